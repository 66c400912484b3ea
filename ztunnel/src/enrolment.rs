//! Brings the set of captured pods to what the control plane asks for, and tells it how
//! far that got.
//!
//! One task owns the difference between the wanted and the actual pods. A pod is enrolled
//! in an order that never leaves it half covered: certificate, listeners on every worker,
//! then capture; and withdrawn in the reverse order, so that open connections go on until
//! they end or the deadline passes. Whatever fails is tried again, and reported until it
//! works. A pod whose capture is in place is what peers may send HBONE to, so the report
//! comes last.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use adit_ebpf::{Listeners, PodRedirection, Redirector};
use adit_shared::identity::{CertificateCache, SpiffeId};
use adit_shared::proto::enrolment::{EnrolmentReport, EnrolmentState, PodEnrolment};
use adit_shared::telemetry::{Event, Telemetry};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};
use tracing::{info, warn};

mod records;
mod socket;
mod upkeep;
mod wanted;

pub use records::EarlyRecords;
pub use socket::EnrolmentSocket;
pub use wanted::{EarlyPod, TooManyEarly, Wanted};

use crate::discovery::{Discovery, DiscoveryError, has_address};
use crate::listeners::PodListeners;
use crate::pod::{NetnsId, Pod, PodSpec};
use crate::worker::WorkerHandle;
use wanted::{Target, Targets};

/// How long an enrolment waits for the pod's first certificate. After that capture is set
/// up all the same: connections then wait for the certificate instead of leaving in
/// plaintext.
const CERTIFICATE_WAIT: Duration = Duration::from_secs(5);
/// How long connections that waited in a withdrawn pod's listeners may go on.
const QUEUE_WAIT: Duration = Duration::from_secs(1);
/// How often failed enrolments are tried again and the capture of all pods is checked.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(3);
/// A pod whose namespace is not found is looked for again after so long, and each time twice
/// as long up to [`LOOK_AGAIN_LIMIT`].
const LOOK_AGAIN: Duration = Duration::from_millis(25);
const LOOK_AGAIN_LIMIT: Duration = Duration::from_secs(1);
/// An early pod that the control plane has not named for so long, though it could, ends.
const EARLY_LIMIT: Duration = Duration::from_secs(60);
/// How often a long series of enrolments is reported.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(50);

/// The enrolled pods, for the admin endpoint.
#[derive(Debug, Default)]
pub struct EnrolledPods(Mutex<BTreeMap<Arc<str>, PodSpec>>);

impl EnrolledPods {
    /// Whether the pod is enrolled.
    pub fn contains(&self, uid: &str) -> bool {
        self.0.lock().contains_key(uid)
    }

    /// Name, namespace and service account, by uid.
    pub fn list(&self) -> BTreeMap<String, serde_json::Value> {
        let describe = |spec: &PodSpec| {
            serde_json::json!({
                "name": *spec.name,
                "namespace": *spec.namespace,
                "serviceAccount": spec.identity.service_account(),
                "trustDomain": spec.identity.trust_domain().as_str(),
            })
        };
        self.0
            .lock()
            .iter()
            .map(|(uid, spec)| (uid.to_string(), describe(spec)))
            .collect()
    }
}

/// What the manager is made of.
pub struct EnrolmentManager {
    /// Node name, for reports.
    pub node: String,
    /// Finds the network namespaces of pods.
    pub discovery: Arc<Discovery>,
    /// What outlives this process of pods that only the CNI plugin has named.
    pub records: Option<Arc<EarlyRecords>>,
    /// Whether listeners accept IPv6.
    pub ipv6: bool,
    /// How long connections of a withdrawn pod may go on.
    pub drain_deadline: Duration,
    /// What is to be enrolled.
    pub wanted: Arc<Wanted>,
    /// Certificates.
    pub certificates: CertificateCache,
    /// Capture.
    pub redirector: Arc<Mutex<Redirector>>,
    /// Workers.
    pub workers: Arc<[WorkerHandle]>,
    /// Where they can be seen.
    pub pods: Arc<EnrolledPods>,
    /// Is told of pods that come and go.
    pub telemetry: Telemetry,
    /// Where reports go.
    pub reports: watch::Sender<EnrolmentReport>,
    /// Told when the wanted pods have been worked through for the first time.
    pub settled: Box<dyn Fn() + Send + Sync>,
}

/// What the manager knows of its pods.
#[derive(Default)]
struct State {
    entries: HashMap<Arc<str>, Entry>,
    /// Pods that are on their way out.
    withdrawing: HashMap<Arc<str>, Withdrawal>,
    /// Identities that certificates are kept for.
    identities: HashSet<SpiffeId>,
    /// Until when each wanted pod waits for its certificate, or has waited: nobody waits twice.
    waits: HashMap<Arc<str>, Instant>,
}

/// Why the manager looks at its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// Something else is wanted.
    Changed,
    /// The time has come to look at everything.
    Tick,
    /// A namespace that was not there may be there.
    Missing,
}

/// Where one pod stands.
struct Entry {
    spec: PodSpec,
    /// The namespace it is enrolled in, or why it is not and whether waiting can help.
    status: Result<Option<NetnsId>, EnrolmentError>,
}

/// A pod's connections draining, and then the end of its capture and of its listeners.
struct Withdrawal {
    identity: SpiffeId,
    /// Dropped, it stops the withdrawal, unless the drain is over already.
    cancel: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Withdrawal {
    /// Stops it, or waits for its end: afterwards it does nothing to the pod any more. The
    /// pod may be enrolled again.
    async fn stop(self) {
        drop(self.cancel);
        // It failed only if it panicked, and then it does nothing either.
        let _ = self.task.await;
    }
}

/// Why a pod is not enrolled.
#[derive(Debug, Clone, thiserror::Error)]
enum EnrolmentError {
    /// Its network namespace is not there (yet).
    #[error("network namespace: {0}")]
    Netns(String),
    /// Sockets could not be opened in it.
    #[error("listeners: {0}")]
    Listeners(String),
    /// Capture could not be set up.
    #[error("capture: {0}")]
    Capture(String),
}

/// How many of the wanted pods are not enrolled (yet).
fn pending(wanted: &[Arc<str>], entries: &HashMap<Arc<str>, Entry>) -> usize {
    wanted
        .iter()
        .filter(|uid| entries.get(*uid).is_none_or(|entry| entry.status.is_err()))
        .count()
}

impl Target {
    /// Tells who asked for it how its enrolment ended.
    fn tell(&self, status: &Result<Option<NetnsId>, EnrolmentError>) {
        let waiter = self.waiter.as_ref().and_then(|waiter| waiter.lock().take());
        if let Some(waiter) = waiter {
            let status = status.as_ref().map(drop).map_err(ToString::to_string);
            // Who asked may have given up.
            let _ = waiter.send(status);
        }
    }
}

/// Whether there is something to do about a pod.
fn is_open(target: &Target, entry: Option<&Entry>, wake: Wake) -> bool {
    let Some(entry) = entry else {
        return true;
    };
    if wake == Wake::Missing {
        return matches!(entry.status, Err(EnrolmentError::Netns(_)));
    }
    // A new sandbox of a pod that is enrolled in the one before.
    let elsewhere = match (&entry.status, &target.handle) {
        (Ok(enrolled), Some((_, handle))) if target.early => *enrolled != Some(*handle),
        _ => false,
    };
    entry.status.is_err() || entry.spec != target.spec || elsewhere
}

/// The namespace of a pod: that of the sandbox that has just been told of, else that of its
/// processes, else the last sandbox's, in which nothing may run yet.
fn locate(discovery: &Discovery, target: &Target) -> Result<File, DiscoveryError> {
    let addresses = &target.spec.addresses;
    let handle = target.handle.as_ref().and_then(|(file, _)| {
        let fits = target.early || has_address(file, addresses).unwrap_or_default();
        file.try_clone().ok().filter(|_| fits)
    });
    if target.early
        && let Some(handle) = handle
    {
        return Ok(handle);
    }
    match (discovery.find(&target.spec.uid, addresses), handle) {
        (Err(_), Some(handle)) => Ok(handle),
        (found, _) => found,
    }
}

impl EnrolmentManager {
    /// Works until the task is dropped.
    pub async fn run(self) {
        tokio::join!(self.manage(), self.keep_steering());
    }

    async fn manage(&self) {
        let mut state = State::default();
        let mut tick = interval(RECONCILE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut adopted, mut cleaned) = (false, false);
        let mut look_again = LOOK_AGAIN;
        loop {
            let missing = state
                .entries
                .values()
                .any(|entry| matches!(entry.status, Err(EnrolmentError::Netns(_))));
            let wake = tokio::select! {
                () = self.wanted.changed() => Wake::Changed,
                () = sleep(look_again), if missing => Wake::Missing,
                _ = tick.tick() => Wake::Tick,
            };
            look_again = match wake {
                Wake::Changed => LOOK_AGAIN,
                Wake::Tick => look_again,
                Wake::Missing => (look_again * 2).min(LOOK_AGAIN_LIMIT),
            };
            if wake == Wake::Tick {
                self.check_capture().await;
                self.check_namespaces(&mut state.entries).await;
                self.expire();
            }
            let targets = self.wanted.targets();
            let nothing = targets.by_uid.is_empty() && targets.ended.is_empty();
            if !targets.synced && nothing && state.entries.is_empty() {
                continue;
            }
            if targets.synced && !adopted {
                self.withdraw_leftovers(&targets.by_uid).await;
                adopted = true;
            }
            let synced = targets.synced;
            let is_done = self.converge(&mut state, targets, wake).await;
            if !synced || !is_done {
                // What an earlier process left stays until it is known who is wanted.
                self.publish(&state.entries);
                continue;
            }
            if !cleaned {
                self.remove_outdated().await;
                cleaned = true;
            }
            self.forget_identities(&mut state);
            self.publish(&state.entries);
            (self.settled)();
        }
    }

    /// Enrols and withdraws. `false` if pods still wait for their certificates: something else
    /// is wanted, which comes first, and then it goes on with them.
    async fn converge(&self, state: &mut State, targets: Targets, wake: Wake) -> bool {
        let wanted = targets.by_uid;
        let State {
            entries,
            withdrawing,
            identities,
            waits,
        } = state;
        for uid in &targets.ended {
            // The control plane was faster: nothing is left to be drained.
            if let Some(withdrawal) = withdrawing.remove(uid) {
                withdrawal.stop().await;
                self.remove(uid).await;
            }
        }
        let gone: Vec<_> = entries
            .keys()
            .filter(|uid| !wanted.contains_key(*uid))
            .cloned()
            .collect();
        for uid in gone {
            if let Some(entry) = entries.remove(&uid) {
                if self.pods.0.lock().remove(&uid).is_some() {
                    self.telemetry.emit(&Event::ProxyStopped);
                }
                if targets.ended.contains(&uid) {
                    info!(
                        target: "enrolment",
                        pod = %entry.spec.name, namespace = %entry.spec.namespace, %uid,
                        "pod ended"
                    );
                    self.remove(&uid).await;
                    continue;
                }
                let withdrawal = self.withdraw(&entry.spec).await;
                withdrawing.insert(uid, withdrawal);
            }
        }

        self.wanted.removed(&targets.ended);

        let wanted_uids: Vec<_> = wanted.keys().cloned().collect();
        let count_pending = |entries: &HashMap<Arc<str>, Entry>| {
            let count = pending(&wanted_uids, entries);
            self.telemetry.metrics().set_pending_proxies(count);
        };
        count_pending(entries);
        let (open, settled): (Vec<&Target>, Vec<&Target>) = wanted
            .values()
            .partition(|target| is_open(target, entries.get(&target.spec.uid), wake));
        let open: Vec<Target> = open.into_iter().cloned().collect();
        for target in settled {
            // One that has failed is open again in the next round.
            if let Some(Entry {
                status: status @ Ok(_),
                ..
            }) = entries.get(&target.spec.uid)
            {
                target.tell(status);
            }
        }
        identities.extend(open.iter().map(|target| target.spec.identity.clone()));
        for target in &open {
            self.certificates.prefetch(&target.spec.identity);
        }
        let mut published = Instant::now();
        let now = Instant::now();
        waits.retain(|uid, _| wanted.contains_key(uid));
        let coming = self.locate(open).await.into_iter();
        let mut coming: FuturesUnordered<_> = coming
            .map(|(target, netns)| {
                // What starts now has a runtime waiting for it; its connections wait for the
                // certificate by themselves.
                let waits = (!target.early && netns.is_ok()).then(|| {
                    // The same for all of a series: a certificate service that is away must
                    // not delay the last pod by the sum of all waits.
                    let until = waits.entry(target.spec.uid.clone());
                    *until.or_insert(now + CERTIFICATE_WAIT)
                });
                async move {
                    if let Some(until) = waits.filter(|until| *until > now) {
                        self.await_certificate(&target.spec.identity, until).await;
                    }
                    (target.spec, netns)
                }
            })
            .collect();
        let mut is_done = true;
        // In the order in which their certificates come.
        loop {
            let (spec, netns) = tokio::select! {
                biased;
                next = coming.next() => match next {
                    Some(next) => next,
                    None => break,
                },
                // A sandbox that is being made, or one that has ended, does not wait for them.
                () = self.wanted.changed() => {
                    self.wanted.look_again();
                    is_done = false;
                    break;
                }
            };
            // It would end by taking away what is set up here.
            if let Some(withdrawal) = withdrawing.remove(&spec.uid) {
                withdrawal.stop().await;
            }
            let status = match netns {
                Ok(netns) => self.enrol(&spec, netns).await,
                Err(e) => Err(EnrolmentError::Netns(e.to_string())),
            };
            let known = entries.get(&spec.uid).and_then(|e| e.status.as_ref().err());
            match &status {
                Ok(_) => info!(
                    target: "enrolment",
                    pod = %spec.name, namespace = %spec.namespace, uid = %spec.uid,
                    "pod enrolled"
                ),
                Err(e) if known.is_none_or(|k| k.to_string() != e.to_string()) => warn!(
                    target: "enrolment",
                    pod = %spec.name, namespace = %spec.namespace, uid = %spec.uid,
                    "pod not enrolled, will be tried again: {e}"
                ),
                Err(_) => {}
            }
            if status.is_ok()
                && self
                    .pods
                    .0
                    .lock()
                    .insert(spec.uid.clone(), spec.clone())
                    .is_none()
            {
                self.telemetry.emit(&Event::ProxyStarted);
            }
            if let Some(target) = wanted.get(&spec.uid) {
                target.tell(&status);
            }
            entries.insert(spec.uid.clone(), Entry { spec, status });
            count_pending(entries);
            // The first of many need not wait for the last until peers use HBONE.
            if published.elapsed() >= PUBLISH_INTERVAL {
                self.publish(entries);
                published = Instant::now();
            }
        }
        is_done
    }

    /// Finds the namespaces of all of them on a thread for blocking work.
    async fn locate(&self, open: Vec<Target>) -> Vec<(Target, Result<File, DiscoveryError>)> {
        let discovery = self.discovery.clone();
        let located = spawn_blocking(move || {
            let locate = |target: Target| {
                let netns = locate(&discovery, &target);
                (target, netns)
            };
            open.into_iter().map(locate).collect()
        });
        // It fails only if it panicked; then they are looked for again.
        located.await.unwrap_or_default()
    }

    /// Ends early pods that nobody else knows, and keeps the records in step.
    fn expire(&self) {
        for uid in self.wanted.expire(EARLY_LIMIT, Instant::now()) {
            warn!(
                target: "enrolment", %uid,
                "the control plane does not name this pod, which the CNI plugin has enrolled; it leaves the mesh"
            );
        }
        if let Some(records) = &self.records {
            records.reconcile(&self.wanted);
        }
    }

    async fn await_certificate(&self, identity: &SpiffeId, until: Instant) {
        match timeout_at(until, self.certificates.get(identity)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => warn!(%identity, "no certificate yet: {e}"),
            Err(_) => warn!(%identity, "no certificate yet; connections of its pods wait"),
        }
    }

    async fn enrol(&self, spec: &PodSpec, netns: File) -> Result<Option<NetnsId>, EnrolmentError> {
        let pod = Arc::new(Pod::new(spec.clone(), netns));
        if let Err(error) = self.listen_and_capture(&pod).await {
            // Listeners without capture serve nobody, and each attempt would leave more.
            join_all(self.workers.iter().map(|w| w.discard(pod.clone()))).await;
            return Err(error);
        }
        join_all(self.workers.iter().map(|w| w.keep_newest(spec.uid.clone()))).await;
        Ok(pod.netns_id())
    }

    async fn listen_and_capture(&self, pod: &Arc<Pod>) -> Result<(), EnrolmentError> {
        let (count, ipv6, opener) = (self.workers.len(), self.ipv6, pod.clone());
        let opened = spawn_blocking(move || PodListeners::open_group(opener.netns(), count, ipv6))
            .await
            .map_err(|e| EnrolmentError::Listeners(e.to_string()))?
            .map_err(|e| EnrolmentError::Listeners(e.to_string()))?;
        // One member of each group goes into the capture's slots.
        let member = opened
            .first()
            .map(PodListeners::duplicate)
            .transpose()
            .map_err(|e| EnrolmentError::Listeners(e.to_string()))?;
        let Some(member) = member else {
            return Err(EnrolmentError::Listeners("no worker".into()));
        };
        for (worker, listeners) in self.workers.iter().zip(opened) {
            worker
                .add_pod(pod.clone(), listeners)
                .await
                .map_err(|e| EnrolmentError::Listeners(e.to_string()))?;
        }

        let (redirector, pod) = (self.redirector.clone(), pod.clone());
        spawn_blocking(move || {
            redirector.lock().enrol(PodRedirection {
                uid: &pod.spec.uid,
                netns: pod.netns(),
                addresses: &pod.spec.addresses,
                outbound_only: pod.spec.outbound_only,
                listeners: Listeners {
                    outbound: member.outbound.as_fd(),
                    plaintext: member.plaintext.as_fd(),
                    hbone: member.hbone.as_fd(),
                },
            })
        })
        .await
        .map_err(|e| EnrolmentError::Capture(e.to_string()))?
        .map_err(|e| EnrolmentError::Capture(e.to_string()))
    }

    /// Ends the capture of a pod in which nothing runs any more, and its listeners.
    async fn remove(&self, uid: &Arc<str>) {
        self.capture(uid, |redirector, uid| redirector.withdraw(uid))
            .await;
        join_all(self.workers.iter().map(|w| w.remove_pod(uid.clone()))).await;
    }

    /// New connections of the pod stop being captured at once; the open ones get the
    /// deadline; then rules, routes and listeners go.
    async fn withdraw(&self, spec: &PodSpec) -> Withdrawal {
        info!(
            target: "enrolment",
            pod = %spec.name, namespace = %spec.namespace, uid = %spec.uid,
            "pod withdrawn"
        );
        self.capture(&spec.uid, |redirector, uid| redirector.release(uid))
            .await;
        let (redirector, workers) = (self.redirector.clone(), self.workers.clone());
        let (uid, deadline) = (spec.uid.clone(), self.drain_deadline);
        let (cancel, cancelled) = oneshot::channel::<()>();
        // In the background: other pods do not wait for this one's connections.
        let task = tokio::spawn(async move {
            let drain = |limit| join_all(workers.iter().map(|w| w.drain_pod(uid.clone(), limit)));
            let drained = async {
                drain(deadline).await;
                // What arrives from now on goes to the app by itself; what waits in a queue of
                // ours is still served, before its listener goes.
                let (redirector, name) = (redirector.clone(), uid.clone());
                let done = spawn_blocking(move || redirector.lock().unsteer(&name)).await;
                if let Ok(Err(e)) = done
                    && !matches!(e, adit_ebpf::Error::UnknownPod(_))
                {
                    warn!(target: "enrolment", %uid, "inbound capture not removed: {e}");
                }
                drain(QUEUE_WAIT).await;
            };
            tokio::select! {
                biased;
                // The manager wants it back, or is gone itself.
                _ = cancelled => return,
                () = drained => {}
            }
            let name = uid.clone();
            let done = spawn_blocking(move || redirector.lock().withdraw(&name)).await;
            if let Ok(Err(e)) = done
                && !matches!(e, adit_ebpf::Error::UnknownPod(_))
            {
                warn!(target: "enrolment", %uid, "capture not removed: {e}");
            }
            join_all(workers.iter().map(|w| w.remove_pod(uid.clone()))).await;
        });
        Withdrawal {
            identity: spec.identity.clone(),
            cancel,
            task,
        }
    }

    /// Certificates of identities that no pod has any more are not renewed. A pod on its way
    /// out still answers for its connections.
    fn forget_identities(&self, state: &mut State) {
        let State {
            entries,
            withdrawing,
            identities,
            ..
        } = state;
        withdrawing.retain(|_, withdrawal| !withdrawal.task.is_finished());
        let used: HashSet<&SpiffeId> = entries
            .values()
            .map(|entry| &entry.spec.identity)
            .chain(withdrawing.values().map(|w| &w.identity))
            .collect();
        identities.retain(|identity| {
            let keep = used.contains(identity);
            if !keep {
                self.certificates.forget(identity);
            }
            keep
        });
    }

    /// A pod whose sandbox was made anew has another network namespace under the same uid,
    /// in which nothing is captured yet.
    async fn check_namespaces(&self, entries: &mut HashMap<Arc<str>, Entry>) {
        let early = self.wanted.early();
        let enrolled: Vec<(PodSpec, NetnsId)> = entries
            .values()
            // The plugin has just said where these are.
            .filter(|entry| !early.contains_key(&entry.spec.uid))
            .filter_map(|entry| Some((entry.spec.clone(), entry.status.as_ref().ok().copied()??)))
            .collect();
        let discovery = self.discovery.clone();
        let replaced = spawn_blocking(move || {
            // One that is gone will be taken from us by the control plane.
            let is_replaced = |(spec, enrolled): &(PodSpec, NetnsId)| {
                let now = discovery.current(&spec.uid, &spec.addresses, *enrolled);
                now.is_some_and(|now| now != *enrolled)
            };
            let replaced = enrolled.into_iter().filter(is_replaced);
            replaced.map(|(spec, _)| spec.uid).collect::<Vec<_>>()
        });
        for uid in replaced.await.unwrap_or_default() {
            if let Some(entry) = entries.get_mut(&uid) {
                let why = "it was replaced, capture follows";
                entry.status = Err(EnrolmentError::Netns(why.into()));
            }
        }
    }

    fn publish(&self, entries: &HashMap<Arc<str>, Entry>) {
        let mut pods: Vec<_> = entries
            .values()
            .map(|entry| PodEnrolment {
                uid: entry.spec.uid.to_string(),
                state: match &entry.status {
                    Ok(_) => EnrolmentState::Enrolled,
                    Err(EnrolmentError::Netns(_)) => EnrolmentState::Pending,
                    Err(_) => EnrolmentState::Failed,
                }
                .into(),
                message: entry
                    .status
                    .as_ref()
                    .err()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            })
            .collect();
        pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        self.reports.send_if_modified(|last| {
            let changed = last.pods != pods;
            last.pods = pods;
            last.node.clone_from(&self.node);
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_shared::identity::TrustDomain;
    use adit_shared::proto::enrolment::Enrolment;

    fn entry(uid: &str, status: Result<Option<NetnsId>, EnrolmentError>) -> Entry {
        let enrolment = Enrolment {
            uid: uid.to_owned(),
            name: uid.to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            addresses: vec![vec![10, 0, 0, 7]],
            outbound_only: false,
        };
        let spec = PodSpec::new(&enrolment, &TrustDomain::default(), "Kubernetes");
        Entry {
            spec: spec.expect("valid"),
            status,
        }
    }

    #[test]
    fn a_pod_is_pending_until_it_is_enrolled() {
        let failed = EnrolmentError::Netns("not there".into());
        let wanted: Vec<Arc<str>> = ["new", "failed", "enrolled"].map(Arc::from).into();
        let entries: HashMap<Arc<str>, Entry> = [
            ("failed", Err(failed.clone())),
            ("enrolled", Ok(None)),
            // Not wanted any more.
            ("leaving", Err(failed)),
        ]
        .map(|(uid, status)| (Arc::from(uid), entry(uid, status)))
        .into();
        assert_eq!(pending(&wanted, &entries), 2);
        assert_eq!(pending(&wanted[2..], &entries), 0);
        assert_eq!(pending(&[], &entries), 0);
    }
}
