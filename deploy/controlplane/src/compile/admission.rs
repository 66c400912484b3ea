//! Node proxies admit the waypoints of their pods.
//!
//! Behind a waypoint the node proxy of a pod meets the waypoint's identity and not the
//! caller's, and an ALLOW policy that names callers would refuse it. The waypoint gets all
//! policies of the pods that it serves and applies them to the caller itself
//! (`l7/authorization.rs`). So a pod that some ALLOW policy covers lists one more:
//! `istio_allow_waypoint_<namespace>_<name>`, which allows the service accounts of exactly
//! the waypoint that serves this pod. Whoever else dials the pod meets the other policies
//! as before, and DENY policies hold for the waypoint too.
//!
//! A pod that no ALLOW policy covers lists none, because an ALLOW policy would refuse
//! everybody else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use adit_shared::proto::security::{Action, Authorization, Group, Match, Rules, Scope};

use super::l7::{GATEWAY_NAME, Served, WaypointName, Waypoints};
use super::mesh::MeshConfig;
use super::selectors::SelectorIndex;
use super::wire;
use crate::model::{
    Labels, NamespaceObjects, Objects, PolicyAction, PolicyScope, PolicySpec, StringMatch,
};

/// The service account of a waypoint's pods, on its Gateway.
const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";

/// The service accounts of each waypoint.
pub(super) type Accounts = BTreeMap<WaypointName, BTreeSet<Arc<str>>>;

/// Collects the service accounts of all waypoints.
pub(super) fn accounts(objects: &Objects, waypoints: &Waypoints) -> Accounts {
    let all = waypoints.iter().map(|(name, _)| {
        let of = objects.namespaces.get(&name.namespace);
        let accounts = of.map(|of| accounts_of(name, of)).unwrap_or_default();
        (name.clone(), accounts)
    });
    all.collect()
}

/// The service accounts that the pods of a waypoint run as, or will: its Gateway's name is
/// the account's too, unless an annotation names another.
pub(super) fn accounts_of(waypoint: &WaypointName, of: &NamespaceObjects) -> BTreeSet<Arc<str>> {
    let pods = of.pods.values().filter(|pod| {
        pod.meta.label(GATEWAY_NAME) == Some(&*waypoint.name) && !pod.phase.is_terminal()
    });
    let mut accounts: BTreeSet<_> = pods.map(|pod| pod.service_account.clone()).collect();
    if accounts.is_empty() {
        let gateway = of.gateways.get(&waypoint.name);
        let named = gateway.and_then(|gateway| gateway.meta.annotation(SERVICE_ACCOUNT));
        accounts.insert(named.map_or_else(|| waypoint.name.clone(), Arc::from));
    }
    accounts
}

/// Whom the ALLOW policies in force of a namespace cover: selectors, the empty one for all.
pub(super) fn allowing(of: &NamespaceObjects, mesh: &MeshConfig) -> Vec<Labels> {
    let policies = of.authorization_policies.values();
    policies
        .filter(|policy| mesh.owns(&policy.meta))
        .filter(|policy| match &policy.spec {
            Ok(PolicySpec {
                action, dry_run, ..
            }) => *action == PolicyAction::Allow && !dry_run,
            Err(invalid) => invalid.action == PolicyAction::Allow && !invalid.dry_run,
        })
        .filter_map(|policy| match policy.scope() {
            PolicyScope::Selector(selector) => Some(selector.clone()),
            PolicyScope::Namespace => Some(Labels::new()),
            PolicyScope::Targets(_) => None,
        })
        .collect()
}

/// What lets waypoints in, for one namespace.
#[derive(Debug, Default)]
pub(super) struct Admission {
    /// Policies by `namespace/name`; each is listed by some workload.
    pub(super) policies: BTreeMap<String, Authorization>,
    /// The policies that a workload lists, by uid.
    pub(super) listed: HashMap<String, Vec<String>>,
}

impl Admission {
    /// Decides for the workloads of `namespace` that waypoints serve. `allowing`: whom ALLOW
    /// policies cover, of the namespace and the mesh.
    pub(super) fn new<'a>(
        namespace: &str,
        served: &Served<'_>,
        allowing: impl Iterator<Item = &'a Labels>,
        accounts: &Accounts,
        mesh: &MeshConfig,
    ) -> Self {
        let allowing = SelectorIndex::new(allowing.map(|selector| (selector, ())).collect());
        let mut admission = Self::default();
        for (waypoint, workloads) in served {
            let Some(accounts) = accounts.get(waypoint) else {
                continue;
            };
            let policy = policy(namespace, waypoint, accounts, mesh);
            let key = format!("{namespace}/{}", policy.name);
            for (uid, workload) in workloads {
                let covered = |labels: &Labels| allowing.matching(labels).next().is_some();
                if workload.labels.is_some_and(covered) {
                    admission.policies.insert(key.clone(), policy.clone());
                    let listed = admission.listed.entry(uid.clone()).or_default();
                    listed.push(key.clone());
                }
            }
        }
        admission
    }
}

/// Underscores keep its name apart from those of objects.
fn policy(
    namespace: &str,
    waypoint: &WaypointName,
    accounts: &BTreeSet<Arc<str>>,
    mesh: &MeshConfig,
) -> Authorization {
    let principals = accounts.iter().map(|account| {
        let domain = mesh.trust_domain.as_str();
        let principal = format!("{domain}/ns/{}/sa/{account}", waypoint.namespace);
        wire::string_match(&StringMatch::Exact(principal))
    });
    let from = Match {
        principals: principals.collect(),
        ..Match::default()
    };
    Authorization {
        name: format!(
            "istio_allow_waypoint_{}_{}",
            waypoint.namespace, waypoint.name
        ),
        namespace: namespace.into(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Allow.into(),
        groups: vec![Group {
            rules: vec![Rules {
                matches: vec![from],
            }],
        }],
        ..Authorization::default()
    }
}
