//! `trafficPolicy` of DestinationRules.

use std::collections::BTreeMap;

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;

use super::destination_rule::TrafficPolicy;
use super::duration::duration;
use super::field::{At, FieldError};
use super::raw::{Map, nullable};

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawPolicyFields {
    load_balancer: Option<RawLoadBalancer>,
    connection_pool: Option<RawPool>,
    outlier_detection: Option<RawOutlier>,
    tls: Option<RawTls>,
    retry_budget: Option<RawBudget>,
}

/// The sections that a host, a port and a subset have alike.
pub(super) type RawTrafficSettings = RawPolicyFields;

#[derive(Default)]
pub(super) struct RawTrafficPolicy {
    pub(super) settings: RawTrafficSettings,
    pub(super) port_level_settings: Vec<Map<RawPortSettings>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawWhole {
    load_balancer: Option<RawLoadBalancer>,
    connection_pool: Option<RawPool>,
    outlier_detection: Option<RawOutlier>,
    tls: Option<RawTls>,
    retry_budget: Option<RawBudget>,
    #[serde(deserialize_with = "nullable")]
    port_level_settings: Vec<Map<RawPortSettings>>,
}

impl<'de> Deserialize<'de> for RawTrafficPolicy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let whole = RawWhole::deserialize(deserializer)?;
        Ok(Self {
            settings: RawPolicyFields {
                load_balancer: whole.load_balancer,
                connection_pool: whole.connection_pool,
                outlier_detection: whole.outlier_detection,
                tls: whole.tls,
                retry_budget: whole.retry_budget,
            },
            port_level_settings: whole.port_level_settings,
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawPortSettings {
    pub(super) port: Option<RawPort>,
    load_balancer: Option<RawLoadBalancer>,
    connection_pool: Option<RawPool>,
    outlier_detection: Option<RawOutlier>,
    tls: Option<RawTls>,
}

impl From<&RawPortSettings> for RawPolicyFields {
    fn from(raw: &RawPortSettings) -> Self {
        Self {
            load_balancer: raw.load_balancer.clone(),
            connection_pool: raw.connection_pool.clone(),
            outlier_detection: raw.outlier_detection.clone(),
            tls: raw.tls.clone(),
            retry_budget: None,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPort {
    pub(super) number: u32,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLoadBalancer {
    simple: Option<String>,
    consistent_hash: Option<RawHash>,
    locality_lb_setting: Option<RawLocality>,
    warmup_duration_secs: Option<String>,
    warmup: Option<RawWarmup>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawHash {
    http_header_name: Option<String>,
    http_cookie: Option<RawCookie>,
    use_source_ip: Option<bool>,
    http_query_parameter_name: Option<String>,
    ring_hash: Option<RawRing>,
    maglev: Option<RawMaglev>,
    minimum_ring_size: Option<u64>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
struct RawCookie {
    name: String,
    path: Option<String>,
    ttl: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRing {
    minimum_ring_size: Option<u64>,
}

// The waypoint's table has a size of its own.
#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
struct RawMaglev {
    #[serde(rename = "tableSize")]
    _table_size: Option<u64>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLocality {
    enabled: Option<bool>,
    #[serde(deserialize_with = "nullable")]
    distribute: Vec<RawDistribute>,
    #[serde(deserialize_with = "nullable")]
    failover: Vec<RawFailover>,
    #[serde(deserialize_with = "nullable")]
    failover_priority: Vec<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
struct RawDistribute {
    from: String,
    to: BTreeMap<String, u32>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
struct RawFailover {
    from: String,
    to: String,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawWarmup {
    duration: Option<String>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
struct RawPool {
    tcp: Option<RawTcp>,
    http: Option<RawHttp>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawTcp {
    max_connections: Option<u32>,
    connect_timeout: Option<String>,
    // The tunnel has keepalive of its own.
    #[serde(rename = "tcpKeepalive")]
    _keepalive: Option<serde_json::Value>,
    max_connection_duration: Option<String>,
    idle_timeout: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawHttp {
    http1_max_pending_requests: Option<u32>,
    http2_max_requests: Option<u32>,
    max_requests_per_connection: Option<u32>,
    max_retries: Option<u32>,
    idle_timeout: Option<String>,
    h2_upgrade_policy: Option<String>,
    use_client_protocol: Option<bool>,
    max_concurrent_streams: Option<u32>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawOutlier {
    consecutive_errors: Option<u32>,
    split_external_local_origin_errors: Option<bool>,
    consecutive_local_origin_failures: Option<u32>,
    consecutive_gateway_errors: Option<u32>,
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    interval: Option<String>,
    base_ejection_time: Option<String>,
    max_ejection_percent: Option<u32>,
    min_health_percent: Option<u32>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawTls {
    mode: Option<String>,
    client_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
    ca_crl: Option<String>,
    credential_name: Option<String>,
    #[serde(deserialize_with = "nullable")]
    subject_alt_names: Vec<String>,
    sni: Option<String>,
    insecure_skip_verify: Option<bool>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
}

/// Converts the sections of one level.
pub(super) fn settings(
    raw: &RawTrafficSettings,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> TrafficPolicy {
    let balancer = raw.load_balancer.as_ref();
    let pool = raw.connection_pool.as_ref();
    let outlier = raw.outlier_detection.as_ref();
    let tls = raw.tls.as_ref();
    let budget = raw.retry_budget.as_ref();
    let credential = tls.and_then(|tls| tls.credential_name.as_deref());
    TrafficPolicy {
        credential: credential.filter(|name| !name.is_empty()).map(Into::into),
        settings: wire::TrafficSettings {
            load_balancer: balancer.map(|raw| load_balancer(raw, at.key("loadBalancer"), errors)),
            connection_pool: pool.map(|raw| connection_pool(raw, at.key("connectionPool"), errors)),
            outlier_detection: outlier
                .map(|raw| outlier_detection(raw, at.key("outlierDetection"), errors)),
            tls: tls.map(|raw| client_tls(raw, at.key("tls"), errors)),
            retry_budget: budget.map(|raw| {
                let percent = raw.percent.unwrap_or(20.0);
                if !(0.0..=100.0).contains(&percent) {
                    let at = at.key("retryBudget");
                    errors.push(at.key("percent").error("is not between 0 and 100"));
                }
                wire::RetryBudget {
                    percent,
                    min_retries: raw.min_retry_concurrency.unwrap_or(3),
                }
            }),
        },
    }
}

fn length(
    text: Option<&str>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<prost_types::Duration> {
    duration(text?, at, errors)
}

fn load_balancer(
    raw: &RawLoadBalancer,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::LoadBalancer {
    use wire::load_balancer::Algorithm;
    let mut balancer = wire::LoadBalancer::default();
    let algorithm = match raw.simple.as_deref() {
        None | Some("" | "UNSPECIFIED") => Algorithm::Unspecified,
        Some("LEAST_REQUEST" | "LEAST_CONN") => Algorithm::LeastRequest,
        Some("ROUND_ROBIN") => Algorithm::RoundRobin,
        Some("RANDOM") => Algorithm::Random,
        Some("PASSTHROUGH") => Algorithm::Passthrough,
        Some(other) => {
            errors.push(at.key("simple").error(format!(
                "{other:?} is not LEAST_REQUEST, ROUND_ROBIN, RANDOM or PASSTHROUGH"
            )));
            Algorithm::Unspecified
        }
    };
    balancer.algorithm = algorithm.into();
    if let Some(hash) = &raw.consistent_hash {
        let below = at.key("consistentHash");
        if raw.simple.is_some() {
            errors.push(below.error("stands beside simple: only one of them may be set"));
        }
        consistent_hash(hash, below, &mut balancer, errors);
    }
    let warmup = raw.warmup.as_ref();
    let seconds = raw.warmup_duration_secs.as_deref();
    balancer.warmup = match warmup {
        Some(warmup) => {
            let at = at.key("warmup");
            length(warmup.duration.as_deref(), at.key("duration"), errors)
        }
        None => length(seconds, at.key("warmupDurationSecs"), errors),
    };
    balancer.warmup_aggression = warmup.and_then(|of| of.aggression).unwrap_or_default();
    let minimum = warmup.and_then(|of| of.minimum_percent);
    if minimum.is_some_and(|minimum| !(0.0..=100.0).contains(&minimum)) {
        let at = at.key("warmup");
        let error = at.key("minimumPercent").error("is not between 0 and 100");
        errors.push(error);
    }
    // A float's cast saturates.
    balancer.warmup_minimum_percent = minimum.map_or(0, |minimum| minimum.round() as u32);
    if let Some(locality) = &raw.locality_lb_setting {
        let at = at.key("localityLbSetting");
        if !locality.failover_priority.is_empty() {
            let error = at.key("failoverPriority").error("is not supported");
            errors.push(error);
        }
        balancer.locality_enabled = locality.enabled.unwrap_or(true);
        let failover = locality.failover.iter().map(|of| wire::LocalityFailover {
            from: of.from.clone(),
            to: of.to.clone(),
        });
        balancer.failover = failover.collect();
        for (index, of) in locality.distribute.iter().enumerate() {
            if of.to.values().copied().map(u64::from).sum::<u64>() != 100 {
                let list = at.key("distribute");
                let at = list.index(index);
                errors.push(at.key("to").error("does not add up to 100"));
            }
            balancer.distribute.push(wire::LocalityDistribute {
                from: of.from.clone(),
                to: of.to.clone().into_iter().collect(),
            });
        }
    }
    balancer
}

fn consistent_hash(
    raw: &RawHash,
    at: At<'_>,
    balancer: &mut wire::LoadBalancer,
    errors: &mut Vec<FieldError>,
) {
    use wire::load_balancer::{Algorithm, HashKey};
    let cookie = raw.http_cookie.as_ref().map(|cookie| {
        let at = at.key("httpCookie");
        if cookie.name.is_empty() {
            errors.push(at.key("name").error("is required"));
        }
        HashKey::Cookie(wire::HashCookie {
            name: cookie.name.clone(),
            path: cookie.path.clone().unwrap_or_default(),
            ttl: length(cookie.ttl.as_deref(), at.key("ttl"), errors),
        })
    });
    let keys = [
        raw.http_header_name.clone().map(HashKey::Header),
        cookie,
        raw.use_source_ip.filter(|on| *on).map(HashKey::SourceIp),
        raw.http_query_parameter_name
            .clone()
            .map(HashKey::QueryParameter),
    ];
    let mut keys = keys.into_iter().flatten();
    balancer.hash_key = keys.next();
    if balancer.hash_key.is_none() || keys.next().is_some() {
        errors.push(
            at.error("has one of httpHeaderName, httpCookie, useSourceIp, httpQueryParameterName"),
        );
    }
    let algorithm = match (&raw.ring_hash, &raw.maglev) {
        (_, None) => Algorithm::RingHash,
        (None, Some(_)) => Algorithm::Maglev,
        (Some(_), Some(_)) => {
            errors.push(at.error("only one of ringHash and maglev may be set"));
            Algorithm::RingHash
        }
    };
    balancer.algorithm = algorithm.into();
    let ring = raw.ring_hash.as_ref().and_then(|of| of.minimum_ring_size);
    balancer.minimum_ring_size = ring.or(raw.minimum_ring_size).unwrap_or_default();
}

fn connection_pool(
    raw: &RawPool,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::ConnectionPool {
    use wire::connection_pool::H2Upgrade;
    let tcp = raw.tcp.clone().unwrap_or_default();
    let http = raw.http.clone().unwrap_or_default();
    let at_tcp = at.key("tcp");
    let at_http = at.key("http");
    let h2_upgrade = match http.h2_upgrade_policy.as_deref() {
        None | Some("" | "DEFAULT") => H2Upgrade::Default,
        Some("DO_NOT_UPGRADE") => H2Upgrade::DoNotUpgrade,
        Some("UPGRADE") => H2Upgrade::Upgrade,
        Some(other) => {
            let message = format!("{other:?} is not DEFAULT, DO_NOT_UPGRADE or UPGRADE");
            errors.push(at_http.key("h2UpgradePolicy").error(message));
            H2Upgrade::Default
        }
    };
    let mut of_tcp = |text: &Option<String>, key| length(text.as_deref(), at_tcp.key(key), errors);
    let connect_timeout = of_tcp(&tcp.connect_timeout, "connectTimeout");
    let tcp_idle_timeout = of_tcp(&tcp.idle_timeout, "idleTimeout");
    let max_connection_duration = of_tcp(&tcp.max_connection_duration, "maxConnectionDuration");
    let http_idle = http.idle_timeout.as_deref();
    wire::ConnectionPool {
        max_connections: tcp.max_connections.unwrap_or_default(),
        connect_timeout,
        tcp_idle_timeout,
        max_pending_requests: http.http1_max_pending_requests.unwrap_or_default(),
        max_requests: http.http2_max_requests.unwrap_or_default(),
        max_requests_per_connection: http.max_requests_per_connection.unwrap_or_default(),
        max_retries: http.max_retries.unwrap_or_default(),
        http_idle_timeout: length(http_idle, at_http.key("idleTimeout"), errors),
        h2_upgrade: h2_upgrade.into(),
        use_client_protocol: http.use_client_protocol.unwrap_or_default(),
        max_concurrent_streams: http.max_concurrent_streams.unwrap_or_default(),
        max_connection_duration,
    }
}

fn outlier_detection(
    raw: &RawOutlier,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::OutlierDetection {
    for (key, percent) in [
        ("maxEjectionPercent", raw.max_ejection_percent),
        ("minHealthPercent", raw.min_health_percent),
    ] {
        if percent.is_some_and(|percent| percent > 100) {
            errors.push(at.key(key).error("is not between 0 and 100"));
        }
    }
    // Istio's older field counts the errors of gateways.
    let gateway = raw.consecutive_gateway_errors.or(raw.consecutive_errors);
    let base = raw.base_ejection_time.as_deref();
    wire::OutlierDetection {
        consecutive_5xx: raw.consecutive_5xx_errors.unwrap_or_default(),
        consecutive_5xx_set: raw.consecutive_5xx_errors.is_some(),
        consecutive_gateway_errors: gateway.unwrap_or_default(),
        consecutive_gateway_errors_set: gateway.is_some(),
        consecutive_local_origin_failures: raw
            .consecutive_local_origin_failures
            .unwrap_or_default(),
        split_external_local_origin_errors: raw
            .split_external_local_origin_errors
            .unwrap_or_default(),
        interval: length(raw.interval.as_deref(), at.key("interval"), errors),
        base_ejection_time: length(base, at.key("baseEjectionTime"), errors),
        max_ejection_percent: raw.max_ejection_percent.unwrap_or_default(),
        max_ejection_percent_set: raw.max_ejection_percent.is_some(),
        min_health_percent: raw.min_health_percent.unwrap_or_default(),
    }
}

/// A waypoint reads no files: authorities come from a Secret, as text, or are the system's.
fn client_tls(raw: &RawTls, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::ClientTls {
    use wire::client_tls::Mode;
    let mode = match raw.mode.as_deref() {
        None | Some("" | "DISABLE") => Mode::Disable,
        Some("SIMPLE") => Mode::Simple,
        Some("ISTIO_MUTUAL") => Mode::IstioMutual,
        Some("MUTUAL") => Mode::Mutual,
        Some(other) => {
            let message = format!("{other:?} is not DISABLE, SIMPLE, MUTUAL or ISTIO_MUTUAL");
            errors.push(at.key("mode").error(message));
            Mode::Simple
        }
    };
    let set = |value: &Option<String>| value.as_deref().is_some_and(|value| !value.is_empty());
    for (key, value) in [
        ("clientCertificate", &raw.client_certificate),
        ("privateKey", &raw.private_key),
    ] {
        if set(value) {
            errors.push(
                at.key(key)
                    .error("a waypoint reads no files: name a Secret in credentialName"),
            );
        }
    }
    if set(&raw.ca_crl) {
        errors.push(at.key("caCrl").error("is not supported"));
    }
    if mode == Mode::Mutual && !set(&raw.credential_name) {
        errors.push(
            at.key("credentialName")
                .error("MUTUAL needs a Secret with a certificate and its key"),
        );
    }
    let authorities = raw.ca_certificates.as_deref().unwrap_or_default().trim();
    let credential = raw.credential_name.as_deref().unwrap_or_default();
    let inline = authorities.starts_with("-----BEGIN CERTIFICATE-----");
    if !authorities.is_empty() && !inline && authorities != "system" {
        errors.push(at.key("caCertificates").error(
            "a waypoint reads no files: name a Secret in credentialName, or write the PEM text",
        ));
    }
    if !authorities.is_empty() && !credential.is_empty() {
        let error = at
            .key("credentialName")
            .error("only one of credentialName and caCertificates may be set");
        errors.push(error);
    }
    wire::ClientTls {
        mode: mode.into(),
        sni: raw.sni.clone().unwrap_or_default(),
        subject_alt_names: raw.subject_alt_names.clone(),
        ca_certificates: match inline {
            true => format!("{authorities}\n"),
            false => String::new(),
        },
        system_roots: mode == Mode::Simple && !inline && credential.is_empty(),
        insecure_skip_verify: raw.insecure_skip_verify.unwrap_or_default(),
        invalid: String::new(),
        client_secret: String::new(),
    }
}
