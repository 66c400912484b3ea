//! Manifests in, resources out; and a node proxy's view of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use adit_controlplane::compile::{Compiled, MeshConfig, Redirection, compile, desired};
use adit_controlplane::model::{Finding, Objects};
use adit_controlplane::source::Directory;
use adit_shared::identity::{SpiffeId, TrustDomain};
use adit_shared::model::{Store, Update, address_from_resource};
use adit_shared::policy::{Connection, Origin, Policy, TrustDomains};
use adit_shared::proto::workload::{Service, Workload, address};

/// Reads manifests as the directory source does.
pub fn read(yaml: &str) -> (Objects, Vec<Finding>) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("all.yaml"), yaml).unwrap();
    let mut source = Directory::new(vec![directory.path().into()]);
    source.reload();
    (source.objects().clone(), source.findings().to_vec())
}

/// A compiled mesh.
pub struct Mesh {
    pub compiled: Compiled,
    pub config: MeshConfig,
}

/// Compiles manifests with every wanted pod captured.
pub fn mesh(yaml: &str) -> Mesh {
    mesh_with(yaml, MeshConfig::default())
}

pub fn mesh_with(yaml: &str, config: MeshConfig) -> Mesh {
    let (objects, _) = read(yaml);
    let all: BTreeSet<_> = desired(&objects, &config).enrolled.into_keys().collect();
    let redirection = Redirection {
        hbone: all.clone(),
        enrolments: all,
    };
    Mesh {
        compiled: compile(&objects, &redirection, &config),
        config,
    }
}

impl Mesh {
    pub fn workload(&self, name: &str) -> &Workload {
        let address = &self.compiled.addresses[&format!("Kubernetes//Pod/{name}")];
        match &address.r#type {
            Some(address::Type::Workload(workload)) => workload,
            other => panic!("{other:?}"),
        }
    }

    pub fn service(&self, name: &str) -> &Service {
        match &self.compiled.addresses[name].r#type {
            Some(address::Type::Service(service)) => service,
            other => panic!("{other:?}"),
        }
    }

    /// The first condition of an object, as `status reason`.
    pub fn condition(&self, policy: &str) -> String {
        let (namespace, name) = policy.split_once('/').unwrap();
        let found = self
            .compiled
            .statuses
            .iter()
            .find(|(object, _)| *object.namespace == *namespace && *object.name == *name);
        let condition = found.and_then(|(_, status)| status.conditions.first());
        condition.map_or("none".into(), |c| format!("{} {}", c.status, c.reason))
    }

    /// Whether the node proxy of pod `to` lets a connection in. `from` is `ns/sa`, a
    /// whole SPIFFE id, or empty for plaintext; `ns/sa for ns/sa` for a waypoint that
    /// names its caller.
    pub fn admits(&self, from: &str, source_ip: &str, to: &str, port: u16) -> bool {
        let (from, caller) = match from.split_once(" for ") {
            Some((from, caller)) => (from, Some(caller)),
            None => (from, None),
        };
        let mut store = Store::new();
        let addresses = self.compiled.addresses.iter();
        let addresses = addresses.map(|(name, a)| address_from_resource(name, a).unwrap());
        let policies = self.compiled.authorizations.iter();
        let policies =
            policies.map(|(name, a)| Update::UpsertPolicy(Policy::from_resource(name, a)));
        store.apply(addresses.chain(policies).collect::<Vec<_>>());
        let snapshot = store.snapshot();
        let uid = format!("Kubernetes//Pod/{to}");
        let workload = snapshot.workload(&uid).unwrap();
        let domain = &self.config.trust_domain;
        let id = |text: &str| -> Option<SpiffeId> {
            let (ns, sa) = text.split_once('/')?;
            Some(match text.starts_with("spiffe:") {
                true => text.parse().unwrap(),
                false => format!("spiffe://{domain}/ns/{ns}/sa/{sa}")
                    .parse()
                    .unwrap(),
            })
        };
        let (identity, caller) = (id(from), caller.and_then(id));
        let aliases = self.config.trust_domain_aliases.clone();
        let connection = Connection {
            source_identity: identity.as_ref(),
            source_ip: source_ip.parse().unwrap(),
            destination_ip: IpAddr::from([10, 0, 0, 1]),
            destination_port: port,
            origin: caller.as_ref().map(|identity| Origin {
                identity,
                ip: source_ip.parse().unwrap(),
            }),
        };
        let trust = TrustDomains::new(domain.clone(), aliases);
        let policies = snapshot.policies_for(workload);
        assert!(
            policies.missing().is_empty(),
            "listed and not sent: {:?}",
            policies.missing()
        );
        policies
            .evaluate(&connection, &trust)
            .verdict
            .is_permitted()
    }
}

pub fn trust_domain(text: &str) -> TrustDomain {
    TrustDomain::new(text).unwrap()
}
