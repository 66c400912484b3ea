//! The driver's step goes over the namespaces that changed. Here random histories are
//! gone through in that way and, beside it, by a naive one that keeps no namespace apart
//! and goes over every pod each time: both must say the same after every step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use adit_shared::xds::ResourceSet;
use kube::core::Status;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;

use super::pods::finish;
use super::{Kept, KubernetesStatus, Mark, Shared};
use crate::compile::{
    Compiler, MeshConfig, PodUid, Redirection, RedirectionTracker, Redirections, WITHDRAW_DELAY,
    compile, desired,
};
use crate::kubernetes::apply::RequestError;
use crate::model::{Kind, Object, ObjectRef, ObjectTable, Objects, Phase, Pod};
use crate::serve::{ResourceSnapshot, SnapshotBuilder};
use crate::source::decode_text;
use crate::status::{REDIRECTION, REDIRECTION_ENABLED};

const HISTORIES: u64 = 60;
const STEPS: usize = 80;
const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const NODES: [&str; 2] = ["n0", "n1"];
const SLOTS: usize = 6;

/// What a history is made of.
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Which pod of the name it is.
    incarnation: usize,
    present: bool,
    mode: Option<&'static str>,
    phase: &'static str,
    address: bool,
    ready: bool,
    marked: bool,
}

struct World {
    random: StdRng,
    table: ObjectTable,
    slots: BTreeMap<(&'static str, usize), Slot>,
    now: Instant,
}

impl World {
    fn new(seed: u64) -> Self {
        let slot = Slot {
            incarnation: 0,
            present: false,
            mode: None,
            phase: "Running",
            address: true,
            ready: true,
            marked: false,
        };
        let names = NAMESPACES
            .iter()
            .flat_map(|namespace| (0..SLOTS).map(move |index| ((*namespace, index), slot)));
        Self {
            random: StdRng::seed_from_u64(seed),
            table: ObjectTable::default(),
            slots: names.collect(),
            now: Instant::now(),
        }
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.random_range(0..of.len())]
    }

    fn put(&mut self, kind: Kind, namespace: &str, name: &str, yaml: Option<String>) {
        let reference = ObjectRef {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        };
        let object: Option<Object> =
            yaml.map(|yaml| decode_text(&yaml).pop().expect("an object").0);
        self.table.set(reference, object);
    }

    /// A random change of the objects.
    fn change(&mut self) {
        let namespace = self.one(&NAMESPACES);
        match self.random.random_range(0..14) {
            0 => {
                let labels = self.one(&[
                    None,
                    Some("{}"),
                    Some("{istio.io/dataplane-mode: ambient}"),
                    Some("{istio.io/dataplane-mode: ambient, istio.io/use-waypoint: w}"),
                ]);
                let yaml = labels.map(|labels| {
                    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {labels}}}\n")
                });
                self.put(Kind::Namespace, "", namespace, yaml);
            }
            1 => {
                let port = self.one(&[None, Some("80"), Some("81")]);
                let (name, selector) = self.one(&[("s", "selector: {app: p0}, "), ("t", "")]);
                let yaml = port.map(|port| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{selector}ports: [{{port: {port}}}]}}\n"));
                self.put(Kind::Service, namespace, name, yaml);
            }
            2 => self.change_slice(namespace),
            3 => {
                let scope = self.one(&[
                    None,
                    Some(("istio-system", "{app: p1}")),
                    Some(("a", "{app: p1}")),
                ]);
                for place in ["istio-system", "a"] {
                    let yaml = scope.filter(|(own, _)| *own == place).map(|(_, selector)| format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: l, namespace: {place}}}\nspec: {{selector: {{matchLabels: {selector}}}, rules: [{{to: [{{operation: {{methods: [GET]}}}}]}}]}}\n"));
                    self.put(Kind::AuthorizationPolicy, place, "l", yaml);
                }
            }
            4 => self.change_waypoint(),
            _ => {
                let index = self.random.random_range(0..SLOTS);
                let mode = self.one(&[None, Some("ambient"), Some("none")]);
                let phase = self.one(&["Running", "Running", "Running", "Succeeded"]);
                let choice = self.random.random_range(0..7);
                let Some(slot) = self.slots.get_mut(&(namespace, index)) else {
                    return;
                };
                match choice {
                    0 => slot.present = false,
                    1 => {
                        slot.incarnation += 1;
                        slot.present = true;
                        slot.marked = false;
                    }
                    2 => slot.mode = mode,
                    3 => slot.phase = phase,
                    4 => slot.address = !slot.address,
                    // Another replica, or a person.
                    5 => slot.marked = !slot.marked,
                    _ => {
                        slot.ready = !slot.ready;
                        slot.present = true;
                    }
                }
                self.show(namespace, index);
            }
        }
    }

    /// Of a service that selects its pods, of one that does not, or of what is no pod.
    fn change_slice(&mut self, namespace: &str) {
        let name = self.one(&["s-1", "t-1"]);
        let service = &name[..1];
        let reference =
            |index| format!(", targetRef: {{kind: Pod, name: p{index}, namespace: {namespace}}}");
        let index = self.random.random_range(0..SLOTS);
        let target = self.one(&[true, true, false]);
        let target = match target {
            true => reference(index),
            false => String::new(),
        };
        let present = self.random.random_bool(0.8);
        let slice = present.then(|| format!("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{{addresses: [10.0.1.{index}]{target}}}]\n"));
        self.put(Kind::EndpointSlice, namespace, name, slice);
    }

    /// A waypoint, which some namespaces use.
    fn change_waypoint(&mut self) {
        let present = self.random.random_bool(0.7);
        let gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: a, labels: {istio.io/waypoint-for: all}}\nspec: {gatewayClassName: istio-waypoint, addresses: [{value: 10.9.0.1}], listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n";
        self.put(Kind::Gateway, "a", "w", present.then(|| gateway.to_owned()));
    }

    /// Has the watch see a pod as it is.
    fn show(&mut self, namespace: &'static str, index: usize) {
        let slot = self.slots[&(namespace, index)];
        let (uid, node) = (uid(namespace, index, slot), node(index, slot));
        let mode = slot.mode.map_or(String::new(), |mode| {
            format!(", istio.io/dataplane-mode: {mode}")
        });
        let annotations = match slot.marked {
            true => format!("{{{REDIRECTION}: {REDIRECTION_ENABLED}}}"),
            false => "{}".into(),
        };
        let address = match slot.address {
            true => "podIP: 10.0.0.1, ",
            false => "",
        };
        let yaml = slot.present.then(|| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{index}, namespace: {namespace}, uid: {uid}, labels: {{app: p{index}{mode}}}, annotations: {annotations}}}\nspec: {{nodeName: {node}, containers: []}}\nstatus: {{{address}phase: {}, conditions: [{{type: Ready, status: '{}'}}]}}\n",
                slot.phase, slot.ready
            )
        });
        self.put(Kind::Pod, namespace, &format!("p{index}"), yaml);
    }

    /// A random report of a node; it may speak of what is not there, or not its own.
    fn report(&mut self) -> (&'static str, Vec<PodEnrolment>) {
        let from = self.one(&NODES);
        let all: Vec<_> = self.slots.clone().into_iter().collect();
        let mut pods = Vec::new();
        for ((namespace, index), slot) in all {
            let own = node(index, slot) == from || self.random.random_bool(0.05);
            if own && self.random.random_bool(0.8) {
                let state = self.one(&[
                    EnrolmentState::Enrolled,
                    EnrolmentState::Enrolled,
                    EnrolmentState::Pending,
                    EnrolmentState::Failed,
                ]);
                pods.push(PodEnrolment {
                    uid: uid(namespace, index, slot),
                    state: state.into(),
                    message: String::new(),
                });
            }
        }
        (from, pods)
    }

    /// The API server has taken an annotation, and the watch sees it.
    fn written(&mut self, mark: &Mark, of: &str) {
        let slots: Vec<_> = self.slots.keys().copied().collect();
        for (namespace, index) in slots {
            if let Some(slot) = self.slots.get_mut(&(namespace, index))
                && slot.present
                && uid(namespace, index, *slot) == of
            {
                slot.marked = mark.enable;
                self.show(namespace, index);
            }
        }
    }
}

fn uid(namespace: &str, index: usize, slot: Slot) -> String {
    format!("{namespace}-{index}-{}", slot.incarnation)
}

fn node(index: usize, slot: Slot) -> &'static str {
    NODES[(index + slot.incarnation) % NODES.len()]
}

/// As the driver goes about it.
struct Stepwise {
    tracker: RedirectionTracker,
    status: KubernetesStatus,
    compiler: Compiler,
    redirections: Redirections,
    snapshot: ResourceSnapshot,
}

impl Stepwise {
    fn step(&mut self, objects: &Objects, now: Instant) {
        let mesh = self.compiler.mesh();
        let touched = self
            .tracker
            .reconcile(objects, mesh, KubernetesStatus::is_marked, now);
        let redirections = &mut self.redirections;
        self.status
            .set_captured(&self.tracker, touched, objects, redirections);
        let mut builder = self.snapshot.edit();
        self.compiler.update(objects, redirections, &mut builder);
        self.snapshot = builder.build();
        self.status
            .set_statuses(self.compiler.changed_statuses(), objects);
    }
}

/// Everything anew each time.
#[derive(Default)]
struct Naive {
    reports: BTreeMap<String, BTreeMap<String, EnrolmentState>>,
    /// Nodes of captured pods; with a time: until then.
    pods: BTreeMap<PodUid, (Arc<str>, Option<Instant>)>,
    kept: BTreeMap<PodUid, Kept>,
    confirmed: BTreeSet<PodUid>,
    marks: BTreeMap<PodUid, Mark>,
}

impl Naive {
    fn report(&mut self, node: &str, pods: &[PodEnrolment]) {
        let pods = pods.iter().map(|pod| (pod.uid.clone(), pod.state()));
        self.reports.insert(node.into(), pods.collect());
    }

    fn step(&mut self, objects: &Objects, leading: bool, now: Instant) -> Redirection {
        let pods = || objects.namespaces.values().flat_map(|of| of.pods.values());
        let desired = desired(objects, &MeshConfig::default());
        for pod in pods().filter(|pod| KubernetesStatus::is_marked(pod)) {
            let uid = &pod.meta.uid;
            if desired.enrolled.get(uid) == Some(&pod.node) {
                let state = (pod.node.clone(), None);
                self.pods.entry(uid.clone()).or_insert(state);
            }
        }
        for (uid, node) in &desired.enrolled {
            let reported = self.reports.get(&**node).and_then(|pods| pods.get(&**uid));
            let captured = self.pods.get(uid).is_some_and(|(on, _)| on == node);
            match captured || reported == Some(&EnrolmentState::Enrolled) {
                true => self.pods.insert(uid.clone(), (node.clone(), None)),
                false => self.pods.remove(uid),
            };
        }
        self.pods.retain(|uid, (_, until)| {
            desired.enrolled.contains_key(uid) || {
                let until = *until.get_or_insert(now + WITHDRAW_DELAY);
                until > now && desired.others.contains(uid)
            }
        });
        self.see_to(pods(), leading);
        let enabled = |uid: &&PodUid| self.pods[*uid].1.is_none() && self.kept.contains_key(*uid);
        let withdrawing = |uid: &&PodUid| self.pods[*uid].1.is_some();
        let captured = || self.pods.keys();
        let enrolled = desired.enrolled.keys();
        Redirection {
            hbone: captured().filter(enabled).cloned().collect(),
            enrolments: enrolled
                .chain(captured().filter(withdrawing))
                .cloned()
                .collect(),
        }
    }

    fn see_to<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<Pod>>, leading: bool) {
        for uid in std::mem::take(&mut self.confirmed) {
            self.kept.entry(uid).or_insert(Kept::Written);
        }
        self.kept.retain(|uid, _| self.pods.contains_key(uid));
        self.marks.clear();
        for pod in pods {
            let uid = &pod.meta.uid;
            let captured = self.pods.contains_key(uid);
            let marked = KubernetesStatus::is_marked(pod);
            if captured && marked {
                self.kept.insert(uid.clone(), Kept::Seen);
            }
            let written = self.kept.get(uid) == Some(&Kept::Written);
            let set = captured && !marked && !written;
            let remove = !captured
                && marked
                && leading
                && !matches!(pod.phase, Phase::Succeeded | Phase::Failed);
            if set || remove {
                let mark = Mark {
                    namespace: pod.meta.namespace.clone(),
                    name: pod.meta.name.clone(),
                    enable: set,
                };
                self.marks.insert(uid.clone(), mark);
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.pods.values().filter_map(|(_, until)| *until).min()
    }
}

fn conflict() -> RequestError {
    let status = Status::failure("another", "Conflict").with_code(409);
    kube::Error::Api(status.boxed()).into()
}

fn bodies(set: Option<&ResourceSet>) -> BTreeMap<String, Vec<u8>> {
    let all = set.into_iter().flat_map(ResourceSet::iter);
    all.map(|(name, resource)| (name.to_string(), resource.body().to_vec()))
        .collect()
}

fn compare(stepwise: &Stepwise, naive: &Naive, wanted: &Redirection, objects: &Objects) {
    let mut published = Redirection::default();
    for redirection in stepwise.redirections.values() {
        published.hbone.extend(redirection.hbone.iter().cloned());
        let enrolments = redirection.enrolments.iter().cloned();
        published.enrolments.extend(enrolments);
    }
    assert_eq!(published, *wanted);
    assert_eq!(stepwise.tracker.next_deadline(), naive.next_deadline());
    let state = stepwise.status.shared.state.lock();
    assert_eq!(state.marks, naive.marks);
    let compiled = compile(objects, wanted, &MeshConfig::default());
    let told: BTreeMap<_, _> = state.wanted.values().flatten().collect();
    let told: BTreeMap<_, _> = told
        .into_iter()
        .map(|(of, wanted)| (of.clone(), wanted.status.clone()))
        .collect();
    assert_eq!(told, compiled.statuses);
    let mut expected = SnapshotBuilder::new();
    for (name, address) in &compiled.addresses {
        expected.set(ADDRESS_TYPE, name, address);
    }
    for (name, policy) in &compiled.authorizations {
        expected.set(AUTHORIZATION_TYPE, name, policy);
    }
    for (node, enrolment) in compiled.enrolments.values() {
        expected.set_enrolment(node, enrolment);
    }
    let expected = expected.build();
    for of in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        let now = stepwise.snapshot.resources(of);
        assert_eq!(bodies(now), bodies(expected.resources(of)), "{of}");
    }
    for node in NODES {
        let now = stepwise.snapshot.enrolments(node);
        assert_eq!(bodies(now), bodies(expected.enrolments(node)), "{node}");
    }
}

/// A history. Gives how many pods said HBONE in its steps, added up.
fn history(seed: u64) -> usize {
    let mut world = World::new(seed);
    let (lead, leading) = watch::channel(true);
    let shared = Arc::new(Shared::default());
    let mut stepwise = Stepwise {
        tracker: RedirectionTracker::new(WITHDRAW_DELAY, []),
        status: KubernetesStatus {
            shared: shared.clone(),
            leading,
            led: false,
            namespaces: BTreeMap::new(),
        },
        compiler: Compiler::new(MeshConfig::default()),
        redirections: Redirections::new(),
        snapshot: ResourceSnapshot::default(),
    };
    let mut naive = Naive::default();
    let mut hbone = 0;
    for _ in 0..STEPS {
        for _ in 0..world.random.random_range(0..3) {
            world.change();
        }
        if world.random.random_bool(0.4) {
            let (node, pods) = world.report();
            stepwise.tracker.report(node, &pods);
            naive.report(node, &pods);
        }
        if world.random.random_bool(0.05) {
            lead.send_modify(|leads| *leads = !*leads);
        }
        for _ in 0..world.random.random_range(0..4) {
            let Ok((uid, mark)) = shared.next_pod() else {
                break;
            };
            let Some(mark) = mark else {
                shared.state.lock().pods.done(&uid);
                continue;
            };
            if world.random.random_bool(0.3) {
                finish(&shared, uid, &mark, Err(conflict()));
                continue;
            }
            if mark.enable {
                naive.confirmed.insert(uid.clone());
            }
            // The watch may be faster than the answer, or later.
            if world.random.random_bool(0.5) {
                world.written(&mark, &uid);
            }
            finish(&shared, uid, &mark, Ok(()));
        }
        let pause = world.one(&[0, 0, 500, 1500, 2500]);
        world.now += Duration::from_millis(pause);
        let objects = world.table.objects().clone();
        stepwise.step(&objects, world.now);
        let leads = *stepwise.status.leading.borrow();
        let wanted = naive.step(&objects, leads, world.now);
        compare(&stepwise, &naive, &wanted, &objects);
        hbone += wanted.hbone.len();
    }
    hbone
}

#[test]
fn going_over_what_changed_is_going_over_everything() {
    let mut hbone = 0;
    for seed in 0..HISTORIES {
        let result = std::panic::catch_unwind(|| history(seed));
        match result {
            Ok(found) => hbone += found,
            Err(panic) => {
                eprintln!("history {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(hbone > 1000, "the histories are about something: {hbone}");
}

/// What is unchanged is not gone over: that is what makes a change cheap.
#[test]
fn other_namespaces_are_left_alone() {
    let mut world = World::new(1);
    for slot in world.slots.values_mut() {
        slot.present = true;
        slot.mode = Some("ambient");
    }
    for namespace in NAMESPACES {
        (0..SLOTS).for_each(|index| world.show(namespace, index));
    }
    let mesh = MeshConfig::default();
    let mut tracker = RedirectionTracker::new(WITHDRAW_DELAY, []);
    let now = world.now;
    let reconcile = |tracker: &mut RedirectionTracker, world: &World| -> Vec<Arc<str>> {
        let objects = world.table.objects();
        let touched = tracker.reconcile(objects, &mesh, |_| false, now);
        touched.into_iter().collect()
    };
    assert_eq!(reconcile(&mut tracker, &world).len(), NAMESPACES.len());
    assert!(reconcile(&mut tracker, &world).is_empty());
    let slot = world.slots.get_mut(&("b", 0)).expect("there");
    slot.ready = false;
    world.show("b", 0);
    assert!(
        reconcile(&mut tracker, &world).is_empty(),
        "readiness is nothing to do with capture"
    );
    let slot = world.slots.get_mut(&("b", 0)).expect("there");
    slot.mode = Some("none");
    world.show("b", 0);
    assert_eq!(reconcile(&mut tracker, &world), [Arc::from("b")]);
    // A report concerns the namespaces whose pods it is about.
    let slot = world.slots[&("c", 1)];
    let report = |state: EnrolmentState| {
        [PodEnrolment {
            uid: uid("c", 1, slot),
            state: state.into(),
            message: String::new(),
        }]
    };
    let node = node(1, slot);
    tracker.report(node, &report(EnrolmentState::Pending));
    assert!(reconcile(&mut tracker, &world).is_empty());
    tracker.report(node, &report(EnrolmentState::Enrolled));
    assert_eq!(reconcile(&mut tracker, &world), [Arc::from("c")]);
}
