//! Where a connection goes that a workload opens (Istio's order of decisions):
//!
//! 1. The destination is a service's virtual address, a workload's address, or inside
//!    a service's block, in this order.
//! 2. A service with a waypoint: HBONE to the waypoint, for the address as dialled.
//! 3. A service that passes through, or nothing known: plain, as dialled.
//! 4. A service without waypoint: one of its endpoints; none: no upstream.
//! 5. A workload with a waypoint that is not the caller itself: HBONE to the waypoint.
//! 6. A workload that speaks HBONE: HBONE to it; one that does not: plain.
//!
//! A waypoint that is named but cannot be found is an error, never a reason to go
//! around it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use super::balance::Drawn;
use super::snapshot::{ServiceEntry, Snapshot};
use super::types::{
    GatewayAddress, GatewayDestination, IpFamilies, LoadBalancingMode, Service, TunnelProtocol,
    Workload, WorkloadUid,
};
use crate::identity::SpiffeId;

/// Where pods listen for HBONE.
pub const HBONE_PORT: u16 = 15008;

/// What to do with a connection.
#[derive(Debug, Clone)]
#[must_use]
pub enum Outbound {
    /// mTLS and CONNECT.
    Hbone(Hbone),
    /// Plain TCP to a known workload.
    Plain(Plain),
    /// Plain TCP to the original destination, about which nothing is known or which
    /// asks to be left alone.
    Passthrough {
        /// The service that asks to be left alone.
        service: Option<Arc<Service>>,
    },
    /// There is nothing to connect to; close the connection.
    Unavailable {
        /// Why.
        reason: Unavailable,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
    },
    /// There is something to connect to, by a way that Adit does not have yet; close
    /// the connection.
    Unsupported {
        /// Which way.
        reason: Unsupported,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
    },
}

/// A connection over mTLS and CONNECT.
#[derive(Debug, Clone)]
pub struct Hbone {
    /// Where to open the TLS connection.
    pub gateway: SocketAddr,
    /// `:authority` of the CONNECT request.
    pub authority: SocketAddr,
    /// Who may answer.
    pub identities: ExpectedIdentities,
    /// The workload that answers: the destination or a waypoint.
    pub peer: Arc<Workload>,
    /// The workload that is meant in the end, where it is known: not behind a service
    /// waypoint.
    pub destination: Option<Arc<Workload>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// Whether a waypoint is in between.
    pub via: Via,
}

/// Whether a waypoint is between client and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// None is.
    Direct,
    /// The waypoint of the service that was dialled.
    ServiceWaypoint,
    /// The waypoint of the workload that was dialled.
    WorkloadWaypoint,
}

/// A plain connection to a known workload.
#[derive(Debug, Clone)]
pub struct Plain {
    /// Where to connect.
    pub address: SocketAddr,
    /// The workload there.
    pub destination: Arc<Workload>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
}

/// Why there is nothing to connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unavailable {
    /// The service has no endpoint with that port that may be used and was not tried.
    #[error("no healthy upstream")]
    NoEndpoint,
    /// The only workload that could be meant was tried already.
    #[error("no other upstream to try")]
    AllTried,
    /// The waypoint is not known, or has no endpoint that may be used and was not
    /// tried.
    #[error("no healthy waypoint")]
    NoWaypoint,
}

/// Which way Adit does not have yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unsupported {
    /// Every endpoint is on another network, behind a gateway.
    #[error("the destination is on another network")]
    OtherNetwork,
    /// The waypoint is on another network.
    #[error("the waypoint is on another network")]
    WaypointOnOtherNetwork,
    /// Every endpoint has a host name and no address.
    #[error("the destination has a host name and no address")]
    WithoutAddress,
}

/// The identities that may answer a connection. Cloning copies reference counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExpectedIdentities {
    workload: SpiffeId,
    service: Option<Arc<[SpiffeId]>>,
}

/// Decides about a connection of `client` to `destination`.
///
/// `exclude` holds the workloads that were tried for this connection and failed:
/// [`Hbone::peer`] or [`Plain::destination`] of earlier answers. Ask again with it to
/// try elsewhere; when nothing is left the answer is [`Outbound::Unavailable`].
pub fn outbound<R: Rng + ?Sized>(
    snapshot: &Snapshot,
    client: &Workload,
    destination: SocketAddr,
    exclude: &[WorkloadUid],
    rng: &mut R,
) -> Outbound {
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let dialled = Dialled {
        snapshot,
        client,
        destination,
        exclude,
    };
    let (network, ip) = (&client.network, destination.ip());
    if let Some(entry) = snapshot.service_at(network, ip, &client.namespace) {
        return dialled.service(entry, rng);
    }
    if let Some(workload) = snapshot.workload_at(network, ip) {
        return dialled.workload(workload, rng);
    }
    match snapshot.service_around(network, ip, &client.namespace) {
        Some(entry) => dialled.service(entry, rng),
        None => Outbound::Passthrough { service: None },
    }
}

struct Dialled<'a> {
    snapshot: &'a Snapshot,
    client: &'a Workload,
    destination: SocketAddr,
    exclude: &'a [WorkloadUid],
}

impl Dialled<'_> {
    fn service<R: Rng + ?Sized>(&self, entry: &ServiceEntry, rng: &mut R) -> Outbound {
        let service = entry.service();
        if let Some(waypoint) = choose_waypoint(service, rng) {
            return match self.waypoint(waypoint, rng) {
                Ok((gateway, peer, identities)) => Outbound::Hbone(Hbone {
                    gateway,
                    authority: self.destination,
                    identities,
                    peer,
                    destination: None,
                    service: Some(service.clone()),
                    via: Via::ServiceWaypoint,
                }),
                Err(failed) => failed.outbound(Some(service)),
            };
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return Outbound::Passthrough {
                service: Some(service.clone()),
            };
        }
        let port = Some(self.destination.port());
        let failed = match entry.draw(self.client, port, self.exclude, rng) {
            Drawn::Endpoint(workload, port) => {
                match choose_address(workload, self.destination.ip(), service.ip_families) {
                    Some(ip) => {
                        let upstream = SocketAddr::new(ip, port);
                        return connect(workload, upstream, Some(entry));
                    }
                    None => Failed::Unavailable(Unavailable::NoEndpoint),
                }
            }
            Drawn::Nothing => Failed::Unavailable(Unavailable::NoEndpoint),
            Drawn::OtherNetwork => Failed::Unsupported(Unsupported::OtherNetwork),
            Drawn::WithoutAddress => Failed::Unsupported(Unsupported::WithoutAddress),
        };
        failed.outbound(Some(service))
    }

    fn workload<R: Rng + ?Sized>(&self, workload: &Arc<Workload>, rng: &mut R) -> Outbound {
        if let Some(waypoint) = &workload.waypoint
            && !self.is_client(waypoint)
        {
            return match self.waypoint(waypoint, rng) {
                Ok((gateway, peer, identities)) => Outbound::Hbone(Hbone {
                    gateway,
                    authority: self.destination,
                    identities,
                    peer,
                    destination: Some(workload.clone()),
                    service: None,
                    via: Via::WorkloadWaypoint,
                }),
                Err(failed) => failed.outbound(None),
            };
        }
        if self.exclude.contains(&workload.uid) {
            return Failed::Unavailable(Unavailable::AllTried).outbound(None);
        }
        connect(workload, self.destination, None)
    }

    /// Whether the client is itself an instance of `waypoint`.
    fn is_client(&self, waypoint: &GatewayAddress) -> bool {
        let uid = &self.client.uid;
        match self.resolve(waypoint) {
            Some(Resolved::Workload(workload)) => workload.uid == *uid,
            Some(Resolved::Service(entry)) => entry.has_endpoint(uid),
            None => false,
        }
    }

    /// An instance of `waypoint`: where it is, what it is, and who may answer.
    fn waypoint<R: Rng + ?Sized>(
        &self,
        waypoint: &GatewayAddress,
        rng: &mut R,
    ) -> Result<(SocketAddr, Arc<Workload>, ExpectedIdentities), Failed> {
        const NONE: Failed = Failed::Unavailable(Unavailable::NoWaypoint);
        const REMOTE: Failed = Failed::Unsupported(Unsupported::WaypointOnOtherNetwork);
        if let GatewayDestination::Address(address) = &waypoint.destination
            && address.network != self.client.network
        {
            return Err(REMOTE);
        }
        let (workload, entry) = match self.resolve(waypoint).ok_or(NONE)? {
            Resolved::Workload(workload) if self.exclude.contains(&workload.uid) => {
                return Err(NONE);
            }
            Resolved::Workload(workload) => (workload, None),
            Resolved::Service(entry) => {
                // A waypoint is reached at its HBONE port, which its service need not
                // list.
                match entry.draw(self.client, None, self.exclude, rng) {
                    Drawn::Endpoint(workload, _) => (workload, Some(entry)),
                    Drawn::Nothing => return Err(NONE),
                    Drawn::OtherNetwork => return Err(REMOTE),
                    Drawn::WithoutAddress => {
                        return Err(Failed::Unsupported(Unsupported::WithoutAddress));
                    }
                }
            }
        };
        let families = entry.map_or(IpFamilies::Automatic, |e| e.service().ip_families);
        let ip = choose_address(workload, self.destination.ip(), families).ok_or(NONE)?;
        let gateway = SocketAddr::new(ip, waypoint.hbone_port);
        let identities = ExpectedIdentities::new(workload, entry);
        Ok((gateway, workload.clone(), identities))
    }

    fn resolve(&self, gateway: &GatewayAddress) -> Option<Resolved<'_>> {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => {
                self.snapshot.service(name).map(|e| Resolved::Service(e))
            }
            GatewayDestination::Address(address) => {
                let (network, ip) = (&address.network, address.address);
                let namespace = &self.client.namespace;
                let workload = self.snapshot.workload_at(network, ip);
                workload.map(Resolved::Workload).or_else(|| {
                    let entry = self.snapshot.service_at(network, ip, namespace)?;
                    Some(Resolved::Service(entry))
                })
            }
        }
    }
}

enum Resolved<'a> {
    Workload(&'a Arc<Workload>),
    Service(&'a ServiceEntry),
}

#[derive(Clone, Copy)]
enum Failed {
    Unavailable(Unavailable),
    Unsupported(Unsupported),
}

impl Failed {
    fn outbound(self, service: Option<&Arc<Service>>) -> Outbound {
        let service = service.cloned();
        match self {
            Self::Unavailable(reason) => Outbound::Unavailable { reason, service },
            Self::Unsupported(reason) => Outbound::Unsupported { reason, service },
        }
    }
}

/// To `upstream` at `workload`, the way it can be reached.
fn connect(
    workload: &Arc<Workload>,
    upstream: SocketAddr,
    entry: Option<&ServiceEntry>,
) -> Outbound {
    let service = entry.map(|entry| entry.service().clone());
    match workload.tunnel_protocol {
        TunnelProtocol::None => Outbound::Plain(Plain {
            address: upstream,
            destination: workload.clone(),
            service,
        }),
        TunnelProtocol::Hbone => Outbound::Hbone(Hbone {
            gateway: SocketAddr::new(upstream.ip(), HBONE_PORT),
            authority: upstream,
            identities: ExpectedIdentities::new(workload, entry),
            peer: workload.clone(),
            destination: Some(workload.clone()),
            service,
            via: Via::Direct,
        }),
    }
}

/// The service's waypoint, drawn by weight where it has several.
fn choose_waypoint<'a, R: Rng + ?Sized>(
    service: &'a Service,
    rng: &mut R,
) -> Option<&'a GatewayAddress> {
    let weighted = service.weighted_waypoints.iter();
    let total: u64 = weighted.clone().map(|w| u64::from(w.weight)).sum();
    if total == 0 {
        return service.waypoint.as_deref();
    }
    let mut draw = rng.random_range(0..total);
    for waypoint in weighted {
        match draw.checked_sub(u64::from(waypoint.weight)) {
            Some(rest) => draw = rest,
            None => return Some(&waypoint.destination),
        }
    }
    service.waypoint.as_deref()
}

/// The address of `workload` to connect to: the one that was dialled if it is its own,
/// else one of a family that the service has, of the dialled family if possible.
fn choose_address(workload: &Workload, dialled: IpAddr, families: IpFamilies) -> Option<IpAddr> {
    if workload.addresses.contains(&dialled) {
        return Some(dialled);
    }
    let allowed = |address: &&IpAddr| match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::V4 => address.is_ipv4(),
        IpFamilies::V6 => address.is_ipv6(),
    };
    let mut addresses = workload.addresses.iter().filter(allowed);
    let first = addresses.clone().next();
    addresses
        .find(|address| address.is_ipv4() == dialled.is_ipv4())
        .or(first)
        .copied()
}

impl ExpectedIdentities {
    /// The identity of `workload`, and those that its service allows beside it.
    pub fn new(workload: &Workload, entry: Option<&ServiceEntry>) -> Self {
        let service = entry.map(ServiceEntry::identities);
        Self {
            workload: workload.identity.clone(),
            service: service.filter(|ids| !ids.is_empty()).cloned(),
        }
    }

    /// The identity of the workload that is connected to.
    pub fn workload(&self) -> &SpiffeId {
        &self.workload
    }

    /// Whether `peer` may answer.
    pub fn contains(&self, peer: &SpiffeId) -> bool {
        self.iter().any(|identity| identity == peer)
    }

    /// All of them, the workload's first.
    pub fn iter(&self) -> impl Iterator<Item = &SpiffeId> {
        let service = self.service.as_deref().into_iter().flatten();
        std::iter::once(&self.workload).chain(service)
    }
}
