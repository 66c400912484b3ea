//! Which pods are to be enrolled, by everybody who has a say.
//!
//! The control plane names pods once they have an address; the CNI plugin names one
//! earlier, while its sandbox is made, and brings the sandbox's network namespace along.
//! Such an early pod is enrolled like any other until the control plane names the same uid
//! and takes it over. If that does not happen, it ends with its sandbox, or after a time in
//! which the control plane could have named it.
//!
//! One pod may have several sandboxes, one after the other. What is said of one sandbox does
//! not end another, in whatever order it comes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::pod::{NetnsId, PodSpec, netns_id};

/// Pods that nobody but the CNI plugin has named, at the most: as many as a node can have.
const MAX_EARLY: usize = 1024;

/// The pods that are wanted on this node; written by the xDS handler and by the socket.
#[derive(Debug, Default)]
pub struct Wanted {
    pods: Mutex<WantedPods>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct WantedPods {
    /// By the control plane.
    named: BTreeMap<Arc<str>, PodSpec>,
    /// By the CNI plugin.
    early: BTreeMap<Arc<str>, Early>,
    /// Pods whose sandbox has ended, named or not, and who waits for the end of their capture.
    ended: BTreeMap<Arc<str>, Vec<oneshot::Sender<()>>>,
    /// The first response has come: an empty set now means none.
    synced: bool,
    /// Since when the control plane could name pods; `None` while it cannot be reached.
    connected: Option<Instant>,
}

/// A pod whose sandbox is being made, or was made lately.
#[derive(Debug)]
pub struct EarlyPod {
    /// What is to be captured.
    pub spec: PodSpec,
    /// The id of its sandbox.
    pub sandbox: Arc<str>,
    /// The sandbox's namespace. `None` for one that an earlier process was told of.
    pub netns: Option<Arc<File>>,
}

#[derive(Debug)]
struct Early {
    pod: EarlyPod,
    netns_id: Option<NetnsId>,
    since: Instant,
    /// The control plane has named it since.
    confirmed: bool,
    waiter: Waiter,
}

/// Who wants to know how the enrolment of an early pod ended.
pub(super) type Waiter = Arc<Mutex<Option<oneshot::Sender<Result<(), String>>>>>;

/// The node has no room for one more early pod.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_EARLY} pods are being started on this node already")]
pub struct TooManyEarly;

/// One pod as it is wanted at a moment.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) spec: PodSpec,
    /// A handle of its namespace, and which one that is.
    pub(super) handle: Option<(Arc<File>, NetnsId)>,
    /// The handle is newer than what the control plane knows.
    pub(super) early: bool,
    pub(super) waiter: Option<Waiter>,
}

/// Everything that is wanted at a moment.
#[derive(Debug, Default)]
pub(super) struct Targets {
    pub(super) by_uid: BTreeMap<Arc<str>, Target>,
    /// Pods that are not wanted any more, in which nothing runs: nothing has to be drained.
    pub(super) ended: BTreeSet<Arc<str>>,
    pub(super) synced: bool,
}

impl Wanted {
    /// The control plane adds, replaces and removes pods.
    pub fn update(&self, specs: Vec<PodSpec>, removed: &[String]) {
        {
            let mut pods = self.pods.lock();
            pods.synced = true;
            for uid in removed {
                pods.named.remove(uid.as_str());
                if pods.ended.get(uid.as_str()).is_some_and(Vec::is_empty) {
                    pods.ended.remove(uid.as_str());
                }
                match pods.early.get_mut(uid.as_str()) {
                    Some(early) if early.confirmed => {
                        pods.early.remove(uid.as_str());
                    }
                    // This is about the sandbox before it.
                    Some(early) => early.since = Instant::now(),
                    None => {}
                }
            }
            for spec in specs {
                if let Some(early) = pods.early.get_mut(&spec.uid) {
                    early.confirmed = true;
                }
                pods.ended.remove(&spec.uid);
                pods.named.insert(spec.uid.clone(), spec);
            }
        }
        self.changed.notify_one();
    }

    /// Whether the control plane can be heard.
    pub fn set_connected(&self, connected: bool) {
        let since = &mut self.pods.lock().connected;
        *since = connected.then(|| since.unwrap_or_else(Instant::now));
    }

    /// A sandbox is being made. How its enrolment ends is told to the receiver, unless
    /// another sandbox of the pod, or the end of this one, comes before that.
    ///
    /// # Errors
    /// [`TooManyEarly`].
    pub fn admit(
        &self,
        pod: EarlyPod,
    ) -> Result<oneshot::Receiver<Result<(), String>>, TooManyEarly> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut pods = self.pods.lock();
            if pods.early.len() >= MAX_EARLY && !pods.early.contains_key(&pod.spec.uid) {
                // Those that the control plane knows need not be remembered.
                pods.early.retain(|_, early| !early.confirmed);
                if pods.early.len() >= MAX_EARLY {
                    return Err(TooManyEarly);
                }
            }
            let netns = pod.netns.as_ref().and_then(|file| file.metadata().ok());
            let early = Early {
                netns_id: netns.as_ref().map(netns_id),
                since: Instant::now(),
                confirmed: false,
                waiter: Arc::new(Mutex::new(Some(sender))),
                pod,
            };
            pods.ended.remove(&early.pod.spec.uid);
            pods.early.insert(early.pod.spec.uid.clone(), early);
        }
        self.changed.notify_one();
        Ok(receiver)
    }

    /// A pod that an earlier process was told of; nothing if this one knows the pod already.
    pub fn remember(&self, pod: EarlyPod) {
        let uid = pod.spec.uid.clone();
        {
            let pods = self.pods.lock();
            if pods.early.contains_key(&uid) || pods.named.contains_key(&uid) {
                return;
            }
        }
        // Nobody waits, and of too many the rest are the control plane's to name.
        drop(self.admit(pod));
    }

    /// A sandbox has ended; the pod's uid if it is the last that the pod had. The receiver is
    /// told when nothing of its capture is left.
    pub fn dismiss(&self, sandbox: &str) -> Option<(Arc<str>, oneshot::Receiver<()>)> {
        let (uid, receiver) = {
            let mut pods = self.pods.lock();
            let found = pods
                .early
                .iter()
                .find(|(_, early)| &*early.pod.sandbox == sandbox);
            let uid = found.map(|(uid, _)| uid.clone())?;
            pods.early.remove(&uid);
            let receiver = pods.end(&uid);
            (uid, receiver)
        };
        self.changed.notify_one();
        Some((uid, receiver))
    }

    /// Whether sandboxes of the pod are known: what is said of others is not about it.
    pub fn knows_sandbox_of(&self, uid: &str) -> bool {
        self.pods.lock().early.contains_key(uid)
    }

    /// Nothing runs in the pod any more, whose sandbox was never told of. The receiver as of
    /// [`Wanted::dismiss`].
    pub fn end(&self, uid: &str) -> oneshot::Receiver<()> {
        let receiver = self.pods.lock().end(&uid.into());
        self.changed.notify_one();
        receiver
    }

    /// Ends pods of all other sandboxes; their uids.
    pub fn retain(&self, sandboxes: &HashSet<String>) -> Vec<Arc<str>> {
        let mut gone = Vec::new();
        {
            let mut pods = self.pods.lock();
            pods.early.retain(|uid, early| {
                let keep = sandboxes.contains(&*early.pod.sandbox);
                if !keep {
                    gone.push(uid.clone());
                }
                keep
            });
            for uid in &gone {
                drop(pods.end(uid));
            }
        }
        if !gone.is_empty() {
            self.changed.notify_one();
        }
        gone
    }

    /// Ends early pods that the control plane could have named for `limit`, and lets go of
    /// the namespaces of those that it has taken over; the uids of the former.
    pub(super) fn expire(&self, limit: Duration, now: Instant) -> Vec<Arc<str>> {
        let mut pods = self.pods.lock();
        let WantedPods {
            named,
            early,
            synced,
            connected,
            ..
        } = &mut *pods;
        let mut expired = Vec::new();
        early.retain(|uid, early| {
            let since = connected.map(|connected| connected.max(early.since));
            let over = since.is_some_and(|since| now.duration_since(since) >= limit);
            if over && early.confirmed {
                (early.pod.netns, early.netns_id) = (None, None);
            }
            let ends = over && *synced && !named.contains_key(uid);
            if ends {
                expired.push(uid.clone());
            }
            !ends
        });
        expired
    }

    /// The capture of these pods, whose sandboxes had ended, is removed.
    pub(super) fn removed(&self, ended: &BTreeSet<Arc<str>>) {
        let mut pods = self.pods.lock();
        for uid in ended {
            let waiting = pods.ended.get_mut(uid).map(std::mem::take);
            for waiting in waiting.into_iter().flatten() {
                // Who waited may have given up.
                let _ = waiting.send(());
            }
            // What the control plane still names is not wanted until it says something new.
            if !pods.named.contains_key(uid) {
                pods.ended.remove(uid);
            }
        }
    }

    /// The early pods that no process would know of after this one: uid and sandbox.
    pub fn early(&self) -> BTreeMap<Arc<str>, Arc<str>> {
        let pods = self.pods.lock();
        let early = pods.early.iter().filter(|(_, early)| !early.confirmed);
        early
            .map(|(uid, early)| (uid.clone(), early.pod.sandbox.clone()))
            .collect()
    }

    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The change that [`Wanted::changed`] has told of is not worked off yet.
    pub(super) fn look_again(&self) {
        self.changed.notify_one();
    }

    pub(super) fn targets(&self) -> Targets {
        let pods = self.pods.lock();
        let mut by_uid: BTreeMap<Arc<str>, Target> = pods
            .named
            .iter()
            .filter(|(uid, _)| !pods.ended.contains_key(*uid))
            .map(|(uid, spec)| {
                let target = Target {
                    spec: spec.clone(),
                    handle: None,
                    early: false,
                    waiter: None,
                };
                (uid.clone(), target)
            })
            .collect();
        for (uid, early) in &pods.early {
            let handle = early.pod.netns.clone().zip(early.netns_id);
            let named = by_uid.get(uid).filter(|_| early.confirmed);
            let spec = named.map_or(&early.pod.spec, |target| &target.spec).clone();
            let target = Target {
                spec,
                handle,
                early: !early.confirmed,
                waiter: Some(early.waiter.clone()),
            };
            by_uid.insert(uid.clone(), target);
        }
        Targets {
            by_uid,
            ended: pods.ended.keys().cloned().collect(),
            synced: pods.synced,
        }
    }
}

impl WantedPods {
    fn end(&mut self, uid: &Arc<str>) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.ended.entry(uid.clone()).or_default().push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use adit_shared::identity::TrustDomain;
    use adit_shared::proto::enrolment::Enrolment;

    use super::*;

    fn spec(uid: &str, last: u8) -> PodSpec {
        let enrolment = Enrolment {
            uid: uid.into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            addresses: vec![vec![10, 0, 0, last]],
            outbound_only: false,
        };
        PodSpec::new(&enrolment, &TrustDomain::default(), "Kubernetes").expect("valid")
    }

    fn sandbox(uid: &str, last: u8, sandbox: &str) -> EarlyPod {
        let netns = File::open("/proc/self/ns/net").expect("there");
        EarlyPod {
            spec: spec(uid, last),
            sandbox: sandbox.into(),
            netns: Some(Arc::new(netns)),
        }
    }

    fn target(wanted: &Wanted, uid: &str) -> Option<(u8, bool)> {
        let target = wanted.targets().by_uid.remove(uid)?;
        let std::net::IpAddr::V4(address) = target.spec.addresses[0] else {
            return None;
        };
        Some((address.octets()[3], target.early))
    }

    #[test]
    fn the_control_plane_takes_over_and_has_the_last_word() {
        let wanted = Wanted::default();
        let _waiting = wanted.admit(sandbox("a", 1, "s1")).expect("room");
        assert_eq!(target(&wanted, "a"), Some((1, true)));
        assert!(!wanted.targets().synced);
        wanted.update(vec![spec("a", 1)], &[]);
        assert_eq!(target(&wanted, "a"), Some((1, false)));
        assert!(wanted.early().is_empty());
        wanted.update(Vec::new(), &["a".into()]);
        assert_eq!(target(&wanted, "a"), None);
    }

    #[test]
    fn a_new_sandbox_is_newer_than_what_the_control_plane_knows() {
        let wanted = Wanted::default();
        wanted.update(vec![spec("a", 1)], &[]);
        let _waiting = wanted.admit(sandbox("a", 2, "s2")).expect("room");
        assert_eq!(target(&wanted, "a"), Some((2, true)));
        // The end of the sandbox before it, told late by both.
        assert!(wanted.dismiss("s1").is_none());
        wanted.update(Vec::new(), &["a".into()]);
        assert_eq!(target(&wanted, "a"), Some((2, true)));
        wanted.update(vec![spec("a", 2)], &[]);
        assert_eq!(target(&wanted, "a"), Some((2, false)));
        let (uid, mut removed) = wanted.dismiss("s2").expect("known");
        assert_eq!(&*uid, "a");
        assert_eq!(target(&wanted, "a"), None, "named, but nothing runs in it");
        wanted.removed(&wanted.targets().ended);
        assert_eq!(removed.try_recv(), Ok(()));
        assert_eq!(target(&wanted, "a"), None);
        wanted.update(vec![spec("a", 3)], &[]);
        assert_eq!(target(&wanted, "a"), Some((3, false)));
    }

    #[test]
    fn a_pod_that_nobody_names_ends_after_a_time() {
        const LIMIT: Duration = Duration::from_secs(60);
        let wanted = Wanted::default();
        let _waiting = wanted.admit(sandbox("a", 1, "s1")).expect("room");
        let later = Instant::now() + 2 * LIMIT;
        assert!(
            wanted.expire(LIMIT, later).is_empty(),
            "nobody could name it"
        );
        wanted.set_connected(true);
        assert!(wanted.expire(LIMIT, Instant::now()).is_empty());
        assert!(wanted.expire(LIMIT, later).is_empty(), "not synced");
        wanted.update(vec![spec("b", 2)], &[]);
        assert_eq!(wanted.expire(LIMIT, later), ["a".into()]);
        assert_eq!(target(&wanted, "a"), None);
        assert_eq!(target(&wanted, "b"), Some((2, false)));
    }

    #[test]
    fn sandboxes_that_are_no_more_end() {
        let wanted = Wanted::default();
        let _one = wanted.admit(sandbox("a", 1, "s1")).expect("room");
        let _two = wanted.admit(sandbox("b", 2, "s2")).expect("room");
        assert!(wanted.retain(&HashSet::from(["s2".to_owned()])) == ["a".into()]);
        assert_eq!(target(&wanted, "b"), Some((2, true)));
        assert!(wanted.targets().ended.contains("a"));
        wanted.removed(&wanted.targets().ended);
        assert!(wanted.targets().ended.is_empty());
    }
}
