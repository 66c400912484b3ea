//! Which pods are captured, as far as clients may rely on it.
//!
//! A client encrypts as soon as a workload says HBONE, and goes on in plaintext as soon
//! as it says NONE. So a pod says HBONE only after its node has reported it, and goes on
//! saying so for as long as it is to be enrolled: a node proxy that restarts, or reports
//! that it cannot capture the pod any more, makes connections fail, never go out in
//! plaintext. On opt-out the workload says NONE first, and only when clients have had
//! time to follow is the enrolment itself withdrawn.
//!
//! Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};

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

/// What to publish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redirection {
    /// Pods whose workloads say HBONE.
    pub hbone: BTreeSet<PodUid>,
    /// Pods whose enrolment is published: those of `Desired`, and those that are being
    /// withdrawn.
    pub enrolments: BTreeSet<PodUid>,
}

/// One pod as its node reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// The state.
    pub state: EnrolmentState,
    /// Why it is not [`EnrolmentState::Enrolled`].
    pub message: String,
}

/// The state machine of all pods.
#[derive(Debug)]
pub struct RedirectionTracker {
    delay: Duration,
    reports: BTreeMap<Arc<str>, BTreeMap<PodUid, PodReport>>,
    pods: BTreeMap<PodUid, State>,
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
    /// Starts with the pods (and nodes) that were captured when the control plane
    /// stopped.
    pub fn new(delay: Duration, captured: impl IntoIterator<Item = (PodUid, Arc<str>)>) -> Self {
        Self {
            delay,
            reports: BTreeMap::new(),
            pods: captured
                .into_iter()
                .map(|(uid, node)| (uid, State::Enabled { node }))
                .collect(),
        }
    }

    /// Learns of a captured pod from elsewhere: another replica has its node's reports.
    pub fn adopt(&mut self, uid: &PodUid, node: &Arc<str>) {
        if !self.pods.contains_key(uid) {
            let node = node.clone();
            self.pods.insert(uid.clone(), State::Enabled { node });
        }
    }

    /// Takes a node's report, which replaces the one before. Says whether it differs.
    pub fn report(&mut self, node: &str, pods: &[PodEnrolment]) -> bool {
        let report: BTreeMap<PodUid, PodReport> = pods
            .iter()
            .map(|pod| {
                let report = PodReport {
                    state: pod.state(),
                    message: pod.message.clone(),
                };
                (pod.uid.as_str().into(), report)
            })
            .collect();
        if self.reports.get(node) == Some(&report) {
            return false;
        }
        self.reports.insert(node.into(), report);
        true
    }

    /// Moves every pod on, and says what to publish now.
    pub fn reconcile(&mut self, desired: &Desired, now: Instant) -> Redirection {
        for (uid, node) in &desired.enrolled {
            // A node speaks for its own pods only.
            let reported = self
                .reports
                .get(node)
                .and_then(|pods| pods.get(uid))
                .is_some_and(|pod| pod.state == EnrolmentState::Enrolled);
            let captured = self.pods.get(uid).is_some_and(|state| state.node() == node);
            if captured || reported {
                let node = node.clone();
                self.pods.insert(uid.clone(), State::Enabled { node });
            } else {
                self.pods.remove(uid);
            }
        }
        let delay = self.delay;
        self.pods.retain(|uid, state| {
            if desired.enrolled.contains_key(uid) {
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
            waiting && desired.others.contains(uid)
        });
        let withdrawing = self
            .pods
            .iter()
            .filter(|(_, state)| matches!(state, State::Withdrawing { .. }))
            .map(|(uid, _)| uid.clone());
        Redirection {
            hbone: self
                .pods
                .iter()
                .filter(|(_, state)| matches!(state, State::Enabled { .. }))
                .map(|(uid, _)| uid.clone())
                .collect(),
            enrolments: desired
                .enrolled
                .keys()
                .cloned()
                .chain(withdrawing)
                .collect(),
        }
    }

    /// When [`Self::reconcile`] has to be called again even if nothing happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.pods.values().filter_map(|state| match state {
            State::Withdrawing { until, .. } => Some(*until),
            State::Enabled { .. } => None,
        });
        deadlines.min()
    }

    /// Captured pods and their nodes, to be kept over a restart. A pod that is being
    /// withdrawn counts: after a restart its delay begins again.
    pub fn captured(&self) -> impl Iterator<Item = (&PodUid, &Arc<str>)> {
        self.pods.iter().map(|(uid, state)| (uid, state.node()))
    }

    /// What the node says of a pod of its own.
    pub fn reported(&self, node: &str, uid: &str) -> Option<&PodReport> {
        self.reports.get(node)?.get(uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired(enrolled: &[(&str, &str)], others: &[&str]) -> Desired {
        Desired {
            enrolled: enrolled
                .iter()
                .map(|(uid, node)| ((*uid).into(), (*node).into()))
                .collect(),
            others: others.iter().map(|uid| (*uid).into()).collect(),
        }
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
        let plan = tracker.reconcile(&wanted, at(0));
        assert_eq!(
            (texts(&plan.hbone), texts(&plan.enrolments)),
            (vec![], vec!["u"])
        );
        assert!(tracker.report("n", &[pod("u", EnrolmentState::Pending)]));
        assert!(tracker.reconcile(&wanted, at(1)).hbone.is_empty());
        assert!(tracker.report("n", &[pod("u", EnrolmentState::Enrolled)]));
        assert!(!tracker.report("n", &[pod("u", EnrolmentState::Enrolled)]));
        assert_eq!(texts(&tracker.reconcile(&wanted, at(2)).hbone), ["u"]);

        // The proxy restarts, fails, forgets: still HBONE.
        for report in [
            vec![pod("u", EnrolmentState::Pending)],
            vec![pod("u", EnrolmentState::Failed)],
            vec![],
        ] {
            tracker.report("n", &report);
            assert_eq!(texts(&tracker.reconcile(&wanted, at(3)).hbone), ["u"]);
        }

        let unwanted = desired(&[], &["u"]);
        let plan = tracker.reconcile(&unwanted, at(1000));
        assert_eq!(
            (texts(&plan.hbone), texts(&plan.enrolments)),
            (vec![], vec!["u"])
        );
        assert_eq!(tracker.next_deadline(), Some(at(3000)));
        assert_eq!(
            texts(&tracker.reconcile(&unwanted, at(2999)).enrolments),
            ["u"]
        );
        assert_eq!(tracker.captured().count(), 1);
        let plan = tracker.reconcile(&unwanted, at(3000));
        assert_eq!(plan, Redirection::default());
        assert_eq!(tracker.next_deadline(), None);
        assert_eq!(tracker.captured().count(), 0);
    }

    #[test]
    fn coming_back_before_the_withdrawal_is_done_needs_no_report() {
        let now = Instant::now();
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, [("u".into(), "n".into())]);
        tracker.reconcile(&desired(&[], &["u"]), now);
        let plan = tracker.reconcile(&desired(&[("u", "n")], &[]), now);
        assert_eq!(texts(&plan.hbone), ["u"]);
        assert_eq!(tracker.next_deadline(), None);
    }

    #[test]
    fn a_pod_that_is_gone_is_forgotten_at_once() {
        let now = Instant::now();
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, [("u".into(), "n".into())]);
        assert_eq!(
            tracker.reconcile(&desired(&[], &[]), now),
            Redirection::default()
        );
        assert_eq!(tracker.next_deadline(), None);
    }

    #[test]
    fn a_pod_that_moved_has_to_be_reported_again() {
        let now = Instant::now();
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, [("u".into(), "n1".into())]);
        let moved = desired(&[("u", "n2")], &[]);
        assert!(tracker.reconcile(&moved, now).hbone.is_empty());
        tracker.report("n2", &[pod("u", EnrolmentState::Enrolled)]);
        assert_eq!(texts(&tracker.reconcile(&moved, now).hbone), ["u"]);
    }

    #[test]
    fn a_node_cannot_speak_for_the_pods_of_another() {
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
        tracker.report("evil", &[pod("u", EnrolmentState::Enrolled)]);
        let plan = tracker.reconcile(&desired(&[("u", "n")], &[]), Instant::now());
        assert!(plan.hbone.is_empty());
    }

    #[test]
    fn a_pod_that_was_never_captured_is_withdrawn_at_once() {
        let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
        let now = Instant::now();
        tracker.reconcile(&desired(&[("u", "n")], &[]), now);
        assert_eq!(
            tracker.reconcile(&desired(&[], &["u"]), now),
            Redirection::default()
        );
    }
}
