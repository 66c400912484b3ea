//! Sending a request to an endpoint, and to another one when that fails: picks, tries, pauses
//! and deadlines.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::model::WorkloadUid;
use adit_shared::policy::http::{HttpFields, normalize};
use http::header::{HOST, HeaderName, UPGRADE};
use http::uri::Scheme;
use http::{HeaderValue, Request, Uri, Version};
use tokio::time::{Sleep, sleep, sleep_until};

use super::authorize::{Asked, authorize};
use super::body::{Replay, RequestBody};
use super::destination::Target;
use super::exchange::{Exchange, grpc_status};
use super::headers;
use super::pick::{Choice, Picked, dialled};
use super::reply::Reply;
use super::request::Decided;
use super::retry::{self, RetryPolicy, Tried};
use super::upstream::{self, Answer, Connecting, HttpVersion, Reached, SendError};
use crate::balance::{Outcome, Permit, PickRequest, RequestResult, Resource, UpstreamProtocol};
use crate::state::{Mesh, Protocol, Reach, View};
use crate::telemetry::ResponseFlags;

/// Stale connections that may be in the way of a request that can be repeated.
const STALE: u32 = 3;
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Where a request goes, and how often.
pub struct Plan {
    /// Endpoints to choose from.
    pub choice: Choice,
    /// What the port says that is spoken there.
    pub protocol: Protocol,
    /// Path and query as they are sent.
    pub uri: Uri,
    /// Tries beyond the first.
    pub retry: RetryPolicy,
    /// For all tries and the response together.
    pub timeout: Option<Duration>,
    /// For one try.
    pub per_try_timeout: Option<Duration>,
    mesh: Arc<Mesh>,
}

/// What came back.
pub struct Forwarded {
    /// The endpoint's answer.
    pub answer: Answer,
    /// When the response has to have been read.
    pub deadline: Option<Pin<Box<Sleep>>>,
}

impl Plan {
    /// For a request without a route.
    pub fn new(target: &Target, view: &View, uri: Uri, _decided: Decided) -> Self {
        let mesh = view.mesh().clone();
        let retry = match (&mesh.default_retry, target.protocol()) {
            // A gRPC client retries by itself.
            (_, Protocol::Grpc) => RetryPolicy::never(),
            (Some(default), _) => RetryPolicy::from_proto(default),
            (None, _) => RetryPolicy::unrouted(),
        };
        Self {
            choice: Choice::of(target),
            protocol: target.protocol(),
            uri,
            per_try_timeout: retry.per_try_timeout,
            retry,
            timeout: None,
            mesh,
        }
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
) -> Result<Forwarded, Reply> {
    let begun = exchange.started;
    let asked = exchange.headers.get(GRPC_TIMEOUT).filter(|_| exchange.grpc);
    let asked = asked.and_then(|value| retry::grpc_timeout(value.as_bytes()));
    let time = match (plan.timeout, asked) {
        (Some(own), Some(asked)) => Some(own.min(asked)),
        (own, asked) => own.or(asked),
    };
    let deadline = time.map(|time| begun + time);
    let mut sender = Sender::new(exchange, plan, body, deadline, asked.is_some());
    match deadline {
        None => {
            let answer = sender.run().await?;
            Ok(Forwarded {
                answer,
                deadline: None,
            })
        }
        Some(deadline) => {
            let mut sleeping = Box::pin(sleep_until(deadline.into()));
            let answer = tokio::select! {
                biased;
                answer = sender.run() => answer?,
                () = &mut sleeping => {
                    sender.observe(RequestResult::Timeout);
                    return Err(Reply::REQUEST_TIMEOUT);
                }
            };
            Ok(Forwarded {
                answer,
                deadline: Some(sleeping),
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
            RequestBody::Stream { incoming, progress } if plan.retry.may_resend() => {
                Source::Kept(Replay::new(incoming, progress))
            }
            body => Source::Once(Some(body)),
        };
        let version = upstream_version(&plan, exchange);
        exchange.cluster = plan.choice.cluster();
        Self {
            exchange,
            plan,
            source,
            has_body,
            version,
            deadline,
            grpc_timeout,
            tried: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<Answer, Reply> {
        let mut count = 0;
        let mut last: Option<Reply> = None;
        let mut given_back: Option<Box<Request<RequestBody>>> = None;
        let mut _retrying: Option<Permit> = None;
        loop {
            let reach = match self.pick() {
                Ok(reach) => reach,
                Err(reply) => return Err(last.unwrap_or(reply)),
            };
            let request = match given_back.take() {
                Some(request) => request,
                None => match self.request()? {
                    Some(request) => request,
                    None => return Err(last.unwrap_or(Reply::UPSTREAM_CLOSED)),
                },
            };
            count += 1;
            let (tried, outcome) = self.attempt(&reach, request).await;
            let stale = tried == Tried::Failed(Reached::Stale)
                && count <= STALE
                && retry::is_repeatable(&self.exchange.method, self.has_body);
            let wanted = stale || self.plan.retry.repeats(tried, count);
            let permit = match wanted && self.may_repeat(tried) {
                true => self.allow_retry(),
                false => None,
            };
            match outcome {
                Ok(answer) if permit.is_none() => return Ok(answer),
                // Its connection closes: the rest of the answer is not waited for.
                Ok(_) => {}
                Err(mut error) => {
                    given_back = error.request.take();
                    self.exchange.upstream_failure = Some(error.error);
                    if permit.is_none() {
                        let mut reply = error.reply;
                        if count > 1 {
                            reply.flags |= ResponseFlags::RETRY_LIMIT_EXCEEDED;
                        }
                        return Err(reply);
                    }
                    last = Some(error.reply);
                }
            }
            _retrying = permit.flatten();
            self.exchange.retries += 1;
            if stale {
                continue;
            }
            self.tried.push(reach.endpoint.uid.clone());
            let pause = self.plan.retry.pause(count, &mut rand::rng());
            // Another endpoint has nothing to recover from.
            if !self.plan.choice.has_more(&self.tried) || matches!(tried, Tried::Answered(..)) {
                sleep(pause).await;
            }
        }
    }

    /// Chooses an endpoint and asks its own policies.
    fn pick(&mut self) -> Result<Reach, Reply> {
        let request = PickRequest {
            tried: &self.tried,
            hash: None,
            sticky: None,
            destination: dialled(self.exchange.downstream.destination.dialled()),
        };
        let picked = self.plan.choice.pick(&request).map_err(|(reply, error)| {
            self.exchange.upstream_failure = Some(error.to_string());
            reply
        })?;
        let Picked { reach, .. } = &picked;
        let reach = reach.clone();
        self.exchange.send_to(picked);
        self.authorize(&reach)?;
        Ok(reach)
    }

    /// The policies of the endpoint itself: those that select workloads.
    fn authorize(&mut self, reach: &Reach) -> Result<(), Reply> {
        let Some(policies) = &reach.policies else {
            return Ok(());
        };
        let exchange = &mut *self.exchange;
        let mesh = &self.plan.mesh;
        let path = normalize(exchange.uri.path(), mesh.path_normalization);
        let path = path.map_err(|_| Reply::bad_request("invalid_path"))?;
        let host = exchange.headers.get(HOST).and_then(|h| h.to_str().ok());
        let fields = HttpFields {
            method: exchange.method.as_str(),
            path: &path,
            query: exchange.uri.query(),
            host: host.unwrap_or_default(),
            headers: &exchange.headers,
            claims: None,
        };
        let asked = Asked {
            caller: &exchange.downstream.caller,
            destination: reach.endpoint.address,
        };
        let denied = authorize(policies, &asked.request(Some(fields)), &mesh.trust);
        denied.map_err(|denied| {
            exchange.policy = denied.policy;
            Reply::DENIED
        })
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
            let value = HeaderValue::try_from(retry::write_grpc_timeout(left));
            if let Ok(value) = value {
                request.headers_mut().insert(GRPC_TIMEOUT, value);
            }
        }
        Ok(Some(Box::new(request)))
    }

    async fn attempt(
        &mut self,
        reach: &Reach,
        request: Box<Request<RequestBody>>,
    ) -> (Tried, Result<Answer, SendError>) {
        let worker = self.exchange.downstream.worker.clone();
        let connecting = connecting(&self.plan.choice);
        let sending = upstream::send(
            &worker,
            &reach.endpoint,
            self.version,
            *request,
            &connecting,
        );
        let sent = match self.plan.per_try_timeout {
            None => sending.await,
            Some(time) => match tokio::time::timeout(time, sending).await {
                Ok(sent) => sent,
                Err(_) => {
                    self.observe(RequestResult::Timeout);
                    let error = SendError {
                        reply: Reply::PER_TRY_TIMEOUT,
                        error: format!("no answer within {time:?}"),
                        reached: Reached::Sent,
                        request: None,
                    };
                    return (Tried::TimedOut, Err(error));
                }
            },
        };
        match sent {
            Ok(answer) => {
                let status = answer.response.status().as_u16();
                let grpc = match self.exchange.grpc {
                    true => grpc_status(answer.response.headers()),
                    false => None,
                };
                self.observe(grpc.map_or(RequestResult::Status(status), RequestResult::from_grpc));
                let sent = self.exchange.sent;
                self.exchange.upstream_time = sent.map(|sent| sent.elapsed());
                (Tried::Answered(status, grpc), Ok(answer))
            }
            Err(error) => {
                self.observe(match error.reached {
                    Reached::NotConnected => RequestResult::ConnectFailed,
                    Reached::NotProcessed | Reached::Stale | Reached::Sent => RequestResult::Reset,
                });
                (Tried::Failed(error.reached), Err(error))
            }
        }
    }

    /// Tells the balancer how the endpoint did.
    fn observe(&self, result: RequestResult) {
        if let (Some(held), Some(sent)) = (&self.exchange.held, self.exchange.sent) {
            let now = Instant::now();
            held.report(
                Outcome::new(result, now.saturating_duration_since(sent)),
                now,
            );
        }
    }

    /// Whether another try could carry the same request.
    fn may_repeat(&self, tried: Tried) -> bool {
        if self.exchange.request.failed.get() {
            return false;
        }
        match (&self.source, tried) {
            (Source::Empty, _) => true,
            // Given back, or never read.
            (Source::Once(_), Tried::Failed(reached)) => {
                !matches!(reached, Reached::Sent | Reached::Stale)
                    && !self.exchange.request.started.get()
            }
            (Source::Once(_), _) => false,
            (Source::Kept(replay), _) => replay.is_whole(),
        }
    }

    /// A place among the retries that are allowed; `None`: there is none.
    fn allow_retry(&self) -> Option<Option<Permit>> {
        match &self.plan.choice {
            Choice::Backend(backend) => {
                let limits = backend.balancer.limits();
                limits.acquire(Resource::Retries).ok().map(Some)
            }
            Choice::Workload(_) => Some(None),
        }
    }
}

fn connecting(choice: &Choice) -> Connecting {
    match choice {
        Choice::Backend(backend) => {
            let pool = &backend.settings.connection_pool;
            Connecting {
                deadline: pool.connect_timeout,
                limits: pool
                    .max_connections
                    .is_some()
                    .then(|| backend.balancer.limits().clone()),
            }
        }
        Choice::Workload(_) => Connecting::default(),
    }
}

fn upstream_version(plan: &Plan, exchange: &Exchange) -> HttpVersion {
    if exchange.headers.contains_key(UPGRADE) {
        return HttpVersion::Http1;
    }
    let declared = matches!(plan.protocol, Protocol::Http2 | Protocol::Grpc);
    let client = exchange.version == Version::HTTP_2;
    let wanted = match &plan.choice {
        Choice::Backend(backend) => backend.settings.connection_pool.protocol,
        Choice::Workload(_) => UpstreamProtocol::Declared,
    };
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
