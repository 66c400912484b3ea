//! How requests to a service are spread and bounded: validated values.
//!
//! The defaults are those that Istio gives a waypoint when no DestinationRule says
//! anything: least request, no limits, no outlier detection, ten seconds to connect.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::model::WorkloadUid;
use http::HeaderName;

/// Everything that holds for one service, port and subset.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrafficSettings {
    /// Which endpoint.
    pub load_balancer: LoadBalancer,
    /// Connections and their limits.
    pub connection_pool: ConnectionPool,
    /// Ejection of endpoints that fail; `None`: never.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS towards endpoints outside the mesh.
    pub tls: Option<ClientTls>,
    /// In place of [`ConnectionPool::max_retries`].
    pub retry_budget: Option<RetryBudget>,
    /// The settings cannot be understood, for this reason: every pick fails.
    pub invalid: Option<Arc<str>>,
}

impl TrafficSettings {
    /// Settings with which every pick fails.
    pub fn invalid(reason: impl Into<Arc<str>>) -> Self {
        Self {
            invalid: Some(reason.into()),
            ..Self::default()
        }
    }

    /// Share of ready endpoints, in percent, below which ejected ones are used too.
    ///
    /// `minHealthPercent` of the outlier detection unless the load balancer says it. 0,
    /// the default, is never: Istio turns Envoy's 50 % off because services have few
    /// pods (istio `applyOutlierDetection`).
    pub fn panic_threshold(&self) -> u8 {
        let outlier = self.outlier_detection.as_ref();
        self.load_balancer
            .panic_threshold
            .or(outlier.map(|outlier| outlier.min_health_percent))
            .unwrap_or(0)
    }
}

/// Which endpoint a request goes to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadBalancer {
    /// How to choose among equals.
    pub algorithm: Algorithm,
    /// What [`Algorithm::RingHash`] and [`Algorithm::Maglev`] hash.
    pub hash_key: Option<HashKey>,
    /// New endpoints get their share step by step.
    pub slow_start: Option<SlowStart>,
    /// Near endpoints first, or by given shares. `None`: what the service says
    /// (`trafficDistribution`).
    pub locality: Option<LocalityPolicy>,
    /// See [`TrafficSettings::panic_threshold`]; percent, 0 to 100.
    pub panic_threshold: Option<u8>,
}

/// How an endpoint is chosen among equally near ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// The better of two drawn by weight: fewer requests in flight, faster answers.
    #[default]
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// Drawn by weight.
    Random,
    /// The endpoint whose address the client dialled.
    Passthrough,
    /// Consistent hashing on a ring.
    RingHash {
        /// Envoy's `minimum_ring_size`: four endpoints of equal weight have as many
        /// points together, and more have more.
        minimum_ring_size: u32,
    },
    /// Consistent hashing by a Maglev table: faster, evener, somewhat less stable.
    Maglev,
}

impl Algorithm {
    /// Whether requests carry a hash.
    pub fn is_consistent_hash(self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev)
    }
}

/// What of a request is hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// The values of a header.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(HashCookie),
    /// The client's address.
    SourceIp,
    /// The first value of a query parameter, as it stands in the path.
    QueryParameter(Arc<str>),
}

/// A cookie that is hashed and, where `ttl` is set, made for clients without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashCookie {
    /// A token (RFC 6265 4.1.1).
    pub name: Arc<str>,
    /// `Path`; empty: none.
    pub path: Arc<str>,
    /// `Max-Age`; zero: until the browser closes; `None`: never made.
    pub ttl: Option<Duration>,
}

/// Envoy's slow start: weight times `max(minimum, (age / window)^(1 / aggression))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// Time until an endpoint has its full share; above zero.
    pub window: Duration,
    /// Above zero; 1 is a straight line, more starts faster.
    pub aggression: f64,
    /// Share at the start, in percent, 0 to 100.
    pub minimum_percent: u8,
}

/// What Istio's `localityLbSetting` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalityPolicy {
    /// Region, zone and subzone of the waypoint first; then its zone, its region, the
    /// region of `failover`, the rest.
    Failover(Vec<(Arc<str>, Arc<str>)>),
    /// Shares by locality. The first whose `from` matches the waypoint's is used; where
    /// none does, localities do not matter.
    Distribute(Vec<Distribution>),
}

/// Shares of the localities for callers of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution {
    /// Where the waypoint is.
    pub from: LocalityPattern,
    /// Where requests go, with their share.
    pub to: Vec<(LocalityPattern, u32)>,
}

/// `region/zone/subzone`; a part that is `*` or missing matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalityPattern {
    /// Region, zone, subzone; `None`: any.
    pub parts: [Option<Arc<str>>; 3],
}

/// Connections towards endpoints. A limit that is `None` is not set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionPool {
    /// Connections to all endpoints together.
    pub max_connections: Option<NonZeroU32>,
    /// Default 10 s (Istio's `connectTimeout`).
    pub connect_timeout: Duration,
    /// TCP connections without bytes; default 1 h. `None`: for ever.
    pub tcp_idle_timeout: Option<Duration>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<NonZeroU32>,
    /// Requests in flight.
    pub max_requests: Option<NonZeroU32>,
    /// Requests that one connection carries before it is closed.
    pub max_requests_per_connection: Option<NonZeroU32>,
    /// Retries in flight.
    pub max_retries: Option<NonZeroU32>,
    /// Upstream connections without requests; default 1 h. `None`: for ever.
    pub http_idle_timeout: Option<Duration>,
    /// Which HTTP version.
    pub protocol: UpstreamProtocol,
    /// Streams of one HTTP/2 connection.
    pub max_concurrent_streams: Option<NonZeroU32>,
    /// Age at which a connection takes no more requests.
    pub max_connection_duration: Option<Duration>,
}

impl Default for ConnectionPool {
    fn default() -> Self {
        Self {
            max_connections: None,
            connect_timeout: Duration::from_secs(10),
            tcp_idle_timeout: Some(Duration::from_secs(3600)),
            max_pending_requests: None,
            max_requests: None,
            max_requests_per_connection: None,
            max_retries: None,
            http_idle_timeout: Some(Duration::from_secs(3600)),
            protocol: UpstreamProtocol::default(),
            max_concurrent_streams: None,
            max_connection_duration: None,
        }
    }
}

/// Which HTTP version is spoken to endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UpstreamProtocol {
    /// What the port declares.
    #[default]
    Declared,
    /// HTTP/1.1 unless the port declares HTTP/2.
    DoNotUpgrade,
    /// HTTP/2.
    Http2,
    /// What the client spoke.
    Client,
}

/// Which failures eject an endpoint, and for how long (Envoy's outlier detection, with
/// the success-rate detectors off, as Istio has it).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Answers of 500 to 599 in a row; 0: never. Default 5.
    pub consecutive_5xx: u32,
    /// Answers of 502, 503, 504 in a row; 0: never, the default.
    pub consecutive_gateway_errors: u32,
    /// Connections refused, reset or timed out in a row, where
    /// `split_local_origin_errors`; 0: never. Default 5.
    pub consecutive_local_origin_failures: u32,
    /// Failures that are no answer do not count as 5xx and gateway errors.
    pub split_local_origin_errors: bool,
    /// How often the memory of past ejections fades by one. Default 10 s.
    pub interval: Duration,
    /// Length of the first ejection; the nth takes n times as long. Default 30 s.
    pub base_ejection_time: Duration,
    /// Never more than this share is out at once. Default 10: with fewer than ten
    /// endpoints none is ejected, as in Envoy since 1.31.
    pub max_ejection_percent: u8,
    /// See [`TrafficSettings::panic_threshold`]. Default 0.
    pub min_health_percent: u8,
}

impl OutlierDetection {
    /// The longest ejection (Envoy's `max_ejection_time`), unless the base is longer.
    pub const MAX_EJECTION_TIME: Duration = Duration::from_secs(300);
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            consecutive_5xx: 5,
            consecutive_gateway_errors: 0,
            consecutive_local_origin_failures: 5,
            split_local_origin_errors: false,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_percent: 10,
            min_health_percent: 0,
        }
    }
}

/// How many retries may be in flight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryBudget {
    /// Percent of the requests in flight, 0 to 100.
    pub percent: f64,
    /// Allowed always.
    pub min_retries: u32,
}

/// TLS towards an endpoint that is not in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientTls {
    /// Whether, and with which certificate.
    pub mode: TlsMode,
    /// SNI and the name that the certificate must have; empty: the request's host.
    pub sni: Arc<str>,
    /// Names of which the certificate must have one; empty: `sni`.
    pub subject_alt_names: Arc<[Arc<str>]>,
    /// PEM.
    pub ca_certificates: Arc<str>,
    /// The platform's roots.
    pub system_roots: bool,
    /// Any certificate will do.
    pub insecure_skip_verify: bool,
    /// The secret with the certificate that servers are shown; empty: none.
    pub client_secret: Arc<str>,
    /// Connections fail, for this reason.
    pub invalid: Option<Arc<str>>,
}

/// Whether TLS is spoken to an endpoint outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// Not at all.
    #[default]
    Disable,
    /// Yes.
    Simple,
    /// Yes, with a client certificate.
    Mutual,
    /// The tunnel already encrypts.
    IstioMutual,
}

/// The workloads of a subset.
pub type SubsetMembers = HashSet<WorkloadUid>;
