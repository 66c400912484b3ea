//! All objects at one moment, by namespace.
//!
//! Values are shared: a new version of the set holds the same `Arc`s wherever nothing
//! changed, so that the compiler sees by pointer which namespaces it may skip.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::authorization::AuthorizationPolicy;
use super::backend_tls::BackendTlsPolicy;
use super::config_map::{ConfigMap, Secret};
use super::destination_rule::DestinationRule;
use super::gateway::{Gateway, GatewayClass};
use super::meta::{Kind, Meta, ObjectRef};
use super::peer_authentication::PeerAuthentication;
use super::pod::{Namespace, Node, Pod, ServiceAccount};
use super::reference_grant::ReferenceGrant;
use super::request_authentication::RequestAuthentication;
use super::route::{GrpcRoute, HttpRoute, TcpRoute, TlsRoute};
use super::service::{EndpointSlice, Service};
use super::telemetry::Telemetry;
use super::unsupported::{ServiceEntry, VirtualService};

/// Objects of one kind, by name.
pub type ByName<T> = BTreeMap<Arc<str>, Arc<T>>;

/// Objects that one of two sets does not have, or not the same by pointer: its version in
/// the first and in the second.
pub fn differing<'a, T>(
    first: &'a ByName<T>,
    second: &'a ByName<T>,
) -> impl Iterator<Item = (Option<&'a Arc<T>>, Option<&'a Arc<T>>)> {
    let (mut first, mut second) = (first.iter().peekable(), second.iter().peekable());
    std::iter::from_fn(move || {
        loop {
            let order = match (first.peek(), second.peek()) {
                (Some((a, _)), Some((b, _))) => a.cmp(b),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return None,
            };
            let before = first.next_if(|_| order.is_le()).map(|(_, object)| object);
            let now = second.next_if(|_| order.is_ge()).map(|(_, object)| object);
            match (before, now) {
                (Some(before), Some(now)) if Arc::ptr_eq(before, now) => {}
                different => return Some(different),
            }
        }
    })
}

/// The one list of kinds: where objects of each are kept.
macro_rules! kinds {
    (
        cluster { $($(#[$cluster_doc:meta])* $Cluster:ident: $cluster:ident,)* }
        namespaced { $($(#[$doc:meta])* $Kind:ident: $field:ident,)* }
    ) => {
        /// The objects of one namespace.
        #[derive(Debug, Clone, Default)]
        pub struct NamespaceObjects {
            /// The namespace itself, where it is known.
            pub namespace: Option<Arc<Namespace>>,
            $($(#[$doc])* pub $field: ByName<$Kind>,)*
        }

        /// All objects.
        #[derive(Debug, Clone, Default)]
        pub struct Objects {
            $($(#[$cluster_doc])* pub $cluster: Arc<ByName<$Cluster>>,)*
            /// Everything else.
            pub namespaces: BTreeMap<Arc<str>, Arc<NamespaceObjects>>,
        }

        impl Objects {
            /// Whether nothing differs, by pointer.
            pub fn same(&self, other: &Self) -> bool {
                $(Arc::ptr_eq(&self.$cluster, &other.$cluster) &&)*
                self.namespaces.len() == other.namespaces.len()
                    && self
                        .namespaces
                        .iter()
                        .zip(&other.namespaces)
                        .all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(a.1, b.1))
            }

            /// The metadata of an object, if there is such a one.
            pub fn meta(&self, reference: &ObjectRef) -> Option<&Meta> {
                match reference.kind {
                    Kind::Namespace => {
                        let of = self.namespaces.get(&reference.name)?;
                        Some(&of.namespace.as_ref()?.meta)
                    }
                    $(Kind::$Cluster => Some(&self.$cluster.get(&reference.name)?.meta),)*
                    $(Kind::$Kind => {
                        let of = self.namespaces.get(&reference.namespace)?;
                        Some(&of.$field.get(&reference.name)?.meta)
                    })*
                }
            }

            /// Puts or takes away one object.
            pub(crate) fn set(&mut self, key: &ObjectRef, object: Option<Object>) {
                let name = &key.name;
                match (key.kind, object) {
                    $((Kind::$Cluster, Some(Object::$Cluster(object))) => {
                        Arc::make_mut(&mut self.$cluster).insert(name.clone(), object);
                    })*
                    $((Kind::$Cluster, _) => {
                        Arc::make_mut(&mut self.$cluster).remove(name);
                    })*
                    (kind, object) => {
                        let place = match kind {
                            Kind::Namespace => name,
                            _ => &key.namespace,
                        };
                        let of = self.namespaces.entry(place.clone()).or_default();
                        let of = Arc::make_mut(of);
                        match object {
                            Some(object) => of.insert(name.clone(), object),
                            None => of.remove(kind, name),
                        }
                        if of.is_empty() {
                            self.namespaces.remove(place);
                        }
                    }
                }
            }

            /// Makes the objects of one cluster-scoped kind anew.
            fn rebuild_cluster(&mut self, kind: Kind, all: &BTreeMap<ObjectRef, Object>) {
                match kind {
                    $(Kind::$Cluster => {
                        let of_kind = all.values().filter_map(|object| match object {
                            Object::$Cluster(object) => {
                                Some((object.meta.name.clone(), object.clone()))
                            }
                            _ => None,
                        });
                        self.$cluster = Arc::new(of_kind.collect());
                    })*
                    _ => {}
                }
            }
        }

        impl NamespaceObjects {
            /// Whether nothing differs but pods and endpoint slices, by pointer.
            pub fn same_besides_endpoints(&self, other: &Self) -> bool {
                let same = |kind: Kind| matches!(kind, Kind::Pod | Kind::EndpointSlice);
                let namespace = match (&self.namespace, &other.namespace) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    (None, None) => true,
                    _ => false,
                };
                namespace
                    $(&& (same(Kind::$Kind)
                        || differing(&self.$field, &other.$field).next().is_none()))*
            }

            /// Whether there is nothing.
            pub fn is_empty(&self) -> bool {
                self.namespace.is_none() $(&& self.$field.is_empty())*
            }

            fn remove(&mut self, kind: Kind, name: &str) {
                match kind {
                    Kind::Namespace => self.namespace = None,
                    $(Kind::$Cluster => {})*
                    $(Kind::$Kind => {
                        self.$field.remove(name);
                    })*
                }
            }

            fn insert(&mut self, name: Arc<str>, object: Object) {
                match object {
                    Object::Namespace(object) => self.namespace = Some(object),
                    $(Object::$Cluster(_) => {})*
                    $(Object::$Kind(object) => {
                        self.$field.insert(name, object);
                    })*
                }
            }
        }

        /// One object of any kind.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Object {
            /// A namespace.
            Namespace(Arc<Namespace>),
            $($(#[$cluster_doc])* $Cluster(Arc<$Cluster>),)*
            $($(#[$doc])* $Kind(Arc<$Kind>),)*
        }

        impl Object {
            /// Its kind.
            pub fn kind(&self) -> Kind {
                match self {
                    Self::Namespace(_) => Kind::Namespace,
                    $(Self::$Cluster(_) => Kind::$Cluster,)*
                    $(Self::$Kind(_) => Kind::$Kind,)*
                }
            }

            /// Its metadata.
            pub fn meta(&self) -> &Meta {
                match self {
                    Self::Namespace(object) => &object.meta,
                    $(Self::$Cluster(object) => &object.meta,)*
                    $(Self::$Kind(object) => &object.meta,)*
                }
            }

            /// The same object of the same `Arc`.
            fn same(&self, other: &Self) -> bool {
                match (self, other) {
                    (Self::Namespace(a), Self::Namespace(b)) => Arc::ptr_eq(a, b),
                    $((Self::$Cluster(a), Self::$Cluster(b)) => Arc::ptr_eq(a, b),)*
                    $((Self::$Kind(a), Self::$Kind(b)) => Arc::ptr_eq(a, b),)*
                    _ => false,
                }
            }
        }
    };
}

kinds! {
    cluster {
        /// Nodes.
        Node: nodes,
        /// Gateway classes.
        GatewayClass: gateway_classes,
    }
    namespaced {
        /// Service accounts.
        ServiceAccount: service_accounts,
        /// Pods.
        Pod: pods,
        /// Services.
        Service: services,
        /// Endpoint slices.
        EndpointSlice: endpoint_slices,
        /// Authorization policies.
        AuthorizationPolicy: authorization_policies,
        /// Peer authentications.
        PeerAuthentication: peer_authentications,
        /// Config maps.
        ConfigMap: config_maps,
        /// Secrets, as far as they hold certificates of authorities.
        Secret: secrets,
        /// Gateways.
        Gateway: gateways,
        /// HTTP routes.
        HttpRoute: http_routes,
        /// gRPC routes.
        GrpcRoute: grpc_routes,
        /// TCP routes.
        TcpRoute: tcp_routes,
        /// TLS routes.
        TlsRoute: tls_routes,
        /// Reference grants.
        ReferenceGrant: reference_grants,
        /// TLS towards backends.
        BackendTlsPolicy: backend_tls_policies,
        /// Request authentications.
        RequestAuthentication: request_authentications,
        /// Destination rules.
        DestinationRule: destination_rules,
        /// Virtual services.
        VirtualService: virtual_services,
        /// Service entries.
        ServiceEntry: service_entries,
        /// Telemetry settings.
        Telemetry: telemetries,
    }
}

impl Object {
    /// Its name.
    pub fn reference(&self) -> ObjectRef {
        self.meta().reference(self.kind())
    }
}

/// Where an object is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Cluster(Kind),
    Namespace(Arc<str>),
}

impl Place {
    fn of(key: &ObjectRef) -> Self {
        match key.kind {
            Kind::Namespace => Self::Namespace(key.name.clone()),
            kind if kind.is_cluster_scoped() => Self::Cluster(kind),
            _ => Self::Namespace(key.namespace.clone()),
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
        let mut touched = BTreeSet::new();
        for (key, object) in &objects {
            if !self.objects.get(key).is_some_and(|old| old.same(object)) {
                touched.insert(Place::of(key));
            }
        }
        for key in self.objects.keys().filter(|key| !objects.contains_key(key)) {
            touched.insert(Place::of(key));
        }
        let mut namespaces: BTreeMap<Arc<str>, NamespaceObjects> = BTreeMap::new();
        for (key, object) in &objects {
            let place = Place::of(key);
            if let Place::Namespace(namespace) = &place
                && touched.contains(&place)
            {
                let of = namespaces.entry(namespace.clone()).or_default();
                of.insert(key.name.clone(), object.clone());
            }
        }
        for place in touched {
            match place {
                Place::Cluster(kind) => self.built.rebuild_cluster(kind, &objects),
                Place::Namespace(place) => match namespaces.remove(&place) {
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

    /// Puts, or with `None` takes away, one object. What is built shares everything else
    /// with what it was before.
    pub fn set(&mut self, key: ObjectRef, object: Option<Object>) {
        match object {
            Some(object) => {
                self.built.set(&key, Some(object.clone()));
                self.objects.insert(key, object);
            }
            None => {
                if self.objects.remove(&key).is_some() {
                    self.built.set(&key, None);
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::decode_text;

    fn objects(yaml: &str) -> BTreeMap<ObjectRef, Object> {
        let decoded = decode_text(yaml).into_iter();
        decoded
            .map(|(object, _)| (object.reference(), object))
            .collect()
    }

    #[test]
    fn what_differs_is_found_in_both_sets() {
        let set = |names: &[(&str, &Arc<u8>)]| -> ByName<u8> {
            let own = |(name, value): &(&str, &Arc<u8>)| (Arc::from(*name), Arc::clone(value));
            names.iter().map(own).collect()
        };
        let (one, two, three) = (Arc::new(1), Arc::new(2), Arc::new(2));
        let first = set(&[("a", &one), ("c", &one), ("d", &two), ("e", &two)]);
        let second = set(&[("b", &one), ("c", &one), ("d", &three), ("f", &one)]);
        let found: Vec<_> = differing(&first, &second)
            .map(|(before, now)| (before.is_some(), now.is_some()))
            .collect();
        let (gone, new, other) = ((true, false), (false, true), (true, true));
        assert_eq!(found, [gone, new, other, gone, new]);
        assert_eq!(differing(&first, &first).count(), 0);
    }

    /// One by one or all at once: the same set, and the same sharing.
    #[test]
    fn single_changes_add_up_to_the_whole() {
        let all = objects(
            "{apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n\
             {apiVersion: v1, kind: Service, metadata: {name: s, namespace: a}}\n---\n\
             {apiVersion: v1, kind: Service, metadata: {name: s, namespace: b}}\n---\n\
             {apiVersion: v1, kind: Node, metadata: {name: n}}\n",
        );
        let mut whole = ObjectTable::default();
        whole.replace(all.clone());
        let mut single = ObjectTable::default();
        for (key, object) in &all {
            single.set(key.clone(), Some(object.clone()));
        }
        assert_eq!(
            format!("{:?}", single.objects()),
            format!("{:?}", whole.objects())
        );

        let before = single.objects().clone();
        let service = all.keys().find(|key| &*key.namespace == "b");
        single.set(service.expect("there").clone(), None);
        let after = single.objects();
        assert!(!after.namespaces.contains_key("b"), "nothing is left of it");
        assert!(Arc::ptr_eq(&before.namespaces["a"], &after.namespaces["a"]));
        assert!(
            before.namespaces.contains_key("b"),
            "a clone stays as it is"
        );
        assert!(!after.same(&before));
        for key in all.keys() {
            single.set(key.clone(), None);
        }
        let left = single.objects();
        assert!(left.namespaces.is_empty() && left.nodes.is_empty());
    }
}
