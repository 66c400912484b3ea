//! Open connections when the model changes: those that a policy does not allow any more are
//! closed, tunnels to workloads that are gone are not used again.

use std::rc::Rc;

use adit_shared::policy::Connection;

use crate::connections::{Closed, Flow};
use crate::worker::Worker;

/// Follows the model until the task is dropped.
pub async fn run(worker: Rc<Worker>) {
    let mut versions = worker.shared.model.subscribe();
    while versions.changed().await.is_ok() {
        close_denied(&worker);
        forget_gone(&worker);
    }
}

fn close_denied(worker: &Worker) {
    let snapshot = worker.shared.model.load_full();
    worker.connections.for_each(|live| {
        let Flow::Inbound(input) = &live.flow else {
            return;
        };
        // A workload that discovery has dropped is about to be withdrawn; until then what
        // was allowed goes on.
        let Some(workload) = snapshot.workload(&live.pod.spec.workload) else {
            return;
        };
        let connection = Connection {
            source_identity: input.identity.as_ref(),
            source_ip: input.source.ip(),
            destination_ip: input.destination.ip(),
            destination_port: input.destination.port(),
        };
        let policies = snapshot.policies_for(workload);
        if !policies
            .evaluate(&connection, &worker.shared.trust_domains)
            .verdict
            .is_permitted()
        {
            live.close(Closed::Denied);
        }
    });
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
