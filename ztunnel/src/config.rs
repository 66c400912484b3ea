//! Configuration by environment variables, under Istio's names where they exist
//! (ztunnel's reference table); Adit's own begin with `ADIT_`.
//!
//! A value that cannot be used stops the start with the variable's name: a proxy that
//! runs on a default nobody asked for is worse than one that does not run.

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
use adit_shared::identity::TrustDomain;
use adit_shared::net::socket::any_address;

/// Everything that is decided before the first packet.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// `NODE_NAME`: which node's pods are ours. Required.
    pub node: String,
    /// `NETWORK`: the network that this node's pods are on; empty is the default.
    pub network: String,
    /// `CLUSTER_ID` or `ISTIO_META_CLUSTER_ID`, default `Kubernetes`.
    pub cluster: String,
    /// `CLUSTER_DOMAIN`, default `cluster.local`.
    pub cluster_domain: String,
    /// `TRUST_DOMAIN`, default `cluster.local`.
    #[serde(serialize_with = "as_text")]
    pub trust_domain: TrustDomain,
    /// `POD_NAME`, `POD_NAMESPACE`, `SERVICE_ACCOUNT`, `INSTANCE_IP`: the proxy's own pod.
    pub own_pod: OwnPod,
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
    /// `SECRET_TTL`: lifetime asked for certificates, default 24 h.
    pub certificate_ttl: Duration,
    /// `ZTUNNEL_WORKER_THREADS`: a number, `n%` of the cores, or 0 for all.
    /// Default: a quarter of the cores, at least two.
    pub workers: usize,
    /// `ADMIN_ADDRESS`, default `127.0.0.1:15000`.
    pub admin_address: SocketAddr,
    /// `STATS_ADDRESS`, default `[::]:15020`.
    pub stats_address: SocketAddr,
    /// `READINESS_ADDRESS`, default `[::]:15021`.
    pub readiness_address: SocketAddr,
    /// `IPV6_ENABLED`, default true.
    pub ipv6: bool,
    /// `POOL_MAX_STREAMS_PER_CONNECTION`, default 100.
    pub pool_max_streams: usize,
    /// `POOL_UNUSED_RELEASE_TIMEOUT`, default 5 min.
    pub pool_unused_release: Duration,
    /// `HTTP2_STREAM_WINDOW_SIZE`, `HTTP2_CONNECTION_WINDOW_SIZE`, `HTTP2_FRAME_SIZE`.
    #[serde(skip)]
    pub http2: Settings,
    /// `CONNECTION_TERMINATION_DEADLINE`, else from `TERMINATION_GRACE_PERIOD_SECONDS`,
    /// else 5 s: how long open connections may go on after SIGTERM.
    pub termination_deadline: Duration,
    /// `ADIT_MAX_CONNECTIONS_PER_LISTENER`, default 65536 per worker and listener.
    pub max_connections: usize,
    /// `ADIT_IDLE_TIMEOUT`: closes proxied connections that moved nothing for so long;
    /// default off, as in Istio.
    pub idle_timeout: Option<Duration>,
    /// `ADIT_CGROUP`: cgroup v2 directory that holds all pods of this node; default, with
    /// `ADIT_POD_DISCOVERY=cgroup`, the kubepods cgroup, else the root of the cgroup v2 mount.
    pub cgroup: Option<PathBuf>,
    /// `ADIT_BPFFS`, default `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// `ADIT_KUBELET_CGROUP`: connections from it reach pods unproxied (probes). Default,
    /// with `ADIT_POD_DISCOVERY=cgroup`, that of the node's kubelet, else none.
    pub kubelet_cgroup: Option<PathBuf>,
    /// `ADIT_KUBELET_PORT`, default 10250: whoever listens there is the kubelet.
    pub kubelet_port: u16,
    /// `ADIT_POD_DISCOVERY`: how network namespaces of pods are found; `directory` (default)
    /// or `cgroup`.
    pub pod_discovery: PodDiscovery,
    /// `ADIT_NETNS_DIR`: directory with one network namespace handle per pod uid.
    pub netns_dir: PathBuf,
    /// `ADIT_SOCKET`: where the node agent tells of pods that are starting. Default, with
    /// `ADIT_POD_DISCOVERY=cgroup`, `/var/run/adit/ztunnel.sock`, else none.
    pub socket: Option<PathBuf>,
    /// `ISTIO_META_*` and `ISTIO_METAJSON_*`, sent to the control plane as node metadata.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

/// How network namespaces of pods are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum PodDiscovery {
    /// In `ADIT_NETNS_DIR`, where somebody keeps them.
    Directory,
    /// By the pods' cgroups, on a node of Kubernetes.
    Cgroup,
}

impl PodDiscovery {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "directory" => Ok(Self::Directory),
            "cgroup" => Ok(Self::Cgroup),
            _ => Err("`directory` or `cgroup` is needed".into()),
        }
    }
}

/// The pod that the proxy itself runs in.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnPod {
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Its address.
    pub ip: Option<IpAddr>,
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    /// [`ConfigError`] names the first variable that cannot be used.
    pub fn from_env() -> Result<Self, ConfigError> {
        let xds_address = text("XDS_ADDRESS", "https://istiod.istio-system.svc:15012");
        let root_ca = "./var/run/secrets/istio/root-cert.pem";
        let defaults = Settings::default();
        let pod_discovery = parsed_with(
            "ADIT_POD_DISCOVERY",
            PodDiscovery::Directory,
            PodDiscovery::parse,
        )?;
        let socket = match pod_discovery {
            PodDiscovery::Directory => optional("ADIT_SOCKET"),
            PodDiscovery::Cgroup => Some(text("ADIT_SOCKET", "/var/run/adit/ztunnel.sock")),
        };
        Ok(Self {
            node: optional("NODE_NAME").ok_or(ConfigError::Missing("NODE_NAME"))?,
            network: text("NETWORK", ""),
            cluster: optional("CLUSTER_ID")
                .unwrap_or_else(|| text("ISTIO_META_CLUSTER_ID", "Kubernetes")),
            cluster_domain: text("CLUSTER_DOMAIN", "cluster.local"),
            trust_domain: parsed_with("TRUST_DOMAIN", TrustDomain::default(), |v| {
                TrustDomain::new(v).map_err(|e| e.to_string())
            })?,
            own_pod: OwnPod {
                name: text("POD_NAME", "ztunnel"),
                namespace: text("POD_NAMESPACE", "istio-system"),
                service_account: text("SERVICE_ACCOUNT", "ztunnel"),
                ip: match optional("INSTANCE_IP") {
                    None => None,
                    Some(_) => Some(parsed("INSTANCE_IP", IpAddr::from([0, 0, 0, 0]))?),
                },
            },
            ca_address: text("CA_ADDRESS", &xds_address),
            xds_address,
            xds_root_ca: text("XDS_ROOT_CA", root_ca).into(),
            alt_xds_hostname: optional("ALT_XDS_HOSTNAME"),
            ca_root_ca: text("CA_ROOT_CA", root_ca).into(),
            alt_ca_hostname: optional("ALT_CA_HOSTNAME"),
            auth_token: text("AUTH_TOKEN", "./var/run/secrets/tokens/istio-token").into(),
            certificate_ttl: duration("SECRET_TTL", Duration::from_secs(24 * 3600))?,
            workers: workers()?,
            admin_address: parsed("ADMIN_ADDRESS", SocketAddr::from(([127, 0, 0, 1], 15000)))?,
            stats_address: parsed("STATS_ADDRESS", any_address(15020))?,
            readiness_address: parsed("READINESS_ADDRESS", any_address(15021))?,
            ipv6: parsed("IPV6_ENABLED", true)?,
            pool_max_streams: parsed_with("POOL_MAX_STREAMS_PER_CONNECTION", 100, positive)?,
            pool_unused_release: duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_secs(300))?,
            http2: Settings {
                stream_window: parsed("HTTP2_STREAM_WINDOW_SIZE", defaults.stream_window)?,
                connection_window: parsed(
                    "HTTP2_CONNECTION_WINDOW_SIZE",
                    defaults.connection_window,
                )?,
                max_frame: parsed_with("HTTP2_FRAME_SIZE", defaults.max_frame, |v| {
                    let size = v
                        .parse()
                        .map_err(|_| "a number of bytes is needed".to_owned())?;
                    // RFC 9113 4.2.
                    match size {
                        16_384..=16_777_215 => Ok(size),
                        _ => Err("16384 to 16777215 bytes are possible".into()),
                    }
                })?,
                ..defaults
            },
            termination_deadline: termination_deadline()?,
            max_connections: parsed_with("ADIT_MAX_CONNECTIONS_PER_LISTENER", 65_536, positive)?,
            idle_timeout: match optional("ADIT_IDLE_TIMEOUT") {
                None => None,
                Some(_) => Some(duration("ADIT_IDLE_TIMEOUT", Duration::ZERO)?),
            },
            cgroup: optional("ADIT_CGROUP").map(Into::into),
            bpffs: text("ADIT_BPFFS", "/sys/fs/bpf").into(),
            kubelet_cgroup: optional("ADIT_KUBELET_CGROUP").map(Into::into),
            kubelet_port: parsed("ADIT_KUBELET_PORT", 10250)?,
            pod_discovery,
            socket: socket.map(Into::into),
            netns_dir: text("ADIT_NETNS_DIR", "/run/adit/netns").into(),
            metadata: metadata(),
        })
    }
}

fn workers() -> Result<usize, ConfigError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    share_of_cores("ZTUNNEL_WORKER_THREADS", (cores / 4).max(2))
}
