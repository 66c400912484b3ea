//! A request for tests.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::telemetry::{ServiceLabels, WorkloadLabels};
use http::{HeaderMap, Method};

use super::event::{Peer, Protocol, RequestEvent, ResponseFlags, Traffic};
use super::trace::TraceContext;

/// What a [`RequestEvent`] borrows.
pub(super) struct Sample {
    pub method: Method,
    pub authority: String,
    pub path: String,
    pub request_headers: HeaderMap,
    pub response_headers: HeaderMap,
    pub status: u16,
    pub grpc_status: Option<u32>,
    pub protocol: Protocol,
    pub flags: ResponseFlags,
    pub details: String,
    pub source: Peer,
    pub destination: Option<Peer>,
    pub service: Option<Arc<ServiceLabels>>,
    pub trace: TraceContext,
    pub duration: Duration,
    pub traffic: Traffic,
}

impl Sample {
    pub(super) fn new() -> Self {
        let workload = |name: &str| WorkloadLabels {
            workload: name.into(),
            namespace: "shop".into(),
            canonical_service: name.into(),
            canonical_revision: "v1".into(),
            cluster: "Kubernetes".into(),
            principal: format!("spiffe://cluster.local/ns/shop/sa/{name}")
                .parse()
                .ok(),
            ..WorkloadLabels::default()
        };
        Self {
            method: Method::GET,
            authority: "reviews.shop".into(),
            path: "/reviews/1?full=yes".into(),
            request_headers: HeaderMap::new(),
            response_headers: HeaderMap::new(),
            status: 200,
            grpc_status: None,
            protocol: Protocol::Http11,
            flags: ResponseFlags::NONE,
            details: "via_upstream".into(),
            source: Arc::new(workload("productpage")),
            destination: Some(Arc::new(workload("reviews"))),
            service: Some(Arc::new(ServiceLabels {
                hostname: "reviews.shop.svc.cluster.local".into(),
                name: "reviews".into(),
                namespace: "shop".into(),
            })),
            trace: TraceContext {
                trace_id: [0xab; 16],
                span_id: [0xcd; 8],
                parent_id: None,
                sampled: true,
            },
            duration: Duration::from_millis(12),
            traffic: Traffic {
                request_bytes: 3,
                response_bytes: 1_200,
                ..Traffic::default()
            },
        }
    }

    pub(super) fn event(&self) -> RequestEvent<'_> {
        RequestEvent {
            started: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            duration: self.duration,
            upstream_time: Some(Duration::from_millis(11)),
            protocol: self.protocol,
            method: &self.method,
            authority: &self.authority,
            path: &self.path,
            request_headers: &self.request_headers,
            response_headers: &self.response_headers,
            status: self.status,
            grpc_status: self.grpc_status,
            flags: self.flags,
            details: &self.details,
            upstream_failure: "",
            traffic: self.traffic,
            source: &self.source,
            destination: self.destination.as_ref(),
            service: self.service.as_ref(),
            route_name: "shop/reviews.0",
            upstream_cluster: "outbound|80||reviews.shop.svc.cluster.local",
            upstream_host: "10.244.1.5:8080".parse().ok(),
            upstream_local: "10.244.1.9:40000".parse().ok(),
            downstream_local: "10.96.0.7:80".parse().ok(),
            downstream_remote: "10.244.2.3:51234".parse().ok(),
            retries: 0,
            policy: None,
            trace: &self.trace,
        }
    }
}
