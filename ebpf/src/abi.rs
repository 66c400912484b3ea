//! The twin of `bpf/mesh.bpf.h`: what user space and the programs share through maps.
//!
//! The maps outlive the process that made them, so a change here is a new [`LAYOUT`].

use std::net::{IpAddr, Ipv6Addr};

/// The version of the maps' layout and of the programs' contract: the name of the pin directory.
pub(crate) const LAYOUT: &str = "v1";

pub(crate) const MAX_PODS: u32 = 1024;
pub(crate) const MAX_ADDRESSES: usize = 16;
pub(crate) const MAX_PROBES: u32 = 16384;
pub(crate) const SLOTS_PER_POD: u32 = 4;

pub(crate) const POD_OUTBOUND_ONLY: u32 = 1;
pub(crate) const POD_IPV4: u32 = 2;
pub(crate) const POD_IPV6: u32 = 4;

/// Longest pod uid that is kept (a Kubernetes uid has 36 bytes).
pub(crate) const MAX_UID: usize = 64;

/// Values that may be handed to the kernel as bytes: `repr(C)`, no padding, any bit pattern.
///
/// # Safety
/// The type has no padding, and every bit pattern is a value of it.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for u8 {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}

/// `struct address`: IPv6 in network order, IPv4 as v4-mapped.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Address([u8; 16]);

// SAFETY: sixteen bytes.
unsafe impl Plain for Address {}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

/// `struct pod`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Pod {
    pub(crate) flags: u32,
    pub(crate) address_count: u32,
    pub(crate) addresses: [Address; MAX_ADDRESSES],
}

// SAFETY: two integers and addresses of alignment 4: no padding.
unsafe impl Plain for Pod {}

/// `struct flow`; ports in host order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Flow {
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
}

// SAFETY: two addresses and two 16-bit integers, 36 bytes of alignment 4: no padding.
unsafe impl Plain for Flow {}

/// `struct enrolment`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Enrolment {
    pub(crate) cookie: u64,
    pub(crate) netns_inode: u64,
    pub(crate) generation: u32,
    pub(crate) outbound_only: u8,
    pub(crate) uid_length: u8,
    pub(crate) address_count: u8,
    pub(crate) sysctls_before: [u8; 4],
    pub(crate) reserved: [u8; 5],
    pub(crate) uid: [u8; MAX_UID],
    pub(crate) addresses: [Address; MAX_ADDRESSES],
}

// SAFETY: 8 + 8 + 4 + 3 + 4 + 5 + 64 + 256 bytes of alignment 8 without a gap (see the assertion).
unsafe impl Plain for Enrolment {}

const _: () =
    assert!(size_of::<Enrolment>() == 352 && size_of::<Pod>() == 264 && size_of::<Flow>() == 36);

/// Which of a pod's listeners a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Slot {
    Outbound = 0,
    Plaintext = 1,
    Hbone = 2,
}

impl Slot {
    pub(crate) const ALL: [Slot; 3] = [Slot::Outbound, Slot::Plaintext, Slot::Hbone];

    /// The slot's key in the SOCKMAP.
    pub(crate) fn of(self, pod: u32) -> u32 {
        pod * SLOTS_PER_POD + self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_kept_in_its_mapped_form_and_comes_back_as_ipv4() {
        for text in ["10.1.2.3", "fd00::1", "::1"] {
            let address: IpAddr = text.parse().expect("an address");
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
        let four: IpAddr = "10.1.2.3".parse().expect("an address");
        assert_eq!(Address::from(four).0[10..], [0xff, 0xff, 10, 1, 2, 3]);
    }

    #[test]
    fn slots_of_neighbouring_pods_do_not_overlap() {
        assert!(Slot::Hbone.of(0) < Slot::Outbound.of(1));
        assert!(Slot::Hbone.of(MAX_PODS - 1) < MAX_PODS * SLOTS_PER_POD);
    }

    /// The header and this file describe the same constants.
    #[test]
    fn constants_are_those_of_the_programs() {
        let header = include_str!("../bpf/mesh.bpf.h");
        let constant = |name: &str| -> u32 {
            let text = header
                .lines()
                .find_map(|line| {
                    line.strip_prefix("#define ")?
                        .strip_prefix(name)?
                        .strip_prefix(' ')
                })
                .unwrap_or_else(|| panic!("{name} is not defined"));
            let text = text.split_whitespace().next().expect("a value");
            match text.strip_prefix("0x") {
                Some(hex) => u32::from_str_radix(hex, 16).expect("hex"),
                None => text.parse().expect("decimal"),
            }
        };
        let expected = [
            ("MARK_OUT", crate::MARK_OUT),
            ("MARK_UP", crate::MARK_UP),
            ("MARK_OWN", crate::MARK_OWN),
            ("MAX_PODS", MAX_PODS),
            ("MAX_ADDRESSES", MAX_ADDRESSES as u32),
            ("MAX_PROBES", MAX_PROBES),
            ("SLOTS_PER_POD", SLOTS_PER_POD),
            ("SLOT_OUTBOUND", Slot::Outbound as u32),
            ("SLOT_PLAINTEXT", Slot::Plaintext as u32),
            ("SLOT_HBONE", Slot::Hbone as u32),
            ("HBONE_PORT", u32::from(crate::HBONE_PORT)),
            ("POD_OUTBOUND_ONLY", POD_OUTBOUND_ONLY),
            ("POD_IPV4", POD_IPV4),
            ("POD_IPV6", POD_IPV6),
        ];
        for (name, value) in expected {
            assert_eq!(constant(name), value, "{name}");
        }
    }
}
