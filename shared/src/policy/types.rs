//! A policy as a value, in the shape that evaluation reads.

use std::sync::Arc;

use super::matching::{AddressSet, PortSet, PrincipalSet, ServiceAccountSet, StringSet};

/// `namespace/name` of a policy.
pub type PolicyKey = Arc<str>;

/// Which workloads a policy covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that list it.
    WorkloadSelector,
}

/// What a match of the policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The connection is allowed; where any ALLOW policy applies, one must match.
    Allow,
    /// The connection is denied, whatever else matches.
    Deny,
}

/// One authorization policy.
///
/// Groups are ORed, the clauses of a group ANDed, the matches of a clause ORed, the
/// kinds of a match ANDed and the values of a kind ORed (Istio AuthorizationPolicy).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `namespace/name`.
    pub key: PolicyKey,
    /// The policy's namespace.
    pub namespace: Arc<str>,
    /// Which workloads it covers.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// Evaluated and reported, never enforced.
    pub dry_run: bool,
    /// Rules. None: the policy never matches.
    pub groups: Vec<Group>,
    /// Rules for connections that have passed a waypoint of the workload, which enforces
    /// the whole policy itself; `None`: the same.
    pub waypoint_groups: Option<Vec<Group>>,
    /// Why the policy, or a part of it, could not be understood, here or by the control
    /// plane. The groups are then already such that it fails closed.
    pub invalid: Option<Arc<str>>,
}

/// One rule. Without clauses it always matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// ANDed.
    pub clauses: Vec<Clause>,
}

/// The `from`, the `to` or one `when` of a rule. Without matches it is true.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Clause {
    /// ORed.
    pub matches: Vec<Match>,
}

/// Conditions that must all hold. Without any field it never matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// The peer's namespace.
    pub namespaces: StringSet,
    /// None of these may be the peer's namespace.
    pub not_namespaces: StringSet,
    /// The peer's identity without `spiffe://`.
    pub principals: PrincipalSet,
    /// None of these may be the peer's identity.
    pub not_principals: PrincipalSet,
    /// The peer's address.
    pub source_ips: AddressSet,
    /// None of these may hold the peer's address.
    pub not_source_ips: AddressSet,
    /// The workload's address.
    pub destination_ips: AddressSet,
    /// None of these may hold the workload's address.
    pub not_destination_ips: AddressSet,
    /// The workload's port.
    pub destination_ports: PortSet,
    /// None of these may be the workload's port.
    pub not_destination_ports: PortSet,
    /// The peer's namespace and service account, of any trust domain.
    pub service_accounts: ServiceAccountSet,
    /// None of these may be the peer's service account.
    pub not_service_accounts: ServiceAccountSet,
    /// The peer's trust domain.
    pub trust_domains: StringSet,
    /// None of these may be the peer's trust domain.
    pub not_trust_domains: StringSet,
}

impl Policy {
    /// The rules for connections that have passed a waypoint of the workload, or have not.
    pub fn groups_for(&self, passed_waypoint: bool) -> &[Group] {
        match &self.waypoint_groups {
            Some(groups) if passed_waypoint => groups,
            _ => &self.groups,
        }
    }

    /// A policy of which only the key is known, because its bytes could not be read:
    /// it denies everything in its own namespace and every workload that lists it.
    ///
    /// The scope is unknown; an object of one namespace has no power over another, so
    /// the namespace is the widest that is certain to be meant.
    pub fn unreadable(key: &str, reason: impl Into<Arc<str>>) -> Self {
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let mut policy = Self {
            key: key.into(),
            namespace: namespace.into(),
            scope: Scope::Namespace,
            action: Action::Deny,
            dry_run: false,
            groups: Vec::new(),
            waypoint_groups: None,
            invalid: None,
        };
        policy.close(reason.into());
        policy
    }

    /// Replaces the rules by those that fail closed: a DENY that always matches, an
    /// ALLOW that never does.
    pub(super) fn close(&mut self, reason: Arc<str>) {
        self.groups = match self.action {
            Action::Deny => vec![Group::default()],
            Action::Allow => Vec::new(),
        };
        self.waypoint_groups = None;
        self.invalid = Some(reason);
    }
}
