//! What is measured, in order of importance.

use serde::Serialize;

use super::contender::{Contender, Proxy, Way};
use super::setup::Setup;
use super::spec::Protocol;

/// One situation, in which several contenders are compared.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    #[serde(skip)]
    pub(super) setup: Setup,
    pub(super) protocol: Protocol,
    pub(super) connections: usize,
    /// Requests at a time on each connection.
    pub(super) streams: usize,
    /// Bytes of each answer.
    pub(super) body: usize,
    /// Routes change a hundred times a second.
    pub(super) churn: bool,
    /// Requests come at a rate, half of what Envoy can take on the same way.
    pub(super) open_loop: bool,
    pub(super) contenders: &'static [Contender],
}

/// The one that limits are set for.
pub(super) const MAIN: &str = "HTTP/1.1, 64 connections, 100 routes";
/// The one that latencies are compared in.
pub(super) const OPEN_LOOP: &str = "HTTP/1.1, 64 connections, at half of Envoy's rate";

const NGINX: Contender = Contender::new(Proxy::Nginx, Way::Plain);
const HAPROXY: Contender = Contender::new(Proxy::Haproxy, Way::Plain);
const ENVOY: Contender = Contender::new(Proxy::Envoy, Way::Plain);
const ENVOY_IN: Contender = Contender::new(Proxy::Envoy, Way::In);
const ENVOY_BOTH: Contender = Contender::new(Proxy::Envoy, Way::Both);
const ADIT_ALONE: Contender = Contender::new(Proxy::Adit, Way::InAlone);
const ADIT_IN: Contender = Contender::new(Proxy::Adit, Way::In);
const ADIT_BOTH: Contender = Contender::new(Proxy::Adit, Way::Both);

const ALL: &[Contender] = &[
    NGINX, HAPROXY, ENVOY, ADIT_ALONE, ENVOY_IN, ADIT_IN, ENVOY_BOTH, ADIT_BOTH,
];
const SHORT: &[Contender] = &[NGINX, HAPROXY, ENVOY, ADIT_IN, ENVOY_BOTH, ADIT_BOTH];
const MESH: &[Contender] = &[ENVOY_BOTH, ADIT_BOTH];

const USUAL: Setup = Setup {
    routes: 100,
    policies: 0,
    http2: false,
};
const HTTP2: Setup = Setup {
    http2: true,
    ..USUAL
};

/// All of them; those of one setup stand together.
pub(super) fn all() -> Vec<Scenario> {
    let plain = |name, connections, contenders| Scenario {
        name,
        setup: USUAL,
        protocol: Protocol::Http1,
        connections,
        streams: 1,
        body: 0,
        churn: false,
        open_loop: false,
        contenders,
    };
    let on = |setup, name| Scenario {
        setup,
        ..plain(name, 64, SHORT)
    };
    let http2 = |protocol, name| Scenario {
        protocol,
        connections: 8,
        streams: 8,
        ..on(HTTP2, name)
    };
    let routes = |routes| Setup { routes, ..USUAL };
    vec![
        plain(MAIN, 64, ALL),
        Scenario {
            open_loop: true,
            ..plain(OPEN_LOOP, 64, SHORT)
        },
        plain("HTTP/1.1, 16 connections", 16, SHORT),
        plain("HTTP/1.1, 1 connection", 1, SHORT),
        plain("HTTP/1.1, 512 connections", 512, SHORT),
        Scenario {
            body: 64 << 10,
            ..plain("HTTP/1.1, 64 connections, 64 KiB bodies", 64, SHORT)
        },
        Scenario {
            churn: true,
            ..plain("HTTP/1.1, 64 connections, 100 changes/s", 64, MESH)
        },
        http2(Protocol::Http2, "HTTP/2, 8 connections of 8 streams"),
        http2(Protocol::Grpc, "gRPC unary, 8 connections of 8 streams"),
        on(routes(1), "HTTP/1.1, 64 connections, 1 route"),
        on(routes(5000), "HTTP/1.1, 64 connections, 5,000 routes"),
        on(
            Setup {
                policies: 10_000,
                ..USUAL
            },
            "HTTP/1.1, 64 connections, 10,000 policies",
        ),
    ]
}
