//! Looking up the services that routes send to.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use adit_shared::proto::waypoint as wire;

use super::services::reference;
use super::view::View;
use crate::model::{BackendRef, Filter, Kind, ParentRef};

/// Looks up the backends of one route, and remembers what came of it.
#[derive(Debug)]
pub(super) struct Resolver<'v, 'a> {
    kind: Kind,
    parents: &'v [ParentRef],
    view: &'v View<'a>,
    failure: RefCell<Option<Failure>>,
    reached: RefCell<BTreeSet<(Arc<str>, Arc<str>)>>,
}

/// Why a backend cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// In one word.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) message: String,
}

/// Whether a route of `kind` with these parents in the namespace of `view` can send to `backend`.
///
/// # Errors
/// Why not, in one word (`ResolvedRefs`) and for people.
pub fn check_backend(
    kind: Kind,
    parents: &[ParentRef],
    backend: &BackendRef,
    view: &View<'_>,
) -> Result<(), (&'static str, String)> {
    match Resolver::new(kind, parents, view).resolve(backend) {
        Ok(_) => Ok(()),
        Err(failure) => Err((failure.reason, failure.message)),
    }
}

impl<'v, 'a> Resolver<'v, 'a> {
    /// For a route of `kind` with these parents in the namespace of `view`.
    pub(super) fn new(kind: Kind, parents: &'v [ParentRef], view: &'v View<'a>) -> Self {
        Self {
            kind,
            parents,
            view,
            failure: RefCell::default(),
            reached: RefCell::default(),
        }
    }

    /// The first backend that could not be used.
    pub(super) fn first_failure(&self) -> Option<Failure> {
        self.failure.borrow().clone()
    }

    /// Namespaces and names of the services that were found.
    pub(super) fn reached(&self) -> BTreeSet<(Arc<str>, Arc<str>)> {
        self.reached.borrow().clone()
    }

    /// Converts a backend with its filters.
    pub(super) fn backend(&self, backend: &BackendRef, filters: &[Filter]) -> wire::Backend {
        use wire::backend::To;
        let to = match self.resolve(backend) {
            Ok(service) => To::Service(service),
            Err(failure) => {
                let message = failure.message.clone();
                self.failure.borrow_mut().get_or_insert(failure);
                To::Invalid(message)
            }
        };
        wire::Backend {
            weight: backend.weight,
            to: Some(to),
            filters: self.filters(filters),
        }
    }

    /// Converts filters.
    pub(super) fn filters(&self, filters: &[Filter]) -> Vec<wire::Filter> {
        let convert = |filter: &Filter| match filter {
            Filter::Plain(filter) => filter.clone(),
            Filter::Mirror {
                backend,
                per_million,
            } => wire::Filter {
                kind: Some(wire::filter::Kind::Mirror(wire::Mirror {
                    backend: Some(self.backend(backend, &[])),
                    per_million: *per_million,
                })),
            },
            Filter::ExternalAuth { backend, auth } => wire::Filter {
                kind: Some(wire::filter::Kind::ExternalAuth(wire::ExternalAuth {
                    backend: Some(self.backend(backend, &[])),
                    ..auth.clone()
                })),
            },
        };
        filters.iter().map(convert).collect()
    }

    fn resolve(&self, backend: &BackendRef) -> Result<wire::BackendService, Failure> {
        let failed = |reason, message| Err(Failure { reason, message });
        let view = self.view;
        let (kind, name) = (&backend.kind, &backend.name);
        if !matches!((&*backend.group, &**kind), ("" | "core", "Service")) {
            let message = format!("{kind} {name:?} is no backend of ours: only Service is");
            return failed("InvalidKind", message);
        }
        let namespace = backend.namespace.as_ref().unwrap_or(view.namespace);
        let full = format!("Service {namespace}/{name}");
        // What asks it is the waypoint, of whose questions the service's policies that are
        // carried out here know nothing: who writes a route for a service of others could
        // have the waypoint say anything there.
        if backend.authorizes && namespace != view.namespace && self.has_foreign_parent() {
            return failed(
                "RefNotPermitted",
                format!(
                    "{full} cannot authorize: a route for a Service of another namespace may \
                     have services of its own namespace asked only"
                ),
            );
        }
        // Whether it is there is told to nobody who may not refer to it.
        let foreign = namespace != view.namespace && !self.is_parent(namespace, name);
        if foreign && !self.is_granted(namespace, name) {
            return failed(
                "RefNotPermitted",
                format!(
                    "no ReferenceGrant in {namespace} allows a {} of {} to refer to {full}",
                    self.kind, view.namespace
                ),
            );
        }
        let found = view
            .namespace(namespace)
            .and_then(|of| of.services.get(name));
        let Some(service) = found else {
            return failed("BackendNotFound", format!("there is no {full}"));
        };
        if service.external_name {
            let message = format!("{full} is an ExternalName, which is no backend");
            return failed("InvalidKind", message);
        }
        let port = backend.port.unwrap_or_default();
        if !service.ports.iter().any(|of| of.number == port) {
            let message = format!("{full} has no TCP port {port}");
            return failed("BackendNotFound", message);
        }
        let mut reached = self.reached.borrow_mut();
        reached.insert((namespace.clone(), name.clone()));
        Ok(wire::BackendService {
            service: Some(reference(namespace, name, view.mesh)),
            port: port.into(),
            subset: String::new(),
        })
    }

    /// What is addressed to a service may go there: a consumer's route for it needs nobody's
    /// leave (GAMMA; the suite's MeshConsumerRoute). A route with another parent also sends
    /// what was addressed to that one, which nobody has asked the service for.
    fn is_parent(&self, namespace: &Arc<str>, service: &Arc<str>) -> bool {
        let only = |parent: &ParentRef| {
            matches!((&*parent.group, &*parent.kind), ("" | "core", "Service"))
                && parent.name == *service
                && parent.namespace.as_ref() == Some(namespace)
        };
        !self.parents.is_empty() && self.parents.iter().all(only)
    }

    fn has_foreign_parent(&self) -> bool {
        let mut parents = self.parents.iter();
        parents.any(|parent| {
            let namespace = parent.namespace.as_ref();
            namespace.is_some_and(|namespace| namespace != self.view.namespace)
        })
    }

    fn is_granted(&self, namespace: &str, service: &str) -> bool {
        let of = self.view.namespace(namespace);
        let mut grants = of.into_iter().flat_map(|of| of.reference_grants.values());
        grants.any(|grant| grant.admits(self.kind, self.view.namespace, (Kind::Service, service)))
    }
}
