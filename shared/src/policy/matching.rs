//! Sets that one attribute of a connection is tested against. Exact values are sorted
//! and found by bisection, so that a policy of a thousand callers costs ten
//! comparisons; patterns are few and are tried in turn. No test allocates.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::evaluate::TrustDomains;
use crate::identity::{SpiffeId, TrustDomain};

/// A pattern of AuthorizationPolicy: `text`, `text*`, `*text` or `*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Presence,
}

impl Pattern {
    /// The pattern that a user wrote: a leading `*` is looked at first, and no other `*`
    /// means anything (Istio AuthorizationPolicy).
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        Ok(match text {
            "" => return Err("the text is empty".to_owned()),
            "*" => Self::Presence,
            text => match (text.strip_prefix('*'), text.strip_suffix('*')) {
                (Some(suffix), _) => Self::Suffix(suffix.into()),
                (None, Some(prefix)) => Self::Prefix(prefix.into()),
                (None, None) => Self::Exact(text.into()),
            },
        })
    }

    /// The same pattern of another text.
    pub(super) fn map(self, change: impl Fn(&str) -> Box<str>) -> Self {
        match self {
            Self::Exact(text) => Self::Exact(change(&text)),
            Self::Prefix(text) => Self::Prefix(change(&text)),
            Self::Suffix(text) => Self::Suffix(change(&text)),
            Self::Presence => Self::Presence,
        }
    }

    fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_bytes(),
            Self::Prefix(text) => value.starts_with(text.as_bytes()),
            Self::Suffix(text) => value.ends_with(text.as_bytes()),
            Self::Presence => !value.is_empty(),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

/// Text patterns: namespaces or trust domains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StringSet {
    exact: Vec<Box<str>>,
    patterns: Vec<Pattern>,
}

impl StringSet {
    pub(super) fn new(patterns: Vec<Pattern>) -> Self {
        let mut set = Self::default();
        for pattern in patterns {
            match pattern {
                Pattern::Exact(text) => set.exact.push(text),
                other => set.patterns.push(other),
            }
        }
        set.exact.sort_unstable();
        set.exact.dedup();
        set
    }

    /// Whether no value is listed.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty()
    }

    /// The values as an AuthorizationPolicy writes them.
    pub fn values(&self) -> Vec<String> {
        let exact = self.exact.iter().map(ToString::to_string);
        exact
            .chain(self.patterns.iter().map(ToString::to_string))
            .collect()
    }

    pub(super) fn contains(&self, value: &str) -> bool {
        self.contains_bytes(value.as_bytes())
    }

    /// Like [`Self::contains`], for what need not be text.
    pub(super) fn contains_bytes(&self, value: &[u8]) -> bool {
        self.has_exact(value) || self.patterns.iter().any(|pattern| pattern.matches(value))
    }

    /// Whether `*` is listed.
    pub(super) fn has_presence(&self) -> bool {
        self.patterns.contains(&Pattern::Presence)
    }

    /// Like [`Self::contains`], for a trust domain: one that is listed exactly and is
    /// the mesh's own, or an alias of it, stands for all of those.
    pub(super) fn contains_trust_domain(&self, peer: &TrustDomain, trust: &TrustDomains) -> bool {
        let text = peer.as_str().as_bytes();
        if !trust.is_own(peer.as_str()) {
            return self.patterns.iter().any(|p| p.matches(text))
                || (!trust.means_own(peer.as_str()) && self.has_exact(text));
        }
        self.patterns.iter().any(|p| p.matches(text))
            || self.exact.iter().any(|text| trust.means_own(text))
    }

    fn has_exact(&self, value: &[u8]) -> bool {
        self.exact
            .binary_search_by(|text| text.as_bytes().cmp(value))
            .is_ok()
    }
}

/// Identities without `spiffe://`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrincipalSet {
    /// Sorted by namespace and service account, so that every trust domain of one
    /// account stands together.
    exact: Vec<ExactPrincipal>,
    patterns: Vec<PrincipalPattern>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ExactPrincipal {
    namespace: Box<str>,
    service_account: Box<str>,
    trust_domain: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum PrincipalPattern {
    Presence,
    /// `trust domain/rest*`.
    InDomain {
        trust_domain: Box<str>,
        rest: Box<str>,
    },
    /// `text*`, shorter than a trust domain and its slash.
    Prefix(Box<str>),
    /// `*tail/ns/namespace/sa/account`: an account of the trust domains with that tail,
    /// which may be empty.
    TailOfDomain(ExactPrincipal),
    /// `*text`.
    Suffix(Box<str>),
    /// An exact text that is no identity of the mesh, kept to be shown.
    Unmatchable(Box<str>),
}

impl PrincipalSet {
    pub(super) fn new(patterns: Vec<Pattern>) -> Self {
        let mut set = Self::default();
        for pattern in patterns {
            match pattern {
                Pattern::Presence => set.patterns.push(PrincipalPattern::Presence),
                Pattern::Exact(text) => match ExactPrincipal::parse(&text) {
                    Some(exact) => set.exact.push(exact),
                    None => set.patterns.push(PrincipalPattern::Unmatchable(text)),
                },
                Pattern::Prefix(text) => set.patterns.push(match text.split_once('/') {
                    Some((trust_domain, rest)) => PrincipalPattern::InDomain {
                        trust_domain: trust_domain.into(),
                        rest: rest.into(),
                    },
                    None => PrincipalPattern::Prefix(text),
                }),
                Pattern::Suffix(text) => set.patterns.push(match ExactPrincipal::parse(&text) {
                    Some(tail) => PrincipalPattern::TailOfDomain(tail),
                    None => PrincipalPattern::Suffix(text),
                }),
            }
        }
        set.exact.sort_unstable();
        set.exact.dedup();
        set
    }

    /// Whether no value is listed.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty()
    }

    /// The values as an AuthorizationPolicy writes them.
    pub fn values(&self) -> Vec<String> {
        let exact = self.exact.iter().map(ToString::to_string);
        let patterns = self.patterns.iter().map(|pattern| match pattern {
            PrincipalPattern::Presence => "*".to_owned(),
            PrincipalPattern::InDomain { trust_domain, rest } => format!("{trust_domain}/{rest}*"),
            PrincipalPattern::Prefix(text) => format!("{text}*"),
            PrincipalPattern::TailOfDomain(tail) => format!("*{tail}"),
            PrincipalPattern::Suffix(text) => format!("*{text}"),
            PrincipalPattern::Unmatchable(text) => text.to_string(),
        });
        exact.chain(patterns).collect()
    }

    /// Namespace and service account of each value, if every one is exact.
    pub(super) fn only_accounts(&self) -> Option<impl Iterator<Item = (&str, &str)>> {
        let exact = self.exact.iter().map(ExactPrincipal::account);
        self.patterns.is_empty().then_some(exact)
    }

    pub(super) fn contains(&self, peer: &SpiffeId, trust: &TrustDomains) -> bool {
        self.names(peer, trust) || self.patterns.iter().any(|p| p.matches(peer, trust))
    }

    /// Whether one of the values is this very identity, without a pattern.
    pub(super) fn names(&self, peer: &SpiffeId, trust: &TrustDomains) -> bool {
        let account = (peer.namespace(), peer.service_account());
        let start = self.exact.partition_point(|e| e.account() < account);
        self.exact[start..]
            .iter()
            .take_while(|e| e.account() == account)
            .any(|e| trust.same(&e.trust_domain, peer.trust_domain().as_str()))
    }
}

impl ExactPrincipal {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        match std::array::from_fn(|_| parts.next()) {
            [
                Some(trust_domain),
                Some("ns"),
                Some(namespace),
                Some("sa"),
                Some(service_account),
                None,
            ] => Some(Self {
                namespace: namespace.into(),
                service_account: service_account.into(),
                trust_domain: trust_domain.into(),
            }),
            _ => None,
        }
    }

    fn account(&self) -> (&str, &str) {
        (&self.namespace, &self.service_account)
    }
}

impl std::fmt::Display for ExactPrincipal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            namespace,
            service_account,
            trust_domain,
        } = self;
        write!(f, "{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

impl PrincipalPattern {
    fn matches(&self, peer: &SpiffeId, trust: &TrustDomains) -> bool {
        let domain = peer.trust_domain().as_str();
        let path = ["ns/", peer.namespace(), "/sa/", peer.service_account()];
        let [a, b, c, d] = path;
        let whole = [domain, "/", a, b, c, d];
        match self {
            Self::Presence => true,
            Self::InDomain { trust_domain, rest } => {
                trust.same(trust_domain, domain) && starts_with(&path, rest)
            }
            Self::Prefix(text) => starts_with(&whole, text),
            Self::TailOfDomain(tail) => {
                tail.account() == (peer.namespace(), peer.service_account())
                    && trust.same_tail(&tail.trust_domain, domain)
            }
            Self::Suffix(text) => ends_with(&whole, text),
            Self::Unmatchable(_) => false,
        }
    }
}

/// Whether the concatenation of `pieces` starts with `prefix`.
fn starts_with(pieces: &[&str], mut prefix: &str) -> bool {
    for piece in pieces {
        if prefix.len() <= piece.len() {
            return piece.starts_with(prefix);
        }
        match prefix.strip_prefix(piece) {
            Some(rest) => prefix = rest,
            None => return false,
        }
    }
    prefix.is_empty()
}

/// Whether the concatenation of `pieces` ends with `suffix`.
fn ends_with(pieces: &[&str], mut suffix: &str) -> bool {
    for piece in pieces.iter().rev() {
        if suffix.len() <= piece.len() {
            return piece.ends_with(suffix);
        }
        match suffix.strip_suffix(piece) {
            Some(rest) => suffix = rest,
            None => return false,
        }
    }
    suffix.is_empty()
}

/// Service accounts of any trust domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceAccountSet {
    accounts: Vec<(Box<str>, Box<str>)>,
}

impl ServiceAccountSet {
    pub(super) fn new(mut accounts: Vec<(Box<str>, Box<str>)>) -> Self {
        accounts.sort_unstable();
        accounts.dedup();
        Self { accounts }
    }

    /// Whether no value is listed.
    pub fn is_empty(&self) -> bool {
        self.accounts.is_empty()
    }

    /// The values as `namespace/account`.
    pub fn values(&self) -> Vec<String> {
        let accounts = self.accounts.iter();
        accounts.map(|(ns, sa)| format!("{ns}/{sa}")).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.accounts.iter().map(|(ns, sa)| (&**ns, &**sa))
    }

    pub(super) fn contains(&self, peer: &SpiffeId) -> bool {
        let wanted = (peer.namespace(), peer.service_account());
        self.accounts
            .binary_search_by(|(namespace, account)| (&**namespace, &**account).cmp(&wanted))
            .is_ok()
    }
}

/// Blocks of addresses, disjoint and sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressSet {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl AddressSet {
    pub(super) fn new(blocks: Vec<IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for block in blocks {
            match block {
                IpNet::V4(block) => v4.push(block),
                IpNet::V6(block) => v6.push(block),
            }
        }
        let mut v4 = Ipv4Net::aggregate(&v4);
        let mut v6 = Ipv6Net::aggregate(&v6);
        v4.sort_unstable();
        v6.sort_unstable();
        Self { v4, v6 }
    }

    /// Whether no block is listed.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// The blocks, neighbours merged.
    pub fn values(&self) -> Vec<String> {
        let v4 = self.v4.iter().map(ToString::to_string);
        v4.chain(self.v6.iter().map(ToString::to_string)).collect()
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.contains_v4(address),
            IpAddr::V6(address) => self.contains_v6(address),
        }
    }

    fn contains_v4(&self, address: Ipv4Addr) -> bool {
        let after = self.v4.partition_point(|block| block.network() <= address);
        after > 0 && self.v4[after - 1].contains(&address)
    }

    fn contains_v6(&self, address: Ipv6Addr) -> bool {
        let after = self.v6.partition_point(|block| block.network() <= address);
        after > 0 && self.v6[after - 1].contains(&address)
    }
}

/// TCP ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortSet {
    ports: Vec<u16>,
}

impl PortSet {
    pub(super) fn new(mut ports: Vec<u16>) -> Self {
        ports.sort_unstable();
        ports.dedup();
        Self { ports }
    }

    /// Whether no port is listed.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    /// The ports.
    pub fn values(&self) -> &[u16] {
        &self.ports
    }

    pub(super) fn contains(&self, port: u16) -> bool {
        self.ports.binary_search(&port).is_ok()
    }
}
