//! Policies and requests in few words.

use std::net::IpAddr;

use ::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::identity::{SpiffeId, TrustDomain};
use crate::policy::http::*;
use crate::policy::{TrustDomains, Verdict};
use crate::proto::waypoint as proto;
use crate::proto::waypoint::authorization_policy::Action;

pub(super) fn list(values: &[&str]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

pub(super) fn named(
    namespace: &str,
    name: &str,
    action: Action,
    rules: Vec<proto::AuthorizationRule>,
) -> proto::AuthorizationPolicy {
    proto::AuthorizationPolicy {
        object: Some(proto::ObjectRef {
            kind: "AuthorizationPolicy".into(),
            namespace: namespace.into(),
            name: name.into(),
            created: 0,
        }),
        action: action.into(),
        provider: if action == Action::Custom {
            "ext".into()
        } else {
            String::new()
        },
        targets: vec![service("srv", "web")],
        rules,
        ..Default::default()
    }
}

pub(super) fn policy(
    action: Action,
    rules: Vec<proto::AuthorizationRule>,
) -> proto::AuthorizationPolicy {
    let name = action.as_str_name().to_ascii_lowercase();
    named("srv", &name, action, rules)
}

pub(super) fn allow(rules: Vec<proto::AuthorizationRule>) -> proto::AuthorizationPolicy {
    policy(Action::Allow, rules)
}

pub(super) fn deny(rules: Vec<proto::AuthorizationRule>) -> proto::AuthorizationPolicy {
    policy(Action::Deny, rules)
}

pub(super) fn service(namespace: &str, name: &str) -> proto::Target {
    proto::Target {
        kind: Some(proto::target::Kind::Service(proto::ServiceRef {
            namespace: namespace.into(),
            hostname: format!("{name}.{namespace}.svc.cluster.local"),
        })),
    }
}

pub(super) fn gateway(gateway: &str) -> proto::Target {
    proto::Target {
        kind: Some(proto::target::Kind::Gateway(gateway.into())),
    }
}

pub(super) fn workload(uid: &str) -> proto::Target {
    proto::Target {
        kind: Some(proto::target::Kind::Workload(uid.into())),
    }
}

pub(super) fn everything() -> proto::AuthorizationRule {
    Default::default()
}

pub(super) fn from(source: proto::Source) -> proto::AuthorizationRule {
    proto::AuthorizationRule {
        from: vec![source],
        ..Default::default()
    }
}

pub(super) fn to(operation: proto::Operation) -> proto::AuthorizationRule {
    proto::AuthorizationRule {
        to: vec![operation],
        ..Default::default()
    }
}

pub(super) fn when(key: &str, values: &[&str], not: &[&str]) -> proto::AuthorizationRule {
    proto::AuthorizationRule {
        when: vec![proto::Condition {
            key: key.into(),
            values: list(values),
            not_values: list(not),
        }],
        ..Default::default()
    }
}

pub(super) fn principals(values: &[&str]) -> proto::AuthorizationRule {
    from(proto::Source {
        principals: list(values),
        ..Default::default()
    })
}

pub(super) fn methods(values: &[&str]) -> proto::AuthorizationRule {
    to(proto::Operation {
        methods: list(values),
        ..Default::default()
    })
}

pub(super) fn paths(values: &[&str]) -> proto::AuthorizationRule {
    to(proto::Operation {
        paths: list(values),
        ..Default::default()
    })
}

pub(super) fn hosts(values: &[&str]) -> proto::AuthorizationRule {
    to(proto::Operation {
        hosts: list(values),
        ..Default::default()
    })
}

/// A request for `srv/web`: GET / by nobody, over HTTP, unless said otherwise.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) by: Option<&'static str>,
    pub(super) ip: IpAddr,
    pub(super) trusted_proxies: u32,
    pub(super) port: u16,
    pub(super) sni: Option<&'static str>,
    pub(super) http: bool,
    pub(super) method: &'static str,
    /// With its query.
    pub(super) target: String,
    pub(super) mode: PathNormalization,
    pub(super) host: String,
    pub(super) headers: HeaderMap,
    pub(super) claims: Option<Claims>,
}

pub(super) fn get(target: &str) -> Call {
    Call {
        by: None,
        ip: IpAddr::from([10, 1, 1, 1]),
        trusted_proxies: 0,
        port: 80,
        sni: None,
        http: true,
        method: "GET",
        target: target.into(),
        mode: PathNormalization::Base,
        host: "web.srv".into(),
        headers: HeaderMap::new(),
        claims: None,
    }
}

pub(super) fn tcp(port: u16) -> Call {
    Call {
        http: false,
        port,
        ..get("/")
    }
}

impl Call {
    /// `namespace/account` of `cluster.local`.
    pub(super) fn by(self, account: &'static str) -> Self {
        Self {
            by: Some(account),
            ..self
        }
    }

    pub(super) fn method(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    pub(super) fn host(self, host: &str) -> Self {
        Self {
            host: host.into(),
            ..self
        }
    }

    pub(super) fn mode(self, mode: PathNormalization) -> Self {
        Self { mode, ..self }
    }

    pub(super) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.append(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).expect("a header value"),
        );
        self
    }

    pub(super) fn claims(self, payload: Value) -> Self {
        let Value::Object(payload) = payload else {
            panic!("claims are an object");
        };
        Self {
            claims: Some(Claims::new(payload, [])),
            ..self
        }
    }

    /// Normalises as the data path does and evaluates against what applies to `srv/web`.
    pub(super) fn evaluate(&self, policies: &[proto::AuthorizationPolicy]) -> HttpEvaluation {
        self.with(|request| set(policies).evaluate_deny_allow(request, &TrustDomains::default()))
            .expect("a request that is not refused before policy")
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&HttpRequest<'_>) -> T) -> Result<T, Rejected> {
        let identity = self.by.map(|text| {
            let (namespace, account) = text.split_once('/').expect("namespace/account");
            SpiffeId::new(TrustDomain::default(), namespace, account).expect("an id")
        });
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (self.target.as_str(), None),
        };
        let path = normalize(path, self.mode)?;
        Ok(act(&HttpRequest {
            source_identity: identity.as_ref(),
            source_ip: self.ip,
            remote_ip: remote_address(self.ip, &self.headers, self.trusted_proxies),
            destination_ip: IpAddr::from([10, 96, 1, 1]),
            destination_port: self.port,
            sni: self.sni,
            http: self.http.then_some(HttpFields {
                method: self.method,
                path: &path,
                query,
                host: &self.host,
                headers: &self.headers,
                claims: self.claims.as_ref(),
            }),
        }))
    }

    pub(super) fn permitted(&self, policies: &[proto::AuthorizationPolicy]) -> bool {
        matches!(self.evaluate(policies).verdict, Verdict::Permitted(_))
    }
}

pub(super) fn convert(wire: &proto::AuthorizationPolicy) -> HttpPolicy {
    let object = wire.object.clone().unwrap_or_default();
    let name = format!("AuthorizationPolicy/{}/{}", object.namespace, object.name);
    HttpPolicy::from_resource(&name, wire)
}

pub(super) fn store(policies: &[proto::AuthorizationPolicy]) -> HttpPolicies {
    let mut store = HttpPolicies::new();
    store.apply(policies.iter().map(convert).map(HttpUpdate::Upsert));
    store
}

/// What applies to `srv/web` at the waypoint `srv/waypoint`.
pub(super) fn set(policies: &[proto::AuthorizationPolicy]) -> HttpPolicySet {
    store(policies).for_service("srv/waypoint", "srv", "web.srv.svc.cluster.local")
}
