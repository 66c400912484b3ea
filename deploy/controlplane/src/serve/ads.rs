//! The configuration service: one task per stream, which feeds a [`ServerState`] with
//! requests and snapshots and sends what it says.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::xds::{DeltaDiscoveryRequest, Node};
use adit_shared::xds::client::node::metadata_string;
use adit_shared::xds::response::SharedResponse;
use adit_shared::xds::server::{Outcome, PUSH_ORDER, ServerState, WAYPOINT_PUSH_ORDER};
use http::header::CONTENT_TYPE;
use http::{Extensions, HeaderValue};
use hyper::body::Incoming;
use rand::Rng as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tracing::{debug, info, warn};

use super::body::ResponseBody;
use super::clients::Clients;
use super::gate::{self, Peer};
use super::metrics::Metrics;
use super::requests::{Pod, Requests, Turns, pod_of};
use super::snapshot::{NodeView, ResourceSnapshot};
use crate::auth::{Caller, TrustedAccounts};
use crate::ca::PodDirectory;
use crate::compile::l7::WaypointName;
use crate::quota::Quota;

/// The node metadata that names the Gateway which a proxy is a pod of.
const GATEWAY_NAME: &str = "GATEWAY_NAME";

const DELTA: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// For the client to take the status with which we end its stream.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// The bounds of the configuration service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Open streams; more are refused with `RESOURCE_EXHAUSTED`.
    pub streams: usize,
    /// Open streams of one pod; a proxy has one, and the next before the last is gone.
    pub streams_of_pod: usize,
    /// Responses with more resources than this are large.
    pub large: usize,
    /// Resources in large responses that are with the transport and not acknowledged, over all
    /// streams; but always one response. Each is 24 bytes there, and the nodes of a mesh come
    /// back all at once when the control plane was restarted.
    pub large_in_flight: u32,
    /// Requests of more than 64 KiB that are being read at one time, one of each pod.
    pub large_requests: usize,
    /// A client that does not acknowledge a large response makes the others wait for so long.
    pub large_hold: Duration,
    /// A stream is ended in good order after this, less up to a tenth; the client comes
    /// back, maybe to another replica, with a fresh token.
    pub max_age: Duration,
    /// For the first request of a stream, without its wait for a turn if it is a long one.
    pub first_request: Duration,
    /// For the pod of a waypoint to become known.
    pub known_pod: Duration,
    /// For the client to take a response off our hands.
    pub send: Duration,
    /// For the client to acknowledge a response.
    pub acknowledgement: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            streams: 10_000,
            streams_of_pod: 4,
            large: 500,
            large_in_flight: 1_000_000,
            large_requests: 8,
            large_hold: Duration::from_secs(10),
            max_age: Duration::from_secs(30 * 60),
            first_request: Duration::from_secs(10),
            known_pod: Duration::from_secs(5),
            send: Duration::from_secs(30),
            acknowledgement: Duration::from_secs(120),
        }
    }
}

/// What every stream shares.
pub(super) struct Shared {
    pub(super) trusted: TrustedAccounts,
    pub(super) pods: Arc<dyn PodDirectory>,
    pub(super) snapshots: watch::Receiver<Arc<ResourceSnapshot>>,
    pub(super) clients: Clients,
    pub(super) metrics: Arc<Metrics>,
    pub(super) limits: StreamLimits,
    pub(super) admission: Arc<Semaphore>,
    pub(super) large_pushes: Arc<Semaphore>,
    pub(super) turns: Turns,
    pub(super) of_pods: Quota<Pod>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// The gRPC service. Not a generated one: that would keep a buffer of the size of the
/// largest response for every stream.
#[derive(Clone)]
pub(super) struct Ads(pub(super) Arc<Shared>);

impl Ads {
    pub(super) fn call(&self, request: http::Request<Incoming>) -> http::Response<Body> {
        if request.uri().path() != DELTA {
            return Status::unimplemented("only delta xDS is served").into_http();
        }
        let (parts, body) = request.into_parts();
        match self.open(&parts.extensions, body) {
            Ok(body) => {
                let mut response = http::Response::new(Body::new(body));
                let grpc = HeaderValue::from_static("application/grpc");
                response.headers_mut().insert(CONTENT_TYPE, grpc);
                response
            }
            Err(status) => status.into_http(),
        }
    }

    fn open(&self, extensions: &Extensions, body: Incoming) -> Result<ResponseBody, Status> {
        let shared = &self.0;
        let caller = gate::caller(extensions)?;
        if !shared.snapshots.borrow().is_ready() {
            shared.metrics.stream_ends.inc("not_ready");
            return Err(Status::unavailable(
                "the configuration has not been read yet",
            ));
        }
        let pod = pod_of(&caller);
        let too_many = |limit: usize, whose: &'static str| {
            warn!(%caller, limit, whose, "too many xDS streams");
            shared.metrics.stream_ends.inc("too_many");
            Status::resource_exhausted("too many xDS streams")
        };
        let of_pod = shared.of_pods.take(pod.clone());
        let of_pod = of_pod.ok_or_else(|| too_many(shared.limits.streams_of_pod, "of the pod"))?;
        let admitted = shared.admission.clone().try_acquire_owned();
        let admitted = admitted.map_err(|_| too_many(shared.limits.streams, "of all"))?;
        // Waypoints know all addresses too, and claim them when they come back.
        let known = shared.trusted.contains(&caller) || shared.pods.gateway_of(&caller).is_some();
        let first = shared.limits.first_request;
        let requests = Requests::new(body, pod, known, shared.turns.clone(), first);
        let peer = extensions.get::<Peer>().map(|peer| peer.0);
        let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
        // One response waits for the transport while the next is being decided on.
        let (sender, responses) = mpsc::channel(1);
        let task_shared = shared.clone();
        shared.tasks.spawn(async move {
            let _admitted = (admitted, of_pod);
            let _counted = task_shared.metrics.streams.hold();
            let end = Connection {
                shared: &task_shared,
                caller: &caller,
                peer: &peer,
                requests,
                responses: &sender,
            }
            .run()
            .await;
            task_shared.metrics.stream_ends.inc(end.reason());
            match end {
                End::Aged | End::Stopping | End::Client => {
                    debug!(%caller, peer, reason = end.reason(), "xDS stream ended");
                }
                End::Failed(reason, status) => {
                    warn!(%caller, peer, reason, status = status.message(), "xDS stream ended");
                    // Nobody need be there to take it.
                    let _ = timeout(STATUS_TIMEOUT, sender.send(Err(status))).await;
                }
            }
        });
        Ok(ResponseBody::new(responses))
    }
}

/// Why a stream ended.
enum End {
    /// It was old enough.
    Aged,
    /// The server stops.
    Stopping,
    /// The client went away.
    Client,
    /// We ended it.
    Failed(&'static str, Status),
}

impl End {
    fn reason(&self) -> &'static str {
        match self {
            Self::Aged => "aged",
            Self::Stopping => "stopping",
            Self::Client => "client",
            Self::Failed(reason, _) => reason,
        }
    }
}

/// Why a caller is not the waypoint that it says it is.
enum Unfit {
    OtherGateway,
    Stopping,
}

struct Connection<'a> {
    shared: &'a Shared,
    caller: &'a Caller,
    peer: &'a str,
    requests: Requests,
    responses: &'a mpsc::Sender<Result<SharedResponse, Status>>,
}

impl Connection<'_> {
    async fn run(mut self) -> End {
        match self.serve().await {
            Ok(end) | Err(end) => end,
        }
    }

    async fn serve(&mut self) -> Result<End, End> {
        let shared = self.shared;
        let limits = shared.limits;
        let first = tokio::select! {
            first = self.requests.message() => received(first)?,
            () = shared.stop.cancelled() => return Ok(End::Stopping),
            () = self.responses.closed() => return Ok(End::Client),
        };
        let node = first.node.clone().unwrap_or_default();
        check_node(self.caller, &node)
            .map_err(|why| failed("node", Status::permission_denied(why)))?;
        info!(caller = %self.caller, peer = self.peer, node = node.id, "xDS client connected");
        let registration = shared.clients.register(self.caller, self.peer, &node);

        let mut snapshots = shared.snapshots.clone();
        let waypoint = match metadata_string(&node, GATEWAY_NAME) {
            Some(gateway) => Some(self.waypoint(gateway, &mut snapshots).await?),
            None => None,
        };
        let view = |snapshots: &mut watch::Receiver<Arc<ResourceSnapshot>>| {
            let snapshot = snapshots.borrow_and_update().clone();
            // What a node has to enrol is for its proxy alone.
            let node = match shared.trusted.contains(self.caller) {
                true => self.caller.node.as_str(),
                false => "",
            };
            Arc::new(NodeView::new(snapshot, node).with_waypoint(waypoint.clone()))
        };
        let order = match waypoint {
            Some(_) => WAYPOINT_PUSH_ORDER,
            None => PUSH_ORDER,
        };
        let mut state = ServerState::new(view(&mut snapshots)).with_order(order);
        let spread = rand::rng().random_range(0.9..=1.0);
        let end_of_life = Instant::now() + limits.max_age.mul_f64(spread);
        let mut acknowledge_by = None;
        let mut large = None;
        self.request(first, &mut state)?;
        loop {
            self.push(&mut state, &mut large).await?;
            registration.update(state.status());
            acknowledge_by = state
                .awaits_acknowledgement()
                .then(|| acknowledge_by.unwrap_or(Instant::now() + limits.acknowledgement));
            tokio::select! {
                message = self.requests.message() => {
                    self.request(received(message)?, &mut state)?;
                    acknowledge_by = None;
                    large = large.filter(|_| state.awaits_acknowledgement());
                }
                changed = snapshots.changed() => match changed {
                    Ok(()) => state.update(view(&mut snapshots)),
                    Err(_) => return Ok(End::Stopping),
                },
                () = sleep_until(end_of_life) => return Ok(End::Aged),
                () = shared.stop.cancelled() => return Ok(End::Stopping),
                () = self.responses.closed() => return Ok(End::Client),
                () = until(large.as_ref().map(|large: &Large| large.until)) => large = None,
                () = until(acknowledge_by) => return Err(failed(
                    "not_acknowledged",
                    Status::deadline_exceeded("a response was not acknowledged"),
                )),
            }
        }
    }

    /// The waypoint that the caller is: it says so, and the pod that its token names is
    /// one of it. The pod may become known a moment after it calls.
    async fn waypoint(
        &self,
        gateway: &str,
        snapshots: &mut watch::Receiver<Arc<ResourceSnapshot>>,
    ) -> Result<WaypointName, End> {
        let found = timeout(self.shared.limits.known_pod, async {
            loop {
                // Before the pod is looked for: what comes meanwhile is not missed.
                snapshots.borrow_and_update();
                match self.shared.pods.gateway_of(self.caller) {
                    Some(found) if found == gateway => return Ok(found),
                    Some(_) => return Err(Unfit::OtherGateway),
                    None => {}
                }
                if snapshots.changed().await.is_err() {
                    return Err(Unfit::Stopping);
                }
            }
        })
        .await;
        match found {
            Ok(Ok(name)) => Ok(WaypointName {
                namespace: self.caller.namespace.as_str().into(),
                name: name.into(),
            }),
            Ok(Err(Unfit::Stopping)) => Err(End::Stopping),
            Ok(Err(Unfit::OtherGateway)) => Err(failed(
                "node",
                Status::permission_denied("the pod is not of the gateway that it names"),
            )),
            Err(_) => Err(failed(
                "unknown_pod",
                Status::unavailable("the pod is not known to belong to a gateway"),
            )),
        }
    }

    fn request(&self, request: DeltaDiscoveryRequest, state: &mut ServerState) -> Result<(), End> {
        let type_url = request.type_url.clone();
        let outcome = state
            .request(request)
            .map_err(|error| failed("protocol", Status::invalid_argument(error.to_string())))?;
        let metrics = &self.shared.metrics;
        match outcome {
            Outcome::Subscribed => debug!(caller = %self.caller, type_url, "subscribed"),
            Outcome::Acknowledged => {}
            Outcome::Stale => metrics.stale_nonces.inc(&type_url),
            Outcome::Rejected(error) => {
                metrics.rejects.inc(&type_url);
                warn!(caller = %self.caller, type_url, error, "the client rejected resources");
            }
        }
        Ok(())
    }

    /// Sends what may be sent now.
    async fn push(&self, state: &mut ServerState, large: &mut Option<Large>) -> Result<(), End> {
        while let Some(size) = state.next_size() {
            // First of all the client has to take the one before: until then nothing is built
            // for it, and nothing is held that others wait for.
            let place = match timeout(self.shared.limits.send, self.responses.reserve()).await {
                Ok(Ok(place)) => place,
                Ok(Err(_)) => return Err(End::Client),
                Err(_) => {
                    let status = Status::deadline_exceeded("the client does not read");
                    return Err(failed("not_read", status));
                }
            };
            if size > self.shared.limits.large && large.is_none() {
                *large = Some(self.large(size).await?);
            }
            let Some(response) = state.next_shared() else {
                return Ok(());
            };
            debug!(
                caller = %self.caller, type_url = response.type_url, nonce = response.nonce,
                updates = response.resources.len(), removed = response.removed.len(),
                "push"
            );
            self.shared.metrics.pushes.inc(&response.type_url);
            place.send(Ok(response));
        }
        Ok(())
    }

    /// Waits for the turn to send something large.
    async fn large(&self, resources: usize) -> Result<Large, End> {
        let shared = self.shared;
        let all = shared.limits.large_in_flight;
        let weight = u32::try_from(resources).unwrap_or(all).min(all);
        tokio::select! {
            permit = shared.large_pushes.clone().acquire_many_owned(weight) => Ok(Large {
                // The semaphore is never closed.
                _permit: permit.map_err(|_| End::Stopping)?,
                until: Instant::now() + shared.limits.large_hold,
            }),
            () = shared.stop.cancelled() => Err(End::Stopping),
            () = self.responses.closed() => Err(End::Client),
        }
    }
}

/// A large response is under way, for as long as this lives.
struct Large {
    _permit: OwnedSemaphorePermit,
    until: Instant,
}

fn failed(reason: &'static str, status: Status) -> End {
    End::Failed(reason, status)
}

fn received<T>(message: Result<Option<T>, Status>) -> Result<T, End> {
    match message {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(End::Client),
        // Malformed or too large; a connection that broke ends up here too.
        Err(status) if status.code() == tonic::Code::Internal => Err(failed("malformed", status)),
        Err(status) if status.code() == tonic::Code::OutOfRange => Err(failed("malformed", status)),
        Err(status) if status.code() == tonic::Code::DeadlineExceeded => {
            Err(failed("no_request", status))
        }
        Err(_) => Err(End::Client),
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What the node says of itself must agree with its token. What it does not say is not
/// held against it: the token's word is used throughout.
fn check_node(caller: &Caller, node: &Node) -> Result<(), String> {
    for (key, token) in [
        ("NODE_NAME", &caller.node),
        ("NAMESPACE", &caller.namespace),
        ("SERVICE_ACCOUNT", &caller.service_account),
    ] {
        if metadata_string(node, key).is_some_and(|said| said != token) {
            return Err(format!("{key} of the node metadata is not the token's"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use adit_shared::xds::client::NodeMetadata;

    use super::*;

    #[test]
    fn metadata_must_agree_with_the_token() {
        let caller = Caller {
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            pod_name: "ztunnel-a".into(),
            pod_uid: "u".into(),
            node: "n1".into(),
        };
        let good = NodeMetadata {
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            node_name: "n1".into(),
            ..NodeMetadata::default()
        };
        assert_eq!(check_node(&caller, &good.to_node()), Ok(()));
        assert_eq!(check_node(&caller, &Node::default()), Ok(()));
        for (key, bad) in [
            (
                "NODE_NAME",
                NodeMetadata {
                    node_name: "n2".into(),
                    ..good.clone()
                },
            ),
            (
                "NAMESPACE",
                NodeMetadata {
                    namespace: "shop".into(),
                    ..good.clone()
                },
            ),
            (
                "SERVICE_ACCOUNT",
                NodeMetadata {
                    service_account: "x".into(),
                    ..good.clone()
                },
            ),
        ] {
            let error = check_node(&caller, &bad.to_node()).expect_err(key);
            assert!(error.starts_with(key), "{error}");
        }
    }
}
