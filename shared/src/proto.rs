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
/// OpenTelemetry's trace exports (`proto/otlp.proto`).
pub mod otlp {
    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
}
/// Envoy's external authorization (`proto/ext_authz.proto`).
pub mod ext_authz {
    tonic::include_proto!("envoy.service.auth.v3");
}
mod text;

/// What a waypoint is told (`proto/waypoint.proto`).
pub mod waypoint {
    tonic::include_proto!("adit.waypoint.v1");

    /// Type URLs, in the order in which they are subscribed to. They are pushed in
    /// [`WAYPOINT_PUSH_ORDER`](crate::xds::server::WAYPOINT_PUSH_ORDER).
    pub const TYPES: [&str; 11] = [
        SETTINGS_TYPE,
        WAYPOINT_TYPE,
        SECRET_TYPE,
        PROVIDER_TYPE,
        REQUEST_AUTHENTICATION_TYPE,
        AUTHORIZATION_POLICY_TYPE,
        TELEMETRY_TYPE,
        SERVICE_TYPE,
        TRAFFIC_POLICY_TYPE,
        BACKEND_TLS_TYPE,
        ROUTE_TYPE,
    ];
    /// Type URL of [`Settings`].
    pub const SETTINGS_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Settings";
    /// Type URL of [`Waypoint`].
    pub const WAYPOINT_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Waypoint";
    /// Type URL of [`Secret`].
    pub const SECRET_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Secret";
    /// Type URL of [`Provider`].
    pub const PROVIDER_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Provider";
    /// Type URL of [`RequestAuthentication`].
    pub const REQUEST_AUTHENTICATION_TYPE: &str =
        "type.googleapis.com/adit.waypoint.v1.RequestAuthentication";
    /// Type URL of [`AuthorizationPolicy`].
    pub const AUTHORIZATION_POLICY_TYPE: &str =
        "type.googleapis.com/adit.waypoint.v1.AuthorizationPolicy";
    /// Type URL of [`Telemetry`].
    pub const TELEMETRY_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Telemetry";
    /// Type URL of [`Service`].
    pub const SERVICE_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Service";
    /// Type URL of [`TrafficPolicy`].
    pub const TRAFFIC_POLICY_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.TrafficPolicy";
    /// Type URL of [`BackendTls`].
    pub const BACKEND_TLS_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.BackendTls";
    /// Type URL of [`Route`].
    pub const ROUTE_TYPE: &str = "type.googleapis.com/adit.waypoint.v1.Route";

    impl std::fmt::Debug for Secret {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let mut shown = f.debug_struct("Secret");
            shown.field("name", &self.name).finish_non_exhaustive()
        }
    }
}

/// Type URL of [`workload::Address`].
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`security::Authorization`].
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`enrolment::Enrolment`].
pub const ENROLMENT_TYPE: &str = "type.googleapis.com/adit.mesh.v1.Enrolment";

/// The longest that a `Duration` may be, about ten thousand years: added to the time of day it
/// does not overflow.
const MAX_SECONDS: u64 = 315_576_000_000;

/// A duration of the wire; `None` where it is negative or malformed. (The conversion of
/// `prost_types` overflows for the smallest number of seconds.)
pub fn duration(of: &prost_types::Duration) -> Option<std::time::Duration> {
    let seconds = u64::try_from(of.seconds).ok();
    let seconds = seconds.filter(|seconds| *seconds <= MAX_SECONDS)?;
    let nanos = u32::try_from(of.nanos)
        .ok()
        .filter(|n| *n < 1_000_000_000)?;
    Some(std::time::Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations_that_are_none_are_refused() {
        let of = |seconds, nanos| super::duration(&prost_types::Duration { seconds, nanos });
        assert_eq!(
            of(1, 500_000_000),
            Some(std::time::Duration::from_millis(1500))
        );
        for (seconds, nanos) in [
            (-1, 0),
            (i64::MIN, 0),
            (i64::MAX, 0),
            (315_576_000_001, 0),
            (0, -1),
            (0, 1_000_000_000),
        ] {
            assert_eq!(of(seconds, nanos), None, "{seconds} {nanos}");
        }
    }
}
