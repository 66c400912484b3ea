//! What the programs are told, and what is written down for the process that follows: one value a pod.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use socket2::SockRef;

use super::{Error, Pod, PodState, io_error};
use crate::abi::{
    self, Address, Enrolment, MAX_ADDRESSES, MAX_PODS, MAX_UID, POD_IPV4, POD_IPV6,
    POD_OUTBOUND_ONLY, SLOTS_PER_POD, Slot,
};
use crate::bpf::{AttachType, Map};
use crate::links::PinnedLink;
use crate::pins::Pins;
use crate::routing::Established;
use crate::sysctl::UNKNOWN;

/// The maps that the programs read and the ones that the next process reads.
pub(super) struct Maps {
    cookies: Map<u64, u32>,
    pods: Map<u32, abi::Pod>,
    slots: Map<u32, u64>,
    addresses: Map<Address, u32>,
    enrolments: Map<u32, Enrolment>,
    probes: Map<abi::Flow, u8>,
}

/// Name and size of each map, as the programs define them.
const COOKIES: (&str, u32) = ("adit_cookies", MAX_PODS);
const PODS: (&str, u32) = ("adit_pods", MAX_PODS);
const SLOTS: (&str, u32) = ("adit_slots", MAX_PODS * SLOTS_PER_POD);
const ADDRESSES: (&str, u32) = ("adit_addresses", MAX_PODS * MAX_ADDRESSES as u32);
const ENROLMENTS: (&str, u32) = ("adit_enrolments", MAX_PODS);
const PROBES: (&str, u32) = ("adit_probes", abi::MAX_PROBES);

fn open_map<K: abi::Plain, V: abi::Plain>(
    pins: &Pins,
    (name, entries): (&str, u32),
) -> Result<Map<K, V>, Error> {
    Map::open(&pins.of(name), entries).map_err(io_error(format!("the map {name}")))
}

impl Maps {
    pub(super) fn open(pins: &Pins) -> Result<Self, Error> {
        Ok(Self {
            cookies: open_map(pins, COOKIES)?,
            pods: open_map(pins, PODS)?,
            slots: open_map(pins, SLOTS)?,
            addresses: open_map(pins, ADDRESSES)?,
            enrolments: open_map(pins, ENROLMENTS)?,
            probes: open_map(pins, PROBES)?,
        })
    }

    /// Why pinned maps cannot be used: they have other sizes. One that is not there is no reason.
    pub(super) fn incompatible(pins: &Pins) -> Option<Error> {
        let results = [
            open_map::<u64, u32>(pins, COOKIES).err(),
            open_map::<u32, abi::Pod>(pins, PODS).err(),
            open_map::<u32, u64>(pins, SLOTS).err(),
            open_map::<Address, u32>(pins, ADDRESSES).err(),
            open_map::<u32, Enrolment>(pins, ENROLMENTS).err(),
            open_map::<abi::Flow, u8>(pins, PROBES).err(),
        ];
        results.into_iter().flatten().find(|error| {
            matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::InvalidData)
        })
    }

    /// Pins maps whose pin was removed; how many.
    pub(super) fn pin_again(&self, pins: &Pins) -> Result<usize, Error> {
        let maps = [
            (COOKIES, self.cookies.as_fd()),
            (PODS, self.pods.as_fd()),
            (SLOTS, self.slots.as_fd()),
            (ADDRESSES, self.addresses.as_fd()),
            (ENROLMENTS, self.enrolments.as_fd()),
            (PROBES, self.probes.as_fd()),
        ];
        let mut restored = 0;
        for ((name, _), fd) in maps {
            let path = pins.of(name);
            if !path.exists() {
                crate::bpf::pin(&path, fd).map_err(io_error(format!("pinning {name} again")))?;
                restored += 1;
            }
        }
        Ok(restored)
    }

    /// The pods that the map of enrolments knows.
    pub(super) fn left_behind(&self, pins: &Pins) -> Result<BTreeMap<String, Pod>, Error> {
        let mut pods = BTreeMap::new();
        for index in self
            .enrolments
            .keys()
            .map_err(io_error("listing enrolments"))?
        {
            let Some(record) = self
                .enrolments
                .get(&index)
                .map_err(io_error("reading an enrolment"))?
            else {
                continue;
            };
            let uid = &record.uid[..usize::from(record.uid_length).min(MAX_UID)];
            let given = &record.addresses[..usize::from(record.address_count).min(MAX_ADDRESSES)];
            let given: Vec<IpAddr> = given.iter().map(|address| (*address).into()).collect();
            let described = self.pods.get(&index).map_err(io_error("reading a pod"))?;
            let addresses = described.map_or_else(Vec::new, |pod| {
                let count = (pod.address_count as usize).min(MAX_ADDRESSES);
                pod.addresses[..count]
                    .iter()
                    .map(|address| (*address).into())
                    .collect()
            });
            let pod = Pod {
                index,
                cookie: record.cookie,
                netns_inode: record.netns_inode,
                netns: None,
                state: PodState::Left,
                generation: record.generation,
                outbound_only: record.outbound_only != 0,
                given,
                addresses,
                sysctls_before: record.sysctls_before,
                link: PinnedLink::open(&pins.of_pod(index), AttachType::SkLookup),
            };
            pods.insert(String::from_utf8_lossy(uid).into_owned(), pod);
        }
        Ok(pods)
    }

    /// Writes down what a later process must know.
    pub(super) fn record(&self, uid: &str, pod: &Pod) -> Result<(), Error> {
        let mut record = Enrolment {
            cookie: pod.cookie,
            netns_inode: pod.netns_inode,
            generation: pod.generation,
            outbound_only: pod.outbound_only.into(),
            uid_length: 0,
            address_count: 0,
            reserved: [0; 5],
            sysctls_before: pod.sysctls_before,
            uid: [0; MAX_UID],
            addresses: [Address::default(); MAX_ADDRESSES],
        };
        for (to, from) in record.uid.iter_mut().zip(uid.as_bytes()) {
            *to = *from;
            record.uid_length += 1;
        }
        for (to, from) in record.addresses.iter_mut().zip(&pod.given) {
            *to = (*from).into();
            record.address_count += 1;
        }
        self.enrolments
            .set(&pod.index, &record)
            .map_err(io_error(format!("pod {uid}: its enrolment")))
    }

    /// Tells the programs what is true of a pod.
    pub(super) fn describe(
        &self,
        uid: &str,
        pod: &mut Pod,
        found: &Established,
    ) -> Result<(), Error> {
        let flags = [
            (pod.outbound_only, POD_OUTBOUND_ONLY),
            (found.ipv4, POD_IPV4),
            (found.ipv6, POD_IPV6),
        ];
        let mut entry = abi::Pod {
            flags: flags
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, flag)| flag)
                .sum(),
            address_count: 0,
            addresses: [Address::default(); MAX_ADDRESSES],
        };
        for (to, from) in entry.addresses.iter_mut().zip(&found.addresses) {
            *to = (*from).into();
            entry.address_count += 1;
        }
        let failed = || io_error(format!("pod {uid}: its addresses"));
        self.pods.set(&pod.index, &entry).map_err(failed())?;
        let gone: Vec<IpAddr> = pod
            .addresses
            .iter()
            .filter(|old| !found.addresses.contains(old))
            .copied()
            .collect();
        self.forget_addresses(pod.index, &gone).map_err(failed())?;
        for address in found.addresses.iter().filter(|address| is_routed(address)) {
            self.addresses
                .set(&(*address).into(), &pod.index)
                .map_err(failed())?;
        }
        pod.addresses.clone_from(&found.addresses);
        for (known, before) in pod.sysctls_before.iter_mut().zip(found.sysctls_before) {
            if *known == UNKNOWN {
                *known = before;
            }
        }
        Ok(())
    }

    /// An address that another pod has taken over stays that pod's.
    fn forget_addresses(&self, index: u32, addresses: &[IpAddr]) -> io::Result<()> {
        for address in addresses {
            let key = Address::from(*address);
            if self.addresses.get(&key)? == Some(index) {
                self.addresses.remove(&key)?;
            }
        }
        Ok(())
    }

    /// Makes the hooks capture; whether they did not before.
    pub(super) fn remember_cookie(&self, pod: &Pod) -> Result<bool, Error> {
        let failed = |error| io_error("a pod's cookie")(error);
        if self.cookies.get(&pod.cookie).map_err(failed)? == Some(pod.index) {
            return Ok(false);
        }
        self.cookies.set(&pod.cookie, &pod.index).map_err(failed)?;
        Ok(true)
    }

    pub(super) fn forget_cookie(&self, pod: &Pod) -> Result<(), Error> {
        self.cookies
            .remove(&pod.cookie)
            .map(drop)
            .map_err(io_error("a pod's cookie"))
    }

    /// Removes what the maps know of a pod, the enrolment last.
    pub(super) fn forget(&self, uid: &str, pod: &Pod) -> Result<(), Error> {
        let forget = || -> io::Result<()> {
            for slot in Slot::ALL {
                self.slots.remove(&slot.of(pod.index))?;
            }
            self.forget_addresses(pod.index, &pod.addresses)?;
            self.enrolments.remove(&pod.index)?;
            Ok(())
        };
        forget().map_err(io_error(format!("pod {uid}: its entries")))
    }

    /// Puts a listener into a slot. One that is there already stays: kernels have lost track of a socket that
    /// replaced itself.
    pub(super) fn fill(&self, slot: u32, listener: BorrowedFd<'_>) -> io::Result<()> {
        // What user space reads from a SOCKMAP is the socket's cookie.
        if self.slots.get(&slot)? == Some(SockRef::from(&listener).cookie()?) {
            return Ok(());
        }
        self.slots.set(&slot, &(listener.as_raw_fd() as u64))
    }

    pub(super) fn has_listener(&self, index: u32, slot: Slot) -> bool {
        matches!(self.slots.get(&slot.of(index)), Ok(Some(_)))
    }
}

/// Whether an address means one pod: link-local ones repeat.
fn is_routed(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}
