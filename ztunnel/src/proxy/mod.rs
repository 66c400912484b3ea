//! What the listeners of a pod do with a connection. One module for each listener, and here
//! what they have in common.

mod fail_closed;
pub mod inbound;
pub mod outbound;
pub mod plaintext;
pub mod recheck;
mod upstream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use adit_shared::hbone::{Baggage, BaggageFields, Pool, PoolSettings, Tunnel};
use adit_shared::identity::{CertificateId, WorkloadCertificate};
use adit_shared::model::route::{ExpectedIdentities, Hbone};
use adit_shared::model::{SharedModel, Workload, WorkloadUid};
use adit_shared::net::accept::{AcceptCounts, AcceptLimits, AcceptPermit, accept_loop};
use adit_shared::net::copy::{CopyEnd, CopySettings, Traffic, through_socket, through_tunnel};
use adit_shared::net::socket::reset_on_close;
use adit_shared::policy::{DryRunOutcome, TrustDomains, Verdict};
use adit_shared::telemetry::{Event, OpenConnection, Rejection, ResponseFlag};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::Config;
use crate::connections::{Closed, Connections, Entry, Flow, PolicyInput};
use crate::pod::{Busy, Incarnation, Pod};
use crate::worker::Worker;

/// How long a connection of a pod waits for the pod itself to arrive in workload discovery.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// Tunnels are shared by connections from one pod to one workload's address, and by nothing
/// else: the destination's policies see the pod's own address and identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The enrolled pod that the connections come from.
    pub source: Incarnation,
    /// The workload that answers.
    pub peer: WorkloadUid,
    /// Where it answers.
    pub address: SocketAddr,
    /// The pod's certificate. After a renewal no stream is opened under the one before, so that
    /// a tunnel is empty long before the peer ends it for that certificate's age.
    pub certificate: CertificateId,
    /// Who may answer there. A service may allow more than its workloads' own identities, and
    /// a workload's may change: a tunnel to one of those is no tunnel for who expects others.
    pub identities: ExpectedIdentities,
}

impl TunnelKey {
    fn new(pod: &Pod, certificate: &WorkloadCertificate, way: &Hbone) -> Self {
        Self {
            source: pod.incarnation,
            certificate: certificate.id(),
            peer: way.peer.uid.clone(),
            address: way.gateway,
            identities: way.identities.clone(),
        }
    }
}

/// A worker's tunnels.
pub type TunnelPool = Pool<TunnelKey, Failed>;

/// A pool as the configuration wants it.
pub fn new_pool(config: &Config) -> TunnelPool {
    Pool::new(PoolSettings {
        max_streams: config.pool_max_streams,
        unused_release: config.pool_unused_release,
        ..PoolSettings::default()
    })
}

/// What each pod's workload says of itself in `baggage`, rendered once for each version of
/// the workload.
#[derive(Default)]
pub struct Descriptions(RefCell<HashMap<WorkloadUid, Described>>);

/// A version of a workload and what it says of itself.
type Described = (Arc<Workload>, Baggage);

impl Descriptions {
    fn of(&self, workload: &Arc<Workload>) -> Baggage {
        let mut known = self.0.borrow_mut();
        if let Some((version, baggage)) = known.get(&workload.uid)
            && Arc::ptr_eq(version, workload)
        {
            return baggage.clone();
        }
        let baggage = Baggage::new(BaggageFields {
            cluster: workload.cluster_id.clone(),
            namespace: workload.namespace.clone(),
            workload_type: workload.workload_type,
            workload_name: workload.workload_name.clone(),
            service_name: workload.canonical_name.clone(),
            service_version: workload.canonical_revision.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
        });
        known.insert(workload.uid.clone(), (workload.clone(), baggage.clone()));
        baggage
    }

    /// Forgets the pod whose workload has this uid.
    pub fn forget(&self, workload: &str) {
        self.0.borrow_mut().remove(workload);
    }
}

/// Why a connection could not be opened: for metrics and for people.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// Istio's flag for it.
    pub flag: ResponseFlag,
    /// What, which peer.
    pub error: String,
}

impl Failed {
    fn new(flag: ResponseFlag, error: impl Into<String>) -> Self {
        Self {
            flag,
            error: error.into(),
        }
    }
}

/// A connection that a listener accepted.
struct Accepted {
    stream: TcpStream,
    peer: SocketAddr,
    /// Its place among the listener's connections.
    _permit: AcceptPermit,
    /// Until it is open, and entered among the connections, or has failed.
    opening: Busy,
}

/// Bytes that the task of an accepted connection may take. There are thousands of them; what
/// only opening a connection needs is boxed and freed once it is open.
const MAX_TASK: usize = 1024;

/// Serves `listener` until the task is dropped or the listener is unusable: one task per
/// connection, no more than the configured number at the same time.
async fn accept_each<F>(
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    listener: TcpListener,
    name: &'static str,
    serve: impl Fn(Rc<Worker>, Arc<Pod>, Accepted) -> F,
) where
    F: Future<Output = ()> + 'static,
{
    const { assert!(size_of::<F>() <= MAX_TASK) };
    let limits = AcceptLimits {
        max_connections: worker.shared.config.max_connections,
        ..AcceptLimits::default()
    };
    let counts = Arc::new(AcceptCounts::default());
    let (reported, reported_full) = (Cell::new(0), Cell::new(0));
    let accepting = accept_loop(listener, limits, counts.clone(), |stream, peer, permit| {
        // What went wrong before this connection could be accepted.
        let exhausted = counts.exhausted.load(Ordering::Relaxed);
        for _ in reported.replace(exhausted)..exhausted {
            worker.shared.telemetry.emit(&Event::AcceptFailed);
        }
        let saturated = counts.saturated.load(Ordering::Relaxed);
        for _ in reported_full.replace(saturated)..saturated {
            worker.shared.telemetry.emit(&Event::ListenerFull);
        }
        let accepted = Accepted {
            stream,
            peer: canonical(peer),
            _permit: permit,
            opening: pod.busy(),
        };
        spawn_local(serve(worker.clone(), pod.clone(), accepted));
    });
    if let Err(error) = accepting.await {
        warn!(listener = name, pod = %pod.spec.name, "listener is unusable: {error}");
    }
}

/// The pod's own workload. A pod may open connections before discovery has told us of it;
/// they wait a little.
async fn workload_of(worker: &Worker, pod: &Pod) -> Option<Arc<Workload>> {
    let find = || {
        worker
            .shared
            .model
            .load()
            .workload(&pod.spec.workload)
            .cloned()
    };
    if let Some(workload) = find() {
        return Some(workload);
    }
    let mut versions = worker.shared.model.subscribe();
    let arrival = async {
        loop {
            if let Some(workload) = find() {
                return Some(workload);
            }
            versions.changed().await.ok()?;
        }
    };
    timeout(WORKLOAD_WAIT, arrival).await.ok().flatten()
}

/// Whom policies are asked about, and by which trust domains.
struct Judge<'a> {
    model: &'a SharedModel,
    trust_domains: &'a TrustDomains,
}

impl<'a> Judge<'a> {
    fn of(worker: &'a Worker) -> Self {
        Self {
            model: &worker.shared.model,
            trust_domains: &worker.shared.trust_domains,
        }
    }

    /// Asks the policies of the pod. A pod that discovery does not know has no policies that
    /// could be asked, which is a reason to refuse.
    ///
    /// Returns the version of the model that allows it.
    fn authorize(&self, workload: Option<&Workload>, input: &PolicyInput) -> Result<u64, Failed> {
        let denied = |why: String| Failed::new(ResponseFlag::Denied, why);
        let Some(workload) = workload else {
            return Err(denied("policy: this workload is not known yet".into()));
        };
        let snapshot = self.model.load();
        let policies = snapshot.policies_for(workload);
        let evaluation = policies.evaluate(&input.connection(), self.trust_domains);
        for dry in &evaluation.dry_run {
            let outcome = match dry.outcome {
                DryRunOutcome::WouldDeny => "would deny",
                DryRunOutcome::WouldAllow => "would allow",
            };
            info!(
                target: "access", policy = %dry.policy, source = %input.source,
                destination = %input.destination, "dry-run policy {outcome}"
            );
        }
        match evaluation.verdict {
            Verdict::Permitted(_) => Ok(snapshot.version()),
            Verdict::Denied(why) => Err(denied(format!("policy: {why}"))),
        }
    }

    /// Enters a connection that the policies of version `judged` allowed. Connecting to the app
    /// took its time: if the model has changed meanwhile, it is asked again, since the recheck of
    /// open connections has not seen this one. From here on it does.
    fn enter(
        &self,
        connections: &Rc<Connections>,
        pod: Arc<Pod>,
        client: SocketAddr,
        input: PolicyInput,
        judged: u64,
    ) -> Result<Entry, Failed> {
        let flow = Flow::Inbound(input.clone());
        let workload_uid = pod.spec.workload.clone();
        let entry = connections.enter(pod, client, flow);
        let mut version = self.model.version();
        if version != judged {
            let workload = self.model.load().workload(&workload_uid).cloned();
            version = self.authorize(workload.as_deref(), &input)?;
        }
        entry.set_judged(version);
        Ok(entry)
    }
}

/// How long a connection waits for the pod's certificate.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(10);

/// The pod's certificate, waited for if there is none yet.
async fn certificate_of(worker: &Worker, pod: &Pod) -> Result<Arc<WorkloadCertificate>, Failed> {
    let (certificates, identity) = (&worker.shared.certificates, &pod.spec.identity);
    if let Some(certificate) = certificates.try_get(identity) {
        return Ok(certificate);
    }
    timeout(CERTIFICATE_DEADLINE, certificates.get(identity))
        .await
        .map_err(|_| "timed out".to_owned())
        .and_then(|got| got.map_err(|e| e.to_string()))
        .map_err(|e| {
            let error = format!("no certificate for {identity}: {e}");
            Failed::new(ResponseFlag::IdentityError, error)
        })
}

/// The other side of an app's connection.
enum Peer {
    Tunnel(Tunnel),
    Tcp(TcpStream),
}

/// The bytes of an open connection, told apart by which end the app is.
struct Counted<'a> {
    open: &'a OpenConnection,
    app_is_client: bool,
}

impl Traffic for Counted<'_> {
    fn sent(&self, bytes: usize) {
        if self.app_is_client {
            self.open.count_request(bytes as u64);
        } else {
            self.open.count_response(bytes as u64);
        }
    }

    fn received(&self, bytes: usize) {
        if self.app_is_client {
            self.open.count_response(bytes as u64);
        } else {
            self.open.count_request(bytes as u64);
        }
    }
}

/// A connection that is open at both ends.
struct Opened {
    entry: Entry,
    app: TcpStream,
    peer: Peer,
    record: OpenConnection,
}

/// Carries a connection to its end, entered in the worker's table meanwhile, and records how
/// it ended. When the table says so, it is dropped before its end, which resets both sides.
fn carry(worker: &Worker, opened: Opened) -> impl Future<Output = ()> + 'static {
    let settings = CopySettings {
        idle: worker.shared.config.idle_timeout,
        ..CopySettings::default()
    };
    // Not an `async fn`, which would hold what it is called with beside what it makes of it.
    let Opened {
        entry,
        app,
        peer,
        record,
    } = opened;
    async move {
        let counted = Counted {
            open: &record,
            app_is_client: matches!(entry.flow(), Flow::Outbound { .. }),
        };
        let ended = match peer {
            Peer::Tunnel(tunnel) => {
                let copying = through_tunnel(app, tunnel, counted, settings);
                entry.unless_closed(copying).await.map(|copied| copied.end)
            }
            Peer::Tcp(peer) => {
                let copying = through_socket(app, peer, counted, settings);
                entry.unless_closed(copying).await.map(|copied| copied.end)
            }
        };
        match ended {
            Ok(CopyEnd::Finished) => record.close(),
            Ok(end) => record.fail(ResponseFlag::None, &end),
            Err(why @ Closed::Denied) => record.fail(ResponseFlag::Denied, &why),
            Err(why) => record.fail(ResponseFlag::None, &why),
        }
    }
}

/// A connection that makes no sense: reset it, count it, say who it was.
fn reject(worker: &Worker, stream: &TcpStream, peer: SocketAddr, reason: Rejection) {
    reset_on_close(stream);
    warn!(%peer, reason = reason.as_str(), "connection rejected");
    worker
        .shared
        .telemetry
        .emit(&Event::InboundRejected { peer, reason });
}

/// Workload discovery knows IPv4 addresses as such, sockets of a dual-stack listener do not.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests;
