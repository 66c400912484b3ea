//! What is configured alike at every proxy: routes by path prefix, each of which names itself
//! in a header towards the upstream, rules that deny, an access log.

use std::net::{Ipv4Addr, SocketAddr};

use super::spec::UpstreamSpec;

/// Where proxies that take plaintext listen.
pub(super) const PLAIN_PORT: u16 = 8000;
/// Port of the services.
pub(super) const SERVICE_PORT: u16 = 80;
/// Service whose pod is outside of the mesh.
pub(super) const WEB: Service = Service {
    name: "web",
    vip: Ipv4Addr::new(10, 96, 200, 1),
};
/// Service whose pod is reached over HBONE.
pub(super) const SECURE: Service = Service {
    name: "secure",
    vip: Ipv4Addr::new(10, 96, 200, 2),
};

/// A service behind a waypoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Service {
    pub(super) name: &'static str,
    pub(super) vip: Ipv4Addr,
}

impl Service {
    pub(super) fn address(self) -> SocketAddr {
        (self.vip, SERVICE_PORT).into()
    }

    pub(super) fn host(self) -> String {
        format!("{}.bench.svc.cluster.local", self.name)
    }
}

/// The configuration of all proxies for some scenarios.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setup {
    /// Routes of each service.
    pub(super) routes: usize,
    /// Policies beyond the one with two rules; each denies one path that nobody asks for.
    pub(super) policies: usize,
    /// The services speak HTTP/2, otherwise HTTP/1.1.
    pub(super) http2: bool,
}

impl Setup {
    pub(super) fn upstream_port(self) -> u16 {
        match self.http2 {
            true => UpstreamSpec::HTTP2,
            false => UpstreamSpec::HTTP1,
        }
    }

    pub(super) fn denied_paths(self) -> impl Iterator<Item = String> {
        (0..self.policies).map(|n| format!("/denied/p{n}"))
    }
}
