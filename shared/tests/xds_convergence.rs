//! The client's and the server's state machines against each other: whatever is changed,
//! subscribed, rejected, lost and reconnected in whatever order, when the exchange comes to
//! rest the client holds what the server serves, and policies were there before the
//! workloads that came with them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use adit_shared::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::xds::client::{DeltaState, Rejected, Resource, Subscription};
use adit_shared::xds::server::{Outcome, ResourceSource, ServerState};
use adit_shared::xds::{ResourceSet, VersionedResource};
use proptest::prelude::*;

const TYPES: [&str; 3] = [AUTHORIZATION_TYPE, ADDRESS_TYPE, ENROLMENT_TYPE];

#[derive(Clone, Default)]
struct Source {
    generation: u64,
    sets: BTreeMap<&'static str, ResourceSet>,
}

impl ResourceSource for Source {
    fn resources(&self, type_url: &str) -> Option<&ResourceSet> {
        self.sets.get(type_url)
    }

    fn version(&self) -> String {
        self.generation.to_string()
    }
}

/// What a handler holds, by type and name. Bodies that start with `bad` are rejected; the
/// last good body stays, as it would in a proxy.
#[derive(Default)]
struct Held {
    good: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    rejected: BTreeMap<String, BTreeSet<String>>,
}

impl Held {
    fn apply(&mut self, url: &str, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let good = self.good.entry(url.to_owned()).or_default();
        let rejected = self.rejected.entry(url.to_owned()).or_default();
        let mut out = vec![];
        for resource in updates {
            if resource.body.starts_with(b"bad") {
                rejected.insert(resource.name.clone());
                out.push(Rejected {
                    name: resource.name,
                    reason: "bad".into(),
                });
            } else {
                rejected.remove(&resource.name);
                good.insert(resource.name, resource.body.to_vec());
            }
        }
        for name in removed {
            good.remove(&name);
            rejected.remove(&name);
        }
        out
    }
}

struct Mesh {
    source: Source,
    client: DeltaState,
    held: Held,
    server: Option<ServerState>,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    to_client: VecDeque<DeltaDiscoveryResponse>,
    outstanding: BTreeMap<String, usize>,
    max_response: usize,
}

impl Mesh {
    fn new(on_demand: bool, max_response: usize) -> Self {
        let address = if on_demand {
            Subscription::OnDemand(BTreeSet::new())
        } else {
            Subscription::Wildcard
        };
        let mut mesh = Self {
            source: Source::default(),
            client: DeltaState::new(
                Node::default(),
                [
                    (AUTHORIZATION_TYPE.to_owned(), Subscription::Wildcard),
                    (ADDRESS_TYPE.to_owned(), address),
                    (ENROLMENT_TYPE.to_owned(), Subscription::Wildcard),
                ],
            ),
            held: Held::default(),
            server: None,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            outstanding: BTreeMap::new(),
            max_response,
        };
        mesh.connect();
        mesh
    }

    fn connect(&mut self) {
        self.client.disconnect();
        self.to_client.clear();
        self.outstanding.clear();
        self.to_server = self.client.connect().into();
        let server = ServerState::new(Arc::new(self.source.clone()));
        self.server = Some(server.with_max_response_bytes(self.max_response));
    }

    fn publish(&mut self) {
        self.source.generation += 1;
        if let Some(server) = &mut self.server {
            server.update(Arc::new(self.source.clone()));
        }
        self.drain_server();
    }

    fn drain_server(&mut self) {
        let Some(server) = &mut self.server else {
            return;
        };
        while let Some(response) = server.next_response() {
            let outstanding = self
                .outstanding
                .entry(response.type_url.clone())
                .or_default();
            *outstanding += 1;
            assert_eq!(*outstanding, 1, "one response per type is outstanding");
            self.to_client.push_back(response);
        }
    }

    /// Delivers one message, if there is one. Returns whether there was.
    fn step(&mut self) -> bool {
        if let Some(request) = self.to_server.pop_front() {
            if !request.response_nonce.is_empty() {
                *self
                    .outstanding
                    .get_mut(&request.type_url)
                    .expect("was sent") -= 1;
            }
            let acknowledges = !request.response_nonce.is_empty();
            let nack = request.error_detail.is_some();
            let outcome = self
                .server
                .as_mut()
                .expect("connected")
                .request(request)
                .expect("legal");
            match outcome {
                Outcome::Acknowledged => assert!(acknowledges && !nack),
                Outcome::Rejected(message) => assert!(nack && message.contains("bad")),
                Outcome::Subscribed => assert!(!acknowledges),
                Outcome::Stale => panic!("nothing is stale between these two"),
            }
            self.drain_server();
            return true;
        }
        if let Some(response) = self.to_client.pop_front() {
            let url = response.type_url.clone();
            let held = &mut self.held;
            let applied = self
                .client
                .response(response, |updates, removed| {
                    held.apply(&url, updates, removed)
                })
                .expect("legal");
            self.to_server.push_back(applied.request);
            return true;
        }
        false
    }

    fn settle(&mut self) {
        let mut steps = 0;
        while self.step() {
            steps += 1;
            assert!(steps < 100_000, "the exchange comes to rest");
        }
        assert!(self.client.is_ready());
        assert!(self.server.as_ref().expect("connected").is_synced());
    }

    fn assert_converged(&self, wanted: Option<&BTreeSet<String>>) {
        for url in TYPES {
            let wanted = wanted.filter(|_| url == ADDRESS_TYPE);
            let mut good = BTreeMap::new();
            let mut bad = BTreeSet::new();
            for (name, resource) in self.source.sets.get(url).iter().flat_map(|set| set.iter()) {
                if wanted.is_some_and(|wanted| !wanted.contains(&**name)) {
                    continue;
                }
                if resource.body().starts_with(b"bad") {
                    bad.insert(name.to_string());
                } else {
                    good.insert(name.to_string(), resource.body().to_vec());
                }
            }
            let mut held = self.held.good.get(url).cloned().unwrap_or_default();
            let rejected = self.held.rejected.get(url).cloned().unwrap_or_default();
            // Of a rejected resource the last good version is kept.
            held.retain(|name, _| !rejected.contains(name));
            if let Some(wanted) = wanted {
                held.retain(|name, _| wanted.contains(name));
            }
            assert_eq!(held, good, "{url}");
            let rejected: BTreeSet<_> = rejected
                .into_iter()
                .filter(|name| wanted.is_none_or(|wanted| wanted.contains(name)))
                .collect();
            assert_eq!(rejected, bad, "{url}");
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Set(usize, u8, u8),
    SetBad(usize, u8, u8),
    Remove(usize, u8),
    Publish,
    Deliver(u8),
    Reconnect,
    Subscribe(u8),
    Unsubscribe(u8),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0..3usize, 0..8u8, 0..4u8).prop_map(|(t, n, b)| Action::Set(t, n, b)),
        1 => (0..3usize, 0..8u8, 0..4u8).prop_map(|(t, n, b)| Action::SetBad(t, n, b)),
        2 => (0..3usize, 0..8u8).prop_map(|(t, n)| Action::Remove(t, n)),
        3 => Just(Action::Publish),
        6 => (1..5u8).prop_map(Action::Deliver),
        1 => Just(Action::Reconnect),
        2 => (0..8u8).prop_map(Action::Subscribe),
        1 => (0..8u8).prop_map(Action::Unsubscribe),
    ]
}

fn run(actions: Vec<Action>, on_demand: bool, max_response: usize) {
    let mut mesh = Mesh::new(on_demand, max_response);
    let mut wanted = BTreeSet::new();
    for action in actions {
        match action {
            Action::Set(kind, name, body) => {
                let body = VersionedResource::new(format!("body {body}"));
                let set = mesh.source.sets.entry(TYPES[kind]).or_default();
                set.insert(&format!("r{name}"), body);
            }
            Action::SetBad(kind, name, body) => {
                let body = VersionedResource::new(format!("bad {body}"));
                let set = mesh.source.sets.entry(TYPES[kind]).or_default();
                set.insert(&format!("r{name}"), body);
            }
            Action::Remove(kind, name) => {
                let set = mesh.source.sets.entry(TYPES[kind]).or_default();
                set.remove(&format!("r{name}"));
            }
            Action::Publish => mesh.publish(),
            Action::Deliver(count) => {
                for _ in 0..count {
                    mesh.step();
                }
            }
            Action::Reconnect => mesh.connect(),
            Action::Subscribe(name) if on_demand => {
                let name = format!("r{name}");
                wanted.insert(name.clone());
                let request = mesh.client.subscribe(ADDRESS_TYPE, [name]);
                mesh.to_server.extend(request);
            }
            Action::Unsubscribe(name) if on_demand => {
                let name = format!("r{name}");
                wanted.remove(&name);
                let request = mesh.client.unsubscribe(ADDRESS_TYPE, [name.as_str()]);
                mesh.to_server.extend(request);
                // The caller forgets what it no longer asks for.
                if let Some(names) = mesh.held.good.get_mut(ADDRESS_TYPE) {
                    names.remove(&name);
                }
                if let Some(names) = mesh.held.rejected.get_mut(ADDRESS_TYPE) {
                    names.remove(&name);
                }
            }
            Action::Subscribe(_) | Action::Unsubscribe(_) => {}
        }
    }
    mesh.publish();
    mesh.settle();
    mesh.assert_converged(on_demand.then_some(&wanted));
    // A client that has everything is told nothing when it comes back, except about what
    // it rejected.
    mesh.connect();
    while let Some(request) = mesh.to_server.pop_front() {
        let server = mesh.server.as_mut().expect("connected");
        server.request(request).expect("legal");
    }
    mesh.drain_server();
    for response in &mesh.to_client {
        let rejected = mesh.held.rejected.get(&response.type_url);
        for resource in &response.resources {
            assert!(
                rejected.is_some_and(|names| names.contains(&resource.name)),
                "{} {} sent again",
                response.type_url,
                resource.name
            );
        }
    }
    mesh.settle();
    mesh.assert_converged(on_demand.then_some(&wanted));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_client_of_everything_converges(actions in prop::collection::vec(action(), 0..60)) {
        run(actions, false, usize::MAX);
    }

    #[test]
    fn a_client_of_everything_converges_by_small_responses(
        actions in prop::collection::vec(action(), 0..60)
    ) {
        run(actions, false, 150);
    }

    #[test]
    fn a_client_on_demand_converges(actions in prop::collection::vec(action(), 0..60)) {
        run(actions, true, usize::MAX);
    }
}

/// What comes after it was unsubscribed from is forgotten by the caller with the next call, and
/// must not be claimed then.
#[test]
fn a_late_answer_is_not_claimed_once_it_is_forgotten() {
    use Action::{Deliver, Publish, Reconnect, Set, Subscribe, Unsubscribe};
    let actions = [
        Set(1, 1, 0),
        Publish,
        Deliver(8),
        Subscribe(1),
        Unsubscribe(1),
        Deliver(4),
        Unsubscribe(1),
        Subscribe(1),
        Reconnect,
    ];
    run(actions.into(), true, usize::MAX);
}

fn hostile_request() -> impl Strategy<Value = DeltaDiscoveryRequest> {
    let name = || prop_oneof![Just("*".to_owned()), "r[0-4]", ".{0,4}"];
    let names = move || prop::collection::vec(name(), 0..4);
    let url = prop_oneof![
        6 => prop::sample::select(&TYPES[..]).prop_map(str::to_owned),
        1 => ".{0,3}"
    ];
    let nonce = prop_oneof![Just(String::new()), (0..20u8).prop_map(|n| n.to_string())];
    let claims = prop::collection::btree_map("r[0-4]", ".{0,3}", 0..4);
    let nack = prop::option::of(".{0,5}");
    (url, names(), names(), nonce, claims, nack).prop_map(
        |(url, subscribe, unsubscribe, nonce, claims, nack)| DeltaDiscoveryRequest {
            type_url: url,
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            response_nonce: nonce,
            initial_resource_versions: claims,
            error_detail: nack.map(|message| adit_shared::proto::xds::Status {
                message,
                ..Default::default()
            }),
            ..DeltaDiscoveryRequest::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Whatever a client says, the server neither panics nor says more than one unanswered
    /// thing per type, nor anything twice by itself.
    #[test]
    fn no_client_confuses_the_server(
        requests in prop::collection::vec((hostile_request(), any::<bool>(), 0..5u8), 0..40)
    ) {
        let mut source = Source::default();
        let mut server = ServerState::new(Arc::new(source.clone()));
        let mut outstanding = BTreeMap::new();
        for (request, publish, name) in requests {
            if publish {
                source.generation += 1;
                let body = format!("body {}", source.generation);
                set(&mut source, TYPES[usize::from(name) % 3], &format!("r{name}"), &body);
                server.update(Arc::new(source.clone()));
            }
            if outstanding.get(&request.type_url) == Some(&request.response_nonce) {
                outstanding.remove(&request.type_url);
            }
            let _ = server.request(request);
            while let Some(response) = server.next_response() {
                let before = outstanding.insert(response.type_url, response.nonce);
                prop_assert_eq!(before, None);
            }
        }
    }
}

fn set(source: &mut Source, url: &'static str, name: &str, body: &str) {
    let set = source.sets.entry(url).or_default();
    set.insert(name, VersionedResource::new(body.to_owned()));
}

fn summary(response: &DeltaDiscoveryResponse) -> String {
    let kind = response.type_url.rsplit('.').next().unwrap_or_default();
    let mut parts = vec![kind.to_owned()];
    parts.extend(response.resources.iter().map(|r| format!("+{}", r.name)));
    parts.extend(response.removed_resources.iter().map(|n| format!("-{n}")));
    parts.join(" ")
}

/// Delivers everything and returns what the server sent, in order.
fn exchange(mesh: &mut Mesh) -> Vec<String> {
    let mut sent: Vec<String> = mesh.to_client.iter().map(summary).collect();
    let mut known = mesh.to_client.len();
    loop {
        let before = mesh.to_client.len();
        assert_eq!(before, known);
        let from_server = mesh.to_server.is_empty();
        if !mesh.step() {
            return sent;
        }
        let kept = if from_server { before - 1 } else { before };
        sent.extend(mesh.to_client.iter().skip(kept).map(summary));
        known = mesh.to_client.len();
    }
}

#[test]
fn policies_come_before_and_go_after_the_workloads_that_name_them() {
    let mut mesh = Mesh::new(false, usize::MAX);
    mesh.settle();
    set(
        &mut mesh.source,
        ADDRESS_TYPE,
        "workload",
        "names the policy",
    );
    set(&mut mesh.source, AUTHORIZATION_TYPE, "policy", "1");
    mesh.publish();
    assert_eq!(
        exchange(&mut mesh),
        ["Authorization +policy", "Address +workload"]
    );
    set(&mut mesh.source, ADDRESS_TYPE, "workload", "names none");
    set(&mut mesh.source, AUTHORIZATION_TYPE, "other", "1");
    let policies = mesh.source.sets.get_mut(AUTHORIZATION_TYPE).expect("set");
    policies.remove("policy");
    mesh.publish();
    assert_eq!(
        exchange(&mut mesh),
        [
            "Authorization +other",
            "Address +workload",
            "Authorization -policy"
        ]
    );
}

#[test]
fn a_workload_waits_for_a_policy_that_waits_for_an_acknowledgement() {
    let mut mesh = Mesh::new(false, usize::MAX);
    mesh.settle();
    set(&mut mesh.source, AUTHORIZATION_TYPE, "p", "1");
    mesh.publish();
    assert_eq!(mesh.to_client.len(), 1);
    set(&mut mesh.source, AUTHORIZATION_TYPE, "p", "2");
    set(&mut mesh.source, AUTHORIZATION_TYPE, "q", "1");
    set(&mut mesh.source, ADDRESS_TYPE, "w", "names q");
    mesh.publish();
    assert_eq!(mesh.to_client.len(), 1, "p is not acknowledged");
    assert_eq!(
        exchange(&mut mesh),
        ["Authorization +p", "Authorization +p +q", "Address +w"]
    );
}

#[test]
fn what_happens_while_a_response_is_outstanding_is_sent_once() {
    let mut mesh = Mesh::new(false, usize::MAX);
    mesh.settle();
    set(&mut mesh.source, ADDRESS_TYPE, "a", "0");
    mesh.publish();
    for round in 1..100 {
        set(&mut mesh.source, ADDRESS_TYPE, "a", &round.to_string());
        set(&mut mesh.source, ADDRESS_TYPE, "b", &round.to_string());
        mesh.publish();
    }
    let addresses = mesh.source.sets.get_mut(ADDRESS_TYPE).expect("set");
    addresses.remove("b");
    mesh.publish();
    assert_eq!(exchange(&mut mesh), ["Address +a", "Address +a -b"]);
    mesh.settle();
    mesh.assert_converged(None);
}
