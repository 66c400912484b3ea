//! What the event loop is told.

use tokio::sync::oneshot;

use crate::control::Request;
use crate::state::ProcessId;

/// Where the answer to a request goes.
pub(super) type Answer = oneshot::Sender<Result<serde_json::Value, String>>;

pub(super) enum Event {
    /// Something in the manifest directory changed.
    Manifests,
    /// Something about a container changed.
    Container {
        uid: String,
        index: usize,
        update: Update,
    },
    /// A pod got another phase.
    Phase { uid: String, phase: &'static str },
    /// A pod that was told to end has ended, and nothing is left of it.
    Gone { uid: String },
    /// Something about a component changed.
    Component {
        name: String,
        /// The pod that it runs in, for a waypoint: its successor has the same name.
        pod: Option<String>,
        update: Update,
    },
    /// `aditd` has written its root certificate: ztunnels can start.
    RootCertificate,
    /// Another process, or the handle, wants something.
    Request { request: Request, reply: Answer },
    /// End on SIGTERM and SIGINT from now on.
    ObeySignals,
    /// End.
    Stop,
}

/// What can change about a process.
#[derive(Debug, Clone)]
pub(super) enum Update {
    /// It was started; `again` if it had run before.
    Started {
        process: Option<ProcessId>,
        again: bool,
    },
    /// It passed or failed its readiness probe.
    Ready(bool),
    /// It ended, or could not be started.
    Ended(String),
}
