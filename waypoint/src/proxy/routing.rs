//! Which rule a request takes, and what the rule makes of it: an answer of our own, or a
//! changed request for one of its backends.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::policy::http::{Claims, NormalizedPath};
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Response, Uri, request};

use super::body::ResponseBody;
use super::consumer;
use super::destination::Target;
use super::exchange::Exchange;
use super::headers::REASON;
use super::pick::Choice;
use super::reply::Reply;
use crate::route::{
    self, Answer, AnswerReason, Backend, BackendError, CorsGrant, Filters, Inspection, L4Rule,
    Listener, Lookup, MatchedPath, NoClaims, PortRoutes, RequestView, Rule, Timeouts,
};
use crate::state::{Protocol, View};
use crate::telemetry::ResponseFlags;

/// What becomes of a request.
pub enum Routing {
    /// It is sent somewhere.
    Forward(Decided),
    /// The rule's filter has another service asked first; then see [`resume`].
    Ask(Box<Asking>),
    /// It is answered here, after that time.
    Answer {
        /// An injected delay.
        delay: Option<Duration>,
        /// What is answered.
        answer: Answer,
    },
}

/// A request whose rule has another service asked about it.
pub struct Asking {
    /// The rule.
    pub routed: Routed,
    matched: MatchedPath,
    delay: Option<Duration>,
    /// The request as it came to the rule.
    came: Uri,
    original: HeaderMap,
}

/// Where a request goes.
pub struct Decided {
    /// To one of these endpoints.
    pub choice: Choice,
    /// Which speak this.
    pub protocol: Protocol,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// The rule that decided.
    pub routed: Option<Routed>,
    /// Wait so long before.
    pub delay: Option<Duration>,
    /// Who gets a copy.
    pub mirrors: Vec<(Choice, Protocol)>,
    /// A route of connections decided, or none: nothing is known of repeating.
    pub unrouted: bool,
}

/// The rule that decided over a request, for what it does to the response.
pub struct Routed {
    /// The rule.
    pub rule: Arc<Rule>,
    /// By which its backend was drawn.
    random: u64,
    cors: CorsGrant,
}

impl Routed {
    /// Changes a response as backend and rule ask for.
    pub fn apply_response(&self, headers: &mut HeaderMap) {
        if let Ok(backend) = self.rule.choose(self.random) {
            let none = CorsGrant::default();
            backend.filters().apply_response(&none, headers);
        }
        self.rule.filters().apply_response(&self.cors, headers);
    }
}

/// The claims of a verified token, as routes ask for them.
struct TokenClaims<'a>(&'a Claims);

impl route::Claims for TokenClaims<'_> {
    fn any(&self, path: &[Box<str>], test: &mut dyn FnMut(&str) -> bool) -> bool {
        let Some((first, rest)) = path.split_first() else {
            return false;
        };
        let value = self.0.payload().get(&**first);
        value.is_some_and(|value| route::Claims::any(value, rest, test))
    }
}

/// Finds the rule and applies it to the request.
///
/// # Errors
/// The answer where there is no rule or no usable backend.
pub fn route(
    exchange: &mut Exchange,
    view: &View,
    target: &Target,
    head: &mut request::Parts,
    path: &NormalizedPath<'_>,
) -> Result<Routing, Reply> {
    let direct = || Decided {
        choice: Choice::of(target),
        protocol: target.protocol(),
        timeouts: Timeouts::default(),
        routed: None,
        delay: None,
        mirrors: Vec::new(),
        unrouted: true,
    };
    // Traffic to pods' own addresses is not routed.
    let Target::Service(port) = target else {
        return Ok(Routing::Forward(direct()));
    };
    let namespace = exchange.downstream.caller.identity.namespace();
    let table = match port.routes.for_port(port.port, namespace) {
        PortRoutes::None => return Ok(Routing::Forward(direct())),
        PortRoutes::Http(table) => table,
        PortRoutes::Tcp(table) | PortRoutes::Tls(table) => {
            // It is no TLS, so that no name was asked for.
            let rule = table.find(None).ok_or(Reply::NO_ROUTE)?;
            let (to, choice, protocol) = l4_backend(view, rule)?;
            if consumer::is_consumer(&rule.route().namespace, target) {
                let came = head.uri.clone();
                consumer::judge(exchange, view, target, Some(to), &came, head)?;
            }
            return Ok(Routing::Forward(Decided {
                choice,
                protocol,
                ..direct()
            }));
        }
    };
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let claims = exchange.claims.as_deref().map(TokenClaims);
    let request = RequestView {
        method: &head.method,
        authority: host.unwrap_or_default(),
        path: path.as_str(),
        query: head.uri.query(),
        headers: &head.headers,
        claims: match &claims {
            Some(claims) => claims,
            None => &NoClaims,
        },
        is_grpc: exchange.grpc,
    };
    let (rule, matched) = match table.find(&request) {
        Lookup::NoMatch => return Err(Reply::NO_ROUTE),
        Lookup::Matched(matched) => {
            exchange.route = matched.rule.label().clone();
            if let Some(reason) = matched.invalid() {
                exchange.upstream_failure = Some(reason.to_string());
                return Err(Reply::INVALID_ROUTE);
            }
            (matched.rule.clone(), matched.path)
        }
    };
    apply(exchange, view, target, rule, matched, head)
}

fn apply(
    exchange: &mut Exchange,
    view: &View,
    dialled: &Target,
    rule: Arc<Rule>,
    matched: MatchedPath,
    head: &mut request::Parts,
) -> Result<Routing, Reply> {
    let listener = listener(exchange);
    let mut routed = Routed {
        random: rand::random(),
        cors: CorsGrant::default(),
        rule,
    };
    let rule = routed.rule.clone();
    let mut delay = None;
    if !rule.filters().is_empty() {
        let inspected = rule
            .filters()
            .inspect(head, matched, listener, rand::random);
        let Inspection {
            delay: injected,
            answer,
            cors,
        } = inspected;
        delay = injected;
        if delay.is_some() {
            exchange.flags |= ResponseFlags::DELAY_INJECTED;
        }
        if let Some(answer) = answer {
            return Ok(Routing::Answer { delay, answer });
        }
        routed.cors = cors;
    }
    if rule.filters().external_auth().is_some() {
        return Ok(Routing::Ask(Box::new(Asking {
            routed,
            matched,
            delay,
            came: head.uri.clone(),
            original: head.headers.clone(),
        })));
    }
    let passing = Passing {
        routed,
        matched,
        delay,
        came: None,
    };
    send(exchange, view, dialled, passing, head)
}

/// Goes on with a request that the service of its rule's filter lets pass.
///
/// # Errors
/// The answer where there is no usable backend, or a policy that has changed meanwhile denies.
pub fn resume(
    exchange: &mut Exchange,
    view: &View,
    dialled: &Target,
    asking: Asking,
    head: &mut request::Parts,
) -> Result<Routing, Reply> {
    let Asking {
        routed,
        matched,
        delay,
        came,
        original,
    } = asking;
    exchange.original = Some(original);
    if let Err(denied) = exchange.judge_again() {
        exchange.policy = denied.policy;
        exchange.routed = Some(routed);
        return Err(Reply::DENIED);
    }
    let filters = routed.rule.filters();
    let listener = listener(exchange);
    if let Some(answer) = filters.answer_authorized(head, matched, listener, &routed.cors) {
        return Ok(Routing::Answer { delay, answer });
    }
    let passing = Passing {
        routed,
        matched,
        delay,
        came: Some(came),
    };
    send(exchange, view, dialled, passing, head)
}

fn listener(exchange: &Exchange) -> Listener {
    Listener {
        tls: false,
        port: exchange.downstream.destination.port(),
    }
}

/// A request that its rule sends on.
struct Passing {
    routed: Routed,
    matched: MatchedPath,
    delay: Option<Duration>,
    /// Path and query as they came to the rule, where they may have been changed since.
    came: Option<Uri>,
}

/// Draws the backend and makes of the request what it is to get.
fn send(
    exchange: &mut Exchange,
    view: &View,
    dialled: &Target,
    passing: Passing,
    head: &mut request::Parts,
) -> Result<Routing, Reply> {
    let Passing {
        routed,
        matched,
        delay,
        came,
    } = passing;
    let listener = listener(exchange);
    let rule = routed.rule.clone();
    let chosen = rule.choose(routed.random);
    let backend = match chosen {
        Ok(backend) => Some(backend),
        // A rule of a service that names no backend means the service itself.
        Err(BackendError::None) => None,
        Err(error) => {
            exchange.upstream_failure = Some(error.to_string());
            exchange.routed = Some(routed);
            return Err(Reply::INVALID_BACKEND);
        }
    };
    let nothing = Filters::default();
    let filters = backend.map_or(&nothing, Backend::filters);
    if !filters.is_empty() {
        let inspected = filters.inspect(head, matched, listener, rand::random);
        if let Some(answer) = inspected.answer {
            return Ok(Routing::Answer { delay, answer });
        }
    }
    let foreign = consumer::is_consumer(&rule.route().namespace, dialled);
    let came = foreign.then(|| came.unwrap_or_else(|| head.uri.clone()));
    if !rule.filters().is_empty() || !filters.is_empty() {
        let original = exchange.original.take();
        exchange.original = Some(original.unwrap_or_else(|| head.headers.clone()));
        rule.filters()
            .apply_request(head, matched, filters)
            .map_err(|_| Reply::INVALID_ROUTE)?;
    }
    if let Some(came) = came {
        let to = backend.map(Backend::target);
        if let Err(reply) = consumer::judge(exchange, view, dialled, to, &came, head) {
            exchange.routed = Some(routed);
            return Err(reply);
        }
    }
    if exchange.original.is_some() {
        exchange.sent_uri = Some(head.uri.clone());
    }
    let resolved = match backend {
        Some(backend) => resolve(view, backend.target()),
        None => Ok((Choice::of(dialled), dialled.protocol())),
    };
    let (choice, protocol) = match resolved {
        Ok(resolved) => resolved,
        Err(reply) => {
            exchange.routed = Some(routed);
            return Err(reply);
        }
    };
    let mirrors = rule.filters().mirrors().iter().chain(filters.mirrors());
    let mirrors = mirrors
        .filter(|mirror| mirror.takes(rand::random()))
        .filter(|mirror| {
            let port = || consumer::judged_at(view, dialled, Some(mirror.target()));
            !foreign
                || port().is_some_and(|port| {
                    let same = consumer::is_same(&port, dialled);
                    consumer::permits(exchange, view, &port, same, head).is_ok()
                })
        })
        .filter_map(|mirror| resolve(view, mirror.target()).ok())
        .collect();
    Ok(Routing::Forward(Decided {
        choice,
        protocol,
        timeouts: rule.timeouts(),
        routed: Some(routed),
        delay,
        mirrors,
        unrouted: false,
    }))
}

/// Where a rule of a TCPRoute or a TLSRoute leads.
///
/// # Errors
/// Its backend is invalid or gone, or it names none (Gateway API: such connections are
/// rejected, unlike requests, for which a rule without a backend means the service itself).
pub fn l4_backend<'r>(
    view: &View,
    rule: &'r L4Rule,
) -> Result<(&'r route::Target, Choice, Protocol), Reply> {
    let backend = rule.choose(rand::random());
    let backend = backend.map_err(|_| Reply::INVALID_BACKEND)?;
    let (choice, protocol) = resolve(view, backend.target())?;
    Ok((backend.target(), choice, protocol))
}

/// The endpoints of a backend. Its own routes are not consulted (Gateway API GAMMA).
pub fn resolve(view: &View, target: &route::Target) -> Result<(Choice, Protocol), Reply> {
    let port = view
        .service(&target.service)
        .and_then(|service| service.port(target.port))
        .ok_or(Reply::INVALID_BACKEND)?;
    let subset = target.subset.as_deref().unwrap_or_default();
    let backend = port.subset(subset).ok_or(Reply::UNKNOWN_SUBSET)?;
    Ok((Choice::Backend(backend.clone()), port.protocol))
}

/// The response of an answer that the configuration gives.
pub fn respond(exchange: &mut Exchange, answer: Answer) -> Response<ResponseBody> {
    let Answer {
        status,
        headers,
        body,
        grpc_status,
        reason,
    } = answer;
    let (word, flags) = match &reason {
        AnswerReason::Invalid(why) => {
            exchange.upstream_failure = Some(why.to_string());
            ("invalid_route", ResponseFlags::NO_CLUSTER)
        }
        AnswerReason::CorsPreflight => ("cors_preflight", ResponseFlags::NONE),
        AnswerReason::Fault => ("fault_injected", ResponseFlags::FAULT_INJECTED),
        AnswerReason::Redirect => ("redirect", ResponseFlags::NONE),
        AnswerReason::DirectResponse => ("direct_response", ResponseFlags::NONE),
    };
    exchange.status = status.as_u16();
    exchange.grpc_status = grpc_status;
    exchange.flags |= flags;
    exchange.details = word;
    let mut response = Response::new(match body.is_empty() {
        true => ResponseBody::empty(),
        false => ResponseBody::full(body),
    });
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    let headers = response.headers_mut();
    if let Some(code) = grpc_status {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(code));
    }
    if matches!(reason, AnswerReason::Invalid(_) | AnswerReason::Fault) {
        headers.insert(REASON, HeaderValue::from_static(word));
    }
    response
}
