//! Configuration by environment variables: ztunnel's names where both need the same, and
//! `GATEWAY_NAME`. Adit's own begin with `ADIT_`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use adit_shared::environment::ConfigError;
use adit_shared::environment::{
    as_text, duration, metadata, optional, parsed, parsed_with, positive, share_of_cores,
    termination_deadline, text,
};
use adit_shared::hbone::Settings;
use adit_shared::identity::{SpiffeId, TrustDomain};
use adit_shared::net::socket::any_address;

/// Streams that a client may have on one HBONE connection. Few, so that a client with many
/// connections opens several tunnels and all workers get their share; not one, for streams
/// share system calls and TLS records.
pub const TUNNEL_STREAMS: u32 = 16;
/// Bytes that a stalled app connection has us hold in each direction. With
/// [`TUNNEL_STREAMS`] of them the connection's window is used up and not exceeded, so that no
/// stream can starve another.
pub const STREAM_WINDOW: u32 = 256 << 10;

/// Everything that is decided before the first packet.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// `GATEWAY_NAME`: name of the Gateway that this process is an instance of. Required.
    pub gateway: String,
    /// `POD_NAMESPACE`: its namespace. Required.
    pub namespace: String,
    /// `POD_NAME`, default the Gateway's name.
    pub pod: String,
    /// `SERVICE_ACCOUNT`, default the Gateway's name.
    pub service_account: String,
    /// `INSTANCE_IP`: the pod's address.
    pub ip: Option<IpAddr>,
    /// `NODE_NAME`: the node's name.
    pub node: String,
    /// `NETWORK`: the network that the pod is on; empty is the default.
    pub network: String,
    /// `CLUSTER_ID` or `ISTIO_META_CLUSTER_ID`, default `Kubernetes`.
    pub cluster: String,
    /// `CLUSTER_DOMAIN`, default `cluster.local`.
    pub cluster_domain: String,
    /// `TRUST_DOMAIN`, default `cluster.local`.
    #[serde(serialize_with = "as_text")]
    pub trust_domain: TrustDomain,
    /// Who the waypoint is, made from the above.
    #[serde(serialize_with = "as_text")]
    pub identity: SpiffeId,
    /// `XDS_ADDRESS`, default `https://istiod.istio-system.svc:15012`.
    pub xds_address: String,
    /// `XDS_ROOT_CA`, default `./var/run/secrets/istio/root-cert.pem`.
    pub xds_root_ca: PathBuf,
    /// `ALT_XDS_HOSTNAME`: the name to verify instead of the address's.
    pub alt_xds_hostname: Option<String>,
    /// `CA_ADDRESS`, default the xDS address.
    pub ca_address: String,
    /// `CA_ROOT_CA`, default `./var/run/secrets/istio/root-cert.pem`.
    pub ca_root_ca: PathBuf,
    /// `ALT_CA_HOSTNAME`: the name to verify instead of the address's.
    pub alt_ca_hostname: Option<String>,
    /// `AUTH_TOKEN`: file with the bearer token, read again for every call.
    pub auth_token: PathBuf,
    /// `SECRET_TTL`: lifetime asked for the certificate, default 24 h.
    pub certificate_ttl: Duration,
    /// `ADIT_WORKER_THREADS`: a number, `n%` of the cores, or 0 for all. Default: all.
    pub workers: usize,
    /// `ADIT_HBONE_ADDRESS`, default `[::]:15008`.
    pub hbone_address: SocketAddr,
    /// `ADMIN_ADDRESS`, default `127.0.0.1:15000`.
    pub admin_address: SocketAddr,
    /// `STATS_ADDRESS`, default `[::]:15020`.
    pub stats_address: SocketAddr,
    /// `READINESS_ADDRESS`, default `[::]:15021`.
    pub readiness_address: SocketAddr,
    /// `POOL_MAX_STREAMS_PER_CONNECTION`, default 100: towards endpoints.
    pub pool_max_streams: usize,
    /// `POOL_UNUSED_RELEASE_TIMEOUT`, default 5 min.
    pub pool_unused_release: Duration,
    /// HTTP/2 of HBONE, with smaller windows than ztunnel's: see [`STREAM_WINDOW`].
    #[serde(skip)]
    pub http2: Settings,
    /// `CONNECTION_TERMINATION_DEADLINE`, else from `TERMINATION_GRACE_PERIOD_SECONDS`,
    /// else 5 s: how long open requests may go on after SIGTERM.
    pub termination_deadline: Duration,
    /// `ADIT_MAX_CONNECTIONS_PER_LISTENER`, default 65536 per worker.
    pub max_connections: usize,
    /// `ISTIO_META_*` and `ISTIO_METAJSON_*`, sent to the control plane as node metadata.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    /// [`ConfigError`] names the first variable that cannot be used.
    pub fn from_env() -> Result<Self, ConfigError> {
        let required = |name| optional(name).ok_or(ConfigError::Missing(name));
        let gateway = required("GATEWAY_NAME")?;
        let namespace = required("POD_NAMESPACE")?;
        let service_account = text("SERVICE_ACCOUNT", &gateway);
        let trust_domain = parsed_with("TRUST_DOMAIN", TrustDomain::default(), |v| {
            TrustDomain::new(v).map_err(|e| e.to_string())
        })?;
        let identity = SpiffeId::new(trust_domain.clone(), &namespace, &service_account);
        let identity = identity.map_err(|e| ConfigError::Invalid {
            variable: "SERVICE_ACCOUNT",
            value: service_account.clone(),
            reason: e.to_string(),
        })?;
        let xds_address = text("XDS_ADDRESS", "https://istiod.istio-system.svc:15012");
        let root_ca = "./var/run/secrets/istio/root-cert.pem";
        Ok(Self {
            pod: text("POD_NAME", &gateway),
            gateway,
            namespace,
            service_account,
            ip: match optional("INSTANCE_IP") {
                None => None,
                Some(_) => Some(parsed("INSTANCE_IP", IpAddr::from([0, 0, 0, 0]))?),
            },
            node: text("NODE_NAME", ""),
            network: text("NETWORK", ""),
            cluster: optional("CLUSTER_ID")
                .unwrap_or_else(|| text("ISTIO_META_CLUSTER_ID", "Kubernetes")),
            cluster_domain: text("CLUSTER_DOMAIN", "cluster.local"),
            trust_domain,
            identity,
            ca_address: text("CA_ADDRESS", &xds_address),
            xds_address,
            xds_root_ca: text("XDS_ROOT_CA", root_ca).into(),
            alt_xds_hostname: optional("ALT_XDS_HOSTNAME"),
            ca_root_ca: text("CA_ROOT_CA", root_ca).into(),
            alt_ca_hostname: optional("ALT_CA_HOSTNAME"),
            auth_token: text("AUTH_TOKEN", "./var/run/secrets/tokens/istio-token").into(),
            certificate_ttl: duration("SECRET_TTL", Duration::from_secs(24 * 3600))?,
            workers: {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                share_of_cores("ADIT_WORKER_THREADS", cores)?
            },
            hbone_address: parsed("ADIT_HBONE_ADDRESS", any_address(15008))?,
            admin_address: parsed("ADMIN_ADDRESS", SocketAddr::from(([127, 0, 0, 1], 15000)))?,
            stats_address: parsed("STATS_ADDRESS", any_address(15020))?,
            readiness_address: parsed("READINESS_ADDRESS", any_address(15021))?,
            pool_max_streams: parsed_with("POOL_MAX_STREAMS_PER_CONNECTION", 100, positive)?,
            pool_unused_release: duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_secs(300))?,
            http2: http2_settings(),
            termination_deadline: termination_deadline()?,
            max_connections: parsed_with("ADIT_MAX_CONNECTIONS_PER_LISTENER", 65_536, positive)?,
            metadata: metadata(),
        })
    }
}

/// HTTP/2 as the waypoint speaks it on HBONE connections, in both roles.
pub fn http2_settings() -> Settings {
    Settings {
        stream_window: STREAM_WINDOW,
        connection_window: STREAM_WINDOW * TUNNEL_STREAMS,
        max_frame: 64 << 10,
        max_concurrent_streams: TUNNEL_STREAMS,
        send_buffer: STREAM_WINDOW as usize,
        connection_send_buffer: (STREAM_WINDOW * 8) as usize,
        ..Settings::DEFAULT
    }
}
