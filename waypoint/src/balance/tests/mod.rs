//! Table tests and properties; time and randomness are made up.

mod breaking;
mod concurrency;
mod convert;
mod cost;
mod hash_key;
mod hashing;
mod least_request;
mod locality;
mod outlier;
mod scan;
mod simple;
mod slow_start;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::identity::{SpiffeId, TrustDomain};
use adit_shared::model::{Health, LoadBalancing, Locality, TunnelProtocol, Workload, WorkloadUid};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;

/// A balancer, its clock and its dice.
struct Fixture {
    balancer: Balancer,
    settings: TrafficSettings,
    service: LoadBalancing,
    origin: Origin,
    now: Instant,
    rng: SmallRng,
}

impl Fixture {
    fn new(settings: TrafficSettings, endpoints: Vec<Endpoint>) -> Self {
        Self::with(
            settings,
            LoadBalancing::default(),
            Origin::default(),
            endpoints,
        )
    }

    fn with(
        settings: TrafficSettings,
        service: LoadBalancing,
        origin: Origin,
        endpoints: Vec<Endpoint>,
    ) -> Self {
        let now = Instant::now();
        let update = Update {
            settings: Arc::new(settings.clone()),
            subset: None,
            load_balancing: &service,
            origin: &origin,
            endpoints,
        };
        Self {
            balancer: Balancer::new(update, now),
            settings,
            service,
            origin,
            now,
            rng: SmallRng::seed_from_u64(7),
        }
    }

    fn update(&self, endpoints: Vec<Endpoint>) {
        self.balancer.update(
            Update {
                settings: Arc::new(self.settings.clone()),
                subset: None,
                load_balancing: &self.service,
                origin: &self.origin,
                endpoints,
            },
            self.now,
        );
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
    }

    fn pick(&mut self) -> Result<Picked, PickError> {
        self.pick_for(PickRequest::default())
    }

    fn pick_for(&mut self, request: PickRequest<'_>) -> Result<Picked, PickError> {
        self.balancer.pick(&request, self.now, &mut self.rng)
    }

    /// One request, answered at once.
    fn request(&mut self) -> String {
        let picked = self.pick().expect("an endpoint");
        let uid = picked.uid().to_string();
        picked.finish(answer(200, 1), self.now);
        uid
    }

    /// How often each endpoint gets one of `count` requests, one after the other.
    fn spread(&mut self, count: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..count {
            *counts.entry(self.request()).or_default() += 1;
        }
        counts
    }

    fn is_ejected(&self, uid: &str) -> bool {
        let all = self.balancer.endpoints(self.now);
        let found = all.iter().find(|status| &*status.endpoint.uid == uid);
        found.expect("a known endpoint").ejected
    }

    /// Ejects `uid` by consecutive 5xx answers, which it must be configured for.
    fn fail(&mut self, uid: &str, status: u16) {
        let picked = self
            .pick_for(PickRequest {
                sticky: Some(uid),
                ..Default::default()
            })
            .expect("an endpoint");
        assert_eq!(&**picked.uid(), uid);
        picked.finish(answer(status, 1), self.now);
    }
}

fn answer(status: u16, millis: u64) -> Outcome {
    Outcome::new(RequestResult::Status(status), Duration::from_millis(millis))
}

fn algorithm(algorithm: Algorithm) -> TrafficSettings {
    TrafficSettings {
        load_balancer: LoadBalancer {
            algorithm,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Ejects at the first 5xx, as many as there are.
fn touchy() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: 1,
        max_ejection_percent: 100,
        ..Default::default()
    }
}

fn locality(text: &str) -> Locality {
    let mut parts = text.split('/').map(Arc::<str>::from);
    let mut next = || parts.next().unwrap_or_default();
    Locality {
        region: next(),
        zone: next(),
        subzone: next(),
    }
}

/// An endpoint whose uid is its name.
fn endpoint(name: &str) -> Endpoint {
    let domain = TrustDomain::new("cluster.local").expect("a domain");
    let number = name
        .bytes()
        .fold(1u32, |a, b| a.wrapping_mul(31).wrapping_add(b.into()));
    let workload = Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![std::net::Ipv4Addr::from(0x0a00_0000 | number & 0xff_ffff).into()],
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        identity: SpiffeId::new(domain, "shop", "default").expect("an id"),
        native_tunnel: false,
        application_tunnel: None,
        waypoint: None,
        network_gateway: None,
        node: "".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_type: "pod",
        workload_name: "".into(),
        cluster_id: "".into(),
        locality: Locality::default(),
        host_network: false,
        health: Health::Healthy,
        capacity: 1,
        authorization_policies: vec![],
        served_by: Default::default(),
        require_waypoint: false,
        callers_matter: false,
        services: vec![],
    };
    Endpoint::new(Arc::new(workload), 8080)
}

fn weighted(name: &str, weight: u32) -> Endpoint {
    Endpoint {
        weight,
        ..endpoint(name)
    }
}

fn unready(name: &str) -> Endpoint {
    Endpoint {
        healthy: false,
        ..endpoint(name)
    }
}

fn at(name: &str, place: &str) -> Endpoint {
    let endpoint = endpoint(name);
    let workload = Workload {
        locality: locality(place),
        ..(*endpoint.workload).clone()
    };
    Endpoint {
        workload: Arc::new(workload),
        ..endpoint
    }
}

fn many(count: usize) -> Vec<Endpoint> {
    (0..count).map(|n| endpoint(&format!("pod-{n}"))).collect()
}

/// Fails unless each count is within five standard deviations of its expected share: by
/// chance less than once in a million times.
#[track_caller]
fn assert_shares(counts: &BTreeMap<String, usize>, shares: &[(&str, f64)]) {
    let total: usize = counts.values().sum();
    let sum: f64 = shares.iter().map(|(_, share)| share).sum();
    for (name, share) in shares {
        let probability = share / sum;
        let expected = total as f64 * probability;
        let deviation = (expected * (1.0 - probability)).sqrt().max(0.5);
        let count = counts.get(*name).copied().unwrap_or(0);
        assert!(
            (count as f64 - expected).abs() <= 5.0 * deviation,
            "{name}: {count} instead of {expected} of {total}: {counts:?}"
        );
    }
    for name in counts.keys() {
        assert!(shares.iter().any(|(other, _)| other == name), "{name}");
    }
}

fn uids(names: &[&str]) -> Vec<WorkloadUid> {
    names.iter().map(|name| (*name).into()).collect()
}
