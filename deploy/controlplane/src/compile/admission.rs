//! What node proxies know of the waypoints of their pods.
//!
//! Behind a waypoint the node proxy of a pod meets the waypoint's identity and not the
//! caller's. Every workload names the service accounts of the waypoints that serve it:
//! of those, and of nobody else, the node proxy believes who the caller is, and judges
//! that caller. Whoever else dials the pod is judged as before.
//!
//! A waypoint that keeps connections of different callers apart needs more of them, so
//! it does so only where some L4 policy of the workload depends on who calls. A workload
//! that is marked lets nothing in that has not passed one of its waypoints.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use adit_shared::proto::workload::Workload;

use super::l7::{GATEWAY_NAME, Served, WaypointName, Waypoints};
use super::mesh::MeshConfig;
use super::selectors::SelectorIndex;
use crate::model::{
    Condition, Labels, Meta, Namespace, NamespaceObjects, Objects, PolicyScope, Rule, Source,
};

/// The service account of a waypoint's pods, on its Gateway.
const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
/// On a pod, a service or a namespace: `true` lets in only what has passed a waypoint.
/// The pod's own word counts first, then that of its services, then its namespace's.
pub(super) const REQUIRE_WAYPOINT: &str = "istio.io/require-waypoint";

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

/// Whom the policies of a namespace cover that depend on who calls: selectors, the empty
/// one for all.
pub(super) fn about_callers(of: &NamespaceObjects, mesh: &MeshConfig) -> Vec<Labels> {
    let policies = of.authorization_policies.values();
    policies
        .filter(|policy| mesh.owns(&policy.meta))
        .filter(|policy| {
            let rules = policy.spec.as_ref().map(|spec| spec.rules.as_slice());
            // One that is invalid closes for everybody alike.
            rules.unwrap_or_default().iter().any(is_about_caller)
        })
        .filter_map(|policy| match policy.scope() {
            PolicyScope::Selector(selector) => Some(selector.clone()),
            PolicyScope::Namespace => Some(Labels::new()),
            PolicyScope::Targets(_) => None,
        })
        .collect()
}

/// Whether a node proxy needs to know the caller for this rule.
fn is_about_caller(rule: &Rule) -> bool {
    let in_source = |source: &Source| {
        let Source {
            principals,
            namespaces,
            service_accounts,
            trust_domains,
            ip_blocks,
            // Only a waypoint can judge these.
            remote_ip_blocks: _,
            request_principals: _,
        } = source;
        !(principals.is_empty()
            && namespaces.is_empty()
            && service_accounts.is_empty()
            && trust_domains.is_empty()
            && ip_blocks.is_empty())
    };
    let in_condition = |condition: &Condition| match condition {
        Condition::SourceIp(_)
        | Condition::SourceNamespace(_)
        | Condition::SourcePrincipal(_)
        | Condition::SourceTrustDomain(_)
        | Condition::SourceServiceAccount(_) => true,
        Condition::RemoteIp(_)
        | Condition::DestinationIp(_)
        | Condition::DestinationPort(_)
        | Condition::L7 { .. } => false,
    };
    rule.from.iter().any(in_source) || rule.when.iter().any(in_condition)
}

/// Whether `workload` lets in only what has passed a waypoint. Waypoints themselves are what
/// has to be passed.
pub(super) fn requires_waypoint<'a>(
    workload: &Meta,
    services: impl Iterator<Item = &'a Meta>,
    namespace: Option<&Namespace>,
) -> bool {
    if workload.label(GATEWAY_NAME).is_some() {
        return false;
    }
    let said = |meta: &Meta| meta.label(REQUIRE_WAYPOINT).map(|value| value == "true");
    // Of several services one that requires it is enough.
    let by_services = services.filter_map(said).reduce(|one, other| one || other);
    said(workload)
        .or(by_services)
        .or_else(|| said(&namespace?.meta))
        .unwrap_or(false)
}

/// The waypoints of the workloads of one namespace.
#[derive(Debug, Default)]
pub(super) struct Admission<'a> {
    /// SPIFFE ids by uid.
    served_by: HashMap<&'a str, BTreeSet<String>>,
    about_callers: Option<SelectorIndex<'a, ()>>,
}

impl<'a> Admission<'a> {
    /// Decides for the workloads of a namespace that waypoints serve. `about_callers`: whom
    /// policies cover that depend on who calls, of the namespace and the mesh.
    pub(super) fn new(
        served: &'a Served<'_>,
        about_callers: impl Iterator<Item = &'a Labels>,
        accounts: &Accounts,
        mesh: &MeshConfig,
    ) -> Self {
        let mut served_by: HashMap<&str, BTreeSet<String>> = HashMap::new();
        for (waypoint, workloads) in served {
            let accounts = accounts.get(waypoint).into_iter().flatten();
            let domain = mesh.trust_domain.as_str();
            let ids: Vec<String> = accounts
                .map(|account| format!("spiffe://{domain}/ns/{}/sa/{account}", waypoint.namespace))
                .collect();
            for uid in workloads.keys() {
                let of = served_by.entry(uid).or_default();
                of.extend(ids.iter().cloned());
            }
        }
        let about_callers = about_callers.map(|selector| (selector, ()));
        Self {
            served_by,
            about_callers: Some(SelectorIndex::new(about_callers.collect())),
        }
    }

    /// Tells a workload, which has these labels.
    pub(super) fn tell(&self, workload: &mut Workload, labels: &Labels) {
        let Some(served_by) = self.served_by.get(&*workload.uid) else {
            return;
        };
        workload.served_by = served_by.iter().cloned().collect();
        let index = self.about_callers.as_ref();
        workload.callers_matter =
            index.is_some_and(|index| index.matching(labels).next().is_some());
    }
}
