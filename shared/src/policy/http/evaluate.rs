//! The verdict over a request (Istio AuthorizationPolicy, evaluation order).

use std::sync::Arc;

use super::chain::Chain;
use super::fields::{Facts, Readings};
use super::request::HttpRequest;
use super::types::HttpPolicy;
use crate::policy::{
    Denied, DenyReason, DryRun, DryRunOutcome, Permitted, PolicyKey, TrustDomains, Verdict,
};

/// Everything that applies to one destination, in layers: the whole waypoint, the
/// namespace, the service; or one workload. Cloning copies reference counts.
///
/// A policy counts once however many of its targets lead to the same destination.
#[derive(Debug, Clone, Default)]
pub struct HttpPolicySet {
    pub(super) chains: Vec<Arc<Chain>>,
}

/// A verdict, and what changes nothing but is reported.
#[derive(Debug)]
#[must_use]
pub struct HttpEvaluation {
    /// What is enforced.
    pub verdict: Verdict,
    /// What dry-run policies would have done.
    pub dry_run: Vec<DryRun>,
    /// AUDIT policies that match.
    pub audit: Vec<AuditMatch>,
}

/// An AUDIT policy that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditMatch {
    /// The policy.
    pub policy: PolicyKey,
    /// Its first rule that matches, counted from 0.
    pub rule: usize,
}

/// A CUSTOM policy that matches: its provider has to be asked before
/// [`HttpPolicySet::evaluate_deny_allow`], and a provider that does not exist denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CustomCheck<'a> {
    /// Name of the provider.
    pub provider: &'a str,
    /// The policy.
    pub policy: &'a PolicyKey,
    /// Its first rule that matches, counted from 0.
    pub rule: usize,
    /// The provider is asked, and its answer only reported.
    pub dry_run: bool,
}

impl HttpPolicySet {
    /// Whether nothing applies: every request is permitted.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Which providers have to be asked, each once, in the order of the policies.
    /// Allocates only where CUSTOM policies match.
    pub fn custom<'a>(
        &'a self,
        request: &HttpRequest<'_>,
        trust: &TrustDomains,
    ) -> Vec<CustomCheck<'a>> {
        let mut checks: Vec<CustomCheck<'a>> = Vec::new();
        if self.chains.iter().all(|chain| chain.custom.is_empty()) {
            return checks;
        }
        let facts = self.facts(request, trust);
        for chain in &self.chains {
            for entry in chain.custom.each(&facts, Readings::Any) {
                let check = CustomCheck {
                    provider: entry.policy().provider(),
                    policy: entry.policy().key(),
                    rule: entry.rule(),
                    dry_run: entry.policy().dry_run(),
                };
                match checks
                    .iter_mut()
                    .find(|known| known.provider == check.provider)
                {
                    // One answer serves both; it is enforced if one of them asks for that.
                    Some(known) if known.dry_run && !check.dry_run => *known = check,
                    Some(_) => {}
                    None => checks.push(check),
                }
            }
        }
        checks
    }

    /// Decides over `request`: an invalid policy or a DENY that matches denies; no ALLOW at
    /// all permits; an ALLOW that matches permits; else denied.
    pub fn evaluate_deny_allow(
        &self,
        request: &HttpRequest<'_>,
        trust: &TrustDomains,
    ) -> HttpEvaluation {
        if self.chains.is_empty() {
            return HttpEvaluation {
                verdict: Verdict::Permitted(Permitted { by: None }),
                dry_run: Vec::new(),
                audit: Vec::new(),
            };
        }
        let facts = self.facts(request, trust);
        let denied = self.denied(&facts);
        let dry_runs = self.chains.iter().any(|chain| chain.dry_runs);
        let allowed = if denied.is_some() && !dry_runs {
            None
        } else {
            let mut chains = self.chains.iter();
            chains
                .find_map(|chain| chain.allow.first(&facts, Readings::All))
                .map(|entry| (entry.key().clone(), entry.rule()))
        };
        let dry_run = if dry_runs {
            self.dry_run(&facts, allowed.is_some())
        } else {
            Vec::new()
        };
        let audit = self.audit(&facts);
        let verdict = match denied {
            Some(denied) => Verdict::Denied(denied),
            None if allowed.is_none() && self.chains.iter().any(|chain| chain.allows) => {
                Verdict::Denied(Denied {
                    policy: None,
                    reason: DenyReason::NotAllowed,
                })
            }
            None => Verdict::Permitted(Permitted { by: allowed }),
        };
        HttpEvaluation {
            verdict,
            dry_run,
            audit,
        }
    }

    fn facts<'a>(&self, request: &HttpRequest<'a>, trust: &'a TrustDomains) -> Facts<'a> {
        let methods = self.chains.iter().any(|chain| chain.methods);
        Facts::new(request, trust, methods)
    }

    fn denied(&self, facts: &Facts<'_>) -> Option<Denied> {
        let invalid = self
            .chains
            .iter()
            .flat_map(|chain| &chain.invalid)
            .find(|policy| !policy.dry_run);
        if let Some(policy) = invalid {
            return Some(Denied {
                policy: Some(policy.key.clone()),
                reason: DenyReason::Invalid(policy.invalid.clone().unwrap_or_default()),
            });
        }
        let mut chains = self.chains.iter();
        let entry = chains.find_map(|chain| chain.deny.first(facts, Readings::Any))?;
        Some(Denied {
            policy: Some(entry.key().clone()),
            reason: DenyReason::Matched(entry.rule()),
        })
    }

    fn audit(&self, facts: &Facts<'_>) -> Vec<AuditMatch> {
        let mut matches: Vec<AuditMatch> = Vec::new();
        for chain in &self.chains {
            for entry in chain.audit.each(facts, Readings::Any) {
                if !matches.iter().any(|known| known.policy == *entry.key()) {
                    matches.push(AuditMatch {
                        policy: entry.key().clone(),
                        rule: entry.rule(),
                    });
                }
            }
        }
        matches
    }

    fn dry_run(&self, facts: &Facts<'_>, allowed: bool) -> Vec<DryRun> {
        let mut outcomes: Vec<DryRun> = Vec::new();
        let mut report = |policy: &PolicyKey, outcome| {
            if !outcomes.iter().any(|known| known.policy == *policy) {
                outcomes.push(DryRun {
                    policy: policy.clone(),
                    outcome,
                });
            }
        };
        for chain in &self.chains {
            for policy in chain.invalid.iter().filter(|policy| policy.dry_run) {
                report(&policy.key, DryRunOutcome::WouldDeny);
            }
            for entry in chain.dry_run_deny.each(facts, Readings::Any) {
                report(entry.key(), DryRunOutcome::WouldDeny);
            }
        }
        let allows = || self.chains.iter().flat_map(|chain| &chain.dry_run_allow);
        let hit = |policy: &HttpPolicy| {
            let mut rules = policy.rules.iter();
            rules.any(|rule| rule.matches(facts, Readings::All))
        };
        let some_allow = allowed || allows().any(|policy| hit(policy));
        for policy in allows() {
            match (hit(policy), some_allow) {
                (true, _) => report(&policy.key, DryRunOutcome::WouldAllow),
                (false, false) => report(&policy.key, DryRunOutcome::WouldDeny),
                (false, true) => {}
            }
        }
        outcomes
    }
}
