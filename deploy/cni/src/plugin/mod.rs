//! What a container runtime runs: one call of the CNI specification (0.3.0 to 1.1.0),
//! configuration on standard input, result on standard output.
//!
//! The plugin changes nothing about the network: the result of the plugins before it goes
//! through as it is. It only holds up the sandbox of a pod that belongs to the mesh until
//! the pod is captured, and fails it when that is not possible. Deleting never fails: what
//! was missed ends by itself.

mod log;
mod spec;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use adit_shared::net::handoff::{self, Answer, CallError};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::protocol::{Added, PLUGIN_DEADLINE};
use log::Log;
pub use spec::{CniError, Code, NetConf, SUPPORTED_VERSIONS};
use spec::{Environment, Verb};

/// The most bytes of a configuration.
const MAX_CONFIGURATION: u64 = 4 << 20;
/// Patience where the sandbox starts with or without an answer.
const SHORT_DEADLINE: Duration = Duration::from_secs(3);

/// Whether a runtime has started this process as a plugin.
pub fn is_called() -> bool {
    std::env::var_os("CNI_COMMAND").is_some()
}

/// Carries out the call that the environment describes.
pub fn main() -> ExitCode {
    let mut configuration = Vec::new();
    let read = std::io::stdin()
        .take(MAX_CONFIGURATION)
        .read_to_end(&mut configuration);
    let done = match read {
        Ok(_) => run(&|name| std::env::var_os(name), &configuration),
        Err(e) => Err(CniError::new(
            Code::Io,
            "the configuration cannot be read",
            e,
        )),
    };
    let (output, code) = match done {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(output)) => (output, ExitCode::SUCCESS),
        Err(error) => (error.to_json(&configuration), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout(), "{output}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One call; what is to be printed.
///
/// # Errors
/// [`CniError`], in the specification's form.
fn run(
    environment: &dyn Fn(&str) -> Option<OsString>,
    configuration: &[u8],
) -> Result<Option<Value>, CniError> {
    let environment = Environment::read(environment)?;
    if environment.verb == Verb::Version {
        return Ok(Some(spec::versions(configuration)));
    }
    let conf = NetConf::parse(configuration)?;
    let log = Log::new(&conf.log_file);
    let called = Called {
        environment: &environment,
        conf: &conf,
        log: &log,
    };
    let done = match environment.verb {
        Verb::Add => called.add().map(Some),
        Verb::Check => called.check().map(|()| None),
        Verb::Del => {
            called.del();
            Ok(None)
        }
        Verb::Gc => {
            called.gc();
            Ok(None)
        }
        // A runtime that hears that its network is not available takes the node out of
        // service, and with it the agent that would make it available. Pods outside the mesh
        // start without us; those inside are held up one by one, with an event each.
        Verb::Status | Verb::Version => Ok(None),
    };
    if let Err(error) = &done {
        log.line(&format!("{environment} failed: {error}"));
    }
    done
}

/// A call with its circumstances.
struct Called<'a> {
    environment: &'a Environment,
    conf: &'a NetConf,
    log: &'a Log,
}

impl Called<'_> {
    fn add(&self) -> Result<Value, CniError> {
        let result = self.conf.previous_result()?;
        // A sandbox of something else than Kubernetes.
        let Some(mut sandbox) = self.environment.sandbox() else {
            return Ok(result.clone());
        };
        if self.is_excluded(&sandbox.namespace) {
            return Ok(result.clone());
        }
        sandbox.addresses = spec::addresses(result)?;
        let netns = self.environment.netns()?;
        let netns = File::open(netns).map_err(|e| {
            let what = format!("the network namespace {} cannot be opened", netns.display());
            CniError::new(Code::Io, what, e)
        })?;
        // Where the mesh itself runs, nothing waits for it: it would wait for itself.
        let waits = !self.conf.unheld_namespaces.contains(&sandbox.namespace);
        let deadline = if waits {
            PLUGIN_DEADLINE
        } else {
            SHORT_DEADLINE
        };
        match self.ask("/add", &sandbox, Some(netns.as_fd()), deadline) {
            Ok(answer) => {
                let added: Option<Added> = serde_json::from_slice(&answer.body).ok();
                self.log.line(&match added {
                    Some(Added { enrolled: true, .. }) => format!("{}: enrolled", self.environment),
                    Some(Added { reason, .. }) => {
                        format!("{}: left alone: {reason}", self.environment)
                    }
                    None => format!("{}: {}", self.environment, answer.text()),
                });
                Ok(result.clone())
            }
            Err(error) if !waits => {
                self.log.line(&format!(
                    "{}: not held up in this namespace: {error}",
                    self.environment
                ));
                Ok(result.clone())
            }
            Err(error) => Err(error),
        }
    }

    fn check(&self) -> Result<(), CniError> {
        self.conf.previous_result()?;
        let Some(sandbox) = self.environment.sandbox() else {
            return Ok(());
        };
        if self.is_excluded(&sandbox.namespace)
            || self.conf.unheld_namespaces.contains(&sandbox.namespace)
        {
            return Ok(());
        }
        self.ask("/check", &sandbox, None, PLUGIN_DEADLINE)
            .map(drop)
    }

    fn del(&self) {
        let Some(sandbox) = self.environment.sandbox() else {
            return;
        };
        if self.is_excluded(&sandbox.namespace) {
            return;
        }
        if let Err(error) = self.ask("/del", &sandbox, None, SHORT_DEADLINE) {
            self.log
                .line(&format!("{}: not told: {error}", self.environment));
        }
    }

    fn gc(&self) {
        let Some(sandboxes) = self.conf.valid_sandboxes() else {
            return;
        };
        if let Err(error) = self.ask("/gc", &sandboxes, None, SHORT_DEADLINE) {
            self.log
                .line(&format!("{}: not told: {error}", self.environment));
        }
    }

    fn is_excluded(&self, namespace: &str) -> bool {
        self.conf.exclude_namespaces.iter().any(|e| e == namespace)
    }

    fn ask(
        &self,
        target: &str,
        what: &impl serde::Serialize,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<Answer, CniError> {
        let body = serde_json::to_vec(what)
            .map_err(|e| CniError::new(Code::Decode, "the request cannot be written", e))?;
        let path = Path::new(&self.conf.agent_socket);
        let answer = handoff::call(path, &Method::POST, target, &body, descriptor, deadline)
            .map_err(|e| self.unanswered(e))?;
        match answer.status {
            StatusCode::OK => Ok(answer),
            status if status.is_client_error() => {
                Err(CniError::new(Code::Refused, answer.text(), ""))
            }
            _ => Err(CniError::new(Code::TryAgainLater, answer.text(), "")),
        }
    }

    fn unanswered(&self, error: CallError) -> CniError {
        let sentence = match error {
            CallError::Unreachable { .. } => {
                "Adit's node agent does not run on this node (DaemonSet istio-cni-node), so that nobody \
                 can say whether the pod belongs to the mesh; it is tried again"
            }
            _ => "Adit's node agent does not answer (DaemonSet istio-cni-node); it is tried again",
        };
        CniError::new(Code::TryAgainLater, sentence, error)
    }
}

/// The entry of the plugin in a list of plugins.
pub fn entry(conf: &NetConf) -> Value {
    json!({
        "type": PLUGIN_TYPE,
        "agentSocket": conf.agent_socket,
        "excludeNamespaces": conf.exclude_namespaces,
        "unheldNamespaces": conf.unheld_namespaces,
        "logFile": conf.log_file,
    })
}

/// The name of the binary in the runtime's directory of plugins.
pub const PLUGIN_TYPE: &str = "adit-cni";
