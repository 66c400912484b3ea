//! The verdict over a connection (Istio AuthorizationPolicy, evaluation order).

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::types::{Action, Clause, Group, Match, Policy, PolicyKey};
use crate::identity::{SpiffeId, TrustDomain};

/// What is evaluated.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Who the peer proved to be; `None` over plaintext.
    pub source_identity: Option<&'a SpiffeId>,
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The workload's address.
    pub destination_ip: IpAddr,
    /// The workload's port, after a service's port was mapped.
    pub destination_port: u16,
    /// Whom the peer says that it speaks for. It counts only if the peer is a waypoint that
    /// serves the workload.
    pub origin: Option<Origin<'a>>,
}

/// The caller behind a waypoint, as the waypoint names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin<'a> {
    /// Who it proved to be, there.
    pub identity: &'a SpiffeId,
    /// Its address.
    pub ip: IpAddr,
}

/// The waypoints of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServedBy {
    /// Who they are.
    pub identities: Arc<[SpiffeId]>,
    /// Nobody else is let in.
    pub required: bool,
}

impl ServedBy {
    /// Whether `peer` is one of them.
    pub fn contains(&self, peer: &SpiffeId) -> bool {
        self.identities.contains(peer)
    }
}

/// The trust domain of the mesh and the names it is also known by.
///
/// In a policy, each of them and `cluster.local` means all of them (Istio mesh config
/// `trustDomainAliases`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustDomains {
    own: TrustDomain,
    aliases: Vec<TrustDomain>,
}

/// Everything that applies to one workload: mesh-wide, of its namespace, and listed.
///
/// Cloning copies reference counts. Two sets are equal when they hold the very same
/// policies, so that open connections need a new verdict only when the sets differ.
#[derive(Debug, Clone)]
pub struct PolicySet {
    global: Arc<[Arc<Policy>]>,
    namespace: Arc<[Arc<Policy>]>,
    listed: Vec<Arc<Policy>>,
    missing: Vec<PolicyKey>,
    served_by: ServedBy,
}

/// A verdict and what dry-run policies would have changed.
#[derive(Debug)]
#[must_use]
pub struct Evaluation {
    /// What is enforced.
    pub verdict: Verdict,
    /// What would be, one entry for each dry-run policy with a say.
    pub dry_run: Vec<DryRun>,
}

/// What is enforced.
#[derive(Debug)]
#[must_use]
pub enum Verdict {
    /// The connection may be served.
    Permitted(Permitted),
    /// The connection has to be refused or closed.
    Denied(Denied),
}

/// Proof that a connection was evaluated and may be served. Only evaluation makes it.
#[derive(Debug, PartialEq, Eq)]
pub struct Permitted {
    pub(super) by: Option<(PolicyKey, usize)>,
}

/// Why a connection may not be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// The policy that is responsible; `None` where no ALLOW policy matched.
    pub policy: Option<PolicyKey>,
    /// What about it.
    pub reason: DenyReason,
}

/// What about a policy denied a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DenyReason {
    /// This rule of a DENY policy matched, counted from 0.
    Matched(usize),
    /// ALLOW policies apply and none of them matched.
    NotAllowed,
    /// The workload lists the policy, but it has not arrived.
    Missing,
    /// The workload takes only what has passed its waypoint, and this has not.
    NotThroughWaypoint,
    /// The policy is not understood, in whole or in part: a DENY that therefore
    /// matched, or an ALLOW that therefore did not.
    Invalid(Arc<str>),
}

/// What a dry-run policy would have done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DryRun {
    /// The policy.
    pub policy: PolicyKey,
    /// What it would have done.
    pub outcome: DryRunOutcome,
}

/// The effect that a dry-run policy would have had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DryRunOutcome {
    /// A DENY that matches, or an ALLOW where no ALLOW matches.
    WouldDeny,
    /// An ALLOW that matches.
    WouldAllow,
}

impl PolicySet {
    /// Puts a set together. `missing` are keys that the workload lists and that name
    /// no policy: they deny.
    pub fn new(
        global: Arc<[Arc<Policy>]>,
        namespace: Arc<[Arc<Policy>]>,
        listed: Vec<Arc<Policy>>,
        missing: Vec<PolicyKey>,
    ) -> Self {
        Self {
            global,
            namespace,
            listed,
            missing,
            served_by: ServedBy::default(),
        }
    }

    /// The same for a workload that these waypoints serve.
    #[must_use]
    pub fn with_waypoints(self, served_by: ServedBy) -> Self {
        Self { served_by, ..self }
    }

    /// Every policy of the set.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.global
            .iter()
            .chain(self.namespace.iter())
            .chain(&self.listed)
    }

    /// Listed policies that have not arrived.
    pub fn missing(&self) -> &[PolicyKey] {
        &self.missing
    }

    /// Decides over `connection`: a DENY that matches or a listed policy that is
    /// missing denies; no ALLOW at all permits; an ALLOW that matches permits; else
    /// denied.
    ///
    /// Where the peer is a waypoint that serves the workload, the caller behind it is judged
    /// instead, by what L4 can know. A waypoint that names no caller has judged it alone, and
    /// what depends on who calls is left to it.
    pub fn evaluate(&self, connection: &Connection<'_>, trust: &TrustDomains) -> Evaluation {
        let subject = Subject::of(connection, &self.served_by);
        if self.served_by.required && subject.waypoint.is_none() {
            return Evaluation {
                verdict: Verdict::Denied(Denied {
                    policy: None,
                    reason: DenyReason::NotThroughWaypoint,
                }),
                dry_run: Vec::new(),
            };
        }
        let hit = |policy: &Policy| {
            let groups = policy.groups_for(subject.waypoint.is_some());
            let mut groups = groups.iter();
            groups.position(|group| group.matches(&subject, policy.action, trust))
        };
        let mut denied = None;
        let mut allowed = None;
        let mut not_allowed = None;
        // Only filled where dry-run policies exist; an empty Vec allocates nothing.
        let mut dry_run = Vec::new();
        let mut dry_run_allows = Vec::new();
        for policy in self.iter() {
            match (policy.action, policy.dry_run) {
                (Action::Deny, false) if denied.is_none() => {
                    denied = hit(policy).map(|rule| Denied::by(policy, rule));
                }
                (Action::Deny, false) => {}
                (Action::Allow, false) => {
                    let denied = not_allowed.get_or_insert(Denied {
                        policy: None,
                        reason: DenyReason::NotAllowed,
                    });
                    if let Some(reason) = &policy.invalid {
                        denied.policy = Some(policy.key.clone());
                        denied.reason = DenyReason::Invalid(reason.clone());
                    }
                    if allowed.is_none() {
                        allowed = hit(policy).map(|rule| (policy.key.clone(), rule));
                    }
                }
                (Action::Deny, true) => {
                    if hit(policy).is_some() {
                        dry_run.push(DryRun {
                            policy: policy.key.clone(),
                            outcome: DryRunOutcome::WouldDeny,
                        });
                    }
                }
                (Action::Allow, true) => {
                    dry_run_allows.push((policy.key.clone(), hit(policy).is_some()));
                }
            }
        }
        let some_allow = allowed.is_some() || dry_run_allows.iter().any(|(_, matched)| *matched);
        for (policy, matched) in dry_run_allows {
            let outcome = match (matched, some_allow) {
                (true, _) => DryRunOutcome::WouldAllow,
                (false, false) => DryRunOutcome::WouldDeny,
                (false, true) => continue,
            };
            dry_run.push(DryRun { policy, outcome });
        }
        let missing = || {
            self.missing.first().map(|key| Denied {
                policy: Some(key.clone()),
                reason: DenyReason::Missing,
            })
        };
        let verdict = match (denied.or_else(missing), allowed, not_allowed) {
            (Some(denied), _, _) | (None, None, Some(denied)) => Verdict::Denied(denied),
            (None, allowed, _) => Verdict::Permitted(Permitted { by: allowed }),
        };
        Evaluation { verdict, dry_run }
    }
}

impl PartialEq for PolicySet {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &[Arc<Policy>], b: &[Arc<Policy>]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        same(&self.global, &other.global)
            && same(&self.namespace, &other.namespace)
            && same(&self.listed, &other.listed)
            && self.missing == other.missing
            && self.served_by == other.served_by
    }
}

impl Eq for PolicySet {}

impl Default for PolicySet {
    fn default() -> Self {
        Self::new(Arc::default(), Arc::default(), Vec::new(), Vec::new())
    }
}

impl Verdict {
    /// The verdict as a result, for `?`.
    ///
    /// # Errors
    /// [`Denied`] where the connection is denied.
    pub fn into_result(self) -> Result<Permitted, Denied> {
        match self {
            Self::Permitted(permitted) => Ok(permitted),
            Self::Denied(denied) => Err(denied),
        }
    }

    /// Whether the connection may be served.
    pub fn is_permitted(&self) -> bool {
        matches!(self, Self::Permitted(_))
    }
}

impl Permitted {
    /// The ALLOW policy that matched; `None` where no ALLOW policy applies.
    pub fn policy(&self) -> Option<&PolicyKey> {
        self.by.as_ref().map(|(policy, _)| policy)
    }

    /// Which rule of [`Self::policy`] matched, counted from 0.
    pub fn rule(&self) -> Option<usize> {
        self.by.as_ref().map(|(_, rule)| *rule)
    }
}

impl Denied {
    fn by(policy: &Policy, rule: usize) -> Self {
        Self {
            policy: Some(policy.key.clone()),
            reason: match &policy.invalid {
                Some(reason) => DenyReason::Invalid(reason.clone()),
                None => DenyReason::Matched(rule),
            },
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = self.policy.as_deref().unwrap_or_default();
        match &self.reason {
            DenyReason::Matched(rule) => write!(f, "denied by rule {rule} of policy {policy}"),
            DenyReason::NotThroughWaypoint => {
                f.write_str("this workload takes only what has passed its waypoint")
            }
            DenyReason::NotAllowed => f.write_str("no ALLOW policy matches"),
            DenyReason::Missing => write!(f, "policy {policy} is listed but has not arrived"),
            DenyReason::Invalid(reason) => {
                write!(f, "policy {policy} is invalid and fails closed: {reason}")
            }
        }
    }
}

impl std::error::Error for Denied {}

/// Who is judged.
struct Subject<'a> {
    caller: Caller<'a>,
    /// The waypoint that it came by.
    waypoint: Option<&'a SpiffeId>,
    /// Without IPv4-mapped addresses, as are the policies' own.
    destination_ip: IpAddr,
    destination_port: u16,
}

enum Caller<'a> {
    Known {
        /// `None` over plaintext.
        identity: Option<&'a SpiffeId>,
        ip: IpAddr,
    },
    /// Only its waypoint knows.
    Unnamed,
}

impl<'a> Subject<'a> {
    fn of(connection: &Connection<'a>, served_by: &ServedBy) -> Self {
        let peer = connection.source_identity;
        let waypoint = peer.filter(|peer| served_by.contains(peer));
        let caller = match (waypoint, connection.origin) {
            (Some(_), Some(origin)) => Caller::Known {
                identity: Some(origin.identity),
                ip: origin.ip.to_canonical(),
            },
            (Some(_), None) => Caller::Unnamed,
            (None, _) => Caller::Known {
                identity: peer,
                ip: connection.source_ip.to_canonical(),
            },
        };
        Self {
            caller,
            waypoint,
            destination_ip: connection.destination_ip.to_canonical(),
            destination_port: connection.destination_port,
        }
    }
}

impl TrustDomains {
    /// The mesh's trust domain and its aliases.
    pub fn new(own: TrustDomain, aliases: Vec<TrustDomain>) -> Self {
        Self { own, aliases }
    }

    /// The mesh's trust domain.
    pub fn own(&self) -> &TrustDomain {
        &self.own
    }

    /// Whether `domain` is the mesh's own or an alias of it.
    pub fn is_own(&self, domain: &str) -> bool {
        self.all().any(|own| own.as_str() == domain)
    }

    /// Whether a policy that says `text` means the mesh's own trust domain.
    pub(super) fn means_own(&self, text: &str) -> bool {
        text == TrustDomain::DEFAULT || self.is_own(text)
    }

    /// Whether a policy that says `text` means the trust domain `peer`.
    pub(super) fn same(&self, text: &str, peer: &str) -> bool {
        if self.means_own(text) {
            self.is_own(peer)
        } else {
            text == peer
        }
    }

    /// Whether a policy that says `*tail` means the trust domain `peer`.
    pub(super) fn same_tail(&self, tail: &str, peer: &str) -> bool {
        peer.ends_with(tail)
            || (self.is_own(peer)
                && (tail == TrustDomain::DEFAULT
                    || self.all().any(|own| own.as_str().ends_with(tail))))
    }

    fn all(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.own).chain(&self.aliases)
    }
}

impl Group {
    fn matches(&self, subject: &Subject<'_>, action: Action, trust: &TrustDomains) -> bool {
        let mut clauses = self.clauses.iter();
        clauses.all(|clause| clause.matches(subject, action, trust))
    }
}

impl Clause {
    fn matches(&self, subject: &Subject<'_>, action: Action, trust: &TrustDomains) -> bool {
        let mut matches = self.matches.iter();
        self.matches.is_empty() || matches.any(|one| one.matches(subject, action, trust))
    }
}

/// Values of one kind: any of the wanted, if there are some, and none of the unwanted.
fn kind(wanted: bool, is_wanted: impl Fn() -> bool, is_unwanted: impl Fn() -> bool) -> bool {
    (!wanted || is_wanted()) && !is_unwanted()
}

impl Match {
    fn matches(&self, subject: &Subject<'_>, action: Action, trust: &TrustDomains) -> bool {
        !self.is_empty()
            && self.matches_destination(subject)
            && match subject.caller {
                Caller::Known { identity, ip } => {
                    self.matches_source(identity, ip, subject.waypoint, trust)
                }
                // Its waypoint has enforced this: neither does it allow less here, nor deny.
                Caller::Unnamed => action == Action::Allow || !self.has_source(),
            }
    }

    fn matches_destination(&self, subject: &Subject<'_>) -> bool {
        let (ip, port) = (subject.destination_ip, subject.destination_port);
        kind(
            !self.destination_ports.is_empty(),
            || self.destination_ports.contains(port),
            || self.not_destination_ports.contains(port),
        ) && kind(
            !self.destination_ips.is_empty(),
            || self.destination_ips.contains(ip),
            || self.not_destination_ips.contains(ip),
        )
    }

    fn matches_source(
        &self,
        identity: Option<&SpiffeId>,
        ip: IpAddr,
        waypoint: Option<&SpiffeId>,
        trust: &TrustDomains,
    ) -> bool {
        // Without an identity nothing positive matches and nothing negative hits.
        let known = |test: &dyn Fn(&SpiffeId) -> bool| identity.is_some_and(test);
        // A policy that names the waypoint by its account means what comes through it.
        let by_name = |test: &dyn Fn(&SpiffeId) -> bool| known(test) || waypoint.is_some_and(test);
        kind(
            !self.namespaces.is_empty(),
            || known(&|id| self.namespaces.contains(id.namespace())),
            || known(&|id| self.not_namespaces.contains(id.namespace())),
        ) && kind(
            !self.service_accounts.is_empty(),
            || by_name(&|id| self.service_accounts.contains(id)),
            || known(&|id| self.not_service_accounts.contains(id)),
        ) && kind(
            !self.principals.is_empty(),
            || {
                known(&|id| self.principals.contains(id, trust))
                    || waypoint.is_some_and(|id| self.principals.names(id, trust))
            },
            || known(&|id| self.not_principals.contains(id, trust)),
        ) && kind(
            !self.trust_domains.is_empty(),
            || {
                known(&|id| {
                    self.trust_domains
                        .contains_trust_domain(id.trust_domain(), trust)
                })
            },
            || {
                known(&|id| {
                    self.not_trust_domains
                        .contains_trust_domain(id.trust_domain(), trust)
                })
            },
        ) && kind(
            !self.source_ips.is_empty(),
            || self.source_ips.contains(ip),
            || self.not_source_ips.contains(ip),
        )
    }

    /// Whether it depends on who calls.
    fn has_source(&self) -> bool {
        let Self {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips: _,
            not_destination_ips: _,
            destination_ports: _,
            not_destination_ports: _,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
        } = self;
        !(namespaces.is_empty()
            && not_namespaces.is_empty()
            && principals.is_empty()
            && not_principals.is_empty()
            && source_ips.is_empty()
            && not_source_ips.is_empty()
            && service_accounts.is_empty()
            && not_service_accounts.is_empty()
            && trust_domains.is_empty()
            && not_trust_domains.is_empty())
    }

    fn is_empty(&self) -> bool {
        !self.has_source()
            && self.destination_ips.is_empty()
            && self.not_destination_ips.is_empty()
            && self.destination_ports.is_empty()
            && self.not_destination_ports.is_empty()
    }
}
