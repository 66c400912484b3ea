//! Sending a request to an endpoint, and to another one when that fails: picks, tries, pauses
//! and deadlines.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_shared::model::WorkloadUid;
use adit_shared::policy::http::{HttpFields, normalize};
use http::header::{HOST, HeaderName, SET_COOKIE, UPGRADE};
use http::uri::Scheme;
use http::{HeaderValue, Request, Uri, Version};
use tokio::time::{Sleep, sleep, sleep_until, timeout};

use super::authorize::{Asked, authorize};
use super::body::{Replay, RequestBody};
use super::exchange::{Exchange, grpc_status};
use super::external::{self, Ask};
use super::headers;
use super::interim::Follower;
use super::mirror::{self, Original, OriginalBody};
use super::pick::{Choice, Picked, dialled};
use super::recheck::unless_denied;
use super::reply::Reply;
use super::routing::Decided;
use super::steps;
use super::upstream::{self, Answer, Connecting, HttpVersion, Reached, SendError};
use crate::balance::{Outcome, Permit, PickRequest, RequestResult, Resource, UpstreamProtocol};
use crate::external_authorization::Denial;
use crate::route::{
    Attempt, RetryDecision, RetryOn, RetryPolicy, Rule, Session, SessionKey, format_grpc_timeout,
    parse_grpc_timeout,
};
use crate::state::{Mesh, Protocol, Reach};
use crate::telemetry::ResponseFlags;

/// Stale connections that may be in the way of a request that can be repeated.
const STALE: u32 = 3;
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Tries beyond the first of a request whose route, or which without a route, says nothing
/// (Istio).
const DEFAULT_ATTEMPTS: u32 = 2;
/// Istio's retries of requests that follow a route which says nothing of them: never of what
/// may have been acted upon.
static ROUTED: LazyLock<RetryPolicy> = LazyLock::new(|| {
    let on = RetryOn::DEFAULT
        .union(RetryOn::RESET_BEFORE_REQUEST)
        .union(RetryOn::CANCELLED);
    default_retry(DEFAULT_ATTEMPTS, on)
});
/// Those of requests without a route.
static UNROUTED: LazyLock<RetryPolicy> = LazyLock::new(|| {
    let on = RetryOn::CONNECT_FAILURE
        .union(RetryOn::REFUSED_STREAM)
        .union(RetryOn::RESET_BEFORE_REQUEST);
    default_retry(DEFAULT_ATTEMPTS, on)
});
/// A gRPC client without a route repeats by itself.
static NEVER: LazyLock<RetryPolicy> = LazyLock::new(|| default_retry(0, RetryOn::default()));

fn default_retry(attempts: u32, on: RetryOn) -> RetryPolicy {
    RetryPolicy {
        attempts,
        codes: Box::new([]),
        on,
        backoff: Duration::from_millis(25),
        per_try_timeout: None,
    }
}

/// Where a request goes, and how often.
pub struct Plan {
    uri: Uri,
    decided: Decided,
    mesh: Arc<Mesh>,
}

/// What came back.
pub struct Forwarded {
    /// The endpoint's answer.
    pub answer: Answer,
    /// When the response has to have been read.
    pub deadline: Option<Pin<Box<Sleep>>>,
    /// To be added to the response: cookies of sessions and of hashing.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// What the client gets in place of an endpoint's answer.
pub enum Refused {
    /// An answer of our own.
    Reply(Reply),
    /// That of a provider, or of a rule's service, which was asked.
    Denied(Box<Denial>),
}

impl From<Reply> for Refused {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

impl Plan {
    /// For a request that goes on as `uri`.
    pub fn new(mesh: Arc<Mesh>, uri: Uri, decided: Decided) -> Self {
        Self { uri, decided, mesh }
    }

    /// An injected delay.
    pub fn delay(&self) -> Option<Duration> {
        self.decided.delay
    }

    fn rule(&self) -> Option<&Rule> {
        self.decided.routed.as_ref().map(|routed| &*routed.rule)
    }

    fn session_key<'a>(&'a self, exchange: &'a Exchange) -> &'a SessionKey {
        let own = &exchange.downstream.worker.shared.session_key;
        self.mesh.session_key.as_deref().unwrap_or(own)
    }

    fn retry(&self) -> &RetryPolicy {
        let stated = self.rule().and_then(Rule::retry);
        let stated = stated.or(self.mesh.default_retry.as_ref());
        stated.unwrap_or(match (self.decided.unrouted, self.decided.protocol) {
            (true, Protocol::Grpc) => &NEVER,
            (true, _) => &UNROUTED,
            (false, _) => &ROUTED,
        })
    }
}

/// Sends the request until it is answered for good.
///
/// # Errors
/// What the client gets instead.
pub async fn forward(
    exchange: &mut Exchange,
    plan: Plan,
    body: RequestBody,
) -> Result<Forwarded, Refused> {
    let begun = exchange.started;
    let asked = exchange.headers.get(GRPC_TIMEOUT).filter(|_| exchange.grpc);
    let asked = asked.and_then(|value| parse_grpc_timeout(value).ok());
    let time = match (plan.decided.timeouts.request, asked) {
        (Some(own), Some(asked)) => Some(own.min(asked)),
        (own, asked) => own.or(asked),
    };
    let deadline = time.map(|time| begun + time);
    let mut sender = Sender::new(exchange, plan, body, deadline, asked.is_some());
    match deadline {
        None => {
            let answer = sender.run().await;
            let headers = sender.end();
            Ok(Forwarded {
                answer: answer?,
                deadline: None,
                headers,
            })
        }
        Some(deadline) => {
            let mut sleeping = Box::pin(sleep_until(deadline.into()));
            let answer = tokio::select! {
                biased;
                answer = sender.run() => answer,
                () = &mut sleeping => {
                    sender.observe(RequestResult::Timeout, Duration::ZERO);
                    Err(Reply::REQUEST_TIMEOUT.into())
                }
            };
            let headers = sender.end();
            Ok(Forwarded {
                answer: answer?,
                deadline: Some(sleeping),
                headers,
            })
        }
    }
}

/// The body as the tries see it.
enum Source {
    /// There is none.
    Empty,
    /// For one try, unless it is given back unused.
    Once(Option<RequestBody>),
    /// For any number.
    Kept(Rc<Replay>),
}

struct Sender<'a> {
    exchange: &'a mut Exchange,
    plan: Plan,
    source: Source,
    has_body: bool,
    version: HttpVersion,
    deadline: Option<Instant>,
    /// `grpc-timeout` is written anew for each try.
    grpc_timeout: bool,
    tried: Vec<WorkloadUid>,
    hash: Option<u64>,
    session: Option<Session>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// A policy that has changed meanwhile denies it.
    denied: bool,
    /// Providers that policies of endpoints have had asked: one answer is for all tries.
    asked: Vec<String>,
}

impl<'a> Sender<'a> {
    fn new(
        exchange: &'a mut Exchange,
        plan: Plan,
        body: RequestBody,
        deadline: Option<Instant>,
        grpc_timeout: bool,
    ) -> Self {
        let has_body = !matches!(body, RequestBody::Empty);
        let source = match body {
            RequestBody::Empty => Source::Empty,
            RequestBody::Stream { incoming, progress } if may_resend(plan.retry()) => {
                Source::Kept(Replay::new(incoming, progress))
            }
            RequestBody::Replay { shared, .. } => Source::Kept(shared),
            body => Source::Once(Some(body)),
        };
        let version = upstream_version(&plan.decided, exchange);
        exchange.cluster = plan.decided.choice.cluster();
        copy_to_mirrors(exchange, &plan, &source);
        let mut headers = Vec::new();
        let hash = hash(exchange, &plan, &mut headers);
        let session = plan.rule().and_then(|rule| {
            let persistence = rule.session()?;
            let key = plan.session_key(exchange);
            let found = persistence.find(&exchange.headers, key, rule.label(), now());
            found?.ok()
        });
        Self {
            exchange,
            plan,
            source,
            has_body,
            version,
            deadline,
            grpc_timeout,
            tried: Vec::new(),
            hash,
            session,
            headers,
            denied: false,
            asked: Vec::new(),
        }
    }

    /// Nothing is tried any more: what the rule does to the response goes with the exchange.
    fn end(self) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = self.headers;
        if let (Some(rule), Some(held)) = (self.plan.rule(), &self.exchange.held)
            && let Some(persistence) = rule.session()
        {
            let now = now();
            let session = match self.session {
                // It stays where it is, and the client knows.
                Some(session) if *session.endpoint == **held.uid() => {
                    let stale = persistence.is_stale(&session, now);
                    stale.then(|| session.used_at(now))
                }
                _ => Some(Session::begin(held.uid(), now)),
            };
            let key = self.plan.session_key(self.exchange);
            let header = session.and_then(|session| {
                let scope = rule.label();
                let nonce = rand::random();
                persistence.header(&session, key, scope, nonce, false).ok()
            });
            headers.extend(header);
        }
        self.exchange.routed = self.plan.decided.routed;
        headers
    }

    async fn run(&mut self) -> Result<Answer, Refused> {
        let mut made = 0;
        let mut last: Option<Reply> = None;
        let mut given_back: Option<Box<Request<RequestBody>>> = None;
        // Held while the retry is under way.
        let mut _permit: Option<Permit> = None;
        loop {
            let (reach, asks) = match self.pick() {
                Ok(picked) => picked,
                Err(reply) => return Err(last.unwrap_or(reply).into()),
            };
            if !asks.is_empty() {
                if let Some(request) = given_back.take() {
                    self.keep(request.into_body());
                }
                // Boxed: few endpoints have such policies.
                Box::pin(self.ask(asks)).await.map_err(Refused::Denied)?;
            }
            let request = match given_back.take() {
                Some(request) => request,
                None => match self.request()? {
                    Some(request) => request,
                    None => return Err(last.unwrap_or(Reply::UPSTREAM_CLOSED).into()),
                },
            };
            made += 1;
            let (attempt, mut outcome) = self.attempt(&reach, request).await;
            if let Err(error) = &mut outcome {
                given_back = error.request.take();
            }
            self.exchange
                .note("attempt", || steps::attempt(made, &outcome));
            let again = self.again(attempt, &outcome, made, given_back.is_some());
            let granted = again.and_then(|pause| Some((pause, self.allow_retry()?)));
            self.exchange.note("retry", || {
                steps::retry(again, granted.is_some(), self.plan.retry())
            });
            let Some((pause, permit)) = granted else {
                return outcome.map_err(|error| {
                    self.exchange.upstream_failure = Some(error.error);
                    let mut reply = match self.exchange.request.stalled.get() {
                        true => Reply::BODY_TIMEOUT,
                        false => error.reply,
                    };
                    if made > 1 {
                        reply.flags |= ResponseFlags::RETRY_LIMIT_EXCEEDED;
                    }
                    reply.into()
                });
            };
            // Of an answer that is not passed on the rest is not waited for: its connection
            // closes.
            if let Err(error) = outcome {
                last = Some(error.reply);
                self.exchange.upstream_failure = Some(error.error);
            }
            _permit = permit;
            self.exchange.retries += 1;
            self.tried.push(reach.endpoint.uid.clone());
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
    }

    /// After what pause the request is tried again, if it is.
    fn again(
        &self,
        attempt: Attempt,
        outcome: &Result<Answer, SendError>,
        made: u32,
        given_back: bool,
    ) -> Option<Duration> {
        if self.denied {
            return None;
        }
        let exchange = &*self.exchange;
        let whole = !exchange.request.failed.get()
            && match &self.source {
                Source::Empty => true,
                Source::Once(_) => given_back && !exchange.request.started.get(),
                Source::Kept(replay) => replay.is_whole(),
            };
        // A connection that was closed while it lay idle (RFC 9112 9.3.1): the method allows
        // what nothing else speaks against (RFC 9110 9.2.2).
        let stale = matches!(outcome, Err(error) if error.reached == Reached::Stale);
        if stale && made <= STALE && !self.has_body && exchange.method.is_idempotent() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        let policy = self.plan.retry();
        match policy.decide(attempt, made, whole, left, rand::random()) {
            RetryDecision::After(pause) => Some(pause),
            _ => None,
        }
    }

    /// Chooses an endpoint and asks its own policies; with it, whom those want to be asked.
    fn pick(&mut self) -> Result<(Reach, Vec<Ask>), Reply> {
        let request = PickRequest {
            tried: &self.tried,
            hash: self.hash,
            // A session whose endpoint has failed goes elsewhere.
            sticky: self
                .session
                .as_ref()
                .map(|session| &*session.endpoint)
                .filter(|uid| !self.tried.iter().any(|tried| **tried == **uid)),
            destination: dialled(self.exchange.downstream.destination.dialled()),
        };
        let picked = self
            .plan
            .decided
            .choice
            .pick(&request)
            .map_err(|(reply, error)| {
                self.exchange.upstream_failure = Some(error.to_string());
                reply
            })?;
        let Picked { reach, .. } = &picked;
        let reach = reach.clone();
        self.exchange.send_to(picked);
        self.exchange
            .note("endpoint", || steps::endpoint(&reach, &self.tried));
        let asks = self.authorize(&reach)?;
        Ok((reach, asks))
    }

    /// The policies of the endpoint itself: those that select workloads. They judge what it
    /// gets, after the route's filters.
    fn authorize(&mut self, reach: &Reach) -> Result<Vec<Ask>, Reply> {
        let Some(policies) = &reach.policies else {
            return Ok(Vec::new());
        };
        let exchange = &mut *self.exchange;
        let mesh = &self.plan.mesh;
        let uri = &self.plan.uri;
        let path = normalize(uri.path(), mesh.path_normalization);
        let path = path.map_err(|_| Reply::bad_request("invalid_path"))?;
        let host = exchange.headers.get(HOST).and_then(|h| h.to_str().ok());
        let fields = HttpFields {
            method: exchange.method.as_str(),
            path: &path,
            query: uri.query(),
            host: host.unwrap_or_default(),
            headers: &exchange.headers,
            claims: exchange.claims.as_deref(),
        };
        let asked = Asked {
            caller: &exchange.downstream.caller,
            destination: reach.endpoint.address,
            server_name: None,
            mesh,
        };
        let request = asked.request(Some(fields));
        let judged = authorize(policies, &request, &mesh.trust);
        exchange.note("endpointAuthorization", || steps::authorization(&judged));
        match judged {
            Ok(_) => {
                let checks = policies.custom(&request, &mesh.trust);
                let new = checks.iter().filter(|check| {
                    let mut asked = self.asked.iter();
                    !asked.any(|provider| provider == check.provider)
                });
                Ok(new.map(Ask::from).collect())
            }
            Err(denied) => {
                exchange.policy = denied.policy;
                Err(Reply::DENIED)
            }
        }
    }

    /// Asks whom the policies of an endpoint want to be asked (action CUSTOM).
    async fn ask(&mut self, asks: Vec<Ask>) -> Result<(), Box<Denial>> {
        self.asked.extend(asks.iter().map(Ask::provider));
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = self.exchange.method.clone();
        head.version = self.exchange.version;
        head.uri = self.plan.uri.clone();
        head.headers = std::mem::take(&mut self.exchange.headers);
        let mut body = match &mut self.source {
            Source::Empty => RequestBody::Empty,
            Source::Once(body) => body.take().unwrap_or(RequestBody::Empty),
            Source::Kept(replay) => replay.attempt(),
        };
        let asked = external::check(self.exchange, &mut head, &mut body, asks).await;
        self.keep(body);
        self.exchange.headers = head.headers;
        self.plan.uri = head.uri;
        // The endpoint's own time begins now.
        self.exchange.sent = Some(Instant::now());
        self.exchange.note("endpointExternalAuthorization", || {
            steps::external(self.exchange, asked.is_ok())
        });
        asked
    }

    /// Takes a body back of which nothing has been sent.
    fn keep(&mut self, body: RequestBody) {
        self.source = match (body, &self.source) {
            (RequestBody::Replay { shared, .. }, _) => Source::Kept(shared),
            (RequestBody::Empty, Source::Empty) => Source::Empty,
            (body, _) => Source::Once(Some(body)),
        };
    }

    /// The request for one try; `None`: its body has been used up.
    fn request(&mut self) -> Result<Option<Box<Request<RequestBody>>>, Reply> {
        let body = match &mut self.source {
            Source::Empty => RequestBody::Empty,
            Source::Once(body) => match body.take() {
                Some(body) => body,
                None => return Ok(None),
            },
            Source::Kept(replay) => replay.attempt(),
        };
        let exchange = &*self.exchange;
        let mut request = Request::new(body);
        *request.method_mut() = exchange.method.clone();
        *request.headers_mut() = exchange.headers.clone();
        *request.uri_mut() = match self.version {
            HttpVersion::Http1 => self.plan.uri.clone(),
            HttpVersion::Http2 => {
                let headers = request.headers_mut();
                headers::to_absolute(&self.plan.uri, headers, Scheme::HTTP)
                    .map_err(|_| Reply::bad_request("invalid_host"))?
            }
        };
        if let Some(deadline) = self.deadline.filter(|_| self.grpc_timeout) {
            let left = deadline.saturating_duration_since(Instant::now());
            let value = format_grpc_timeout(left);
            request.headers_mut().insert(GRPC_TIMEOUT, value);
        }
        Ok(Some(Box::new(request)))
    }

    async fn attempt(
        &mut self,
        reach: &Reach,
        request: Box<Request<RequestBody>>,
    ) -> (Attempt, Result<Answer, SendError>) {
        let worker = self.exchange.downstream.worker.clone();
        let connecting = connecting(&self.plan.decided.choice);
        let endpoint = reach.endpoint.of_caller(&self.exchange.downstream.caller);
        let stated = self.plan.retry().per_try_timeout;
        let sent = {
            let follower = Follower::of(self.exchange, self.has_body);
            let version = self.version;
            let sending =
                upstream::send(&worker, &endpoint, version, *request, &connecting, follower);
            let sending = pin!(sending);
            // It may be a stream whose answer comes when the client has done.
            let sending = unless_denied(self.exchange, sending);
            match self.plan.decided.timeouts.backend_request.or(stated) {
                None => Ok(sending.await),
                Some(time) => match timeout(time, sending).await {
                    Ok(sent) => Ok(sent),
                    Err(_) => Err(time),
                },
            }
        };
        let sent = match sent {
            Ok(Ok(sent)) => sent,
            Ok(Err(denied)) => {
                self.exchange.policy = denied.policy;
                self.denied = true;
                Err(SendError {
                    reply: Reply::DENIED,
                    error: "denied by a policy that has changed".to_owned(),
                    reached: Reached::Sent,
                    request: None,
                })
            }
            Err(time) => {
                self.observe(RequestResult::Timeout, Duration::ZERO);
                let error = SendError {
                    reply: Reply::PER_TRY_TIMEOUT,
                    error: format!("no answer within {time:?}"),
                    reached: Reached::Sent,
                    request: None,
                };
                return (Attempt::TimedOut, Err(error));
            }
        };
        match sent {
            Ok(answer) => {
                let status = answer.response.status().as_u16();
                let grpc = match self.exchange.grpc {
                    true => grpc_status(answer.response.headers()),
                    false => None,
                };
                let result = grpc.map_or(RequestResult::Status(status), RequestResult::from_grpc);
                self.observe(result, answer.connecting);
                let sent = self.exchange.sent;
                self.exchange.upstream_time = sent.map(|sent| sent.elapsed());
                let attempt = Attempt::Response {
                    status,
                    grpc_status: grpc,
                };
                (attempt, Ok(answer))
            }
            // The endpoint has done nothing wrong.
            Err(error) if self.denied => (Attempt::Reset, Err(error)),
            Err(error) => {
                let result = match error.reached {
                    Reached::NotConnected => RequestResult::ConnectFailed,
                    Reached::NotProcessed | Reached::Stale | Reached::Sent => RequestResult::Reset,
                };
                self.observe(result, Duration::ZERO);
                let attempt = match error.reached {
                    Reached::NotConnected => Attempt::ConnectFailed,
                    Reached::NotProcessed if error.request.is_some() => Attempt::ResetBeforeRequest,
                    Reached::NotProcessed => Attempt::Refused,
                    Reached::Stale | Reached::Sent => Attempt::Reset,
                };
                (attempt, Err(error))
            }
        }
    }

    /// Tells the balancer how the endpoint did; `connecting` took so much of the time.
    fn observe(&self, result: RequestResult, connecting: Duration) {
        if let (Some(held), Some(sent)) = (&self.exchange.held, self.exchange.sent) {
            let now = Instant::now();
            let time = now.saturating_duration_since(sent);
            held.report(Outcome::new(result, time.saturating_sub(connecting)), now);
        }
    }

    /// A place among the retries that are allowed; `None`: there is none.
    fn allow_retry(&self) -> Option<Option<Permit>> {
        match &self.plan.decided.choice {
            Choice::Backend(backend) => {
                let limits = backend.balancer.limits();
                limits.acquire(Resource::Retries).ok().map(Some)
            }
            Choice::Workload(_) => Some(None),
        }
    }
}

/// How connections to a backend's endpoints are made.
pub fn connecting(choice: &Choice) -> Connecting {
    match choice {
        Choice::Backend(backend) => {
            let pool = &backend.settings.connection_pool;
            Connecting {
                deadline: pool.connect_timeout,
                limits: pool
                    .max_connections
                    .is_some()
                    .then(|| backend.balancer.limits().clone()),
                max_requests: pool.max_requests_per_connection.map(|max| max.get()),
            }
        }
        Choice::Workload(_) => Connecting::default(),
    }
}

/// Whether a try that was answered, or cut off half-way, may be repeated: then the body has to
/// be kept. What was not connected gives it back unused.
fn may_resend(policy: &RetryPolicy) -> bool {
    let given_back = RetryOn::CONNECT_FAILURE.union(RetryOn::RESET_BEFORE_REQUEST);
    let refused = given_back.union(RetryOn::REFUSED_STREAM);
    policy.attempts > 0
        && (!policy.codes.is_empty() || (policy.on != given_back && policy.on != refused))
}

/// Sends copies to those who are to get them.
fn copy_to_mirrors(exchange: &Exchange, plan: &Plan, source: &Source) {
    for (choice, protocol) in &plan.decided.mirrors {
        let original = Original {
            method: &exchange.method,
            uri: &plan.uri,
            headers: &exchange.headers,
            body: match source {
                Source::Empty => OriginalBody::None,
                Source::Once(_) => OriginalBody::Coming(&exchange.request),
                Source::Kept(replay) => OriginalBody::Kept(replay),
            },
            caller: &exchange.downstream.caller,
            claims: exchange.claims.as_ref(),
            mesh: &plan.mesh,
        };
        let worker = &exchange.downstream.worker;
        mirror::send(worker, choice.clone(), *protocol, &original);
    }
}

/// What consistent hashing goes by, where the backend asks for it.
fn hash(
    exchange: &Exchange,
    plan: &Plan,
    headers: &mut Vec<(HeaderName, HeaderValue)>,
) -> Option<u64> {
    let Choice::Backend(backend) = &plan.decided.choice else {
        return None;
    };
    let balancer = &backend.settings.load_balancer;
    let key = balancer.hash_key.as_ref()?;
    if !balancer.algorithm.is_consistent_hash() {
        return None;
    }
    let source = exchange.downstream.client.ip();
    let hashed = key.hash(&exchange.headers, &plan.uri, source, &mut rand::rng());
    headers.extend(hashed.set_cookie.map(|cookie| (SET_COOKIE, cookie)));
    hashed.hash
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn upstream_version(plan: &Decided, exchange: &Exchange) -> HttpVersion {
    let declared = matches!(plan.protocol, Protocol::Http2 | Protocol::Grpc);
    let client = exchange.version == Version::HTTP_2;
    let wanted = match &plan.choice {
        Choice::Backend(backend) => backend.settings.connection_pool.protocol,
        Choice::Workload(_) => UpstreamProtocol::Declared,
    };
    if exchange.headers.contains_key(UPGRADE) {
        // Who speaks HTTP/2 takes it there if it says so (RFC 8441), and else over HTTP/1.
        return match wanted == UpstreamProtocol::Http2 || declared {
            true => HttpVersion::Http2,
            false => HttpVersion::Http1,
        };
    }
    let http2 = match wanted {
        UpstreamProtocol::Http2 => true,
        UpstreamProtocol::DoNotUpgrade => declared,
        UpstreamProtocol::Client => client,
        // Who speaks HTTP/2 without being told to knows its server.
        UpstreamProtocol::Declared => declared || client,
    };
    match http2 {
        true => HttpVersion::Http2,
        false => HttpVersion::Http1,
    }
}
