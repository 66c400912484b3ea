//! RequestAuthentication as values: which rules apply where.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use adit_shared::policy::http::HttpTarget;
use adit_shared::proto::waypoint as proto;
use http::header::HeaderName;

use super::fetch::{KeySource, KeySources};
use super::keys::KeySet;
use super::location::Location;
use super::output::Output;

/// Of a request for keys, where a rule does not say (Istio JWTRule `timeout`).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest that a rule may say: a request may wait for it.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the keys of a rule come from.
#[derive(Debug)]
pub(super) enum Keys {
    Inline(Arc<KeySet>),
    Remote(Arc<KeySource>),
}

/// One issuer and how its tokens are handled.
#[derive(Debug)]
pub(super) struct JwtRule {
    pub(super) issuer: Box<str>,
    /// Empty: any.
    pub(super) audiences: Vec<Box<str>>,
    pub(super) keys: Keys,
    pub(super) locations: Vec<Location>,
    pub(super) forward: bool,
    pub(super) output: Output,
    pub(super) space_delimited: Vec<String>,
}

/// What could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("request authentication {object}: {field}: {reason}")]
pub struct AuthenticationProblem {
    /// `namespace/name`.
    pub object: String,
    /// Path of the field in the wire message.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

/// One RequestAuthentication. Invalid: every token is refused where it applies.
#[derive(Debug)]
pub struct RequestAuthentication {
    key: Arc<str>,
    targets: Vec<HttpTarget>,
    pub(super) rules: Vec<Arc<JwtRule>>,
    /// Everywhere a token of this object may stand.
    pub(super) locations: Vec<Location>,
    /// Headers that only its rules may write, be they usable or not.
    pub(super) written: Vec<HeaderName>,
    pub(super) invalid: bool,
    problems: Vec<AuthenticationProblem>,
}

impl RequestAuthentication {
    /// What the xDS resource `RequestAuthentication/namespace/name` carries. Never fails:
    /// what is not understood refuses every token, and [`Self::problems`] says what.
    pub fn from_resource(
        name: &str,
        wire: &proto::RequestAuthentication,
        sources: &KeySources,
    ) -> Self {
        let key = name.strip_prefix("RequestAuthentication/").unwrap_or(name);
        let mut reader = Reader {
            object: key,
            written: Vec::new(),
            problems: Vec::new(),
        };
        match &wire.object {
            Some(object) if format!("{}/{}", object.namespace, object.name) == key => {}
            _ => reader.problem("object", format!("is not that of the resource {name:?}")),
        }
        let mut targets = Vec::new();
        for (at, target) in wire.targets.iter().enumerate() {
            targets.push(HttpTarget::try_from(target).unwrap_or_else(|error| {
                reader.problem(&format!("targets[{at}]"), error.to_string());
                widest(key)
            }));
        }
        if targets.is_empty() {
            targets.push(HttpTarget::Everything);
        }
        targets.sort_unstable();
        targets.dedup();
        let (mut rules, mut locations) = (Vec::new(), Vec::new());
        for (at, rule) in wire.rules.iter().enumerate() {
            let at = format!("rules[{at}]");
            let own = reader.locations(&at, rule);
            for location in &own {
                if !locations.contains(location) {
                    locations.push(location.clone());
                }
            }
            rules.extend(reader.rule(&at, rule, own, sources).map(Arc::new));
        }
        let invalid = !wire.invalid.is_empty() || !reader.problems.is_empty();
        if invalid {
            locations.extend(Location::defaults());
        }
        Self {
            key: key.into(),
            targets,
            rules,
            locations,
            written: reader.written,
            invalid,
            // What the control plane has found wrong is not told to it again.
            problems: match wire.invalid.is_empty() {
                true => reader.problems,
                false => Vec::new(),
            },
        }
    }

    /// One of which only the resource's name is known, because its bytes could not be read.
    pub fn unreadable(name: &str, reason: &str) -> Self {
        let key = name.strip_prefix("RequestAuthentication/").unwrap_or(name);
        Self {
            key: key.into(),
            targets: vec![widest(key)],
            rules: Vec::new(),
            locations: Location::defaults(),
            written: Vec::new(),
            invalid: true,
            problems: vec![AuthenticationProblem {
                object: key.into(),
                field: "resource".into(),
                reason: reason.into(),
            }],
        }
    }

    /// `namespace/name`.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// What could not be understood here, for the NACK.
    pub fn problems(&self) -> &[AuthenticationProblem] {
        &self.problems
    }

    /// Whether every token is refused.
    pub fn is_invalid(&self) -> bool {
        self.invalid
    }
}

fn widest(key: &str) -> HttpTarget {
    let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
    HttpTarget::Namespace(namespace.into())
}

struct Reader<'a> {
    object: &'a str,
    written: Vec<HeaderName>,
    problems: Vec<AuthenticationProblem>,
}

impl Reader<'_> {
    fn problem(&mut self, field: &str, reason: impl Into<String>) {
        self.problems.push(AuthenticationProblem {
            object: self.object.to_owned(),
            field: field.to_owned(),
            reason: reason.into(),
        });
    }

    fn header(&mut self, field: &str, name: &str) -> Option<HeaderName> {
        let header = HeaderName::from_bytes(name.as_bytes());
        if header.is_err() {
            self.problem(field, format!("{name:?} is not the name of a header"));
        }
        header.ok()
    }

    fn locations(&mut self, at: &str, wire: &proto::JwtRule) -> Vec<Location> {
        let mut locations = Vec::new();
        for (i, header) in wire.from_headers.iter().enumerate() {
            let field = format!("{at}.from_headers[{i}].name");
            if let Some(name) = self.header(&field, &header.name) {
                let bearer = name == http::header::AUTHORIZATION && header.prefix == "Bearer ";
                locations.push(if bearer {
                    Location::Bearer
                } else {
                    Location::Header(name, header.prefix.as_str().into())
                });
            }
        }
        let parameters = wire
            .from_params
            .iter()
            .map(|n| Location::Parameter(n.as_str().into()));
        locations.extend(parameters);
        let cookies = wire
            .from_cookies
            .iter()
            .map(|n| Location::Cookie(n.as_str().into()));
        locations.extend(cookies);
        if wire.from_headers.is_empty() && locations.is_empty() {
            locations = Location::defaults();
        }
        locations
    }

    fn rule(
        &mut self,
        at: &str,
        wire: &proto::JwtRule,
        locations: Vec<Location>,
        sources: &KeySources,
    ) -> Option<JwtRule> {
        if wire.issuer.is_empty() {
            self.problem(&format!("{at}.issuer"), "is empty");
        }
        let payload = match wire.output_payload_to_header.as_str() {
            "" => None,
            name => self.header(&format!("{at}.output_payload_to_header"), name),
        };
        let mut claims = Vec::new();
        for (i, output) in wire.output_claim_to_headers.iter().enumerate() {
            let field = format!("{at}.output_claim_to_headers[{i}]");
            if output.claim.is_empty() {
                self.problem(&field, "has no claim");
            }
            if let Some(name) = self.header(&field, &output.header) {
                claims.push((name, output.claim.as_str().into()));
            }
        }
        let output = Output { payload, claims };
        for name in output.names() {
            if !self.written.contains(name) {
                self.written.push(name.clone());
            }
        }
        let keys = self.keys(at, wire, sources)?;
        Some(JwtRule {
            issuer: wire.issuer.as_str().into(),
            audiences: wire.audiences.iter().map(|a| a.as_str().into()).collect(),
            keys,
            locations,
            forward: wire.forward_original_token,
            output,
            space_delimited: wire.space_delimited_claims.clone(),
        })
    }

    fn keys(&mut self, at: &str, wire: &proto::JwtRule, sources: &KeySources) -> Option<Keys> {
        let timeout = match &wire.timeout {
            None => DEFAULT_TIMEOUT,
            Some(timeout) => match adit_shared::proto::duration(timeout) {
                Some(timeout) if !timeout.is_zero() => timeout.min(MAX_TIMEOUT),
                _ => {
                    self.problem(&format!("{at}.timeout"), "is not a length of time");
                    DEFAULT_TIMEOUT
                }
            },
        };
        match (wire.jwks.as_str(), wire.jwks_uri.as_str()) {
            ("", "") => match sources.discover(&wire.issuer, timeout) {
                Ok(source) => Some(Keys::Remote(source)),
                Err(reason) => {
                    self.problem(
                        &format!("{at}.jwks_uri"),
                        format!("is missing, and the issuer cannot be asked for it: {reason}"),
                    );
                    None
                }
            },
            ("", uri) => match sources.key_set(uri, timeout) {
                Ok(source) => Some(Keys::Remote(source)),
                Err(reason) => {
                    self.problem(&format!("{at}.jwks_uri"), reason);
                    None
                }
            },
            (text, "") => match KeySet::parse(text.as_bytes()) {
                Ok(keys) => Some(Keys::Inline(Arc::new(keys))),
                Err(error) => {
                    self.problem(&format!("{at}.jwks"), error.to_string());
                    None
                }
            },
            _ => {
                self.problem(&format!("{at}.jwks"), "stands beside jwks_uri");
                None
            }
        }
    }
}

/// Every RequestAuthentication, by target.
#[derive(Debug, Clone, Default)]
pub struct RequestAuthentications {
    by_key: BTreeMap<Arc<str>, Arc<RequestAuthentication>>,
    by_target: HashMap<HttpTarget, BTreeMap<Arc<str>, Arc<RequestAuthentication>>>,
    /// How many workloads are targets; mostly none.
    selected: usize,
}

/// What applies to one destination. Cloning copies reference counts.
#[derive(Debug, Clone, Default)]
pub struct AuthenticationSet {
    pub(super) policies: Arc<[Arc<RequestAuthentication>]>,
    /// Every place that one of them looks at, once.
    pub(super) locations: Arc<[Location]>,
}

impl AuthenticationSet {
    /// Whether nothing applies: no token is looked for.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// What applies, to be shown.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RequestAuthentication>> {
        self.policies.iter()
    }
}

impl RequestAuthentications {
    /// Adds or replaces one.
    pub fn upsert(&mut self, policy: RequestAuthentication) {
        self.remove(&policy.key);
        let policy = Arc::new(policy);
        for target in &policy.targets {
            let at = self.by_target.entry(target.clone()).or_default();
            at.insert(policy.key.clone(), policy.clone());
            self.selected += usize::from(matches!(target, HttpTarget::Workload(_)));
        }
        self.by_key.insert(policy.key.clone(), policy);
    }

    /// Removes the one with this key, `namespace/name`.
    pub fn remove(&mut self, key: &str) {
        let Some(policy) = self.by_key.remove(key) else {
            return;
        };
        for target in &policy.targets {
            if let Some(at) = self.by_target.get_mut(target) {
                at.remove(key);
                if at.is_empty() {
                    self.by_target.remove(target);
                }
                self.selected -= usize::from(matches!(target, HttpTarget::Workload(_)));
            }
        }
    }

    /// Every one, by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RequestAuthentication>> {
        self.by_key.values()
    }

    /// What applies to traffic for a service at the waypoint `namespace/name`; without a
    /// host name, to traffic that was dialled by a workload's address. Without what selects
    /// workloads: see [`Self::for_destination`].
    pub fn for_service(
        &self,
        waypoint: &str,
        namespace: &str,
        hostname: Option<&str>,
    ) -> AuthenticationSet {
        self.for_destination(waypoint, namespace, hostname, [])
    }

    /// Like [`Self::for_service`], and what selects an endpoint.
    ///
    /// `workloads` are the uids of its endpoints. What selects one of them holds for the
    /// whole service, because a token is looked at before an endpoint is picked.
    pub fn for_destination<'a>(
        &self,
        waypoint: &str,
        namespace: &str,
        hostname: Option<&str>,
        workloads: impl IntoIterator<Item = &'a str>,
    ) -> AuthenticationSet {
        let mut targets = HttpTarget::covering(waypoint, namespace, hostname);
        if self.selected > 0 {
            let workloads = workloads.into_iter().map(Arc::from);
            targets.extend(workloads.map(HttpTarget::Workload));
        }
        self.of(&targets)
    }

    fn of(&self, targets: &[HttpTarget]) -> AuthenticationSet {
        let mut policies: Vec<Arc<RequestAuthentication>> = Vec::new();
        let mut locations: Vec<Location> = Vec::new();
        let targeted = targets.iter().filter_map(|t| self.by_target.get(t));
        for policy in targeted.flat_map(BTreeMap::values) {
            if policies.iter().any(|known| known.key == policy.key) {
                continue;
            }
            policies.push(policy.clone());
            for location in &policy.locations {
                if !locations.contains(location) {
                    locations.push(location.clone());
                }
            }
        }
        AuthenticationSet {
            policies: policies.into(),
            locations: locations.into(),
        }
    }
}
