//! What a namespace sees of the others while it is compiled.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::binding::{Bindable, Binding, bind};
use super::waypoints::Waypoints;
use crate::compile::mesh::MeshConfig;
use crate::model::{NamespaceObjects, Objects, Service};

/// Namespaces that were looked at, as they were.
#[derive(Debug, Clone, Default)]
pub struct Consulted {
    seen: BTreeMap<Arc<str>, Option<Arc<NamespaceObjects>>>,
    /// All were looked at, and there were so many.
    all: Option<usize>,
}

impl Consulted {
    /// Whether all of them are still the same.
    pub fn is_current(&self, objects: &Objects) -> bool {
        if self.all.is_some_and(|all| all != objects.namespaces.len()) {
            return false;
        }
        self.seen
            .iter()
            .all(|(name, seen)| match (objects.namespaces.get(name), seen) {
                (Some(now), Some(seen)) => Arc::ptr_eq(now, seen),
                (None, None) => true,
                _ => false,
            })
    }
}

/// The mesh as seen from one namespace.
#[derive(Debug)]
pub struct View<'a> {
    /// Settings.
    pub mesh: &'a MeshConfig,
    /// All waypoints.
    pub waypoints: &'a Waypoints,
    /// The namespace.
    pub namespace: &'a Arc<str>,
    objects: &'a Objects,
    consulted: RefCell<Consulted>,
}

impl<'a> View<'a> {
    /// As `namespace` sees it.
    pub fn new(
        namespace: &'a Arc<str>,
        objects: &'a Objects,
        waypoints: &'a Waypoints,
        mesh: &'a MeshConfig,
    ) -> Self {
        Self {
            mesh,
            waypoints,
            namespace,
            objects,
            consulted: RefCell::default(),
        }
    }

    /// The objects of a namespace.
    pub fn namespace(&self, name: &str) -> Option<&'a NamespaceObjects> {
        let found = self.objects.namespaces.get(name);
        if *name != **self.namespace {
            let mut consulted = self.consulted.borrow_mut();
            if !consulted.seen.contains_key(name) {
                consulted.seen.insert(name.into(), found.cloned());
            }
        }
        found.map(|of| &**of)
    }

    /// All namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = (&'a Arc<str>, &'a NamespaceObjects)> {
        self.consulted.borrow_mut().all = Some(self.objects.namespaces.len());
        let names = self.objects.namespaces.keys();
        names.filter_map(|name| Some((name, self.namespace(name)?)))
    }

    /// A service that can be a parent or a backend; not an ExternalName.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&'a Service> {
        let service = self.namespace(namespace)?.services.get(name)?;
        (!service.external_name).then_some(&**service)
    }

    /// The binding of a service.
    pub fn binding(&self, service: &Service) -> Option<Binding> {
        let of = self.namespace(&service.meta.namespace);
        let namespace = of.and_then(|of| of.namespace.as_deref());
        bind(Bindable::Service, &service.meta, namespace, self.waypoints)
    }

    /// What other namespaces were looked at.
    pub fn into_consulted(self) -> Consulted {
        self.consulted.into_inner()
    }
}
