//! A policy as a value, in the shape that evaluation reads.

use std::sync::Arc;

use super::fields::Rule;
use crate::policy::{PolicyError, PolicyKey};
use crate::proto::waypoint as proto;

/// What a match of the policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HttpAction {
    /// The request is allowed; where any ALLOW policy applies, one must match.
    Allow,
    /// The request is denied, whatever else matches.
    Deny,
    /// A match is reported and changes nothing.
    Audit,
    /// A provider is asked.
    Custom,
}

/// What a policy applies to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HttpTarget {
    /// Everything that passes the waypoint.
    Everything,
    /// Everything that passes this waypoint, `namespace/name`.
    Gateway(Arc<str>),
    /// Traffic to services of this namespace, and everything that passes a waypoint in it:
    /// what a policy can mean whose targets cannot be read.
    Namespace(Arc<str>),
    /// Traffic to this service.
    Service {
        /// Namespace.
        namespace: Arc<str>,
        /// Host name, as in `reviews.shop.svc.cluster.local`.
        hostname: Arc<str>,
    },
    /// Traffic whose endpoint is this workload, by uid.
    Workload(Arc<str>),
}

impl HttpTarget {
    /// The targets that lead to traffic for the service `hostname` of `namespace` at the
    /// waypoint `namespace/name`; without a host name, to traffic that was dialled by the
    /// address of a workload of `namespace`. Widest first.
    pub fn covering(waypoint: &str, namespace: &str, hostname: Option<&str>) -> Vec<Self> {
        let mut targets = vec![
            Self::Everything,
            Self::Gateway(waypoint.into()),
            Self::Namespace(namespace.into()),
        ];
        let own = waypoint.split_once('/').map_or("", |(own, _)| own);
        if own != namespace {
            targets.push(Self::Namespace(own.into()));
        }
        if let Some(hostname) = hostname {
            targets.push(Self::Service {
                namespace: namespace.into(),
                hostname: hostname.to_ascii_lowercase().into(),
            });
        }
        targets
    }
}

/// The target is of no known kind, or empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is of no known kind")]
pub struct UnknownTarget;

impl TryFrom<&proto::Target> for HttpTarget {
    type Error = UnknownTarget;

    fn try_from(wire: &proto::Target) -> Result<Self, UnknownTarget> {
        use proto::target::Kind;
        match &wire.kind {
            Some(Kind::Service(service))
                if !service.namespace.is_empty() && !service.hostname.is_empty() =>
            {
                Ok(Self::Service {
                    namespace: service.namespace.as_str().into(),
                    hostname: service.hostname.to_ascii_lowercase().into(),
                })
            }
            Some(Kind::Gateway(gateway)) if gateway.contains('/') => {
                Ok(Self::Gateway(gateway.as_str().into()))
            }
            Some(Kind::Workload(uid)) if !uid.is_empty() => Ok(Self::Workload(uid.as_str().into())),
            _ => Err(UnknownTarget),
        }
    }
}

/// One authorization policy for requests (Istio AuthorizationPolicy).
///
/// Made by [`HttpPolicy::from_resource`] only.
#[derive(Debug)]
pub struct HttpPolicy {
    pub(super) key: PolicyKey,
    pub(super) action: HttpAction,
    pub(super) dry_run: bool,
    pub(super) provider: Arc<str>,
    pub(super) targets: Vec<HttpTarget>,
    pub(super) rules: Vec<Rule>,
    pub(super) problems: Vec<PolicyError>,
    pub(super) invalid: Option<Arc<str>>,
}

impl HttpPolicy {
    /// `namespace/name`.
    pub fn key(&self) -> &PolicyKey {
        &self.key
    }

    /// What a match means. Of an invalid policy: what it would have meant.
    pub fn action(&self) -> HttpAction {
        self.action
    }

    /// Evaluated and reported, never enforced (`istio.io/dry-run`).
    pub fn dry_run(&self) -> bool {
        self.dry_run
    }

    /// The provider that a CUSTOM policy names.
    pub fn provider(&self) -> &str {
        &self.provider
    }

    /// What it applies to; never empty.
    pub fn targets(&self) -> &[HttpTarget] {
        &self.targets
    }

    /// How many rules it has.
    pub fn rules(&self) -> usize {
        self.rules.len()
    }

    /// What this process could not understand, field by field, for the NACK. Not what the
    /// control plane itself has found invalid.
    pub fn problems(&self) -> &[PolicyError] {
        &self.problems
    }

    /// Why the policy denies whatever it targets, be its action what it may.
    pub fn invalid(&self) -> Option<&Arc<str>> {
        self.invalid.as_ref()
    }

    /// A policy of which only the resource's name is known, because its bytes could not
    /// be read: it denies what a policy of its namespace can mean at the widest.
    pub fn unreadable(name: &str, reason: &str) -> Self {
        let key = name.strip_prefix("AuthorizationPolicy/").unwrap_or(name);
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let problem = PolicyError {
            policy: key.into(),
            field: "resource".into(),
            reason: reason.into(),
        };
        Self {
            key: key.into(),
            action: HttpAction::Deny,
            dry_run: false,
            provider: Arc::default(),
            targets: vec![HttpTarget::Namespace(namespace.into())],
            rules: Vec::new(),
            invalid: Some(problem.to_string().into()),
            problems: vec![problem],
        }
    }
}
