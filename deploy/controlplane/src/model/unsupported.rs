//! Kinds that Istio's users have and that the mesh does not act upon yet: they are known,
//! so that they can be warned about.

use super::meta::Meta;

/// A VirtualService. Its traffic rules are not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualService {
    /// Metadata.
    pub meta: Meta,
}

/// A ServiceEntry. Its hosts are not known to the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Metadata.
    pub meta: Meta,
}
