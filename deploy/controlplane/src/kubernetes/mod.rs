//! The Kubernetes cluster that a control plane belongs to: how it is reached, and who in it
//! this replica is. Everything that reads or writes the API server starts from a
//! [`Kubernetes`].

pub mod apply;
mod client;
pub mod lease;
pub mod queue;
mod root_certificates;

pub use apply::{GATEWAY_MANAGER, STATUS_MANAGER};
pub use client::{ConnectError, connect, explain};
pub use root_certificates::{ROOT_CONFIG_MAP, ROOT_KEY, RootCertificates};

use std::sync::Arc;

/// The field manager of objects that belong to the mesh itself (server-side apply).
pub const FIELD_MANAGER: &str = "adit";

/// A handle on the API server. Cheap to clone.
#[derive(Clone)]
pub struct Kubernetes {
    /// Speaks with the API server. Its deadline for answers is that of watches, which is
    /// long: whoever calls sets one.
    pub client: kube::Client,
    /// The namespace of the control plane, `istio-system` unless told otherwise.
    pub namespace: Arc<str>,
    /// What tells this replica from the others: the name of its pod.
    pub identity: Arc<str>,
}

impl std::fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubernetes")
            .field("namespace", &self.namespace)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}
