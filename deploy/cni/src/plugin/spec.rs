//! The CNI specification as far as a chained plugin needs it
//! (<https://github.com/containernetworking/cni/blob/main/SPEC.md>).

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::protocol::{AGENT_SOCKET, Sandbox};

/// The versions that this plugin speaks; the newest last. A result of 0.2.0 and older has
/// another form.
pub const SUPPORTED_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The interface with the pod's own addresses: what all runtimes of Kubernetes call it.
const POD_INTERFACE: &str = "eth0";
/// The version of a configuration that names none.
const DEFAULT_VERSION: &str = "0.2.0";

/// Error codes: those below 100 are the specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Incompatible CNI version.
    IncompatibleVersion,
    /// An environment variable is missing or invalid.
    Environment,
    /// Input or output failed.
    Io,
    /// Content could not be decoded.
    Decode,
    /// The network configuration is invalid.
    Configuration,
    /// Something has to happen first; it may be tried again.
    TryAgainLater,
    /// Refused, and trying again does not help. Our own.
    Refused,
}

impl Code {
    fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::Environment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::Configuration => 7,
            Self::TryAgainLater => 11,
            Self::Refused => 100,
        }
    }
}

/// A failure in the specification's form.
#[derive(Debug, thiserror::Error)]
#[error("{message}{}{details}", if .details.is_empty() { "" } else { ": " })]
pub struct CniError {
    code: Code,
    message: String,
    details: String,
}

impl CniError {
    /// `message` is what people read on the pod.
    pub fn new(code: Code, message: impl Into<String>, details: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.to_string(),
        }
    }

    /// The error of a call with this configuration.
    pub(super) fn to_json(&self, configuration: &[u8]) -> Value {
        let mut error = json!({
            "cniVersion": version_of(configuration),
            "code": self.code.number(),
            "msg": format!("adit-cni: {}", self.message),
        });
        if !self.details.is_empty() {
            error["details"] = json!(self.details);
        }
        error
    }
}

/// The version in which to answer.
fn version_of(configuration: &[u8]) -> String {
    serde_json::from_slice::<Value>(configuration)
        .ok()
        .and_then(|conf| Some(conf.get("cniVersion")?.as_str()?.to_owned()))
        .unwrap_or_else(|| DEFAULT_VERSION.to_owned())
}

/// The answer to VERSION.
pub(super) fn versions(configuration: &[u8]) -> Value {
    json!({
        "cniVersion": version_of(configuration),
        "supportedVersions": SUPPORTED_VERSIONS,
    })
}

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// The environment of a call.
#[derive(Debug)]
pub(super) struct Environment {
    pub(super) verb: Verb,
    container: String,
    netns: PathBuf,
    interface: String,
    arguments: BTreeMap<String, String>,
}

impl Environment {
    pub(super) fn read(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let text = |name: &'static str| match variable(name) {
            None => Ok(String::new()),
            Some(value) => value
                .into_string()
                .map_err(|_| CniError::new(Code::Environment, format!("{name} is not text"), name)),
        };
        let verb = match text("CNI_COMMAND")?.as_str() {
            "ADD" => Verb::Add,
            "DEL" => Verb::Del,
            "CHECK" => Verb::Check,
            "GC" => Verb::Gc,
            "STATUS" => Verb::Status,
            "VERSION" => Verb::Version,
            other => {
                let what = format!("CNI_COMMAND={other:?} is unknown");
                return Err(CniError::new(Code::Environment, what, "CNI_COMMAND"));
            }
        };
        let environment = Self {
            verb,
            container: text("CNI_CONTAINERID")?,
            netns: variable("CNI_NETNS").unwrap_or_default().into(),
            interface: text("CNI_IFNAME")?,
            arguments: arguments(&text("CNI_ARGS")?),
        };
        let needs_container = matches!(verb, Verb::Add | Verb::Del | Verb::Check);
        if needs_container && environment.container.is_empty() {
            return Err(missing("CNI_CONTAINERID"));
        }
        Ok(environment)
    }

    /// The pod's sandbox; `None` outside Kubernetes, and for a further interface of a pod
    /// (Multus): its addresses are not the pod's, and its end is not the pod's end.
    pub(super) fn sandbox(&self) -> Option<Sandbox> {
        if !matches!(self.interface.as_str(), "" | POD_INTERFACE) {
            return None;
        }
        let argument = |name: &str| {
            let value = self.arguments.get(name)?;
            (!value.is_empty()).then(|| value.clone())
        };
        Some(Sandbox {
            id: self.container.clone(),
            namespace: argument("K8S_POD_NAMESPACE")?,
            name: argument("K8S_POD_NAME")?,
            uid: argument("K8S_POD_UID"),
            addresses: Vec::new(),
        })
    }

    pub(super) fn netns(&self) -> Result<&Path, CniError> {
        match self.netns.as_os_str().is_empty() {
            true => Err(missing("CNI_NETNS")),
            false => Ok(&self.netns),
        }
    }
}

fn missing(variable: &str) -> CniError {
    let what = format!("the environment variable {variable} is missing");
    CniError::new(Code::Environment, what, variable)
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let argument = |name| self.arguments.get(name).map_or("", String::as_str);
        write!(
            f,
            "{:?} {}/{} sandbox {}",
            self.verb,
            argument("K8S_POD_NAMESPACE"),
            argument("K8S_POD_NAME"),
            self.container
        )
    }
}

/// `CNI_ARGS`: `A=B;C=D`.
fn arguments(text: &str) -> BTreeMap<String, String> {
    let pair = |part: &str| {
        let (key, value) = part.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    };
    text.split(';').filter_map(pair).collect()
}

/// The network configuration of a call.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetConf {
    /// In which version to speak.
    #[serde(default)]
    cni_version: String,
    /// What the plugins before ours answered.
    #[serde(default)]
    prev_result: Option<Value>,
    /// Of GC.
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
    /// Where the node agent listens.
    #[serde(default = "default_socket")]
    pub agent_socket: String,
    /// Pods of these namespaces never belong to the mesh, and are not asked about.
    #[serde(default)]
    pub exclude_namespaces: Vec<String>,
    /// Pods of these namespaces start also when nobody can be asked.
    #[serde(default)]
    pub unheld_namespaces: Vec<String>,
    /// Where calls are written down; empty: nowhere.
    #[serde(default)]
    pub log_file: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attachment {
    #[serde(rename = "containerID")]
    container_id: String,
}

fn default_socket() -> String {
    AGENT_SOCKET.to_owned()
}

impl NetConf {
    /// What an installer writes.
    pub fn new(
        agent_socket: String,
        exclude_namespaces: Vec<String>,
        unheld_namespaces: Vec<String>,
        log_file: String,
    ) -> Self {
        Self {
            cni_version: String::new(),
            prev_result: None,
            valid_attachments: None,
            agent_socket,
            exclude_namespaces,
            unheld_namespaces,
            log_file,
        }
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, CniError> {
        let conf: Self = serde_json::from_slice(text).map_err(|e| {
            CniError::new(
                Code::Decode,
                "the network configuration is not understood",
                e,
            )
        })?;
        let version = match conf.cni_version.as_str() {
            "" => DEFAULT_VERSION,
            version => version,
        };
        if !SUPPORTED_VERSIONS.contains(&version) {
            let what = format!("CNI version {version} is not supported");
            let known = SUPPORTED_VERSIONS.join(", ");
            return Err(CniError::new(Code::IncompatibleVersion, what, known));
        }
        Ok(conf)
    }

    /// What the plugins before ours answered.
    pub(super) fn previous_result(&self) -> Result<&Value, CniError> {
        self.prev_result.as_ref().ok_or_else(|| {
            CniError::new(
                Code::Configuration,
                "there is no plugin before this one in the list, which gives the pod its network",
                "prevResult is missing",
            )
        })
    }

    pub(super) fn valid_sandboxes(&self) -> Option<HashSet<&str>> {
        let attachments = self.valid_attachments.as_ref()?;
        Some(
            attachments
                .iter()
                .map(|a| a.container_id.as_str())
                .collect(),
        )
    }
}

/// The addresses that a result gives to the sandbox: those of interfaces inside it.
pub(super) fn addresses(result: &Value) -> Result<Vec<IpAddr>, CniError> {
    #[derive(Deserialize)]
    struct Result_ {
        #[serde(default)]
        interfaces: Vec<Interface>,
        #[serde(default)]
        ips: Vec<Ip>,
    }
    #[derive(Deserialize)]
    struct Interface {
        #[serde(default)]
        sandbox: String,
    }
    #[derive(Deserialize)]
    struct Ip {
        address: String,
        interface: Option<usize>,
    }
    let not_understood = |e: &dyn fmt::Display| {
        CniError::new(
            Code::Decode,
            "the result of the plugins before this one is not understood",
            e,
        )
    };
    let result = Result_::deserialize(result).map_err(|e| not_understood(&e))?;
    let is_inside = |ip: &&Ip| match ip.interface.and_then(|index| result.interfaces.get(index)) {
        Some(interface) => !interface.sandbox.is_empty(),
        None => true,
    };
    let mut found = Vec::new();
    for ip in result.ips.iter().filter(is_inside) {
        let parsed = ip.address.parse::<IpNet>().map(|net| net.addr());
        let address = parsed
            .or_else(|_| ip.address.parse::<IpAddr>())
            .map_err(|_| not_understood(&format!("{:?} is no address", ip.address)))?;
        if !found.contains(&address) {
            found.push(address);
        }
    }
    Ok(found)
}
