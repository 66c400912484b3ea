//! What the control plane writes back about objects, and keeps over a restart: conditions,
//! addresses, and which pods are captured.
//!
//! With an API server as source it holds all that (`kubernetes`); with a directory as
//! source a status directory does (`directory`). What is told about an object is the same
//! ([`ObjectStatus`]), and the driver knows the two as a [`StatusBackend`].

mod backend;
mod directory;
pub mod kubernetes;
mod object;
mod wire;

use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::jiff::Timestamp;

pub use backend::StatusBackend;
pub use directory::{StatusError, StatusStore, read_statuses};
pub use object::{AddressStatus, Condition, ListenerStatus, ObjectStatus, ParentStatus, RefStatus};
pub use wire::{
    Item as StoredStatus, StoredAddress, StoredAncestor, StoredCondition, StoredListener,
    StoredParent, StoredRef,
};

/// The annotation that says a pod is captured (Istio `ambient.istio.io/redirection`).
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// The value of [`REDIRECTION`] on a pod that is captured.
pub const REDIRECTION_ENABLED: &str = "enabled";

/// A pod that is captured, as far as clients may rely on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CapturedPod {
    /// Pod uid.
    pub uid: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A time as conditions state it.
fn rfc3339(time: SystemTime) -> String {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or_default();
    let time = Timestamp::from_second(seconds).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
