//! Rules and routes of a pod's network namespace, over rtnetlink.
//!
//! A marked connection has to loop over lo with its destination intact:
//!
//! ```text
//! 5: from all fwmark MARK_OUT lookup TABLE            (and the same for IPv6)
//! 6: from all fwmark MARK_UP  lookup TABLE
//! local default dev lo   src POD_IP metric 1             table TABLE
//! local default dev eth0 src POD_IP metric 10 + ifindex  table TABLE
//! ```
//! The routes name the source: for a local route without one the kernel takes the destination for it. The
//! route of each interface serves sockets bound to it (`SO_BINDTODEVICE`). Everything carries our protocol
//! number, and a plan is compared with what is there, so that the same code enrols and reconciles.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use crate::abi::MAX_ADDRESSES;
use crate::netns::{NetnsFd, on_own_thread};
use crate::sysctl::{self, SYSCTLS, SysctlError};
use crate::{MARK_OUT, MARK_UP, ROUTE_TABLE, RULE_PREFERENCE_OUT, RULE_PREFERENCE_UP};

/// Who made a rule or a route (`RTPROT`, `FRA_PROTOCOL`): an unassigned number.
pub(crate) const PROTOCOL: u8 = 173;
const LO: u32 = 1;
const LO_METRIC: u32 = 1;
const INTERFACE_METRIC: u32 = 10;

/// A handful of small messages to the local kernel.
const NETLINK_DEADLINE: Duration = Duration::from_secs(5);
/// Duplicate address detection takes a second by default; an address cannot be a route's source before.
const ADDRESS_DEADLINE: Duration = Duration::from_secs(4);
const ADDRESS_POLL: Duration = Duration::from_millis(20);

/// Why a namespace could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    /// The namespace could not be entered, or a socket not be opened in it.
    #[error("entering the network namespace: {0}")]
    Netns(#[source] io::Error),
    /// The kernel refused a request.
    #[error("rtnetlink, {request}: {source}")]
    Netlink {
        /// What was asked.
        request: &'static str,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
    /// The kernel did not answer.
    #[error("rtnetlink did not finish within {}s", NETLINK_DEADLINE.as_secs())]
    Deadline,
    /// The pod's address is not on any interface of the namespace.
    #[error(
        "no interface of the pod has the address {0}: it is not the pod's network namespace, or not ready"
    )]
    AddressMissing(IpAddr),
    /// The pod has more addresses than the programs compare.
    #[error("the pod has {0} addresses; at most {MAX_ADDRESSES} can be told apart")]
    TooManyAddresses(usize),
    /// lo is down, and steering goes over it.
    #[error("lo is down in the pod's network namespace")]
    LoopbackDown,
    /// A setting could not be made.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

/// What was found and made in a namespace.
#[derive(Debug)]
pub(crate) struct Established {
    /// The pod's addresses as given, then all others of its interfaces (link-local, secondary).
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ipv4: bool,
    pub(crate) ipv6: bool,
    pub(crate) sysctls_before: [u8; SYSCTLS.len()],
    pub(crate) changed: Changed,
}

/// How much was not as it should be.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) rules: usize,
    pub(crate) routes: usize,
    pub(crate) sysctls: usize,
}

/// Makes the namespace steer: settings, rules, routes. Changes only what differs.
pub(crate) fn establish(netns: &NetnsFd, given: &[IpAddr]) -> Result<Established, RoutingError> {
    inside(netns.as_fd(), async |netlink| {
        netlink.establish(given, ADDRESS_DEADLINE).await
    })?
}

/// [`establish`] for a namespace that had everything: waits for no address.
pub(crate) fn repair(netns: &NetnsFd, given: &[IpAddr]) -> Result<Changed, RoutingError> {
    inside(netns.as_fd(), async |netlink| {
        let established = netlink.establish(given, Duration::ZERO).await?;
        Ok(established.changed)
    })?
}

/// Removes what [`establish`] made.
pub(crate) fn withdraw(
    netns: &NetnsFd,
    sysctls_before: [u8; SYSCTLS.len()],
) -> Result<(), RoutingError> {
    inside(netns.as_fd(), async |netlink| {
        netlink.apply(&Plan::default()).await?;
        sysctl::restore(sysctls_before);
        Ok(())
    })?
}

/// Whether this kernel has rules, for each family that it has.
pub(crate) fn supports_rules() -> Result<(), RoutingError> {
    let netns = NetnsFd::current().map_err(RoutingError::Netns)?;
    inside(netns.as_fd(), async |netlink| {
        for ipv6 in [false, true] {
            let version = if ipv6 { IpVersion::V6 } else { IpVersion::V4 };
            let rules: Result<Vec<_>, _> = netlink
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await;
            match rules {
                // A machine without IPv6 needs no rules of it.
                Err(_) if ipv6 && !sysctl::ipv6_enabled() => {}
                Err(error) => return Err(failed("list rules")(error)),
                Ok(_) => {}
            }
        }
        Ok(())
    })?
}

/// Runs `work` on a thread inside the namespace, with a connection to its rtnetlink and a deadline.
fn inside<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl AsyncFnOnce(Netlink) -> Result<T, RoutingError> + Send,
) -> Result<Result<T, RoutingError>, RoutingError> {
    on_own_thread(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RoutingError::Netns)?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(RoutingError::Netns)?;
            let connection = tokio::spawn(connection);
            let deadline = NETLINK_DEADLINE + ADDRESS_DEADLINE;
            let result = tokio::time::timeout(deadline, work(Netlink { handle })).await;
            connection.abort();
            result.map_err(|_| RoutingError::Deadline)?
        })
    })
    .map_err(RoutingError::Netns)
}

/// The rules and routes that shall be there.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    rules: Vec<Rule>,
    routes: Vec<Route>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    ipv6: bool,
    preference: u32,
    mark: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Route {
    source: IpAddr,
    interface: u32,
    metric: u32,
}

/// What the namespace's interfaces are.
#[derive(Debug, Default)]
struct Interfaces {
    /// Those that are up, without lo.
    up: Vec<u32>,
    /// Address -> usable (duplicate detection is over).
    addresses: BTreeMap<IpAddr, bool>,
}

impl Plan {
    fn of(interfaces: &Interfaces, source4: Option<Ipv4Addr>, source6: Option<Ipv6Addr>) -> Self {
        let mut plan = Self::default();
        let sources = [source4.map(IpAddr::V4), source6.map(IpAddr::V6)];
        for source in sources.into_iter().flatten() {
            for (preference, mark) in [
                (RULE_PREFERENCE_OUT, MARK_OUT),
                (RULE_PREFERENCE_UP, MARK_UP),
            ] {
                plan.rules.push(Rule {
                    ipv6: source.is_ipv6(),
                    preference,
                    mark,
                });
            }
            plan.routes.push(Route {
                source,
                interface: LO,
                metric: LO_METRIC,
            });
            for &interface in &interfaces.up {
                let metric = INTERFACE_METRIC + interface;
                plan.routes.push(Route {
                    source,
                    interface,
                    metric,
                });
            }
        }
        plan
    }
}

struct Netlink {
    handle: Handle,
}

fn failed(request: &'static str) -> impl Fn(rtnetlink::Error) -> RoutingError {
    move |source| RoutingError::Netlink {
        request,
        source: Box::new(source),
    }
}

impl Netlink {
    async fn establish(
        &self,
        given: &[IpAddr],
        patience: Duration,
    ) -> Result<Established, RoutingError> {
        let ipv6 = sysctl::ipv6_enabled();
        let wanted: Vec<IpAddr> = given
            .iter()
            .map(|address| address.to_canonical())
            .filter(|address| address.is_ipv4() || ipv6)
            .collect();
        let interfaces = self.interfaces(&wanted, patience).await?;
        let source4 = wanted.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        let source6 = wanted.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        let mut addresses = wanted.clone();
        addresses.extend(
            interfaces
                .addresses
                .keys()
                .filter(|address| !wanted.contains(address)),
        );
        if addresses.len() > MAX_ADDRESSES {
            return Err(RoutingError::TooManyAddresses(addresses.len()));
        }
        let (sysctls_before, sysctls) = sysctl::establish(ipv6)?;
        let mut changed = self.apply(&Plan::of(&interfaces, source4, source6)).await?;
        changed.sysctls = sysctls;
        Ok(Established {
            addresses,
            ipv4: source4.is_some(),
            ipv6: source6.is_some(),
            sysctls_before,
            changed,
        })
    }

    /// The interfaces, once all wanted addresses are usable.
    async fn interfaces(
        &self,
        wanted: &[IpAddr],
        patience: Duration,
    ) -> Result<Interfaces, RoutingError> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let found = self.list_interfaces().await?;
            let unusable = wanted
                .iter()
                .find(|address| found.addresses.get(address) != Some(&true));
            match unusable {
                None => return Ok(found),
                Some(address) => {
                    // Only an address that is there may be waited for.
                    let tentative = found.addresses.contains_key(address);
                    if !tentative || tokio::time::Instant::now() >= deadline {
                        return Err(RoutingError::AddressMissing(*address));
                    }
                }
            }
            tokio::time::sleep(ADDRESS_POLL).await;
        }
    }

    async fn list_interfaces(&self) -> Result<Interfaces, RoutingError> {
        let mut found = Interfaces::default();
        let links: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("list interfaces"))?;
        for link in links {
            let up = link.header.flags.contains(LinkFlags::Up);
            if link.header.index == LO {
                if !up {
                    return Err(RoutingError::LoopbackDown);
                }
            } else if up {
                found.up.push(link.header.index);
            }
        }
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("list addresses"))?;
        for message in addresses {
            let mut flags = AddressFlags::empty();
            let (mut local, mut address) = (None, None);
            for attribute in message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(ip),
                    AddressAttribute::Address(ip) => address = Some(ip),
                    AddressAttribute::Flags(value) => flags = value,
                    _ => {}
                }
            }
            let Some(ip) = local.or(address).filter(|ip| !ip.is_loopback()) else {
                continue;
            };
            let optimistic = flags.contains(AddressFlags::Optimistic);
            let usable = !flags.contains(AddressFlags::Tentative) || optimistic;
            let known = found.addresses.entry(ip).or_insert(usable);
            *known |= usable;
        }
        Ok(found)
    }

    /// Makes our rules and routes be exactly those of the plan.
    async fn apply(&self, plan: &Plan) -> Result<Changed, RoutingError> {
        let mut changed = Changed::default();
        // Routes first: a rule that leads to an empty table lets a connection out past the mesh.
        let mut routes = self.routes().await?;
        for wanted in &plan.routes {
            if take(&mut routes, |(route, _)| route == wanted) {
                continue;
            }
            let message = wanted.message();
            self.handle
                .route()
                .add(message)
                .replace()
                .execute()
                .await
                .map_err(failed("add a route"))?;
            changed.routes += 1;
        }
        let mut rules = self.rules().await?;
        for wanted in &plan.rules {
            if take(&mut rules, |(rule, _)| rule.as_ref() == Some(wanted)) {
                continue;
            }
            let mut request = self.handle.rule().add();
            *request.message_mut() = wanted.message();
            request.execute().await.map_err(failed("add a rule"))?;
            changed.rules += 1;
        }
        for (_, message) in rules {
            self.handle
                .rule()
                .del(message)
                .execute()
                .await
                .map_err(failed("delete a rule"))?;
        }
        // A route that was replaced in place is listed here under what it was.
        let remaining = self.routes().await?;
        for (route, message) in remaining {
            if !plan.routes.contains(&route) {
                self.handle
                    .route()
                    .del(message)
                    .execute()
                    .await
                    .map_err(failed("delete a route"))?;
            }
        }
        Ok(changed)
    }

    /// Rules that lead to our table; `None` for one that is not as we make them.
    async fn rules(&self) -> Result<Vec<(Option<Rule>, RuleMessage)>, RoutingError> {
        let mut found = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Result<Vec<RuleMessage>, _> = self
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await;
            let rules = match rules {
                Ok(rules) => rules,
                // IPv6 may be missing from the machine.
                Err(error) if unsupported(&error) => continue,
                Err(error) => return Err(failed("list rules")(error)),
            };
            let ours = rules
                .into_iter()
                .filter(|rule| rule.attributes.contains(&RuleAttribute::Table(ROUTE_TABLE)));
            found.extend(ours.map(|message| (Rule::read(&message), message)));
        }
        Ok(found)
    }

    async fn routes(&self) -> Result<Vec<(Route, RouteMessage)>, RoutingError> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let routes: Result<Vec<RouteMessage>, _> = self
                .handle
                .route()
                .get(filter)
                .execute()
                .try_collect()
                .await;
            let routes = match routes {
                Ok(routes) => routes,
                Err(error) if unsupported(&error) => continue,
                Err(error) => return Err(failed("list routes")(error)),
            };
            let ours = routes.into_iter().filter(|route| {
                route
                    .attributes
                    .contains(&RouteAttribute::Table(ROUTE_TABLE))
            });
            found.extend(ours.map(|message| (Route::read(&message), message)));
        }
        Ok(found)
    }
}

/// Removes the first element that matches; whether there was one.
fn take<T>(list: &mut Vec<T>, matches: impl Fn(&T) -> bool) -> bool {
    match list.iter().position(matches) {
        Some(index) => {
            list.swap_remove(index);
            true
        }
        None => false,
    }
}

fn unsupported(error: &rtnetlink::Error) -> bool {
    matches!(
        error,
        rtnetlink::Error::NetlinkError(message)
            if matches!(-message.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
    )
}

impl Rule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = family(self.ipv6);
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Priority(self.preference),
            RuleAttribute::FwMark(self.mark),
            RuleAttribute::FwMask(u32::MAX),
            RuleAttribute::Table(ROUTE_TABLE),
            RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
        ];
        message
    }

    fn read(message: &RuleMessage) -> Option<Self> {
        let (mut preference, mut mark, mut mask) = (0, None, u32::MAX);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(value) => preference = *value,
                RuleAttribute::FwMark(value) => mark = Some(*value),
                RuleAttribute::FwMask(value) => mask = *value,
                RuleAttribute::Table(_)
                | RuleAttribute::Protocol(_)
                | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
                // A condition that ours do not have.
                _ => return None,
            }
        }
        let ipv6 = message.header.family == AddressFamily::Inet6;
        let plain = message.header.src_len == 0
            && message.header.dst_len == 0
            && message.header.action == RuleAction::ToTable
            && message.header.flags.is_empty()
            && mask == u32::MAX;
        plain.then_some(())?;
        mark.map(|mark| Self {
            ipv6,
            preference,
            mark,
        })
    }
}

impl Route {
    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.source.is_ipv6());
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
        message.header.scope = RouteScope::Host;
        message.header.kind = RouteType::Local;
        message.attributes = vec![
            RouteAttribute::Table(ROUTE_TABLE),
            RouteAttribute::Oif(self.interface),
            RouteAttribute::Priority(self.metric),
            RouteAttribute::PrefSource(match self.source {
                IpAddr::V4(v4) => RouteAddress::Inet(v4),
                IpAddr::V6(v6) => RouteAddress::Inet6(v6),
            }),
        ];
        message
    }

    /// Anything that is not one of our routes reads as one that no plan contains (metric 0).
    fn read(message: &RouteMessage) -> Self {
        let mut route = Self {
            source: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            interface: 0,
            metric: 0,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(index) => route.interface = *index,
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => route.source = (*v4).into(),
                RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => route.source = (*v6).into(),
                _ => {}
            }
        }
        let header = &message.header;
        if header.kind != RouteType::Local || header.destination_prefix_length != 0 {
            route.metric = 0;
        }
        route
    }
}

fn family(ipv6: bool) -> AddressFamily {
    if ipv6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_without_an_address_gets_neither_rules_nor_routes() {
        let interfaces = Interfaces {
            up: vec![2],
            ..Interfaces::default()
        };
        let plan = Plan::of(&interfaces, Some(Ipv4Addr::new(10, 0, 0, 1)), None);
        assert!(plan.rules.iter().all(|rule| !rule.ipv6));
        assert_eq!(plan.rules.len(), 2);
        let interfaces: Vec<u32> = plan.routes.iter().map(|route| route.interface).collect();
        assert_eq!(interfaces, [LO, 2]);
    }

    #[test]
    fn what_is_written_reads_back() {
        let rule = Rule {
            ipv6: true,
            preference: 5,
            mark: MARK_OUT,
        };
        assert_eq!(Rule::read(&rule.message()), Some(rule));
        let route = Route {
            source: Ipv6Addr::LOCALHOST.into(),
            interface: 3,
            metric: 13,
        };
        assert_eq!(Route::read(&route.message()), route);
    }

    #[test]
    fn a_rule_with_a_condition_more_is_not_ours() {
        let mut message = Rule {
            ipv6: false,
            preference: 5,
            mark: MARK_OUT,
        }
        .message();
        message
            .attributes
            .push(RuleAttribute::Iifname("eth0".to_owned()));
        assert_eq!(Rule::read(&message), None);
    }
}
