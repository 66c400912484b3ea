//! Where the xDS client hands over what it received.

use std::sync::Arc;

use adit_shared::model::{Update, address_from_resource};
use adit_shared::proto::workload::Address;
use adit_shared::xds::client::handlers::log_rejected;
use adit_shared::xds::client::{Handler, Rejected, Resource};
use prost::Message as _;

use super::State;

/// Workloads and services.
pub struct Addresses(pub Arc<State>);

impl Handler for Addresses {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut batch = Vec::with_capacity(updates.len() + removed.len());
        for resource in updates {
            let decoded = Address::decode(resource.body)
                .map_err(|e| e.to_string())
                .and_then(|a| address_from_resource(&resource.name, &a).map_err(|e| e.to_string()));
            match decoded {
                Ok(update) => batch.push(update),
                Err(reason) => rejected.push(Rejected {
                    name: resource.name,
                    reason,
                }),
            }
        }
        batch.extend(
            removed
                .into_iter()
                .map(|name| Update::RemoveAddress(name.into())),
        );
        self.0.apply_addresses(batch);
        log_rejected("address", &rejected);
        rejected
    }
}

/// One of the waypoint's own types.
pub struct Resources {
    /// Where they go.
    pub state: Arc<State>,
    /// Their type URL.
    pub type_url: &'static str,
}

impl Handler for Resources {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let rejected = self.state.apply(self.type_url, updates, &removed);
        let kind = self.type_url.rsplit('.').next().unwrap_or(self.type_url);
        log_rejected(kind, &rejected);
        rejected
    }
}
