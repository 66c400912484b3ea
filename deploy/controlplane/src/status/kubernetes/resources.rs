//! Under which paths the API server has our kinds.

use std::collections::BTreeMap;

use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, discovery};

use crate::kubernetes::apply::{Failure, RequestError, request};
use crate::model::Kind;

const GROUPS: [&str; 3] = [
    "gateway.networking.k8s.io",
    "security.istio.io",
    "telemetry.istio.io",
];

/// The kinds that there are, each in the version that is most stable.
#[derive(Debug, Clone, Default)]
pub(super) struct Resources(BTreeMap<Kind, ApiResource>);

impl Resources {
    /// Asks the API server. A group that is not there has no kinds.
    ///
    /// # Errors
    /// A request's.
    pub(super) async fn discover(client: &Client) -> Result<Self, RequestError> {
        let service = GroupVersionKind::gvk("", "v1", "Service");
        let mut found = BTreeMap::from([(Kind::Service, ApiResource::from_gvk(&service))]);
        for group in GROUPS {
            let group = match request(discovery::group(client, group)).await {
                Ok(group) => group,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(error),
            };
            // Not the recommended version of the group: kinds grow up one by one.
            for (resource, _) in group.resources_by_stability() {
                let mut kinds = super::merge::kinds();
                if let Some(kind) = kinds.find(|kind| kind.as_str() == resource.kind) {
                    found.entry(kind).or_insert(resource);
                }
            }
        }
        Ok(Self(found))
    }

    pub(super) fn get(&self, kind: Kind) -> Option<&ApiResource> {
        self.0.get(&kind)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Kind, &ApiResource)> {
        self.0.iter().map(|(kind, resource)| (*kind, resource))
    }
}

fn is_absent(error: &RequestError) -> bool {
    match error {
        RequestError::Api(api) if matches!(**api, kube::Error::Discovery(_)) => true,
        error => error.failure() == Failure::Gone,
    }
}
