//! Who is measured, and over which way.

use std::net::SocketAddr;

use anyhow::{Context, bail, ensure};
use serde::{Serialize, Serializer};

use super::generator::{Probe, probe};
use super::ground::{Ground, HostId, Process};
use super::setup::{PLAIN_PORT, SECURE, Setup, WEB};
use super::spec::{Hbone, LoadSpec, Protocol, path};
use super::waypoint::Waypoint;
use super::{envoy, peers, waypoint};

/// A proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Proxy {
    Nginx,
    Haproxy,
    Envoy,
    Adit,
}

/// How requests come in and go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// Plaintext in, plaintext out.
    Plain,
    /// HBONE in, plaintext out; 16 client connections share an HBONE connection.
    In,
    /// The same, but each client connection has an HBONE connection to itself: as many
    /// connections come in as with [`Way::Plain`], and each has TLS and HTTP/2 around it. What
    /// a waypoint would take in plaintext cannot be more.
    InAlone,
    /// HBONE in, HBONE out.
    Both,
}

/// A proxy, one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Contender {
    pub(super) proxy: Proxy,
    pub(super) way: Way,
}

impl Contender {
    pub(super) const fn new(proxy: Proxy, way: Way) -> Self {
        Self { proxy, way }
    }

    pub(super) fn name(self) -> String {
        let proxy = match self.proxy {
            Proxy::Nginx => "nginx",
            Proxy::Haproxy => "HAProxy",
            Proxy::Envoy => "Envoy",
            Proxy::Adit => "Adit",
        };
        let way = match self.way {
            Way::Plain => "plain",
            Way::In => "HBONE in",
            Way::InAlone => "HBONE in, one connection each",
            Way::Both => "HBONE in and out",
        };
        format!("{proxy}, {way}")
    }
}

impl Serialize for Contender {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name())
    }
}

/// The processes of one setup.
pub(super) struct Proxies {
    nginx: anyhow::Result<Process>,
    haproxy: anyhow::Result<Process>,
    envoy: anyhow::Result<Process>,
    envoy_waypoint: anyhow::Result<Process>,
    adit: anyhow::Result<Waypoint>,
}

impl Proxies {
    /// Starts those that are asked for. One that cannot be started says so when it is used.
    pub(super) fn start(ground: &Ground, setup: Setup, wanted: &[Contender]) -> Self {
        let plain = |proxy| wanted.contains(&Contender::new(proxy, Way::Plain));
        let hbone = |proxy| {
            wanted
                .iter()
                .any(|contender| contender.proxy == proxy && contender.way != Way::Plain)
        };
        Self {
            nginx: start(plain(Proxy::Nginx), || peers::nginx(ground, setup)),
            haproxy: start(plain(Proxy::Haproxy), || peers::haproxy(ground, setup)),
            envoy: start(plain(Proxy::Envoy), || envoy::plain(ground, setup)),
            envoy_waypoint: start(hbone(Proxy::Envoy), || envoy::waypoint(ground, setup)),
            adit: start(hbone(Proxy::Adit), || Waypoint::start(ground, setup)),
        }
    }

    pub(super) fn process(&self, contender: Contender) -> anyhow::Result<&Process> {
        let process = match (contender.proxy, contender.way) {
            (Proxy::Nginx, _) => self.nginx.as_ref(),
            (Proxy::Haproxy, _) => self.haproxy.as_ref(),
            (Proxy::Envoy, Way::Plain) => self.envoy.as_ref(),
            (Proxy::Envoy, _) => self.envoy_waypoint.as_ref(),
            (Proxy::Adit, _) => self.adit.as_ref().map(|adit| &adit.process),
        };
        process.map_err(|error| anyhow::anyhow!("{error:#}"))
    }
}

fn start<T>(wanted: bool, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    match wanted {
        true => start(),
        false => bail!("not asked for"),
    }
}

/// The load `load` as this contender gets it.
pub(super) fn aim(ground: &Ground, contender: Contender, load: &LoadSpec) -> LoadSpec {
    let service = match contender.way {
        Way::Both => SECURE,
        _ => WEB,
    };
    let host = |id| ground.address(id, PLAIN_PORT);
    let target: SocketAddr = match (contender.proxy, contender.way) {
        (Proxy::Nginx, Way::Plain) => host(HostId::Nginx),
        (Proxy::Haproxy, Way::Plain) => host(HostId::Haproxy),
        (Proxy::Envoy, Way::Plain) => host(HostId::Envoy),
        _ => service.address(),
    };
    let entrance = match contender.proxy {
        Proxy::Adit => waypoint::address(ground),
        _ => ground.address(HostId::EnvoyWaypoint, 15008),
    };
    let hbone = |share| Hbone {
        waypoint: entrance,
        share,
        ca: ground.ca(),
    };
    LoadSpec {
        target,
        hbone: match contender.way {
            Way::Plain => None,
            Way::InAlone => Some(hbone(1)),
            Way::In | Way::Both => Some(hbone(16)),
        },
        host: service.host(),
        ..load.clone()
    }
}

/// Whether a contender does what all have to do: routes by path, rules that deny, 404.
///
/// # Errors
/// What it does differently.
pub(super) fn verify(
    ground: &Ground,
    proxies: &Proxies,
    contender: Contender,
    setup: Setup,
    protocol: Protocol,
) -> anyhow::Result<()> {
    let process = proxies.process(contender)?;
    let load = LoadSpec {
        target: SocketAddr::from(([0, 0, 0, 0], 0)),
        hbone: None,
        protocol,
        connections: 1,
        streams: 1,
        host: String::new(),
        routes: setup.routes,
        body: 0,
        seconds: 0.0,
        rate: None,
    };
    let load = aim(ground, contender, &load);
    let last = setup.routes.saturating_sub(1);
    let answer = |status, route: String| Probe { status, route };
    let refused =
        |path: &str, method: &'static str| (method, path.to_owned(), answer(403, String::new()));
    let mut expected = vec![
        ("GET", path(last, 0), answer(200, format!("r{last}"))),
        ("GET", path(0, 5), answer(200, "r0".into())),
        ("GET", "/nowhere".into(), answer(404, String::new())),
        refused("/admin/users", "GET"),
        refused(&path(last, 0), "DELETE"),
    ];
    expected.extend(
        setup
            .denied_paths()
            .last()
            .map(|path| refused(&path, "GET")),
    );
    // Its configuration may be on the way still.
    let settled = process.wait("routes", || {
        let (method, path, answer) = &expected[0];
        probe(&load, method, path).is_ok_and(|probe| probe == *answer)
    });
    for (method, path, answer) in &expected {
        let got = probe(&load, method, path).with_context(|| format!("{method} {path}"))?;
        ensure!(
            got == *answer,
            "{method} {path}: {got:?} instead of {answer:?}"
        );
    }
    settled
}
