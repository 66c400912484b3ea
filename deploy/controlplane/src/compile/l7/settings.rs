//! What holds for the whole mesh, as waypoints are told: Istio's mesh configuration, a
//! ConfigMap of the root namespace, and what the control plane was started with.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;

use crate::compile::mesh::MeshConfig;
use crate::model::{ConfigMap, MESH_KEY, MeshMap, Objects};

/// The one resource of its type.
pub const SETTINGS_NAME: &str = "mesh";

/// The mesh configuration that was read last. It is read again when its ConfigMap is
/// another one.
#[derive(Debug, Default)]
pub struct MeshSettings {
    source: Option<Arc<ConfigMap>>,
    map: MeshMap,
}

impl MeshSettings {
    /// Those of `objects`.
    pub fn of(objects: &Objects, mesh: &MeshConfig) -> Self {
        let mut settings = Self::default();
        settings.refresh(objects, mesh);
        settings
    }

    /// Reads the ConfigMap again if it changed.
    pub fn refresh(&mut self, objects: &Objects, mesh: &MeshConfig) {
        let source = source(objects, mesh);
        let same = match (&self.source, source) {
            (Some(known), Some(now)) => Arc::ptr_eq(known, now),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        self.source = source.cloned();
        let text = source.and_then(|map| map.data.get(MESH_KEY));
        self.map = text.map(|text| MeshMap::parse(text)).unwrap_or_default();
    }

    /// Where it is from, with what is wrong with it.
    pub fn source(&self) -> Option<(&ConfigMap, &MeshMap)> {
        Some((self.source.as_deref()?, &self.map))
    }

    /// `mesh`, with what the configuration adds to it.
    pub fn effective(&self, mesh: &MeshConfig) -> MeshConfig {
        let mut mesh = mesh.clone();
        for alias in &self.map.trust_domain_aliases {
            if !mesh.trust_domain_aliases.contains(alias) {
                mesh.trust_domain_aliases.push(alias.clone());
            }
        }
        mesh
    }

    /// As waypoints are told; `mesh` is the effective one.
    pub fn resource(&self, mesh: &MeshConfig) -> wire::Settings {
        wire::Settings {
            root_namespace: mesh.root_namespace.to_string(),
            trust_domain: mesh.trust_domain.as_str().into(),
            trust_domain_aliases: mesh
                .trust_domain_aliases
                .iter()
                .map(|alias| alias.as_str().into())
                .collect(),
            ..self.map.settings.clone()
        }
    }

    /// The providers.
    pub fn providers(&self) -> &[wire::Provider] {
        &self.map.providers
    }
}

/// Istio's name for it, with the revision where that is not the default one.
fn source<'a>(objects: &'a Objects, mesh: &MeshConfig) -> Option<&'a Arc<ConfigMap>> {
    let of = objects.namespaces.get(&mesh.root_namespace)?;
    match &*mesh.revision {
        "default" => of.config_maps.get("istio"),
        revision => of.config_maps.get(&*format!("istio-{revision}")),
    }
}
