//! The policies of one target, taken apart by what they do, in the order in which they are
//! asked: CUSTOM, AUDIT, DENY, ALLOW. Where there are many rules an index leads to those
//! that can match.

use std::sync::Arc;

use super::fields::{Facts, Readings, Rule};
use super::types::{HttpAction, HttpPolicy};
use crate::policy::PolicyKey;

/// Below this many rules trying each is cheaper than looking any up.
const INDEX_FROM: usize = 4;

/// The policies of one target.
#[derive(Debug, Default)]
pub(super) struct Chain {
    pub(super) custom: Phase,
    pub(super) audit: Phase,
    pub(super) deny: Phase,
    pub(super) allow: Phase,
    pub(super) dry_run_deny: Phase,
    /// One by one: each has an outcome of its own.
    pub(super) dry_run_allow: Vec<Arc<HttpPolicy>>,
    /// They deny, first the enforced ones.
    pub(super) invalid: Vec<Arc<HttpPolicy>>,
    /// Whether there is an enforced ALLOW policy, be it without rules.
    pub(super) allows: bool,
    /// Whether there is a dry run.
    pub(super) dry_runs: bool,
    /// Whether some rule asks for the method.
    pub(super) methods: bool,
}

impl Chain {
    /// `policies` in the order of their keys.
    pub(super) fn new<'a>(policies: impl Iterator<Item = &'a Arc<HttpPolicy>>) -> Self {
        let mut chain = Self::default();
        for policy in policies {
            chain.dry_runs |= policy.dry_run;
            chain.methods |= policy.rules.iter().any(Rule::asks_method);
            if policy.invalid.is_some() {
                chain.invalid.push(policy.clone());
                continue;
            }
            match (policy.action, policy.dry_run) {
                (HttpAction::Custom, _) => chain.custom.add(policy),
                (HttpAction::Audit, _) => chain.audit.add(policy),
                (HttpAction::Deny, false) => chain.deny.add(policy),
                (HttpAction::Deny, true) => chain.dry_run_deny.add(policy),
                (HttpAction::Allow, true) => chain.dry_run_allow.push(policy.clone()),
                (HttpAction::Allow, false) => {
                    chain.allows = true;
                    chain.allow.add(policy);
                }
            }
        }
        chain.deny.index();
        chain.allow.index();
        chain
    }
}

/// The rules of one action, in order.
#[derive(Debug, Default)]
pub(super) struct Phase {
    entries: Vec<Entry>,
    index: Option<Index>,
}

/// One rule of a policy.
#[derive(Debug)]
pub(super) struct Entry {
    policy: Arc<HttpPolicy>,
    rule: usize,
}

impl Entry {
    pub(super) fn key(&self) -> &PolicyKey {
        &self.policy.key
    }

    pub(super) fn policy(&self) -> &Arc<HttpPolicy> {
        &self.policy
    }

    pub(super) fn rule(&self) -> usize {
        self.rule
    }

    fn rule_value(&self) -> &Rule {
        &self.policy.rules[self.rule]
    }

    fn matches(&self, facts: &Facts<'_>, readings: Readings) -> bool {
        self.rule_value().matches(facts, readings)
    }
}

impl Phase {
    fn add(&mut self, policy: &Arc<HttpPolicy>) {
        let rules = 0..policy.rules.len();
        self.entries.extend(rules.map(|rule| Entry {
            policy: policy.clone(),
            rule,
        }));
    }

    fn index(&mut self) {
        if self.entries.len() >= INDEX_FROM {
            self.index = Some(Index::new(&self.entries));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The first rule that matches.
    pub(super) fn first(&self, facts: &Facts<'_>, readings: Readings) -> Option<&Entry> {
        let hit = |entry: &&Entry| entry.matches(facts, readings);
        match (&self.index, &facts.request.http) {
            (Some(index), Some(_)) => {
                let mut best: Option<usize> = None;
                for list in index.candidates(facts) {
                    let before = |at: &&u32| best.is_none_or(|best| (**at as usize) < best);
                    let found = list
                        .iter()
                        .take_while(before)
                        .find(|at| self.entries[**at as usize].matches(facts, readings));
                    if let Some(at) = found {
                        best = Some(*at as usize);
                    }
                }
                best.map(|at| &self.entries[at])
            }
            // Without HTTP a rule that is filed under a path may match all the same.
            _ => self.entries.iter().find(hit),
        }
    }

    /// For each policy its first rule that matches.
    pub(super) fn each<'s>(
        &'s self,
        facts: &Facts<'_>,
        readings: Readings,
    ) -> impl Iterator<Item = &'s Entry> {
        let mut last: Option<&PolicyKey> = None;
        self.entries.iter().filter(move |entry| {
            let hit = last != Some(entry.key()) && entry.matches(facts, readings);
            if hit {
                last = Some(entry.key());
            }
            hit
        })
    }
}

/// Namespace and name of a service account.
type Account = (Box<str>, Box<str>);

/// Places of rules by what a request must have for them to match. Only to leave out rules
/// that cannot; every candidate is still judged in full.
#[derive(Debug)]
struct Index {
    /// By namespace and service account: rules whose every source lists accounts.
    by_account: Vec<(Account, Vec<u32>)>,
    /// By path: rules whose every operation lists paths.
    by_path: Vec<(Box<[u8]>, Vec<u32>)>,
    rest: Vec<u32>,
}

impl Index {
    fn new(entries: &[Entry]) -> Self {
        let (mut accounts, mut paths, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (at, entry) in entries.iter().enumerate() {
            // More rules than u32 do not fit into memory; what is not indexed is tried.
            let Ok(at) = u32::try_from(at) else { break };
            let rule = entry.rule_value();
            if let Some(keys) = account_keys(rule) {
                accounts.extend(keys.into_iter().map(|key| (key, at)));
            } else if let Some(keys) = path_keys(rule) {
                paths.extend(keys.into_iter().map(|key| (key, at)));
            } else {
                rest.push(at);
            }
        }
        Self {
            by_account: grouped(accounts),
            by_path: grouped(paths),
            rest,
        }
    }

    fn candidates<'a>(&'a self, facts: &Facts<'_>) -> [&'a [u32]; 4] {
        let account = facts.request.source_identity.map_or(&[][..], |id| {
            let wanted = (id.namespace(), id.service_account());
            let found = self
                .by_account
                .binary_search_by(|((ns, sa), _)| (&**ns, &**sa).cmp(&wanted));
            found.map_or(&[][..], |at| &self.by_account[at].1)
        });
        let path = |path: &[u8]| {
            let found = self.by_path.binary_search_by(|(own, _)| (**own).cmp(path));
            found.map_or(&[][..], |at| &*self.by_path[at].1)
        };
        let http = facts.request.http.as_ref();
        let sent = http.map_or(&[][..], |http| path(http.path.as_str().as_bytes()));
        let other = http.and_then(|http| http.path.other_reading());
        [account, sent, other.map_or(&[][..], path), &self.rest]
    }
}

fn grouped<K: Ord>(mut pairs: Vec<(K, u32)>) -> Vec<(K, Vec<u32>)> {
    pairs.sort_unstable();
    let mut groups: Vec<(K, Vec<u32>)> = Vec::new();
    for (key, at) in pairs {
        match groups.last_mut() {
            Some((last, list)) if *last == key => {
                if list.last() != Some(&at) {
                    list.push(at);
                }
            }
            _ => groups.push((key, vec![at])),
        }
    }
    groups
}

fn account_keys(rule: &Rule) -> Option<Vec<Account>> {
    let mut keys = Vec::new();
    for source in &rule.from {
        let before = keys.len();
        let accounts = &source.service_accounts.yes;
        if !accounts.is_empty() {
            keys.extend(accounts.iter().map(|(ns, sa)| (ns.into(), sa.into())));
        } else if let Some(exact) = source.principals.yes.only_accounts() {
            keys.extend(exact.map(|(ns, sa)| (ns.into(), sa.into())));
        }
        if keys.len() == before {
            return None;
        }
    }
    (!keys.is_empty()).then_some(keys)
}

fn path_keys(rule: &Rule) -> Option<Vec<Box<[u8]>>> {
    let mut keys = Vec::new();
    for operation in &rule.to {
        keys.extend(operation.paths.yes.only_exact()?.map(Box::from));
    }
    (!keys.is_empty()).then_some(keys)
}
