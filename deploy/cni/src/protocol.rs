//! What the plugin says to the agent: HTTP/1.1 with JSON over a Unix socket
//! (`adit_shared::net::handoff`).
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /add` | [`Sandbox`], and the network namespace as a descriptor | 200 [`Added`]; else a sentence |
//! | `POST /check` | [`Sandbox`] | 200 [`Added`]; 409 if it should be enrolled and is not |
//! | `POST /del` | [`Sandbox`] | 200 |
//! | `POST /gc` | list of sandbox ids | 200 |
//! | `GET /leaving` | | 200, `true` when both DaemonSets are being removed; ztunnel asks that when it ends |
//!
//! 4xx: trying again does not help; 5xx: it may.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the agent listens.
pub const AGENT_SOCKET: &str = "/var/run/adit/cni.sock";
/// Where ztunnel listens.
pub const ZTUNNEL_SOCKET: &str = "/var/run/adit/ztunnel.sock";

/// The plugin's patience with the agent. Runtimes and kubelets give up after minutes.
pub const PLUGIN_DEADLINE: Duration = Duration::from_secs(30);
/// The agent's patience with ztunnel, which answers within 12 s.
pub const ZTUNNEL_DEADLINE: Duration = Duration::from_secs(15);
/// The agent waits so long for a ztunnel that is not there: one that restarts is back by
/// then, and a kubelet tries again only after ten seconds.
pub const ZTUNNEL_WAIT: Duration = Duration::from_secs(5);
/// The agent's patience with the API server.
pub const API_DEADLINE: Duration = Duration::from_secs(5);

/// A sandbox, as the runtime describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`, which older runtimes do not pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// What the plugins before ours gave it.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// How the agent decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Added {
    /// Capture is in place.
    pub enrolled: bool,
    /// Why it was left alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}
