//! How fields of generated messages look in dumps: names of enumerations in place of
//! numbers, durations as Kubernetes writes them.

use serde::Serializer;

use super::waypoint as pb;

/// `1.5s`; nothing where the field is absent.
pub(super) fn duration<S: Serializer>(
    value: &Option<prost_types::Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        None => serializer.serialize_none(),
        Some(value) => match super::duration(value) {
            Some(value) => serializer.collect_str(&format_args!("{value:?}")),
            None => serializer.collect_str(&format_args!("{}s", value.seconds)),
        },
    }
}

macro_rules! names {
    ($($function:ident: $kind:ty;)*) => {
        $(pub(super) fn $function<S: Serializer>(
            value: &i32,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match <$kind>::try_from(*value) {
                Ok(kind) => serializer.serialize_str(kind.as_str_name()),
                Err(_) => serializer.serialize_i32(*value),
            }
        })*
    };
}

names! {
    traffic_type: pb::waypoint::TrafficType;
    path_normalization: pb::settings::PathNormalization;
    access_log_encoding: pb::settings::AccessLogEncoding;
    protocol: pb::service_port::Protocol;
    persistence: pb::session_persistence::Type;
    algorithm: pb::load_balancer::Algorithm;
    h2_upgrade: pb::connection_pool::H2Upgrade;
    tls_mode: pb::client_tls::Mode;
    action: pb::authorization_policy::Action;
    scope: pb::telemetry::Scope;
}
