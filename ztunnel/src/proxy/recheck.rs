//! Open connections when the model changes: those that a policy does not allow any more are
//! closed, tunnels to workloads that are gone are not used again. And the tunnels are counted.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::hbone::buffer::BufferPool;
use adit_shared::model::WorkloadUid;
use adit_shared::policy::PolicySet;
use adit_shared::telemetry::WorkerPools;
use tokio::time::{MissedTickBehavior, interval};

use crate::connections::{Closed, Flow};
use crate::worker::Worker;

/// How old what the metrics say of tunnels may be.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// What the previous pass judged by: a change of the model that leaves a pod's policies as
/// they were, and most do, costs its connections nothing.
#[derive(Default)]
struct Judged {
    version: u64,
    by_workload: HashMap<WorkloadUid, PolicySet>,
}

/// Follows the model until the task is dropped.
pub async fn run(worker: Rc<Worker>) {
    let mut versions = worker.shared.model.subscribe();
    let mut judged = Judged::default();
    let pools = WorkerPools::new(BufferPool::local().stats());
    worker.shared.telemetry.metrics().watch_pools(pools.clone());
    let mut counting = interval(COUNT_INTERVAL);
    counting.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            changed = versions.changed() => {
                if changed.is_err() {
                    return;
                }
                judged = close_denied(&worker, &judged);
                forget_gone(&worker);
            }
            _ = counting.tick() => pools.set_tunnels(worker.pool.counts()),
        }
    }
}

/// Policies of one pod in this pass, and whether they are those of the previous one.
struct Current {
    policies: PolicySet,
    same: bool,
}

fn close_denied(worker: &Worker, before: &Judged) -> Judged {
    let snapshot = worker.shared.model.load_full();
    // Only pods with connections: what was not looked at in this pass is not known in the next.
    let mut current: HashMap<WorkloadUid, Option<Current>> = HashMap::new();
    worker.connections.for_each(|live| {
        let Flow::Inbound(input) = &live.flow else {
            return;
        };
        let uid = &live.pod.spec.workload;
        let now = match current.get(uid) {
            Some(now) => now,
            None => {
                let now = snapshot.workload(uid).map(|workload| {
                    let policies = snapshot.policies_for(workload);
                    let same = before.by_workload.get(uid) == Some(&policies);
                    Current { policies, same }
                });
                current.entry(uid.clone()).or_insert(now)
            }
        };
        // A workload that discovery has dropped is about to be withdrawn; until then what
        // was allowed goes on.
        let Some(Current { policies, same }) = now else {
            return;
        };
        // Allowed by these policies in the previous pass. What was entered since, maybe under
        // yet other policies, is asked about.
        if *same && live.judged() == before.version {
            live.set_judged(snapshot.version());
            return;
        }
        if policies
            .evaluate(&input.connection(), &worker.shared.trust_domains)
            .verdict
            .is_permitted()
        {
            live.set_judged(snapshot.version());
        } else {
            live.close(Closed::Denied);
        }
    });
    Judged {
        version: snapshot.version(),
        by_workload: current
            .into_iter()
            .filter_map(|(uid, now)| Some((uid, now?.policies)))
            .collect(),
    }
}

/// An address that another workload has now must not be reached by an old tunnel.
fn forget_gone(worker: &Worker) {
    let snapshot = worker.shared.model.load_full();
    worker.pool.evict(|key| {
        snapshot
            .workload(&key.peer)
            .is_none_or(|workload| !workload.addresses.contains(&key.address.ip()))
    });
}
