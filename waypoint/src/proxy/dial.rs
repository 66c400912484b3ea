//! How the waypoint reaches services that it asks itself: as it reaches endpoints, so that one
//! in the mesh is spoken to over HBONE; by DNS where the mesh does not know the name.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::{Rc, Weak};
use std::time::Duration;

use adit_shared::proto::waypoint::ProviderService;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::io::Io;
use super::pick::Choice;
use super::routing;
use super::upstream::{Connecting, HttpVersion, Origin, open_tcp};
use crate::balance::PickRequest;
use crate::client::Dial;
use crate::route::Target;
use crate::worker::Worker;

/// For a name, and for a connection to what it stands for.
const DEADLINE: Duration = Duration::from_secs(5);

/// Endpoints that are tried for one connection.
const ENDPOINTS: usize = 3;

/// Dials in the name of a worker, as long as that lives.
pub struct Dialer {
    worker: Weak<Worker>,
    backend: Option<(Target, HttpVersion)>,
}

impl Dialer {
    /// For `worker`, to services by their names.
    pub fn new(worker: &Rc<Worker>) -> Self {
        Self {
            worker: Rc::downgrade(worker),
            backend: None,
        }
    }

    /// For `worker`, to that one backend, which is spoken to so. What the mesh does not know
    /// any more is nowhere then: names mean nothing here.
    pub fn to_backend(worker: &Rc<Worker>, target: Target, version: HttpVersion) -> Self {
        Self {
            worker: Rc::downgrade(worker),
            backend: Some((target, version)),
        }
    }
}

impl Dial for Dialer {
    type Io = TokioIo<Io>;

    async fn dial(&self, to: &ProviderService) -> io::Result<Self::Io> {
        let worker = self.worker.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let io = match &self.backend {
            Some((target, version)) => {
                let known = routing::resolve(&worker.shared.state.load(), target);
                let (choice, _) = known.map_err(|reply| io::Error::other(reply.reason))?;
                Box::pin(connect(&worker, &choice, Some(*version))).await?
            }
            None => {
                let port = u16::try_from(to.port).map_err(|_| io::ErrorKind::InvalidInput)?;
                let known = {
                    let view = worker.shared.state.load();
                    let namespace = &view.gateway().namespace;
                    let entry = view.model().service_by_hostname(&to.hostname, namespace);
                    let service = entry.and_then(|entry| view.service(&entry.service().key));
                    service.and_then(|service| Some(service.port(port)?.backend.clone()))
                };
                match known {
                    Some(backend) => {
                        let choice = Choice::Backend(backend);
                        Box::pin(connect(&worker, &choice, None)).await?
                    }
                    None => by_name(&to.hostname, port).await?,
                }
            }
        };
        Ok(TokioIo::new(io))
    }
}

/// Connects to an endpoint, and to another one when that fails.
async fn connect(
    worker: &Rc<Worker>,
    choice: &Choice,
    version: Option<HttpVersion>,
) -> io::Result<Io> {
    let config = &worker.shared.config;
    let own = Origin {
        address: SocketAddr::new(config.ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), 0),
        identity: config.identity.clone(),
    };
    let connecting = Connecting::default();
    let mut tried = Vec::new();
    loop {
        let picked = choice.pick(&PickRequest {
            tried: &tried,
            ..PickRequest::default()
        });
        let picked = picked.map_err(|(_, error)| io::Error::other(error))?;
        let endpoint = picked.reach.endpoint.clone();
        match open_tcp(worker, &endpoint, Some(&own), version, &connecting).await {
            Ok(connected) => return Ok(connected.io),
            Err(error) if tried.len() + 1 >= ENDPOINTS || tried.contains(&endpoint.uid) => {
                return Err(io::Error::other(error));
            }
            Err(_) => tried.push(endpoint.uid.clone()),
        }
    }
}

/// Connects to what DNS says of a name.
async fn by_name(hostname: &str, port: u16) -> io::Result<Io> {
    let connecting = async {
        let mut last = io::ErrorKind::NotFound.into();
        for address in lookup_host((hostname, port)).await? {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    let connected = timeout(DEADLINE, connecting).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    connected.map(Io::tcp)
}
