//! All rules of one kind on one port of a service, and the best match of a request.
//!
//! The rank of a match depends on the configuration alone, so all matches are sorted once and
//! the best is the first that holds. A request tries only those that its path leads to: by the
//! whole path, and along a tree of path segments for prefixes and for the certain beginning of
//! regular expressions. [`super::index`] narrows what one path leads to further. A lookup does
//! not allocate.

use std::collections::HashMap;
use std::sync::Arc;

use super::index::{Bucket, Rank};
use super::matching::{
    MatchedPath, NamePattern, PathMatch, RequestMatch, RequestView, Standing, Summary, grpc_names,
};
use super::rule::{L4Rule, Route, Rule};

/// The rules of HTTPRoutes or of GRPCRoutes on one port.
#[derive(Debug)]
pub struct HttpTable {
    /// The best first.
    entries: Box<[Entry]>,
    exact: HashMap<Box<str>, Bucket>,
    /// gRPC matches that name a method and no service.
    methods: HashMap<Box<str>, Bucket>,
    /// The root is the first.
    nodes: Box<[Node]>,
    guarded: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    rule: Arc<Rule>,
    alternative: usize,
}

/// A path segment below others.
#[derive(Debug, Default)]
struct Node {
    parent: Option<usize>,
    children: HashMap<Box<str>, usize>,
    bucket: Bucket,
}

/// What became of a request.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub enum Lookup<'t> {
    /// This rule decides.
    Matched(Matched<'t>),
    /// Routes are attached and none matches: 404, for a gRPC call status UNIMPLEMENTED.
    NoMatch,
}

/// The rule that decides over a request.
#[derive(Debug, Clone, Copy)]
pub struct Matched<'t> {
    /// The rule. To be cloned by who needs it after the table may be gone.
    pub rule: &'t Arc<Rule>,
    /// Which part of the path was matched.
    pub path: MatchedPath,
    alternative: usize,
}

impl<'t> Matched<'t> {
    fn new(entry: &'t Entry) -> Self {
        Self {
            rule: &entry.rule,
            path: entry.request_match().path.matched(),
            alternative: entry.alternative,
        }
    }

    /// Place of the match in the rule's list, from 0.
    pub fn alternative(&self) -> usize {
        self.alternative
    }

    /// Not `None`: answer 500, for this reason.
    pub fn invalid(&self) -> Option<&'t Arc<str>> {
        let of = &self.rule.matches[self.alternative];
        self.rule.invalid.as_ref().or(of.invalid.as_ref())
    }
}

impl Entry {
    fn request_match(&self) -> &RequestMatch {
        &self.rule.matches[self.alternative]
    }
}

impl HttpTable {
    /// The rules of these routes, whatever they are attached to.
    pub fn new<'r>(routes: impl IntoIterator<Item = &'r Route>) -> Self {
        let mut ranked: Vec<(Summary<'_>, Entry)> = Vec::new();
        for route in routes {
            for rule in &route.http {
                for (alternative, of) in rule.matches.iter().enumerate() {
                    let standing = Standing {
                        created: route.created,
                        route: &route.id,
                        rule: rule.index,
                        alternative,
                    };
                    let rule = Arc::clone(rule);
                    ranked.push((Summary::new(of, standing), Entry { rule, alternative }));
                }
            }
        }
        ranked.sort_by(|(a, _), (b, _)| b.cmp(a));
        let entries: Box<[Entry]> = ranked.into_iter().map(|(_, entry)| entry).collect();
        Self::index(entries)
    }

    fn index(entries: Box<[Entry]>) -> Self {
        let mut exact: HashMap<Box<str>, Vec<Rank>> = HashMap::new();
        let mut methods: HashMap<Box<str>, Vec<Rank>> = HashMap::new();
        let mut tree = Tree::default();
        // 2^32 matches would not fit into memory.
        for (entry, rank) in entries.iter().zip(0..) {
            use NamePattern::Exact;
            match &entry.request_match().path {
                PathMatch::Prefix(prefix) => tree.at(prefix).push(rank),
                PathMatch::Exact(path) => exact.entry(path.clone()).or_default().push(rank),
                PathMatch::Regex { literal, .. } | PathMatch::InvalidRegex { literal, .. } => {
                    // The last segment of the certain beginning may go on.
                    let whole = match literal.rsplit_once('/') {
                        Some((whole, _)) if literal.starts_with('/') => whole,
                        _ => "",
                    };
                    tree.at(whole).push(rank);
                }
                PathMatch::Grpc { service, method } => match (service, method) {
                    (Some(Exact(service)), Some(Exact(method))) => {
                        let path = format!("/{service}/{method}").into();
                        exact.entry(path).or_default().push(rank);
                    }
                    (Some(Exact(service)), _) => tree.at(&format!("/{service}")).push(rank),
                    (None, Some(Exact(method))) => {
                        methods.entry(method.clone()).or_default().push(rank);
                    }
                    _ => tree.at("").push(rank),
                },
            }
        }
        let bucket =
            |ranks: Vec<Rank>| Bucket::new(&ranks, |rank| entries[rank as usize].request_match());
        let by_name = |named: HashMap<Box<str>, Vec<Rank>>| {
            let buckets = named.into_iter().map(|(name, ranks)| (name, bucket(ranks)));
            buckets.collect()
        };
        let nodes = tree.nodes.into_iter().map(|(node, ranks)| Node {
            bucket: bucket(ranks),
            ..node
        });
        Self {
            exact: by_name(exact),
            methods: by_name(methods),
            nodes: nodes.collect(),
            guarded: entries.iter().any(|entry| entry.rule.guards()),
            entries,
        }
    }

    /// Whether nothing may pass of which no request can be seen: some rule has another service
    /// asked about requests, or cannot be understood and might have.
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// The rule that decides over a request.
    pub fn find<'t>(&'t self, request: &RequestView<'_>) -> Lookup<'t> {
        let holds = |rank: Rank| self.entries[rank as usize].request_match().matches(request);
        let mut best = Rank::MAX;
        if let Some(bucket) = self.exact.get(request.path) {
            bucket.find(request, holds, &mut best);
        }
        if !self.methods.is_empty()
            && let Some((_, method)) = grpc_names(request.path)
            && let Some(bucket) = self.methods.get(method)
        {
            bucket.find(request, holds, &mut best);
        }
        // From the deepest node upwards: longer prefixes rank higher, so that most of the
        // buckets above are then passed over.
        let mut at = self.deepest(request.path);
        while let Some(node) = at {
            let node = &self.nodes[node];
            node.bucket.find(request, holds, &mut best);
            at = node.parent;
        }
        match self.entries.get(best as usize) {
            Some(entry) => Lookup::Matched(Matched::new(entry)),
            None => Lookup::NoMatch,
        }
    }

    /// All that match a request, the one that decides first: for a person who asks why. Tries
    /// every match, unlike [`HttpTable::find`].
    pub fn explain<'t, 'r>(
        &'t self,
        request: &'r RequestView<'r>,
    ) -> impl Iterator<Item = Matched<'t>> + use<'t, 'r> {
        let entries = self.entries.iter();
        entries
            .filter(|entry| entry.request_match().matches(request))
            .map(Matched::new)
    }

    /// Whether there is no rule at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The rules in the order in which they are tried, each as often as it has matches.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.entries.iter().map(|entry| &entry.rule)
    }

    fn deepest(&self, path: &str) -> Option<usize> {
        let mut at = 0;
        let Some(path) = path.strip_prefix('/') else {
            // `*` of OPTIONS, nothing of CONNECT: only what everything matches.
            return Some(at);
        };
        for segment in path.split('/') {
            match self.nodes.get(at)?.children.get(segment) {
                Some(&child) => at = child,
                None => break,
            }
        }
        Some(at)
    }
}

/// [`HttpTable::nodes`] while they grow.
struct Tree {
    nodes: Vec<(Node, Vec<Rank>)>,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            nodes: vec![Default::default()],
        }
    }
}

impl Tree {
    /// The node of a path without a slash at its end; the root's is empty.
    fn at(&mut self, path: &str) -> &mut Vec<Rank> {
        let mut at = 0;
        // What does not begin with a slash is below no segment.
        for segment in path.split('/').skip(1) {
            let next = self.nodes.len();
            let (node, _) = &mut self.nodes[at];
            let child = *node.children.entry(segment.into()).or_insert(next);
            if child == next {
                let node = Node {
                    parent: Some(at),
                    ..Node::default()
                };
                self.nodes.push((node, Vec::new()));
            }
            at = child;
        }
        &mut self.nodes[at].1
    }
}

/// The rules of TCPRoutes or of TLSRoutes on one port. A TLSRoute has the connections whose
/// ClientHello names one of its host names: of several the one that is named as it is, then the
/// one with the longest suffix behind `*.`, then one without any, which a TCPRoute always is. Of
/// several routes for the same the oldest has them (then the first by namespace and name), and
/// of its rules the first: they have no matches.
#[derive(Debug)]
pub struct L4Table {
    /// By host name; those behind `*` with their dot.
    named: HashMap<Box<str>, Arc<L4Rule>>,
    unnamed: Option<Arc<L4Rule>>,
    oldest: Arc<L4Rule>,
}

impl L4Table {
    /// The table of these routes; `None`: there is none, or it has no rule.
    pub fn new<'r>(routes: impl IntoIterator<Item = &'r Route>) -> Option<Self> {
        let mut ranked: Vec<&Route> = routes.into_iter().collect();
        ranked.sort_by_key(|route| {
            let created = match route.created {
                0 => i64::MAX,
                created => created,
            };
            (created, Arc::clone(&route.id))
        });
        let mut table: Option<Self> = None;
        for route in ranked {
            let Some(rule) = route.l4.first() else {
                continue;
            };
            let table = table.get_or_insert_with(|| Self {
                named: HashMap::new(),
                unnamed: None,
                oldest: Arc::clone(rule),
            });
            for hostname in &route.hostnames {
                let named = table.named.entry(hostname.clone());
                named.or_insert_with(|| Arc::clone(rule));
            }
            if route.hostnames.is_empty() {
                table.unnamed.get_or_insert_with(|| Arc::clone(rule));
            }
        }
        table
    }

    /// Whether it depends on the server's name which rule decides.
    pub fn wants_server_name(&self) -> bool {
        !self.named.is_empty()
    }

    /// The rule that decides over a connection to `server_name`, in small letters; `None`: no
    /// route wants it.
    pub fn find(&self, server_name: Option<&str>) -> Option<&Arc<L4Rule>> {
        let named = server_name.filter(|name| !name.starts_with('.'));
        let named = named.and_then(|name| {
            let dots = name.match_indices('.').map(|(at, _)| at);
            let suffixes = dots.map(|at| &name[at..]);
            std::iter::once(name)
                .chain(suffixes)
                .find_map(|key| self.named.get(key))
        });
        named.or(self.unnamed.as_ref())
    }

    /// The rule of the oldest route, for who shows it.
    pub fn rule(&self) -> &Arc<L4Rule> {
        &self.oldest
    }
}
