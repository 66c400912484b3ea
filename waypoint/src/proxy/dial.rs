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
use super::upstream::{Connecting, Origin, open_tcp};
use crate::balance::PickRequest;
use crate::client::Dial;
use crate::worker::Worker;

/// For a name, and for a connection to what it stands for.
const DEADLINE: Duration = Duration::from_secs(5);

/// Dials in the name of a worker, as long as that lives.
pub struct Dialer(Weak<Worker>);

impl Dialer {
    /// For `worker`.
    pub fn new(worker: &Rc<Worker>) -> Self {
        Self(Rc::downgrade(worker))
    }
}

impl Dial for Dialer {
    type Io = TokioIo<Io>;

    async fn dial(&self, to: &ProviderService) -> io::Result<Self::Io> {
        let worker = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let port = u16::try_from(to.port).map_err(|_| io::ErrorKind::InvalidInput)?;
        let known = {
            let view = worker.shared.state.load();
            let namespace = &view.gateway().namespace;
            let entry = view.model().service_by_hostname(&to.hostname, namespace);
            let service = entry.and_then(|entry| view.service(&entry.service().key));
            service.and_then(|service| Some(service.port(port)?.backend.clone()))
        };
        let io = match known {
            Some(backend) => {
                let picked = Choice::Backend(backend).pick(&PickRequest::default());
                let picked = picked.map_err(|(_, error)| io::Error::other(error))?;
                let endpoint = picked.reach.endpoint.clone();
                let connecting = Connecting::default();
                let config = &worker.shared.config;
                let own = Origin {
                    address: SocketAddr::new(config.ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), 0),
                    identity: config.identity.clone(),
                };
                let opening = Box::pin(open_tcp(&worker, &endpoint, Some(&own), None, &connecting));
                opening.await.map_err(io::Error::other)?.io
            }
            None => {
                let connecting = async {
                    let mut last = io::ErrorKind::NotFound.into();
                    for address in lookup_host((&*to.hostname, port)).await? {
                        match TcpStream::connect(address).await {
                            Ok(stream) => return Ok(stream),
                            Err(error) => last = error,
                        }
                    }
                    Err(last)
                };
                let connected = timeout(DEADLINE, connecting).await;
                Io::tcp(connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?)
            }
        };
        Ok(TokioIo::new(io))
    }
}
