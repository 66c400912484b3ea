//! Which endpoint a request or a connection goes to.

use std::sync::Arc;

use adit_shared::model::{Health, ServiceEntry, Workload, WorkloadUid};
use rand::Rng as _;

use super::destination::Target;
use super::upstream::Endpoint;

/// An endpoint and the workload that it belongs to.
#[derive(Clone)]
pub struct Picked {
    /// The workload.
    pub workload: Arc<Workload>,
    /// How to reach it.
    pub endpoint: Arc<Endpoint>,
}

/// The endpoints of a service's port that may be given requests.
pub fn endpoints(entry: &ServiceEntry, service_port: u16) -> Box<[Picked]> {
    let service = entry.service();
    let all = entry.endpoints().iter();
    all.filter(|workload| {
        let usable = service.load_balancing.allow_unhealthy || workload.health == Health::Healthy;
        usable && workload.capacity > 0
    })
    .filter_map(|workload| {
        let own = workload.ports_of(&service.key).into_iter().flatten();
        let target = own
            .filter(|port| port.service_port == service_port)
            .find_map(|port| port.target_port)
            .or_else(|| service.port(service_port)?.target_port)?;
        Some(Picked {
            workload: workload.clone(),
            endpoint: Arc::new(Endpoint::new(workload, target, Some(entry))?),
        })
    })
    .collect()
}

/// An endpoint of `target` that is not among `tried`; `None`: there is none.
pub fn endpoint(target: &Target, tried: &[WorkloadUid]) -> Option<Picked> {
    match target {
        Target::Service(port) => {
            let all = &port.endpoints;
            if all.is_empty() {
                return None;
            }
            let start = rand::rng().random_range(0..all.len());
            let mut from = all[start..].iter().chain(&all[..start]);
            from.find(|picked| !tried.contains(&picked.endpoint.uid))
                .cloned()
        }
        Target::Workload {
            workload, address, ..
        } => (!tried.contains(&workload.uid)).then(|| Picked {
            workload: workload.clone(),
            endpoint: Arc::new(Endpoint::at(workload, *address, None)),
        }),
    }
}
