//! Gateways and their classes, as far as waypoints need them.

use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::field::{At, FieldError};
use super::label_selector::{LabelSelector, RawLabelSelector};
use super::meta::Meta;
use super::raw::{Map, nullable, read_spec};

/// Most listeners that a Gateway may have.
const MAX_LISTENERS: usize = 64;
/// Most addresses that a Gateway may have.
const MAX_ADDRESSES: usize = 16;

/// A GatewayClass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayClass {
    /// Metadata.
    pub meta: Meta,
    /// Which controller serves it.
    pub controller: Arc<str>,
    /// What its Gateways are made with.
    pub parameters: Option<ClassParameters>,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

/// `GatewayClass.spec.parametersRef`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassParameters {
    /// API group.
    #[serde(deserialize_with = "nullable")]
    pub group: String,
    /// Kind.
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Namespace; a class has none of its own.
    pub namespace: Option<String>,
}

impl ClassParameters {
    /// Namespace and name of the ConfigMap that is meant.
    ///
    /// # Errors
    /// Why none can be.
    pub fn config_map(&self) -> Result<(&str, &str), String> {
        if !self.group.is_empty() || self.kind != "ConfigMap" {
            return Err(format!(
                "spec.parametersRef names a {} of group {:?}; it can be a ConfigMap",
                self.kind, self.group
            ));
        }
        match self.namespace.as_deref() {
            None | Some("") => Err(format!(
                "spec.parametersRef names no namespace, in which the ConfigMap {} would be",
                self.name
            )),
            Some(namespace) => Ok((namespace, &self.name)),
        }
    }
}

/// A Gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// Metadata.
    pub meta: Meta,
    /// Name of its class.
    pub class: Arc<str>,
    /// Listeners.
    pub listeners: Vec<Listener>,
    /// Addresses that it is to have: somebody else runs it then.
    pub addresses: Vec<GatewayAddress>,
    /// `tls.backend.clientCertificateRef`: what its proxies show to backends.
    pub client_certificate: Option<CertificateRef>,
    /// What is wrong with it. One with errors is not accepted.
    pub errors: Vec<FieldError>,
}

/// What a Gateway names as a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRef {
    /// API group.
    pub group: Arc<str>,
    /// Kind, `Secret` unless said.
    pub kind: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Namespace, the Gateway's unless said.
    pub namespace: Option<Arc<str>>,
}

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// The port.
    pub port: u16,
    /// The protocol, for example `HBONE`.
    pub protocol: Arc<str>,
    /// Which namespaces may attach.
    pub namespaces: AllowedNamespaces,
    /// `allowedRoutes.kinds` is set: kinds by name.
    pub kinds: Vec<Arc<str>>,
}

/// Which namespaces may attach to a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedNamespaces {
    /// The Gateway's own.
    Same,
    /// Every one.
    All,
    /// Those with these labels.
    Selector(LabelSelector),
}

/// An address that a Gateway is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GatewayAddress {
    /// `type: IPAddress`.
    Ip(IpAddr),
    /// `type: Hostname`.
    Hostname(Arc<str>),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawClass {
    #[serde(deserialize_with = "nullable")]
    controller_name: String,
    parameters_ref: Option<Map<ClassParameters>>,
    #[serde(rename = "description")]
    _description: Option<String>,
}

impl GatewayClass {
    /// Reads `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw = read_spec(spec).unwrap_or_else(|error| {
            errors.push(error);
            RawClass::default()
        });
        let spec = At::ROOT.key("spec");
        if raw.controller_name.is_empty() && errors.is_empty() {
            errors.push(spec.key("controllerName").error("is required"));
        }
        Self {
            meta,
            controller: raw.controller_name.into(),
            parameters: raw.parameters_ref.map(Map::into_inner),
            errors,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawGateway {
    #[serde(deserialize_with = "nullable")]
    gateway_class_name: String,
    #[serde(deserialize_with = "nullable")]
    listeners: Vec<Map<RawListener>>,
    #[serde(deserialize_with = "nullable")]
    addresses: Vec<Map<RawAddress>>,
    // What follows is read by whoever provisions gateways, and by ingress gateways.
    #[serde(rename = "infrastructure")]
    _infrastructure: Option<Value>,
    #[serde(rename = "allowedListeners")]
    _allowed_listeners: Option<Value>,
    tls: Option<Map<RawTls>>,
    #[serde(rename = "backendTLS")]
    _backend_tls: Option<Value>,
    #[serde(rename = "defaultScope")]
    _default_scope: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawTls {
    backend: Option<Map<RawBackendTls>>,
    #[serde(rename = "frontend")]
    _frontend: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawBackendTls {
    client_certificate_ref: Option<Map<RawCertificateRef>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawCertificateRef {
    group: Option<String>,
    kind: Option<String>,
    #[serde(deserialize_with = "nullable")]
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawListener {
    #[serde(deserialize_with = "nullable")]
    name: String,
    port: i64,
    #[serde(deserialize_with = "nullable")]
    protocol: String,
    allowed_routes: Option<Map<RawAllowed>>,
    #[serde(rename = "hostname")]
    _hostname: Option<String>,
    #[serde(rename = "tls")]
    _tls: Option<Value>,
    #[serde(rename = "filters")]
    _filters: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawAllowed {
    namespaces: Option<Map<RawNamespaces>>,
    #[serde(deserialize_with = "nullable")]
    kinds: Vec<Map<RawKind>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawNamespaces {
    from: Option<String>,
    selector: Option<Map<RawLabelSelector>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawKind {
    #[serde(rename = "group")]
    _group: Option<String>,
    #[serde(deserialize_with = "nullable")]
    kind: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawAddress {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(deserialize_with = "nullable")]
    value: String,
    #[serde(rename = "routability")]
    _routability: Option<String>,
}

impl Gateway {
    /// Reads `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw = read_spec(spec).unwrap_or_else(|error| {
            errors.push(error);
            // Whose it is should be known even so.
            let class = spec.get("gatewayClassName").and_then(Value::as_str);
            RawGateway {
                gateway_class_name: class.unwrap_or_default().into(),
                ..RawGateway::default()
            }
        });
        let at = At::ROOT.key("spec");
        if raw.gateway_class_name.is_empty() && errors.is_empty() {
            errors.push(at.key("gatewayClassName").error("is required"));
        }
        let list = at.key("listeners");
        let listeners = listeners(&raw.listeners, list, &mut errors);
        let list = at.key("addresses");
        if raw.addresses.len() > MAX_ADDRESSES {
            errors.push(list.error(format!("has more than {MAX_ADDRESSES} entries")));
        }
        let mut addresses = Vec::new();
        for (index, address) in raw.addresses.iter().take(MAX_ADDRESSES).enumerate() {
            match read_address(address, list.index(index)) {
                Ok(address) => addresses.extend(address),
                Err(error) => errors.push(error),
            }
        }
        let backend = raw.tls.as_deref().and_then(|tls| tls.backend.as_deref());
        let certificate = backend.and_then(|tls| tls.client_certificate_ref.as_deref());
        let client_certificate = certificate.map(|raw| CertificateRef {
            group: raw.group.as_deref().unwrap_or_default().into(),
            kind: raw.kind.as_deref().unwrap_or("Secret").into(),
            name: raw.name.as_str().into(),
            namespace: raw.namespace.as_deref().map(Into::into),
        });
        Self {
            meta,
            class: raw.gateway_class_name.into(),
            listeners,
            addresses,
            client_certificate,
            errors,
        }
    }
}

fn listeners(raw: &[Map<RawListener>], at: At<'_>, errors: &mut Vec<FieldError>) -> Vec<Listener> {
    if raw.len() > MAX_LISTENERS {
        errors.push(at.error(format!("has more than {MAX_LISTENERS} entries")));
    }
    let mut found: Vec<Listener> = Vec::new();
    for (index, listener) in raw.iter().take(MAX_LISTENERS).enumerate() {
        let at = at.index(index);
        if listener.name.is_empty() {
            errors.push(at.key("name").error("is required"));
        } else if found.iter().any(|known| *known.name == listener.name) {
            errors.push(at.key("name").error("is the name of another listener"));
        }
        if listener.protocol.is_empty() {
            errors.push(at.key("protocol").error("is required"));
        }
        let port = u16::try_from(listener.port).unwrap_or_default();
        if port == 0 {
            let message = format!("{} is not a port: 1 to 65535", listener.port);
            errors.push(at.key("port").error(message));
        }
        let allowed = listener.allowed_routes.as_deref();
        let at_allowed = at.key("allowedRoutes");
        found.push(Listener {
            name: listener.name.as_str().into(),
            port,
            protocol: listener.protocol.as_str().into(),
            namespaces: allowed_namespaces(
                allowed.and_then(|allowed| allowed.namespaces.as_deref()),
                at_allowed.key("namespaces"),
                errors,
            ),
            kinds: allowed
                .map(|allowed| allowed.kinds.iter().map(|kind| kind.kind.as_str().into()))
                .map(Iterator::collect)
                .unwrap_or_default(),
        });
    }
    found
}

fn allowed_namespaces(
    raw: Option<&RawNamespaces>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> AllowedNamespaces {
    let Some(raw) = raw else {
        return AllowedNamespaces::Same;
    };
    match raw.from.as_deref() {
        None | Some("" | "Same") => AllowedNamespaces::Same,
        Some("All") => AllowedNamespaces::All,
        Some("Selector") => match &raw.selector {
            Some(selector) => {
                let selector = LabelSelector::read(selector, at.key("selector"), errors);
                AllowedNamespaces::Selector(selector)
            }
            None => {
                errors.push(at.key("selector").error("is required with from: Selector"));
                AllowedNamespaces::Same
            }
        },
        Some(other) => {
            let message = format!("{other:?} is not All, Selector or Same");
            errors.push(at.key("from").error(message));
            AllowedNamespaces::Same
        }
    }
}

/// An address without a value asks for any address of its type: ours is one.
fn read_address(raw: &RawAddress, at: At<'_>) -> Result<Option<GatewayAddress>, FieldError> {
    if raw.value.is_empty() {
        return Ok(None);
    }
    match raw.kind.as_deref() {
        None | Some("" | "IPAddress") => match raw.value.parse() {
            Ok(ip) => Ok(Some(GatewayAddress::Ip(ip))),
            Err(_) => {
                let message = format!("{:?} is not an IP address", raw.value);
                Err(at.key("value").error(message))
            }
        },
        Some("Hostname") => Ok(Some(GatewayAddress::Hostname(raw.value.as_str().into()))),
        Some(other) => Err(at
            .key("type")
            .error(format!("{other:?} is not IPAddress or Hostname"))),
    }
}
