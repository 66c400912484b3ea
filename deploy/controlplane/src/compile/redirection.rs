//! Which pods are captured, as far as clients may rely on it.
//!
//! A client encrypts as soon as a workload says HBONE, and goes on in plaintext as soon
//! as it says NONE. So a pod says HBONE only after its node has reported it, and goes on
//! saying so for as long as it is to be enrolled: a node proxy that restarts, or reports
//! that it cannot capture the pod any more, makes connections fail, never go out in
//! plaintext. On opt-out the workload says NONE first, and only when clients have had
//! time to follow is the enrolment itself withdrawn.
//!
//! A namespace is gone over again only if something about its pods changes that matters to
//! capture, by its objects or by a report, or a delay in it has passed: there may be very
//! many pods.
//!
//! Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};

use super::enrolment::{Decision, decide};
use super::mesh::MeshConfig;
use crate::model::{NamespaceObjects, Objects, Pod, differing};

/// How long clients get to follow an opt-out.
pub const WITHDRAW_DELAY: Duration = Duration::from_secs(2);

/// A pod's uid.
pub type PodUid = Arc<str>;

/// The pods that ought to be enrolled, and those that merely exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Node of each pod that ought to be enrolled.
    pub enrolled: BTreeMap<PodUid, Arc<str>>,
    /// Other pods that could be captured still.
    pub others: BTreeSet<PodUid>,
}

impl Desired {
    /// Decides about the pods of one namespace.
    pub fn add(&mut self, of: &NamespaceObjects, mesh: &MeshConfig) {
        for pod in of.pods.values() {
            let uid = pod.meta.uid.clone();
            match decide(pod, of.namespace.as_deref(), mesh) {
                Decision::Enrol => {
                    self.enrolled.insert(uid, pod.node.clone());
                }
                Decision::Leave(_) if pod.phase.is_terminal() || pod.addresses.is_empty() => {}
                Decision::Leave(_) => {
                    self.others.insert(uid);
                }
            }
        }
    }
}

/// Which pods of all namespaces ought to be enrolled.
pub fn desired(objects: &Objects, mesh: &MeshConfig) -> Desired {
    let mut desired = Desired::default();
    for of in objects.namespaces.values() {
        desired.add(of, mesh);
    }
    desired
}

/// What to publish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redirection {
    /// Pods whose workloads say HBONE.
    pub hbone: BTreeSet<PodUid>,
    /// Pods whose enrolment is published: those of `Desired`, and those that are being
    /// withdrawn.
    pub enrolments: BTreeSet<PodUid>,
}

/// What to publish in each namespace. Where nothing changed it is the same `Arc`.
pub type Redirections = BTreeMap<Arc<str>, Arc<Redirection>>;

/// One pod as its node reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// The state.
    pub state: EnrolmentState,
    /// Why it is not [`EnrolmentState::Enrolled`].
    pub message: String,
}

/// A pod that is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its uid.
    pub uid: PodUid,
    /// Its node.
    pub node: Arc<str>,
}

/// The state machine of all pods.
#[derive(Debug)]
pub struct RedirectionTracker {
    delay: Duration,
    reports: BTreeMap<Arc<str>, Report>,
    namespaces: BTreeMap<Arc<str>, Tracked>,
    /// Pods that ought to be enrolled, with their namespaces: whom a report concerns.
    homes: BTreeSet<(PodUid, Arc<str>)>,
    /// Namespaces of which more is known than when they were gone over last.
    stale: BTreeSet<Arc<str>>,
    /// What was decided with.
    mesh: Option<MeshConfig>,
}

type Report = BTreeMap<PodUid, PodReport>;

/// The pods of one namespace.
#[derive(Debug, Default)]
struct Tracked {
    /// What `desired` was made from.
    objects: Option<Arc<NamespaceObjects>>,
    desired: Desired,
    pods: BTreeMap<PodUid, State>,
    redirection: Arc<Redirection>,
    /// When the first withdrawal is done.
    until: Option<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Captured on `node`; clients use HBONE.
    Enabled { node: Arc<str> },
    /// Still captured; clients are leaving.
    Withdrawing { node: Arc<str>, until: Instant },
}

impl State {
    fn node(&self) -> &Arc<str> {
        match self {
            Self::Enabled { node } | Self::Withdrawing { node, .. } => node,
        }
    }
}

impl RedirectionTracker {
    /// Starts with the pods that were captured when the control plane stopped.
    pub fn new(delay: Duration, captured: impl IntoIterator<Item = Captured>) -> Self {
        let mut tracker = Self {
            delay,
            reports: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            homes: BTreeSet::new(),
            stale: BTreeSet::new(),
            mesh: None,
        };
        for pod in captured {
            tracker.adopt(pod);
        }
        tracker
    }

    /// Learns of a captured pod from elsewhere, before it has been gone over.
    pub fn adopt(&mut self, pod: Captured) {
        let Captured {
            namespace,
            uid,
            node,
        } = pod;
        let tracked = self.namespaces.entry(namespace.clone()).or_default();
        tracked.pods.entry(uid).or_insert(State::Enabled { node });
        self.stale.insert(namespace);
    }

    /// Takes a node's report, which replaces the one before. Says whether it differs.
    pub fn report(&mut self, node: &str, pods: &[PodEnrolment]) -> bool {
        let report: Report = pods
            .iter()
            .map(|pod| {
                let report = PodReport {
                    state: pod.state(),
                    message: pod.message.clone(),
                };
                (pod.uid.as_str().into(), report)
            })
            .collect();
        let before = self.reports.get(node);
        if before == Some(&report) {
            return false;
        }
        // Only what is newly enrolled moves a pod on: it stays so whatever the node says.
        for (uid, _) in report.iter().filter(|(_, pod)| pod.is_enrolled()) {
            let known = before.and_then(|before| before.get(uid));
            if !known.is_some_and(PodReport::is_enrolled) {
                let homes = self.homes.range((uid.clone(), Arc::default())..);
                let homes = homes.take_while(|(of, _)| of == uid);
                self.stale.extend(homes.map(|(_, home)| home.clone()));
            }
        }
        self.reports.insert(node.into(), report);
        true
    }

    /// Moves every pod on. `marked` says of a pod that another replica, or a predecessor,
    /// found it to be captured. Says which namespaces were gone over; those that are gone
    /// are among them.
    pub fn reconcile(
        &mut self,
        objects: &Objects,
        mesh: &MeshConfig,
        marked: impl Fn(&Pod) -> bool,
        now: Instant,
    ) -> BTreeSet<Arc<str>> {
        let all = self.mesh.as_ref() != Some(mesh);
        if all {
            self.mesh = Some(mesh.clone());
        }
        let stale = std::mem::take(&mut self.stale);
        let mut touched = BTreeSet::new();
        let known = self.namespaces.keys();
        let gone = known.filter(|name| !objects.namespaces.contains_key(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            // Nobody connects to a pod that is gone.
            if let Some(tracked) = self.namespaces.remove(&name) {
                for uid in tracked.desired.enrolled.into_keys() {
                    self.homes.remove(&(uid, name.clone()));
                }
            }
            touched.insert(name);
        }
        for (name, of) in &objects.namespaces {
            let tracked = self.namespaces.entry(name.clone()).or_default();
            let known = tracked.objects.as_ref();
            let same = !all && known.is_some_and(|known| same_fates(known, of, mesh, &marked));
            if !same {
                let mut desired = Desired::default();
                desired.add(of, mesh);
                let before = std::mem::replace(&mut tracked.desired, desired);
                let enrolled = &tracked.desired.enrolled;
                for uid in before.enrolled.into_keys() {
                    if !enrolled.contains_key(&uid) {
                        self.homes.remove(&(uid, name.clone()));
                    }
                }
                let homes = enrolled.keys().map(|uid| (uid.clone(), name.clone()));
                self.homes.extend(homes);
            }
            tracked.objects = Some(of.clone());
            let passed = tracked.until.is_some_and(|until| until <= now);
            if same && !passed && !stale.contains(name) {
                continue;
            }
            for pod in of.pods.values().filter(|pod| marked(pod)) {
                tracked.adopt(&pod.meta.uid, &pod.node);
            }
            tracked.reconcile(&self.reports, self.delay, now);
            touched.insert(name.clone());
        }
        touched
    }

    /// What to publish in a namespace.
    pub fn redirection(&self, namespace: &str) -> Option<&Arc<Redirection>> {
        Some(&self.namespaces.get(namespace)?.redirection)
    }

    /// When [`Self::reconcile`] has to be called again even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let all = self.namespaces.values();
        all.filter_map(|tracked| tracked.until).min()
    }

    /// The node on which a pod of a namespace is captured, to be kept over a restart. A pod
    /// that is being withdrawn counts: after a restart its delay begins again.
    pub fn captured_on(&self, namespace: &str, uid: &str) -> Option<&Arc<str>> {
        Some(self.namespaces.get(namespace)?.pods.get(uid)?.node())
    }

    /// What the node says of a pod of its own.
    pub fn reported(&self, node: &str, uid: &str) -> Option<&PodReport> {
        self.reports.get(node)?.get(uid)
    }
}

/// Whether two versions of a namespace are the same as far as capture is concerned: mostly
/// it is readiness that changes.
fn same_fates(
    known: &Arc<NamespaceObjects>,
    now: &Arc<NamespaceObjects>,
    mesh: &MeshConfig,
    marked: impl Fn(&Pod) -> bool,
) -> bool {
    if Arc::ptr_eq(known, now) {
        return true;
    }
    if known.namespace != now.namespace {
        return false;
    }
    let namespace = now.namespace.as_deref();
    let fate = |pod: &Pod| {
        let decision = decide(pod, namespace, mesh) == Decision::Enrol;
        let exists = (pod.phase.is_terminal(), pod.addresses.is_empty());
        (decision, exists, pod.meta.deleting, marked(pod))
    };
    differing(&known.pods, &now.pods).all(|pods| match pods {
        (Some(known), Some(now)) => {
            known.meta.uid == now.meta.uid && known.node == now.node && fate(known) == fate(now)
        }
        _ => false,
    })
}

impl PodReport {
    fn is_enrolled(&self) -> bool {
        self.state == EnrolmentState::Enrolled
    }
}

impl Tracked {
    /// Another replica has the reports of the pod's node. One that is being withdrawn is
    /// marked for a while still, and is not for us to bring back.
    fn adopt(&mut self, uid: &PodUid, node: &Arc<str>) {
        if self.desired.enrolled.get(uid) != Some(node) {
            return;
        }
        let known = self.pods.get(uid);
        if known.is_none_or(|state| state.node() != node) {
            let node = node.clone();
            self.pods.insert(uid.clone(), State::Enabled { node });
        }
    }

    /// Moves the pods on.
    fn reconcile(&mut self, reports: &BTreeMap<Arc<str>, Report>, delay: Duration, now: Instant) {
        let Desired { enrolled, others } = &self.desired;
        for (uid, node) in enrolled {
            // A node speaks for its own pods only.
            let reported = reports.get(node).and_then(|pods| pods.get(uid));
            let captured = self.pods.get(uid).is_some_and(|state| state.node() == node);
            if captured || reported.is_some_and(PodReport::is_enrolled) {
                let node = node.clone();
                self.pods.insert(uid.clone(), State::Enabled { node });
            } else {
                self.pods.remove(uid);
            }
        }
        self.pods.retain(|uid, state| {
            if enrolled.contains_key(uid) {
                return true;
            }
            if let State::Enabled { node } = state {
                *state = State::Withdrawing {
                    node: node.clone(),
                    until: now + delay,
                };
            }
            let waiting = matches!(state, State::Withdrawing { until, .. } if *until > now);
            // Nobody connects to a pod that is gone.
            waiting && others.contains(uid)
        });
        let mut redirection = Redirection {
            hbone: BTreeSet::new(),
            enrolments: enrolled.keys().cloned().collect(),
        };
        self.until = None;
        for (uid, state) in &self.pods {
            match state {
                State::Enabled { .. } => {
                    redirection.hbone.insert(uid.clone());
                }
                State::Withdrawing { until, .. } => {
                    redirection.enrolments.insert(uid.clone());
                    self.until = Some(self.until.map_or(*until, |first| first.min(*until)));
                }
            }
        }
        if *self.redirection != redirection {
            self.redirection = Arc::new(redirection);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::testing::pod as pod_object;

    /// Pods that ought to be enrolled, with their nodes, and others.
    fn desired(enrolled: &[(&str, &str)], others: &[&str]) -> Objects {
        let enrolled = enrolled.iter().map(|(uid, node)| (*uid, *node, "ambient"));
        let others = others.iter().map(|uid| (*uid, "n", "none"));
        let mut of = NamespaceObjects::default();
        for (uid, node, mode) in enrolled.chain(others) {
            let metadata = format!("uid: {uid}\n  labels: {{istio.io/dataplane-mode: {mode}}}");
            let spec = format!("nodeName: {node}");
            let pod = pod_object("a", uid, &metadata, &spec, "podIP: 10.0.0.1");
            of.pods.insert(uid.into(), Arc::new(pod));
        }
        let namespaces = [("a".into(), Arc::new(of))].into();
        Objects {
            namespaces,
            ..Objects::default()
        }
    }

    fn reconcile(
        tracker: &mut RedirectionTracker,
        objects: &Objects,
        now: Instant,
    ) -> Arc<Redirection> {
        tracker.reconcile(objects, &MeshConfig::default(), |_| false, now);
        tracker.redirection("a").cloned().unwrap_or_default()
    }

    fn started_with(uid: &str, node: &str) -> RedirectionTracker {
        let captured = Captured {
            namespace: "a".into(),
            uid: uid.into(),
            node: node.into(),
        };
        RedirectionTracker::new(WITHDRAW_DELAY, [captured])
    }

    fn pod(uid: &str, state: EnrolmentState) -> PodEnrolment {
        PodEnrolment {
            uid: uid.into(),
            state: state.into(),
            message: String::new(),
        }
    }

    fn texts(set: &BTreeSet<PodUid>) -> Vec<&str> {
        set.iter().map(|uid| &**uid).collect()
    }

    #[test]
    fn opt_in_waits_for_the_node_and_opt_out_for_the_clients() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
        let wanted = desired(&[("u", "n")], &[]);
        let plan = reconcile(&mut tracker, &wanted, at(0));
        assert_eq!(
            (texts(&plan.hbone), texts(&plan.enrolments)),
            (vec![], vec!["u"])
        );
        assert!(tracker.report("n", &[pod("u", EnrolmentState::Pending)]));
        assert!(reconcile(&mut tracker, &wanted, at(1)).hbone.is_empty());
        assert!(tracker.report("n", &[pod("u", EnrolmentState::Enrolled)]));
        assert!(!tracker.report("n", &[pod("u", EnrolmentState::Enrolled)]));
        assert_eq!(texts(&reconcile(&mut tracker, &wanted, at(2)).hbone), ["u"]);

        // The proxy restarts, fails, forgets: still HBONE.
        for report in [
            vec![pod("u", EnrolmentState::Pending)],
            vec![pod("u", EnrolmentState::Failed)],
            vec![],
        ] {
            tracker.report("n", &report);
            assert_eq!(texts(&reconcile(&mut tracker, &wanted, at(3)).hbone), ["u"]);
        }

        let unwanted = desired(&[], &["u"]);
        let plan = reconcile(&mut tracker, &unwanted, at(1000));
        assert_eq!(
            (texts(&plan.hbone), texts(&plan.enrolments)),
            (vec![], vec!["u"])
        );
        assert_eq!(tracker.next_deadline(), Some(at(3000)));
        assert_eq!(
            texts(&reconcile(&mut tracker, &unwanted, at(2999)).enrolments),
            ["u"]
        );
        assert!(tracker.captured_on("a", "u").is_some());
        let plan = reconcile(&mut tracker, &unwanted, at(3000));
        assert_eq!(*plan, Redirection::default());
        assert_eq!(tracker.next_deadline(), None);
        assert!(tracker.captured_on("a", "u").is_none());
    }

    #[test]
    fn coming_back_before_the_withdrawal_is_done_needs_no_report() {
        let now = Instant::now();
        let mut tracker = started_with("u", "n");
        reconcile(&mut tracker, &desired(&[], &["u"]), now);
        let plan = reconcile(&mut tracker, &desired(&[("u", "n")], &[]), now);
        assert_eq!(texts(&plan.hbone), ["u"]);
        assert_eq!(tracker.next_deadline(), None);
    }

    #[test]
    fn a_pod_that_is_gone_is_forgotten_at_once() {
        let now = Instant::now();
        let mut tracker = started_with("u", "n");
        assert_eq!(
            *reconcile(&mut tracker, &desired(&[], &[]), now),
            Redirection::default()
        );
        assert_eq!(tracker.next_deadline(), None);
    }

    #[test]
    fn a_pod_that_moved_has_to_be_reported_again() {
        let now = Instant::now();
        let mut tracker = started_with("u", "n1");
        let moved = desired(&[("u", "n2")], &[]);
        assert!(reconcile(&mut tracker, &moved, now).hbone.is_empty());
        tracker.report("n2", &[pod("u", EnrolmentState::Enrolled)]);
        assert_eq!(texts(&reconcile(&mut tracker, &moved, now).hbone), ["u"]);
    }

    #[test]
    fn a_node_cannot_speak_for_the_pods_of_another() {
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
        tracker.report("evil", &[pod("u", EnrolmentState::Enrolled)]);
        let plan = reconcile(&mut tracker, &desired(&[("u", "n")], &[]), Instant::now());
        assert!(plan.hbone.is_empty());
    }

    #[test]
    fn a_pod_that_was_never_captured_is_withdrawn_at_once() {
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
        let now = Instant::now();
        reconcile(&mut tracker, &desired(&[("u", "n")], &[]), now);
        assert_eq!(
            *reconcile(&mut tracker, &desired(&[], &["u"]), now),
            Redirection::default()
        );
    }
}
