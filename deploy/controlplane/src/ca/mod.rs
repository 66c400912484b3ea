//! The certificate service: which caller gets a certificate for which identity.

mod directory;

pub use directory::PodDirectory;
