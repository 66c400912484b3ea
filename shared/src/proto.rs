//! Generated protobuf types. Only [`crate::model`], [`crate::policy`],
//! [`crate::identity`] and [`crate::xds`] read them; everything else uses the
//! validated types those modules convert them into.
#![allow(missing_docs, clippy::all, clippy::unwrap_used)]

/// Istio's workload discovery API (`proto/workload.proto`).
pub mod workload {
    tonic::include_proto!("istio.workload");
}
/// Istio's L4 authorization API (`proto/authorization.proto`).
pub mod security {
    tonic::include_proto!("istio.security");
}
/// Delta ADS (`proto/xds.proto`).
pub mod xds {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// Istio's certificate service (`proto/ca.proto`).
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// Adit's enrolment API (`proto/enrolment.proto`).
pub mod enrolment {
    tonic::include_proto!("adit.mesh.v1");
}

/// Type URL of [`workload::Address`].
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`security::Authorization`].
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`enrolment::Enrolment`].
pub const ENROLMENT_TYPE: &str = "type.googleapis.com/adit.mesh.v1.Enrolment";
