//! What holds for the whole mesh, as waypoints are told.

use adit_shared::proto::waypoint as wire;

use crate::compile::mesh::MeshConfig;
use crate::model::Objects;

/// The one resource of its type.
pub const SETTINGS_NAME: &str = "mesh";

/// Converts the mesh's settings.
pub fn settings(_objects: &Objects, mesh: &MeshConfig) -> wire::Settings {
    wire::Settings {
        root_namespace: mesh.root_namespace.to_string(),
        trust_domain: mesh.trust_domain.as_str().into(),
        trust_domain_aliases: mesh
            .trust_domain_aliases
            .iter()
            .map(|alias| alias.as_str().into())
            .collect(),
        path_normalization: wire::settings::PathNormalization::Base.into(),
        ..wire::Settings::default()
    }
}
