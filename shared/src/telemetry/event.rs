//! The vocabulary: what can happen, and what is known of a connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::identity::SpiffeId;
use crate::model::{Service, Workload};

/// Everything that metrics, access log and other listeners are told.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A connection's way is decided; bytes may flow.
    ConnectionOpened {
        /// Which.
        connection: &'a ConnectionInfo,
    },
    /// An opened connection ended.
    ConnectionClosed {
        /// Which.
        connection: &'a ConnectionInfo,
        /// What it carried.
        totals: Totals,
        /// How it ended, if not well.
        failure: Option<Failure<'a>>,
    },
    /// A connection was refused before its way was decided: by policy, for lack of an
    /// endpoint, or because the peer did not answer.
    ConnectionFailed {
        /// What is known of it.
        connection: &'a ConnectionInfo,
        /// How long it was tried.
        duration: Duration,
        /// Why.
        failure: Failure<'a>,
    },
    /// A TLS handshake of a tunnel succeeded.
    HandshakeCompleted {
        /// Client (source) or server (destination) of the handshake.
        reporter: Reporter,
        /// TCP connect not included.
        duration: Duration,
    },
    /// A TLS handshake of a tunnel failed.
    HandshakeFailed {
        /// Client (source) or server (destination) of the handshake.
        reporter: Reporter,
    },
    /// A tunnel (an HBONE connection) was opened.
    TunnelOpened {
        /// Client (source) or server (destination) side.
        reporter: Reporter,
    },
    /// A tunnel ended.
    TunnelClosed {
        /// Client (source) or server (destination) side.
        reporter: Reporter,
        /// How many connections it has carried.
        streams: u64,
    },
    /// A peer spoke HBONE wrongly; the connection or stream was refused.
    InboundRejected {
        /// The TCP peer.
        peer: SocketAddr,
        /// What was wrong.
        reason: Rejection,
    },
    /// The system had no descriptor or memory for a connection; it waits in the backlog.
    AcceptFailed,
    /// A listener had as many connections as it may; others wait in the backlog.
    ListenerFull,
    /// A connect to an endpoint failed and another endpoint is tried.
    EndpointRetried,
    /// A connection that has to pass a waypoint could not, and was ended.
    WaypointFailed {
        /// Why, as a metric label.
        reason: &'static str,
        /// How its client was told, as a metric label.
        told: &'static str,
    },
    /// A message of the control plane arrived.
    XdsMessage {
        /// Type URL of its resources.
        type_url: &'a str,
        /// Its size.
        bytes: usize,
    },
    /// The stream to the control plane ended.
    XdsTerminated {
        /// Why.
        reason: TerminationReason,
    },
    /// Something was put right that had been changed behind our back: a rule, a route,
    /// a map.
    RedirectionRepaired {
        /// What, as a metric label.
        kind: &'static str,
    },
    /// The control plane did not take a report of what is enrolled.
    ReportFailed {
        /// It said no; otherwise it could not be asked.
        refused: bool,
    },
    /// Listeners and capture of a pod are in place.
    ProxyStarted,
    /// A pod was released.
    ProxyStopped,
}

/// Who hears of events. Called on the workers: must neither block nor take long.
pub trait EventSink: Send + Sync {
    /// `event` has just happened.
    fn on_event(&self, event: &Event<'_>);
}

/// Which end of a connection reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
    /// A waypoint between the two.
    Waypoint,
}

impl Reporter {
    /// Every reporter, in the order of their discriminants.
    pub(super) const ALL: [Self; 3] = [Self::Source, Self::Destination, Self::Waypoint];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// How a connection is secured between the proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecurityPolicy {
    /// HBONE: both ends are verified.
    MutualTls,
    /// Plaintext.
    Unknown,
}

impl SecurityPolicy {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a connection failed, as Istio's `response_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFlag {
    /// It did not fail.
    None,
    /// A policy denied it.
    Denied,
    /// The other end could not be reached.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The HTTP/2 handshake failed.
    Http2Handshake,
    /// Probably a NetworkPolicy drops port 15008.
    NetworkPolicy,
    /// No certificate, or the peer is not who was expected.
    IdentityError,
    /// The peer's certificate is revoked.
    CertificateRevoked,
}

impl ResponseFlag {
    /// Every flag, in the order of their discriminants.
    pub(super) const ALL: [Self; 8] = [
        Self::None,
        Self::Denied,
        Self::Connect,
        Self::TlsFailure,
        Self::Http2Handshake,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertificateRevoked,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::Http2Handshake => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertificateRevoked => "CERT_REVOKED",
        }
    }
}

/// How a connection failed.
#[derive(Clone, Copy)]
pub struct Failure<'a> {
    /// The kind, for metrics.
    pub flag: ResponseFlag,
    /// The reason, for people; rendered only if somebody reads it.
    pub error: &'a dyn std::fmt::Display,
}

impl std::fmt::Debug for Failure<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.flag.as_str(), self.error)
    }
}

/// What a connection carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Bytes from client to server.
    pub request_bytes: u64,
    /// Bytes from server to client.
    pub response_bytes: u64,
    /// From open to close.
    pub duration: Duration,
}

/// What a peer did wrong on an inbound listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// Not CONNECT.
    Method,
    /// The authority is missing or not `address:port`.
    Authority,
    /// The authority is not an address of this pod.
    ForeignAuthority,
    /// More headers than we take.
    Headers,
    /// The TLS or HTTP/2 handshake, or the request, took too long.
    Timeout,
    /// No HTTP/2, or a breach of it.
    Protocol,
    /// More connections or streams than we take.
    Overload,
    /// A destination that leads back to us.
    Loop,
}

impl Rejection {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::Authority => "authority",
            Self::ForeignAuthority => "foreign_authority",
            Self::Headers => "headers",
            Self::Timeout => "timeout",
            Self::Protocol => "protocol",
            Self::Overload => "overload",
            Self::Loop => "loop",
        }
    }
}

/// Why the stream to the control plane ended, by Istio's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TerminationReason {
    /// It could not be opened.
    ConnectionError,
    /// It failed.
    Error,
    /// It was opened anew on purpose.
    Reconnect,
    /// The control plane ended it in good order.
    Complete,
}

impl TerminationReason {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// The telemetry names of a workload. Empty is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct WorkloadLabels {
    /// Name of the owning Deployment or the like.
    pub workload: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Canonical service name; also the `app` label.
    pub canonical_service: Arc<str>,
    /// Canonical revision; also the `version` label.
    pub canonical_revision: Arc<str>,
    /// Cluster id.
    pub cluster: Arc<str>,
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// The identity that the connection proved; `None` on plaintext, where it would
    /// only be a belief.
    pub principal: Option<SpiffeId>,
}

impl From<&Workload> for WorkloadLabels {
    fn from(workload: &Workload) -> Self {
        Self {
            workload: workload.workload_name.clone(),
            namespace: workload.namespace.clone(),
            canonical_service: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            cluster: workload.cluster_id.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
            principal: None,
        }
    }
}

/// The telemetry names of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceLabels {
    /// Fully qualified host name (`destination_service`).
    pub hostname: Arc<str>,
    /// Short name (`destination_service_name`).
    pub name: Arc<str>,
    /// Namespace (`destination_service_namespace`).
    pub namespace: Arc<str>,
}

impl From<&Service> for ServiceLabels {
    fn from(service: &Service) -> Self {
        Self {
            hostname: service.key.hostname.clone(),
            name: service.name.clone(),
            namespace: service.key.namespace.clone(),
        }
    }
}

/// What distinguishes one TCP series from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Which end reports.
    pub reporter: Reporter,
    /// How it is secured.
    pub security: SecurityPolicy,
    /// The client.
    pub source: WorkloadLabels,
    /// The server.
    pub destination: WorkloadLabels,
    /// The service that the client addressed.
    pub service: Option<ServiceLabels>,
}

/// What is known of a connection once its way is decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The client's address.
    pub source_address: SocketAddr,
    /// The client's pod name; empty: unknown.
    pub source_name: Arc<str>,
    /// Where the proxy connects to: with HBONE, the peer's port 15008.
    pub destination_address: SocketAddr,
    /// The server's pod name; empty: unknown.
    pub destination_name: Arc<str>,
    /// With HBONE, the `:authority`: what the client wanted to reach.
    pub hbone_authority: Option<Arc<str>>,
    /// Whom the client speaks for, where it is a waypoint that serves the server.
    pub origin: Option<Box<Origin>>,
    /// What the metrics distinguish.
    pub labels: TcpLabels,
}

/// The caller behind a waypoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Its address; the port is 0 where the connection carries what several of its connections
    /// have sent.
    pub address: SocketAddr,
    /// Who it is, by the word of the waypoint.
    pub identity: SpiffeId,
}

impl ConnectionInfo {
    /// A plaintext connection of which nothing but the addresses is known.
    pub fn new(reporter: Reporter, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            source_address: source,
            source_name: Arc::default(),
            destination_address: destination,
            destination_name: Arc::default(),
            hbone_authority: None,
            origin: None,
            labels: TcpLabels {
                reporter,
                security: SecurityPolicy::Unknown,
                source: WorkloadLabels::default(),
                destination: WorkloadLabels::default(),
                service: None,
            },
        }
    }

    /// Sets what is known of the client's workload, but not its identity.
    pub fn with_source(mut self, workload: &Workload) -> Self {
        self.source_name = workload.name.clone();
        let principal = self.labels.source.principal.take();
        self.labels.source = WorkloadLabels {
            principal,
            ..workload.into()
        };
        self
    }

    /// Sets what is known of the server's workload, but not its identity.
    pub fn with_destination(mut self, workload: &Workload) -> Self {
        self.destination_name = workload.name.clone();
        let principal = self.labels.destination.principal.take();
        self.labels.destination = WorkloadLabels {
            principal,
            ..workload.into()
        };
        self
    }

    /// Sets whom the client speaks for.
    pub fn with_origin(self, origin: Option<Box<Origin>>) -> Self {
        Self { origin, ..self }
    }

    /// Sets the service that the client addressed.
    pub fn with_service(mut self, service: &Service) -> Self {
        self.labels.service = Some(service.into());
        self
    }

    /// Marks the connection as tunnelled with both ends verified.
    pub fn with_mutual_tls(
        mut self,
        source: SpiffeId,
        destination: SpiffeId,
        authority: Arc<str>,
    ) -> Self {
        self.labels.security = SecurityPolicy::MutualTls;
        self.labels.source.principal = Some(source);
        self.labels.destination.principal = Some(destination);
        self.hbone_authority = Some(authority);
        self
    }
}
