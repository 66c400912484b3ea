//! One state of everything, as requests read it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use adit_shared::identity::TrustDomain;
use adit_shared::model::{
    self, GatewayAddress, GatewayDestination, ServiceEntry, ServiceName, Workload,
};
use adit_shared::policy::TrustDomains;
use adit_shared::policy::http::{HttpPolicies, HttpPolicySet, PathNormalization};
use adit_shared::proto::waypoint as pb;
use adit_shared::telemetry::ServiceLabels;
use imbl::HashMap;
use tracing::warn;

use super::backend::{Backend, Surroundings};
use super::resources::{DeclaredPort, Store, seniority};
use super::{Touched, host_matches};
use crate::authentication::{AuthenticationSet, RequestAuthentications};
use crate::balance::{Origin, Selection, TrafficSettings};
use crate::proxy::upstream::Originate;
use crate::route::{RetryPolicy, ServiceRoutes, SessionKey};
use crate::telemetry::TelemetrySettings;

/// Which Gateway this process is an instance of.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// `namespace/name`.
    pub key: Arc<str>,
    /// The service that leads to it.
    pub service: ServiceName,
    /// The network that it is on; empty is the default.
    pub network: Arc<str>,
    /// Ours, before the control plane has said anything.
    pub trust_domain: TrustDomain,
    /// The uid of the workload that this process is.
    pub workload: Arc<str>,
}

impl Gateway {
    /// The Gateway `namespace/name`, whose service has the same name. `workload` is the uid of
    /// this instance.
    pub fn new(
        name: &str,
        namespace: &str,
        cluster_domain: &str,
        network: &str,
        trust_domain: TrustDomain,
        workload: &str,
    ) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            key: format!("{namespace}/{name}").into(),
            service: ServiceName {
                namespace: namespace.into(),
                hostname: format!("{name}.{namespace}.svc.{cluster_domain}").into(),
            },
            network: network.into(),
            trust_domain,
            workload: workload.into(),
        }
    }
}

/// What a port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not declared: looked at, unless the server has to speak first.
    Undeclared,
    /// HTTP, of the version that the client uses.
    Http,
    /// HTTP/2.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
    /// Opaque bytes.
    Tcp,
    /// TLS, which is not ours to open.
    Tls,
}

/// What holds for the whole mesh.
pub struct Mesh {
    /// How paths are made comparable.
    pub path_normalization: PathNormalization,
    /// Which trust domains are ours.
    pub trust: TrustDomains,
    /// Mirrored requests are for a host with `-shadow`.
    pub shadow_host_suffix: bool,
    /// Telemetry of what has no service.
    pub telemetry: Arc<TelemetrySettings>,
    /// How often requests are tried of which no route says anything.
    pub default_retry: Option<RetryPolicy>,
    /// How many proxies before this one wrote `x-forwarded-for` truthfully.
    pub trusted_proxies: u32,
    /// Seals the tokens of sessions, alike for all replicas; `None`: the control plane gives
    /// none.
    pub session_key: Option<Arc<SessionKey>>,
    /// Whom the waypoint asks itself, by name.
    pub providers: HashMap<String, Arc<pb::Provider>>,
}

/// One state of everything. It never changes.
pub struct View {
    version: u64,
    gateway: Arc<Gateway>,
    model: Arc<model::Snapshot>,
    services: HashMap<ServiceName, Arc<ServiceView>>,
    origin: Arc<Origin>,
    policies: HttpPolicies,
    authentications: Arc<RequestAuthentications>,
    mesh: Arc<Mesh>,
}

/// A service, as the request path sees it.
pub struct ServiceView {
    entry: Arc<ServiceEntry>,
    labels: Arc<ServiceLabels>,
    /// Sorted by number.
    ports: Box<[Arc<PortView>]>,
}

/// One port of a service with everything that decides about requests to it.
pub struct PortView {
    /// The service.
    pub service: Arc<ServiceEntry>,
    /// As telemetry names it.
    pub labels: Arc<ServiceLabels>,
    /// The port's number.
    pub port: u16,
    /// Its `metadata.name`.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Its endpoints.
    pub backend: Arc<Backend>,
    /// Subsets of them, by name.
    subsets: Vec<(Arc<str>, Arc<Backend>)>,
    /// Routes that are attached to the service.
    pub routes: Arc<ServiceRoutes>,
    /// Whose tokens are looked for.
    pub authentication: AuthenticationSet,
    /// Policies for what is sent to it.
    pub policies: HttpPolicySet,
    /// What is measured and logged.
    pub telemetry: Arc<TelemetrySettings>,
}

impl View {
    pub(super) fn empty(gateway: Gateway, store: &Store) -> Self {
        Self {
            version: 0,
            mesh: Arc::new(Mesh::compile(&gateway, store)),
            authentications: Arc::default(),
            gateway: Arc::new(gateway),
            model: Arc::default(),
            services: HashMap::new(),
            origin: Arc::default(),
            policies: HttpPolicies::new(),
        }
    }

    /// The view after a change; `None` when nothing is different.
    pub(super) fn next(
        &self,
        model: Arc<model::Snapshot>,
        store: &Store,
        touched: &Touched,
    ) -> Option<Self> {
        if touched.is_empty() && self.model.version() == model.version() {
            return None;
        }
        let own = model.workload(&self.gateway.workload);
        let origin = own.map_or_else(Origin::default, |own| Origin::of(own));
        let origin = Origin {
            network: self.gateway.network.clone(),
            ..origin
        };
        let moved = *self.origin != origin;
        let mesh = if touched.everything {
            Arc::new(Mesh::compile(&self.gateway, store))
        } else {
            self.mesh.clone()
        };
        let around = Surroundings {
            origin: &origin,
            policies: &store.policies,
            now: Instant::now(),
        };
        let mut services = self.services.clone();
        if self.model.version() != model.version() {
            services.retain(|name, _| model.service(name).is_some());
        }
        for entry in model.services() {
            let name = &entry.service().key;
            let known = services.get(name);
            let same = known.is_some_and(|known| Arc::ptr_eq(&known.entry, entry));
            if !same || moved || touched.contains(entry) {
                let view = ServiceView::compile(
                    entry,
                    store,
                    &self.gateway,
                    &around,
                    known.map(|known| &**known),
                );
                services.insert(name.clone(), Arc::new(view));
            }
        }
        Some(Self {
            version: self.version + 1,
            gateway: self.gateway.clone(),
            model,
            services,
            origin: Arc::new(origin),
            policies: store.policies.clone(),
            authentications: store.authentications.clone(),
            mesh,
        })
    }

    /// How many changes led to this state.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The Gateway that this process is an instance of.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Workloads and services.
    pub fn model(&self) -> &model::Snapshot {
        &self.model
    }

    /// What holds for the whole mesh.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// All authorization policies.
    pub fn policies(&self) -> &HttpPolicies {
        &self.policies
    }

    /// All rules about end users' tokens.
    pub fn authentications(&self) -> &RequestAuthentications {
        &self.authentications
    }

    /// A service.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<ServiceView>> {
        self.services.get(name)
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceView>> {
        self.services.values()
    }

    /// Whether `gateway`, which a service or a workload names as its waypoint, is this one.
    pub fn is_self(&self, gateway: &GatewayAddress) -> bool {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => *name == self.gateway.service,
            GatewayDestination::Address(at) => {
                let namespace = &self.gateway.namespace;
                let service = self.model.service_at(&at.network, at.address, namespace);
                let workload = || self.model.workload_at(&at.network, at.address);
                service.is_some_and(|entry| entry.service().key == self.gateway.service)
                    || workload().is_some_and(|w| w.ports_of(&self.gateway.service).is_some())
            }
        }
    }

    /// What `address` of `workload` speaks, as the services say that it belongs to.
    pub fn protocol_of(&self, workload: &Workload, address: SocketAddr) -> Protocol {
        for membership in &workload.services {
            let Some(view) = self.service(&membership.service) else {
                continue;
            };
            let mut ports = membership.ports.iter();
            let port = ports.find(|port| port.target_port == Some(address.port()));
            let declared = port.and_then(|port| view.port(port.service_port));
            if let Some(declared) = declared.filter(|p| p.protocol != Protocol::Undeclared) {
                return declared.protocol;
            }
        }
        Protocol::Undeclared
    }
}

impl Mesh {
    fn compile(gateway: &Gateway, store: &Store) -> Self {
        use pb::settings::PathNormalization as Wire;
        let settings = &store.settings;
        let domain = TrustDomain::new(&settings.trust_domain);
        let domain = domain.unwrap_or_else(|_| gateway.trust_domain.clone());
        let aliases = settings.trust_domain_aliases.iter();
        let aliases = aliases.filter_map(|alias| TrustDomain::new(alias).ok());
        Self {
            path_normalization: match Wire::try_from(settings.path_normalization) {
                Ok(Wire::None) => PathNormalization::None,
                Ok(Wire::Base) => PathNormalization::Base,
                Ok(Wire::MergeSlashes) => PathNormalization::MergeSlashes,
                // What is not known is taken for the strictest.
                Ok(Wire::DecodeAndMergeSlashes) | Err(_) => {
                    PathNormalization::DecodeAndMergeSlashes
                }
            },
            trust: TrustDomains::new(domain, aliases.collect()),
            shadow_host_suffix: settings.shadow_host_suffix,
            telemetry: telemetry(store, gateway, None),
            default_retry: settings.default_retry.as_ref().and_then(|retry| {
                let read = RetryPolicy::from_proto(retry);
                read.inspect_err(|reason| warn!("default_retry: {reason}"))
                    .ok()
            }),
            trusted_proxies: settings.trusted_proxies,
            session_key: store.secrets.session_key().cloned(),
            providers: store
                .providers
                .iter()
                .map(|(name, provider)| (name.clone(), provider.clone()))
                .collect(),
        }
    }
}

impl ServiceView {
    fn compile(
        entry: &Arc<ServiceEntry>,
        store: &Store,
        gateway: &Gateway,
        around: &Surroundings<'_>,
        before: Option<&Self>,
    ) -> Self {
        let service = entry.service();
        let key = &service.key;
        let declared: &[DeclaredPort] = store.services.get(key).map_or(&[], |declared| declared);
        let labels = Arc::new(ServiceLabels::from(&**service));
        let labels = match before {
            Some(before) if *before.labels == *labels => before.labels.clone(),
            _ => labels,
        };
        let authentication = store.authentications.for_destination(
            &gateway.key,
            &key.namespace,
            Some(&key.hostname),
            entry.endpoints().iter().map(|endpoint| &*endpoint.uid),
        );
        let routes = Arc::new(ServiceRoutes::build(key, store.routes_of(key)));
        let policies = store
            .policies
            .for_service(&gateway.key, &key.namespace, &key.hostname);
        let telemetry = telemetry(store, gateway, Some(key));
        let telemetry = match before.and_then(|before| before.ports.first()) {
            Some(known) if known.telemetry == telemetry => known.telemetry.clone(),
            _ => telemetry,
        };
        let mut ports: Vec<_> = service
            .ports
            .iter()
            .map(|port| {
                let number = port.service_port;
                let declared = declared.iter().find(|d| d.port == number);
                let known = before.and_then(|before| before.port(number));
                let (backend, subsets) =
                    backends(entry, number, store, around, known.map(|known| &**known));
                Arc::new(PortView {
                    service: entry.clone(),
                    labels: labels.clone(),
                    port: number,
                    name: declared.map(|d| d.name.clone()).unwrap_or_default(),
                    protocol: declared.map_or(Protocol::Undeclared, |d| d.protocol),
                    backend,
                    subsets,
                    routes: routes.clone(),
                    authentication: authentication.clone(),
                    policies: policies.clone(),
                    telemetry: telemetry.clone(),
                })
            })
            .collect();
        ports.sort_by_key(|port| port.port);
        Self {
            entry: entry.clone(),
            labels,
            ports: ports.into(),
        }
    }

    /// The service and its endpoints.
    pub fn entry(&self) -> &Arc<ServiceEntry> {
        &self.entry
    }

    /// The ports, sorted by number.
    pub fn ports(&self) -> &[Arc<PortView>] {
        &self.ports
    }

    /// The port of that number.
    pub fn port(&self, number: u16) -> Option<&Arc<PortView>> {
        let at = self.ports.binary_search_by_key(&number, |port| port.port);
        at.ok().map(|at| &self.ports[at])
    }
}

impl PortView {
    /// The endpoints of a subset; empty: all. `None`: there is no such subset.
    pub fn subset(&self, name: &str) -> Option<&Arc<Backend>> {
        if name.is_empty() {
            return Some(&self.backend);
        }
        let mut subsets = self.subsets.iter();
        subsets
            .find(|(own, _)| **own == *name)
            .map(|(_, backend)| backend)
    }
}

type Subsets = Vec<(Arc<str>, Arc<Backend>)>;

/// The endpoints of a port, all of them and by subset, with the traffic policies for them.
fn backends(
    entry: &Arc<ServiceEntry>,
    port: u16,
    store: &Store,
    around: &Surroundings<'_>,
    before: Option<&PortView>,
) -> (Arc<Backend>, Subsets) {
    let hostname = &entry.service().key.hostname;
    let mut policies: Vec<_> = store
        .traffic
        .values()
        .filter(|traffic| host_matches(&traffic.policy.host, hostname))
        .collect();
    // The longest host is the most specific one; then the oldest object.
    policies.sort_by_key(|traffic| {
        let wildcard = traffic.policy.host.starts_with('*');
        let length = usize::MAX - traffic.policy.host.len();
        (wildcard, length, seniority(Some(&traffic.object)))
    });
    let mut rules = policies
        .iter()
        .filter(|t| t.object.kind != "XBackendTrafficPolicy");
    let rule = rules.next();
    let budgets = policies
        .iter()
        .find(|t| t.object.kind == "XBackendTrafficPolicy");
    let budget = budgets.and_then(|t| t.policy.select(port, None).ok()?.settings.retry_budget);
    let tls = backend_tls(entry, port, store);
    let compile = |subset: Option<&str>, selection: Option<Selection>, known: Option<&Backend>| {
        let mut selection = selection.unwrap_or_else(|| Selection {
            settings: Arc::default(),
            members: None,
        });
        if budget.is_some() && selection.settings.retry_budget.is_none() {
            selection.settings = Arc::new(TrafficSettings {
                retry_budget: budget,
                ..(*selection.settings).clone()
            });
        }
        let settings = tls.as_ref().or(selection.settings.tls.as_ref());
        let secret = settings.and_then(|tls| store.secrets.client(&tls.client_secret));
        let originate = Originate::of(settings, hostname, secret);
        Backend::compile(
            entry,
            port,
            subset,
            selection,
            originate.map(Arc::new).as_ref(),
            around,
            known,
        )
    };
    let whole = compile(
        None,
        rule.and_then(|rule| rule.policy.select(port, None).ok()),
        before.map(|before| &*before.backend),
    );
    let subsets = rule.into_iter().flat_map(|rule| {
        rule.policy.subsets().map(|name| {
            let known = before.and_then(|before| before.subset(name));
            let selection = rule.policy.select(port, Some(name)).ok();
            let backend = compile(Some(name), selection, known.map(|known| &**known));
            (name.clone(), Arc::new(backend))
        })
    });
    (Arc::new(whole), subsets.collect())
}

/// What a BackendTLSPolicy says of a port: one for the port before one for the service, then
/// the oldest.
fn backend_tls(
    entry: &ServiceEntry,
    port: u16,
    store: &Store,
) -> Option<crate::balance::ClientTls> {
    let key = &entry.service().key;
    let mut found: Option<(bool, &pb::BackendTls)> = None;
    for resource in store.backend_tls.values() {
        for target in &resource.targets {
            let Some(service) = &target.service else {
                continue;
            };
            let applies = *service.hostname == *key.hostname
                && *service.namespace == *key.namespace
                && (target.port == 0 || target.port == u32::from(port))
                && target.rejected.is_empty();
            if !applies {
                continue;
            }
            let whole = target.port == 0;
            let rank = (whole, seniority(resource.object.as_ref()));
            let better = found.is_none_or(|(known_whole, known)| {
                rank < (known_whole, seniority(known.object.as_ref()))
            });
            if better {
                found = Some((whole, resource));
            }
        }
    }
    let settings = pb::TrafficSettings {
        tls: Some(found?.1.tls.clone().unwrap_or_default()),
        ..Default::default()
    };
    let (settings, problems) = TrafficSettings::from_proto(&settings);
    match problems.first() {
        None => settings.tls,
        // Plaintext in its place would be worse.
        Some(problem) => Some(crate::balance::ClientTls {
            invalid: Some(problem.to_string().into()),
            ..Default::default()
        }),
    }
}

/// What the Telemetry API says of requests to `service`.
fn telemetry(
    store: &Store,
    gateway: &Gateway,
    service: Option<&ServiceName>,
) -> Arc<TelemetrySettings> {
    use pb::target::Kind;
    /// How closely a resource fits; `None`: it does not.
    fn closeness(
        resource: &pb::Telemetry,
        gateway: &Gateway,
        service: Option<&ServiceName>,
    ) -> Option<u8> {
        if resource.targets.is_empty() {
            return Some(0);
        }
        let fits = |target: &pb::Target| match target.kind.as_ref()? {
            Kind::Gateway(name) => (**name == *gateway.key).then_some(1),
            Kind::Service(of) => {
                let service = service?;
                let same = *of.hostname == *service.hostname && *of.namespace == *service.namespace;
                same.then_some(2)
            }
            Kind::Workload(_) => None,
        };
        resource.targets.iter().filter_map(fits).max()
    }
    let mut resources: Vec<_> = store
        .telemetry
        .values()
        .filter(|resource| resource.invalid.is_empty())
        .filter_map(|resource| Some((closeness(resource, gateway, service)?, resource)))
        .collect();
    // From the least to the most specific; of two alike the older one decides.
    resources.sort_by(|(a, x), (b, y)| {
        let senior = seniority(y.object.as_ref()).cmp(&seniority(x.object.as_ref()));
        (x.scope, a).cmp(&(y.scope, b)).then(senior)
    });
    let resources: Vec<_> = resources.into_iter().map(|(_, r)| r.clone()).collect();
    let provider = |name: &str| store.providers.get(name).cloned();
    let (settings, errors) = TelemetrySettings::merge(&store.settings, &provider, &resources);
    for error in errors {
        warn!(target: "telemetry", "not in force: {error}");
    }
    Arc::new(settings)
}
