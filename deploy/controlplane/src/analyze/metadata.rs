//! Labels and annotations of ours: unknown, misplaced, with values that mean nothing.

use super::Report;
use crate::compile::{DATAPLANE_MODE, go_bool};
use crate::model::{At, Code, Kind, Meta, Objects, Severity};
use crate::status::REDIRECTION;

/// Annotations under `istio.io` that mean something somewhere.
const KNOWN: &[&str] = &[
    REDIRECTION,
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
    "ambient.istio.io/waypoint-inbound-binding",
    "ambient.istio.io/xfcc-include-client-identity",
    "galley.istio.io/analyze-suppress",
    "gateway.istio.io/controller-version",
    "gateway.istio.io/name-override",
    "gateway.istio.io/service-account",
    "istio.io/autoRegistrationGroup",
    "istio.io/connect-strategy",
    "istio.io/dry-run",
    "istio.io/reroute-virtual-interfaces",
    "istio.io/use-waypoint-canary-weight",
    "networking.istio.io/exportTo",
    "networking.istio.io/service-type",
    "networking.istio.io/traffic-distribution",
];
/// Sidecars' own; they are many, and mean nothing to this mesh.
const KNOWN_PREFIXES: &[&str] = &[
    "sidecar.istio.io/",
    "proxy.istio.io/",
    "traffic.sidecar.istio.io/",
    "inject.istio.io/",
    "prometheus.istio.io/",
    "readiness.status.sidecar.istio.io/",
    "status.sidecar.istio.io/",
];

pub(super) fn check(objects: &Objects, report: &mut Report) {
    for node in objects.nodes.values() {
        check_annotations(Kind::Node, &node.meta, report);
    }
    for of in objects.namespaces.values() {
        if let Some(namespace) = &of.namespace {
            check_annotations(Kind::Namespace, &namespace.meta, report);
            check_mode(Kind::Namespace, &namespace.meta, report);
        }
        for pod in of.pods.values() {
            check_annotations(Kind::Pod, &pod.meta, report);
            check_mode(Kind::Pod, &pod.meta, report);
        }
        let services = of.services.values().map(|o| (Kind::Service, &o.meta));
        let accounts = of.service_accounts.values();
        let accounts = accounts.map(|o| (Kind::ServiceAccount, &o.meta));
        let policies = of.authorization_policies.values();
        let policies = policies.map(|o| (Kind::AuthorizationPolicy, &o.meta));
        let peers = of.peer_authentications.values();
        let peers = peers.map(|o| (Kind::PeerAuthentication, &o.meta));
        let gateways = of.gateways.values().map(|o| (Kind::Gateway, &o.meta));
        let http = of.http_routes.values().map(|o| (Kind::HttpRoute, &o.meta));
        let grpc = of.grpc_routes.values().map(|o| (Kind::GrpcRoute, &o.meta));
        let tls = of.tls_routes.values().map(|o| (Kind::TlsRoute, &o.meta));
        let tcp = of.tcp_routes.values().map(|o| (Kind::TcpRoute, &o.meta));
        let older = services.chain(accounts).chain(policies).chain(peers);
        let routes = http.chain(grpc).chain(tls).chain(tcp);
        for (kind, meta) in older.chain(gateways).chain(routes) {
            check_annotations(kind, meta, report);
        }
    }
}

fn check_annotations(kind: Kind, meta: &Meta, report: &mut Report) {
    let metadata = At::ROOT.key("metadata");
    let list = metadata.key("annotations");
    for (key, value) in &meta.annotations {
        let path = list.key(key).path();
        let boolean = matches!(
            key.as_str(),
            "ambient.istio.io/bypass-inbound-capture" | "ambient.istio.io/dns-capture"
        );
        if key == REDIRECTION {
            report.add(
                (kind, meta),
                path,
                Severity::Warning,
                Code::MisplacedAnnotation,
                "is written by the mesh and ignored in manifests; the label istio.io/dataplane-mode opts in".into(),
            );
        } else if boolean && go_bool(value).is_none() {
            report.add(
                (kind, meta),
                path,
                Severity::Warning,
                Code::InvalidAnnotation,
                format!("{value:?} is neither \"true\" nor \"false\" and has no effect"),
            );
        } else if !KNOWN.contains(&key.as_str())
            && !KNOWN_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
        {
            report.add(
                (kind, meta),
                path,
                Severity::Warning,
                Code::UnknownAnnotation,
                "is not an annotation that the mesh knows".into(),
            );
        }
    }
}

fn check_mode(kind: Kind, meta: &Meta, report: &mut Report) {
    match meta.label(DATAPLANE_MODE) {
        None | Some("ambient" | "none") => {}
        Some(value) => {
            let metadata = At::ROOT.key("metadata");
            let labels = metadata.key("labels");
            report.add(
                (kind, meta),
                labels.key(DATAPLANE_MODE).path(),
                Severity::Warning,
                Code::InvalidAnnotation,
                format!("{value:?} is neither \"ambient\" nor \"none\" and has no effect"),
            );
        }
    }
}
