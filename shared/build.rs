//! Compiles `proto/` with a protoc written in Rust, so that a build needs only cargo.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/workload.proto",
        "proto/authorization.proto",
        "proto/xds.proto",
        "proto/ca.proto",
        "proto/enrolment.proto",
        "proto/waypoint.proto",
        "proto/otlp.proto",
        "proto/ext_authz.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    let mut config = tonic_prost_build::configure();
    // Waypoints show what they were told (`/config_dump`).
    config = config.type_attribute(
        ".adit.waypoint.v1",
        "#[derive(serde::Serialize)] #[serde(rename_all = \"camelCase\")]",
    );
    // What must not be shown (src/proto.rs).
    config = config.skip_debug([".adit.waypoint.v1.Secret"]);
    for field in ["session_key", "certificate_chain", "private_key"] {
        config = config.field_attribute(
            format!(".adit.waypoint.v1.Secret.{field}"),
            "#[serde(skip)]",
        );
    }
    for (field, shown) in SHOWN {
        let attribute = format!("#[serde(serialize_with = \"crate::proto::text::{shown}\")]");
        config = config.field_attribute(format!(".adit.waypoint.v1.{field}"), attribute);
    }
    // Maps in order: equal messages must encode to equal bytes, because the version of a
    // resource is a hash of them (src/xds/resources.rs).
    config.btree_map(".").compile_fds(descriptors)?;
    Ok(())
}

/// Fields of waypoint.proto that `serde` cannot show by itself, and what shows them.
const SHOWN: [(&str, &str); 27] = [
    ("HttpRule.request_timeout", "duration"),
    ("HttpRule.backend_request_timeout", "duration"),
    ("Fault.delay", "duration"),
    ("Retry.backoff", "duration"),
    ("Retry.per_try_timeout", "duration"),
    ("SessionPersistence.absolute_timeout", "duration"),
    ("SessionPersistence.idle_timeout", "duration"),
    ("LoadBalancer.warmup", "duration"),
    ("HashCookie.ttl", "duration"),
    ("ConnectionPool.connect_timeout", "duration"),
    ("ConnectionPool.tcp_idle_timeout", "duration"),
    ("ConnectionPool.http_idle_timeout", "duration"),
    ("ConnectionPool.max_connection_duration", "duration"),
    ("OutlierDetection.interval", "duration"),
    ("OutlierDetection.base_ejection_time", "duration"),
    ("JwtRule.timeout", "duration"),
    ("ProviderService.timeout", "duration"),
    ("Waypoint.waypoint_for", "traffic_type"),
    ("Settings.path_normalization", "path_normalization"),
    ("Settings.access_log_encoding", "access_log_encoding"),
    ("ServicePort.protocol", "protocol"),
    ("SessionPersistence.type", "persistence"),
    ("LoadBalancer.algorithm", "algorithm"),
    ("ConnectionPool.h2_upgrade", "h2_upgrade"),
    ("ClientTls.mode", "tls_mode"),
    ("AuthorizationPolicy.action", "action"),
    ("Telemetry.scope", "scope"),
];
