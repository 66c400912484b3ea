//! What every object has: name, labels, age, and the place it was read from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;

use super::field::{At, FieldError};

/// Kubernetes labels.
pub type Labels = BTreeMap<String, String>;

/// The kinds of objects that the control plane reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `v1` Pod.
    Pod,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `security.istio.io` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `security.istio.io` PeerAuthentication.
    PeerAuthentication,
    /// `v1` ConfigMap.
    ConfigMap,
    /// `v1` Secret.
    Secret,
    /// `gateway.networking.k8s.io` GatewayClass.
    GatewayClass,
    /// `gateway.networking.k8s.io` Gateway.
    Gateway,
    /// `gateway.networking.k8s.io` HTTPRoute.
    HttpRoute,
    /// `gateway.networking.k8s.io` GRPCRoute.
    GrpcRoute,
    /// `gateway.networking.k8s.io` TCPRoute.
    TcpRoute,
    /// `gateway.networking.k8s.io` TLSRoute.
    TlsRoute,
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant,
    /// `gateway.networking.k8s.io` BackendTLSPolicy.
    BackendTlsPolicy,
    /// `security.istio.io` RequestAuthentication.
    RequestAuthentication,
    /// `networking.istio.io` DestinationRule.
    DestinationRule,
    /// `networking.istio.io` VirtualService.
    VirtualService,
    /// `networking.istio.io` ServiceEntry.
    ServiceEntry,
    /// `telemetry.istio.io` Telemetry.
    Telemetry,
}

impl Kind {
    /// Objects of this kind live outside namespaces.
    pub fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
    }

    /// The kind as manifests write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
            Self::GatewayClass => "GatewayClass",
            Self::Gateway => "Gateway",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TcpRoute => "TCPRoute",
            Self::TlsRoute => "TLSRoute",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::BackendTlsPolicy => "BackendTLSPolicy",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::DestinationRule => "DestinationRule",
            Self::VirtualService => "VirtualService",
            Self::ServiceEntry => "ServiceEntry",
            Self::Telemetry => "Telemetry",
        }
    }

    /// The kind that manifests write as `text`, if the control plane reads it.
    pub fn from_name(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    /// All kinds.
    pub const ALL: [Self; 23] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::ConfigMap,
        Self::Secret,
        Self::GatewayClass,
        Self::Gateway,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TcpRoute,
        Self::TlsRoute,
        Self::ReferenceGrant,
        Self::BackendTlsPolicy,
        Self::RequestAuthentication,
        Self::DestinationRule,
        Self::VirtualService,
        Self::ServiceEntry,
        Self::Telemetry,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An object's unique name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// Where an object was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The file; `None` for objects that do not come from files.
    pub file: Option<Arc<Path>>,
    /// Line on which the document starts, from 1; 0 without a file.
    pub line: u32,
    /// Position in the document's `items`, for `List` kinds.
    pub item: Option<usize>,
}

impl Origin {
    /// Of an object that no file holds.
    pub const NONE: Self = Self {
        file: None,
        line: 0,
        item: None,
    };
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{}", file.display(), self.line),
            None => f.write_str("-"),
        }
    }
}

/// When an object came to be. Older is less.
///
/// An object without `creationTimestamp` counts as newer than all that have one; among
/// themselves such objects are ordered by where they stand ([`Meta::seniority`]), which
/// stays the same when files are edited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Age {
    /// `metadata.creationTimestamp`.
    Created(Timestamp),
    /// Not stated.
    Unstated,
}

/// The metadata that the control plane keeps of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Name.
    pub name: Arc<str>,
    /// Namespace; empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// `metadata.uid`; where it is missing, `<namespace>.<name>`, so that files written
    /// by hand need none.
    pub uid: Arc<str>,
    /// Labels.
    pub labels: Labels,
    /// Annotations under `istio.io`; the others are not kept.
    pub annotations: BTreeMap<String, String>,
    /// When it was created.
    pub age: Age,
    /// `metadata.generation`: counts the versions of `spec`, where an API server does so.
    pub generation: Option<i64>,
    /// `deletionTimestamp` is set.
    pub deleting: bool,
    /// Where it was read.
    pub origin: Origin,
}

impl Age {
    /// Microseconds since 1970; 0: not stated.
    pub fn micros(self) -> i64 {
        match self {
            Self::Created(time) => time.as_microsecond(),
            Self::Unstated => 0,
        }
    }
}

impl Meta {
    /// Checks and keeps `meta` of an object of `kind`.
    ///
    /// # Errors
    /// A missing or impossible name or namespace.
    pub fn parse(kind: Kind, meta: ObjectMeta, origin: Origin) -> Result<Self, FieldError> {
        let metadata = At::ROOT.key("metadata");
        let at = metadata.key("name");
        let name = meta.name.unwrap_or_default();
        check_name(&name).map_err(|reason| at.error(reason))?;
        let namespace = if kind.is_cluster_scoped() {
            String::new()
        } else {
            let namespace = meta.namespace.unwrap_or_else(|| "default".into());
            let at = metadata.key("namespace");
            check_name(&namespace).map_err(|reason| at.error(reason))?;
            namespace
        };
        let uid = match meta.uid {
            Some(uid) => {
                let at = metadata.key("uid");
                check_name(&uid).map_err(|reason| at.error(reason))?;
                uid.into()
            }
            None if namespace.is_empty() => name.as_str().into(),
            None => format!("{namespace}.{name}").into(),
        };
        let mut annotations = meta.annotations.unwrap_or_default();
        annotations.retain(|key, _| {
            key.split_once('/')
                .is_some_and(|(domain, _)| domain == "istio.io" || domain.ends_with(".istio.io"))
        });
        Ok(Self {
            name: name.into(),
            namespace: namespace.into(),
            uid,
            labels: meta.labels.unwrap_or_default(),
            annotations,
            age: meta
                .creation_timestamp
                .map_or(Age::Unstated, |time| Age::Created(time.0)),
            generation: meta.generation,
            deleting: meta.deletion_timestamp.is_some(),
            origin,
        })
    }

    /// The object's name, as a reference of `kind`.
    pub fn reference(&self, kind: Kind) -> ObjectRef {
        ObjectRef {
            kind,
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    /// A label's value.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    /// Orders objects from oldest to newest: where several claim the same thing, the
    /// least wins. Ties go to the file and line, then to namespace and name (Gateway API
    /// "Conflicts").
    pub fn seniority(&self) -> (Age, &Origin, &str, &str) {
        (self.age, &self.origin, &self.namespace, &self.name)
    }
}

/// Names go into file names, resource names and SPIFFE ids, hence the characters of a
/// DNS subdomain and nothing else (Kubernetes `IsDNS1123Subdomain`).
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    if name.is_empty() {
        Err("is required".into())
    } else if name.len() > 253
        || !bytes.iter().copied().all(legal)
        || !ends(bytes.first())
        || !ends(bytes.last())
        || name.contains("..")
    {
        Err(format!(
            "{name:?} is not a Kubernetes name: lower-case letters, digits, '-' and '.', at most 253 bytes"
        ))
    } else {
        Ok(())
    }
}

/// The controlling owner, if there is one.
pub(super) fn controller(owners: Option<&Vec<OwnerReference>>) -> Option<&OwnerReference> {
    owners?.iter().find(|owner| owner.controller == Some(true))
}

/// Whether `selector` picks an object with `labels`; an empty selector picks all.
pub fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}
