//! Policies by what they target. A change rebuilds the chains of its own targets only, and
//! a request meets only what is meant for its destination, however many others there are.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};

use super::chain::Chain;
use super::evaluate::HttpPolicySet;
use super::types::{HttpPolicy, HttpTarget};
use crate::policy::PolicyKey;

/// All policies that a waypoint knows. Cloning is cheap and shares everything.
#[derive(Debug, Clone, Default)]
pub struct HttpPolicies {
    by_key: OrdMap<PolicyKey, Arc<HttpPolicy>>,
    by_target: HashMap<HttpTarget, Targeted>,
}

#[derive(Debug, Clone, Default)]
struct Targeted {
    policies: OrdMap<PolicyKey, Arc<HttpPolicy>>,
    chain: Arc<Chain>,
}

/// One change.
#[derive(Debug)]
pub enum HttpUpdate {
    /// A new or changed policy.
    Upsert(HttpPolicy),
    /// The policy with this key is gone.
    Remove(PolicyKey),
}

impl HttpPolicies {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies changes together; every target touched is rebuilt once.
    pub fn apply(&mut self, updates: impl IntoIterator<Item = HttpUpdate>) {
        let mut touched = BTreeSet::new();
        for update in updates {
            match update {
                HttpUpdate::Remove(key) => self.take(&key, &mut touched),
                HttpUpdate::Upsert(policy) => {
                    self.take(&policy.key, &mut touched);
                    let policy = Arc::new(policy);
                    for target in &policy.targets {
                        let targeted = self.by_target.entry(target.clone()).or_default();
                        targeted.policies.insert(policy.key.clone(), policy.clone());
                        touched.insert(target.clone());
                    }
                    self.by_key.insert(policy.key.clone(), policy);
                }
            }
        }
        for target in touched {
            let Some(targeted) = self.by_target.get_mut(&target) else {
                continue;
            };
            if targeted.policies.is_empty() {
                self.by_target.remove(&target);
            } else {
                targeted.chain = Arc::new(Chain::new(targeted.policies.values()));
            }
        }
    }

    fn take(&mut self, key: &PolicyKey, touched: &mut BTreeSet<HttpTarget>) {
        let Some(policy) = self.by_key.remove(key) else {
            return;
        };
        for target in &policy.targets {
            if let Some(targeted) = self.by_target.get_mut(target) {
                targeted.policies.remove(key);
                touched.insert(target.clone());
            }
        }
    }

    /// The policy with this key, `namespace/name`.
    pub fn get(&self, key: &str) -> Option<&Arc<HttpPolicy>> {
        self.by_key.get(key)
    }

    /// Every policy, by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<HttpPolicy>> {
        self.by_key.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// What applies to traffic for a service at the waypoint `namespace/name`, before an
    /// endpoint is picked.
    pub fn for_service(&self, waypoint: &str, namespace: &str, hostname: &str) -> HttpPolicySet {
        self.of(&HttpTarget::covering(waypoint, namespace, Some(hostname)))
    }

    /// What applies at the waypoint `namespace/name` to traffic that was dialled by the
    /// address of a workload of `namespace`.
    pub fn for_address(&self, waypoint: &str, namespace: &str) -> HttpPolicySet {
        self.of(&HttpTarget::covering(waypoint, namespace, None))
    }

    /// What applies to traffic whose endpoint is the workload, besides what applies to the
    /// service: an enforcement point of its own, as the workload's ztunnel is for L4.
    pub fn for_workload(&self, uid: &str) -> HttpPolicySet {
        self.of(&[HttpTarget::Workload(uid.into())])
    }

    fn of(&self, targets: &[HttpTarget]) -> HttpPolicySet {
        let targeted = targets.iter().filter_map(|t| self.by_target.get(t));
        HttpPolicySet {
            chains: targeted.map(|targeted| targeted.chain.clone()).collect(),
        }
    }
}
