//! What holds for the whole mesh.

use std::sync::Arc;

use adit_shared::identity::{DerivedSecret, TrustDomain};

/// Settings that every compiled resource depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// Trust domain of every workload.
    pub trust_domain: TrustDomain,
    /// Further trust domains whose names in policies mean this mesh
    /// (Istio `trustDomainAliases`).
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Policies in this namespace cover the mesh.
    pub root_namespace: Arc<str>,
    /// Prefix of workload uids.
    pub cluster_id: Arc<str>,
    /// Network of the workloads; the root namespace's label
    /// `topology.istio.io/network` has precedence. Empty: the default network.
    pub network: Arc<str>,
    /// Suffix of service host names, after `.svc.`.
    pub cluster_domain: Arc<str>,
    /// Policies that carry another `istio.io/rev` are ignored.
    pub revision: Arc<str>,
    /// No pod of these namespaces is enrolled.
    pub excluded_namespaces: Vec<Arc<str>>,
    /// What is bound to a waypoint that is not ready is reached without it, as in Istio.
    /// The policies that the waypoint enforces are skipped meanwhile.
    pub waypoint_fail_open: bool,
    /// What the keys that replicas of a waypoint share are made from; `None`: they get none.
    pub shared_secret: Option<DerivedSecret>,
}

impl Default for MeshConfig {
    /// Istio's defaults.
    fn default() -> Self {
        Self {
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            cluster_domain: "cluster.local".into(),
            revision: "default".into(),
            excluded_namespaces: vec!["kube-system".into()],
            waypoint_fail_open: false,
            shared_secret: None,
        }
    }
}

impl MeshConfig {
    /// Fully qualified host name of a service.
    pub fn hostname(&self, namespace: &str, name: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.cluster_domain)
    }

    /// A resource with these labels is for us.
    pub(super) fn owns(&self, meta: &crate::model::Meta) -> bool {
        meta.label("istio.io/rev")
            .is_none_or(|revision| revision == &*self.revision)
    }

    /// The trust domain as WDS has it: the default one is left out.
    pub(super) fn wire_trust_domain(&self) -> String {
        match self.trust_domain.as_str() {
            TrustDomain::DEFAULT => String::new(),
            domain => domain.into(),
        }
    }
}
