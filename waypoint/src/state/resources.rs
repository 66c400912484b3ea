//! The resources as they were received, by name, and what each of them touches.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use adit_shared::model::ServiceName;
use adit_shared::policy::http::{HttpPolicies, HttpPolicy, HttpUpdate};
use adit_shared::proto::waypoint as pb;
use bytes::Bytes;
use prost::Message;

use super::Touched;
use super::secrets::Secrets;
use super::view::Protocol;
use crate::authentication::{KeySources, RequestAuthentication, RequestAuthentications};
use crate::balance::TrafficPolicy;
use crate::route::Route;

/// Everything that was received and is in force.
pub(super) struct Store {
    /// Where issuers' keys come from.
    keys: KeySources,
    pub(super) authentications: Arc<RequestAuthentications>,
    pub(super) settings: pb::Settings,
    pub(super) waypoints: HashMap<String, pb::Waypoint>,
    pub(super) secrets: Secrets,
    pub(super) services: HashMap<ServiceName, Arc<[DeclaredPort]>>,
    service_names: HashMap<String, ServiceName>,
    pub(super) providers: HashMap<String, Arc<pb::Provider>>,
    pub(super) policies: HttpPolicies,
    /// Changes of `policies` that are not in it yet.
    pending: Vec<HttpUpdate>,
    pub(super) telemetry: BTreeMap<String, Arc<pb::Telemetry>>,
    pub(super) traffic: BTreeMap<String, Traffic>,
    pub(super) backend_tls: BTreeMap<String, Arc<pb::BackendTls>>,
    routes: BTreeMap<String, Arc<Route>>,
    /// Names of the routes that are attached to a service.
    attached: HashMap<ServiceName, BTreeSet<String>>,
}

/// What a service says of one of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeclaredPort {
    pub(super) port: u16,
    pub(super) name: Arc<str>,
    pub(super) protocol: Protocol,
}

/// A traffic policy and where it comes from.
pub(super) struct Traffic {
    pub(super) policy: Arc<TrafficPolicy>,
    /// The user's object: which of two for one host wins.
    pub(super) object: pb::ObjectRef,
}

/// Of two objects that say the same, the older one holds, then the first by name
/// (Gateway API, conflict resolution).
pub(super) fn seniority(object: Option<&pb::ObjectRef>) -> (i64, &str, &str) {
    object.map_or((i64::MAX, "", ""), |object| {
        let created = match object.created {
            0 => i64::MAX,
            created => created,
        };
        (created, &object.namespace, &object.name)
    })
}

impl Store {
    pub(super) fn new(keys: KeySources) -> Self {
        Self {
            keys,
            authentications: Arc::default(),
            settings: pb::Settings::default(),
            waypoints: HashMap::new(),
            secrets: Secrets::default(),
            services: HashMap::new(),
            service_names: HashMap::new(),
            providers: HashMap::new(),
            policies: HttpPolicies::new(),
            pending: Vec::new(),
            telemetry: BTreeMap::new(),
            traffic: BTreeMap::new(),
            backend_tls: BTreeMap::new(),
            routes: BTreeMap::new(),
            attached: HashMap::new(),
        }
    }

    /// Takes a resource.
    ///
    /// # Errors
    /// Why it cannot be used as it is. What fails closed is in force all the same; of the
    /// rest, what was there before stays.
    pub(super) fn upsert(
        &mut self,
        type_url: &str,
        name: &str,
        body: Bytes,
        touched: &mut Touched,
    ) -> Result<(), String> {
        match type_url {
            pb::SETTINGS_TYPE => {
                self.settings = decode(body)?;
                touched.everything = true;
            }
            pb::WAYPOINT_TYPE => {
                self.waypoints.insert(name.to_owned(), decode(body)?);
            }
            pb::SECRET_TYPE => {
                self.secrets.upsert(name, &decode(body)?)?;
                // They are few, and change when a certificate does.
                touched.everything = true;
            }
            pb::SERVICE_TYPE => self.upsert_service(name, &decode(body)?, touched)?,
            pb::PROVIDER_TYPE => {
                let provider = Arc::new(decode(body)?);
                self.providers.insert(name.to_owned(), provider);
                touched.everything = true;
            }
            pb::AUTHORIZATION_POLICY_TYPE => return self.upsert_policy(name, body, touched),
            pb::REQUEST_AUTHENTICATION_TYPE => {
                let policy = match pb::RequestAuthentication::decode(body) {
                    Ok(wire) => RequestAuthentication::from_resource(name, &wire, &self.keys),
                    Err(error) => RequestAuthentication::unreadable(name, &error.to_string()),
                };
                let problem = policy.problems().first().map(ToString::to_string);
                Arc::make_mut(&mut self.authentications).upsert(policy);
                // They are few: which services one was about before is not kept.
                touched.everything = true;
                // In force all the same: it refuses tokens.
                return problem.map_or(Ok(()), Err);
            }
            pb::TELEMETRY_TYPE => {
                let resource: Arc<pb::Telemetry> = Arc::new(decode(body)?);
                touched.targets(&resource.targets);
                let before = self.telemetry.insert(name.to_owned(), resource);
                touched.targets(before.iter().flat_map(|before| &before.targets));
            }
            pb::TRAFFIC_POLICY_TYPE => {
                let wire: pb::TrafficPolicy = decode(body)?;
                let policy = Arc::new(TrafficPolicy::from_proto(&wire));
                touched.hosts.push(policy.host.clone());
                let problem = policy.problems().first().map(ToString::to_string);
                let traffic = Traffic {
                    policy,
                    object: wire.object.unwrap_or_default(),
                };
                if let Some(before) = self.traffic.insert(name.to_owned(), traffic) {
                    touched.hosts.push(before.policy.host.clone());
                }
                // In force all the same: it fails what it is about.
                return problem.map_or(Ok(()), Err);
            }
            pb::BACKEND_TLS_TYPE => {
                let resource: Arc<pb::BackendTls> = Arc::new(decode(body)?);
                touched.backends(&resource);
                if let Some(before) = self.backend_tls.insert(name.to_owned(), resource) {
                    touched.backends(&before);
                }
            }
            pb::ROUTE_TYPE => {
                let route = Route::from_proto(&decode(body)?);
                let problem = route.problems().first().map(ToString::to_string);
                self.detach(name, touched);
                for service in route.services() {
                    let attached = self.attached.entry(service.clone()).or_default();
                    attached.insert(name.to_owned());
                    touched.services.insert(service.clone());
                }
                self.routes.insert(name.to_owned(), Arc::new(route));
                // In force all the same: what it is about is answered with 500.
                return problem.map_or(Ok(()), Err);
            }
            other => return Err(format!("resources of type {other} are not known here")),
        }
        Ok(())
    }

    /// Takes a route from the services that it was attached to.
    fn detach(&mut self, name: &str, touched: &mut Touched) {
        let Some(route) = self.routes.remove(name) else {
            return;
        };
        for service in route.services() {
            if let Some(attached) = self.attached.get_mut(service) {
                attached.remove(name);
                if attached.is_empty() {
                    self.attached.remove(service);
                }
            }
            touched.services.insert(service.clone());
        }
    }

    /// The routes that are attached to a service, by name.
    pub(super) fn routes_of(&self, service: &ServiceName) -> impl Iterator<Item = Arc<Route>> {
        let names = self.attached.get(service).into_iter().flatten();
        names.filter_map(|name| self.routes.get(name).cloned())
    }

    fn upsert_service(
        &mut self,
        name: &str,
        wire: &pb::Service,
        touched: &mut Touched,
    ) -> Result<(), String> {
        let service = ServiceName {
            namespace: wire.namespace.as_str().into(),
            hostname: wire.hostname.as_str().into(),
        };
        let ports = wire.ports.iter().map(declared_port);
        let ports = ports.collect::<Result<_, _>>()?;
        self.services.insert(service.clone(), ports);
        let before = self.service_names.insert(name.to_owned(), service.clone());
        if let Some(before) = before.filter(|before| *before != service) {
            self.services.remove(&before);
            touched.services.insert(before);
        }
        touched.services.insert(service);
        Ok(())
    }

    fn upsert_policy(
        &mut self,
        name: &str,
        body: Bytes,
        touched: &mut Touched,
    ) -> Result<(), String> {
        let policy = match pb::AuthorizationPolicy::decode(body) {
            Ok(wire) => HttpPolicy::from_resource(name, &wire),
            Err(error) => HttpPolicy::unreadable(name, &error.to_string()),
        };
        let problem = policy.problems().first().map(ToString::to_string);
        if let Some(before) = self.policies.get(policy.key()) {
            touched.policy_targets(before.targets());
        }
        touched.policy_targets(policy.targets());
        self.pending.push(HttpUpdate::Upsert(policy));
        problem.map_or(Ok(()), Err)
    }

    /// A batch is complete. Policies are put in order once for all of it: for each of them it
    /// would take minutes where there are thousands.
    pub(super) fn settle(&mut self) {
        if !self.pending.is_empty() {
            self.policies.apply(std::mem::take(&mut self.pending));
        }
    }

    /// Forgets a resource.
    pub(super) fn remove(&mut self, type_url: &str, name: &str, touched: &mut Touched) {
        match type_url {
            pb::SETTINGS_TYPE => {
                self.settings = pb::Settings::default();
                touched.everything = true;
            }
            pb::WAYPOINT_TYPE => {
                self.waypoints.remove(name);
            }
            pb::SECRET_TYPE => {
                self.secrets.remove(name);
                touched.everything = true;
            }
            pb::SERVICE_TYPE => {
                if let Some(service) = self.service_names.remove(name) {
                    self.services.remove(&service);
                    touched.services.insert(service);
                }
            }
            pb::PROVIDER_TYPE => {
                self.providers.remove(name);
                touched.everything = true;
            }
            pb::AUTHORIZATION_POLICY_TYPE => {
                let key = name.strip_prefix("AuthorizationPolicy/").unwrap_or(name);
                if let Some(policy) = self.policies.get(key) {
                    touched.policy_targets(policy.targets());
                }
                self.pending.push(HttpUpdate::Remove(key.into()));
            }
            pb::REQUEST_AUTHENTICATION_TYPE => {
                let key = name.strip_prefix("RequestAuthentication/").unwrap_or(name);
                Arc::make_mut(&mut self.authentications).remove(key);
                touched.everything = true;
            }
            pb::TELEMETRY_TYPE => {
                if let Some(before) = self.telemetry.remove(name) {
                    touched.targets(&before.targets);
                }
            }
            pb::TRAFFIC_POLICY_TYPE => {
                if let Some(before) = self.traffic.remove(name) {
                    touched.hosts.push(before.policy.host.clone());
                }
            }
            pb::BACKEND_TLS_TYPE => {
                if let Some(before) = self.backend_tls.remove(name) {
                    touched.backends(&before);
                }
            }
            pb::ROUTE_TYPE => self.detach(name, touched),
            _ => {}
        }
    }
}

fn decode<M: Message + Default>(body: Bytes) -> Result<M, String> {
    M::decode(body).map_err(|e| e.to_string())
}

/// The name of a service in a resource.
pub(super) fn service_name(wire: &pb::ServiceRef) -> ServiceName {
    ServiceName {
        namespace: wire.namespace.as_str().into(),
        hostname: wire.hostname.as_str().into(),
    }
}

fn declared_port(wire: &pb::ServicePort) -> Result<DeclaredPort, String> {
    use pb::service_port::Protocol as Wire;
    let port = u16::try_from(wire.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| format!("ports: {} is no port", wire.port))?;
    let protocol = match Wire::try_from(wire.protocol) {
        Ok(Wire::Undeclared) => Protocol::Undeclared,
        Ok(Wire::Http) => Protocol::Http,
        Ok(Wire::Http2) => Protocol::Http2,
        Ok(Wire::Grpc) => Protocol::Grpc,
        // A protocol that we do not know is not ours to look into.
        Ok(Wire::Tcp | Wire::Udp) | Err(_) => Protocol::Tcp,
        Ok(Wire::Tls) => Protocol::Tls,
    };
    Ok(DeclaredPort {
        port,
        name: wire.name.as_str().into(),
        protocol,
    })
}
