//! All objects at one moment, by namespace.
//!
//! Values are shared: a new version of the set holds the same `Arc`s wherever nothing
//! changed, so that the compiler sees by pointer which namespaces it may skip.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::authorization::AuthorizationPolicy;
use super::meta::{Kind, Meta, ObjectRef};
use super::peer_authentication::PeerAuthentication;
use super::pod::{Namespace, Node, Pod, ServiceAccount};
use super::service::{EndpointSlice, Service};

/// Objects of one kind, by name.
pub type ByName<T> = BTreeMap<Arc<str>, Arc<T>>;

/// The objects of one namespace.
#[derive(Debug, Clone, Default)]
pub struct NamespaceObjects {
    /// The namespace itself, where it is known.
    pub namespace: Option<Arc<Namespace>>,
    /// Service accounts.
    pub service_accounts: ByName<ServiceAccount>,
    /// Pods.
    pub pods: ByName<Pod>,
    /// Services.
    pub services: ByName<Service>,
    /// Endpoint slices.
    pub endpoint_slices: ByName<EndpointSlice>,
    /// Authorization policies.
    pub authorization_policies: ByName<AuthorizationPolicy>,
    /// Peer authentications.
    pub peer_authentications: ByName<PeerAuthentication>,
}

/// All objects.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    /// Nodes.
    pub nodes: Arc<ByName<Node>>,
    /// Everything else.
    pub namespaces: BTreeMap<Arc<str>, Arc<NamespaceObjects>>,
}

impl Objects {
    /// Whether nothing differs, by pointer.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.nodes, &other.nodes)
            && self.namespaces.len() == other.namespaces.len()
            && self
                .namespaces
                .iter()
                .zip(&other.namespaces)
                .all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(a.1, b.1))
    }
}

/// One object of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A namespace.
    Namespace(Arc<Namespace>),
    /// A node.
    Node(Arc<Node>),
    /// A service account.
    ServiceAccount(Arc<ServiceAccount>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A service.
    Service(Arc<Service>),
    /// An endpoint slice.
    EndpointSlice(Arc<EndpointSlice>),
    /// An authorization policy.
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    /// A peer authentication.
    PeerAuthentication(Arc<PeerAuthentication>),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
        }
    }

    /// Its metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(object) => &object.meta,
            Self::Node(object) => &object.meta,
            Self::ServiceAccount(object) => &object.meta,
            Self::Pod(object) => &object.meta,
            Self::Service(object) => &object.meta,
            Self::EndpointSlice(object) => &object.meta,
            Self::AuthorizationPolicy(object) => &object.meta,
            Self::PeerAuthentication(object) => &object.meta,
        }
    }

    /// Its name.
    pub fn reference(&self) -> ObjectRef {
        self.meta().reference(self.kind())
    }

    /// The same object of the same `Arc`.
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Namespace(a), Self::Namespace(b)) => Arc::ptr_eq(a, b),
            (Self::Node(a), Self::Node(b)) => Arc::ptr_eq(a, b),
            (Self::ServiceAccount(a), Self::ServiceAccount(b)) => Arc::ptr_eq(a, b),
            (Self::Pod(a), Self::Pod(b)) => Arc::ptr_eq(a, b),
            (Self::Service(a), Self::Service(b)) => Arc::ptr_eq(a, b),
            (Self::EndpointSlice(a), Self::EndpointSlice(b)) => Arc::ptr_eq(a, b),
            (Self::AuthorizationPolicy(a), Self::AuthorizationPolicy(b)) => Arc::ptr_eq(a, b),
            (Self::PeerAuthentication(a), Self::PeerAuthentication(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// A flat view of the objects, which knows what changed when an [`Objects`] is made of it.
#[derive(Debug, Default)]
pub struct ObjectTable {
    objects: BTreeMap<ObjectRef, Object>,
    built: Objects,
}

impl ObjectTable {
    /// Replaces all objects by `objects` and gives the new set. Namespaces in which
    /// nothing changed keep their `Arc`.
    pub fn replace(&mut self, objects: BTreeMap<ObjectRef, Object>) -> &Objects {
        let mut touched = std::collections::BTreeSet::new();
        let mut touch = |key: &ObjectRef| {
            touched.insert(match key.kind {
                Kind::Node => None,
                Kind::Namespace => Some(key.name.clone()),
                _ => Some(key.namespace.clone()),
            });
        };
        for (key, object) in &objects {
            if !self.objects.get(key).is_some_and(|old| old.same(object)) {
                touch(key);
            }
        }
        for key in self.objects.keys().filter(|key| !objects.contains_key(key)) {
            touch(key);
        }
        let mut nodes = ByName::default();
        let mut namespaces: BTreeMap<Arc<str>, NamespaceObjects> = BTreeMap::new();
        for (key, object) in &objects {
            let place = match object {
                Object::Node(_) => None,
                Object::Namespace(_) => Some(key.name.clone()),
                _ => Some(key.namespace.clone()),
            };
            if !touched.contains(&place) {
                continue;
            }
            let name = key.name.clone();
            let Some(place) = place else {
                if let Object::Node(node) = object {
                    nodes.insert(name, node.clone());
                }
                continue;
            };
            let of = namespaces.entry(place).or_default();
            match object.clone() {
                Object::Node(_) => {}
                Object::Namespace(object) => of.namespace = Some(object),
                Object::ServiceAccount(object) => {
                    of.service_accounts.insert(name, object);
                }
                Object::Pod(object) => {
                    of.pods.insert(name, object);
                }
                Object::Service(object) => {
                    of.services.insert(name, object);
                }
                Object::EndpointSlice(object) => {
                    of.endpoint_slices.insert(name, object);
                }
                Object::AuthorizationPolicy(object) => {
                    of.authorization_policies.insert(name, object);
                }
                Object::PeerAuthentication(object) => {
                    of.peer_authentications.insert(name, object);
                }
            }
        }
        for place in touched {
            match place {
                None => self.built.nodes = Arc::new(std::mem::take(&mut nodes)),
                Some(place) => match namespaces.remove(&place) {
                    Some(of) => {
                        self.built.namespaces.insert(place, Arc::new(of));
                    }
                    None => {
                        self.built.namespaces.remove(&place);
                    }
                },
            }
        }
        self.objects = objects;
        &self.built
    }

    /// The object of that name.
    pub fn get(&self, key: &ObjectRef) -> Option<&Object> {
        self.objects.get(key)
    }

    /// The set as it is.
    pub fn objects(&self) -> &Objects {
        &self.built
    }
}
