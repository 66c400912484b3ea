//! Clients that connect in unusual ways are captured like any other.

mod common;

use std::io::Read;
use std::mem::zeroed;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use common::*;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

fn foreign() -> [SocketAddr; 2] {
    ["192.0.2.10:80", "[2001:db8::10]:80"].map(|text| text.parse().expect("an address"))
}

#[test]
fn an_mptcp_client_is_captured_and_falls_back_to_tcp() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for (destination, own) in foreign().into_iter().zip(pod.addresses()) {
        let socket = pod.app(|| {
            Socket::new(
                Domain::for_address(destination),
                Type::STREAM,
                Some(Protocol::MPTCP),
            )
        });
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => return skip(&format!("this kernel has no MPTCP: {error}")),
        };
        let mut app = pod.app(|| connect_from(socket, destination).expect("captured"));
        let mut accepted = accept(&trap.outbound);
        assert_eq!((accepted.local, accepted.peer.ip()), (destination, own));
        assert_eq!(app.peer_addr().expect("connected"), destination);
        converse(&mut app, &mut accepted.stream);
    }
}

#[test]
fn a_tcp_fast_open_client_is_captured() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    // Client side on, as is the default.
    pod.netns.set_sysctl("ipv4/tcp_fastopen", "1");
    for destination in foreign() {
        // Twice: a cookie, if one is given, is used by the second.
        for _ in 0..2 {
            let sent = pod.app(|| {
                let socket = tcp(destination.ip());
                let sent =
                    socket.send_to_with_flags(b"early", &destination.into(), libc::MSG_FASTOPEN);
                sent.map(|_| socket)
            });
            let _app = match sent {
                Ok(socket) => socket,
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return skip("this kernel has no TCP Fast Open");
                }
                Err(error) => panic!("{error}"),
            };
            let mut accepted = accept(&trap.outbound);
            assert_eq!(accepted.local, destination);
            let mut buffer = [0; 5];
            accepted
                .stream
                .read_exact(&mut buffer)
                .expect("the data of the SYN, or after it");
            assert_eq!(&buffer, b"early");
        }
    }
    // Without a ztunnel it is refused like any other.
    close(trap);
    let refused = pod.app(|| {
        tcp(foreign()[0].ip()).send_to_with_flags(
            b"early",
            &foreign()[0].into(),
            libc::MSG_FASTOPEN,
        )
    });
    assert_eq!(errno(refused), Some(libc::ECONNREFUSED));
}

#[test]
fn a_connect_by_io_uring_is_captured() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for destination in foreign() {
        let result = pod.app(|| {
            let socket = tcp(destination.ip());
            let mut ring = match Ring::new() {
                Ok(ring) => ring,
                Err(error) => return Err(error),
            };
            let code = ring.connect(&socket, &destination.into());
            Ok((socket, code))
        });
        match result {
            Err(error) => return skip(&format!("io_uring is not to be had: {error}")),
            Ok((_socket, code)) => {
                assert_eq!(code, 0, "{}", std::io::Error::from_raw_os_error(-code))
            }
        }
        assert_eq!(accept(&trap.outbound).local, destination);
    }
    close(trap);
    let code = pod.app(|| {
        let socket = tcp(foreign()[0].ip());
        Ring::new().map(|mut ring| ring.connect(&socket, &foreign()[0].into()))
    });
    assert_eq!(code.expect("worked before"), -libc::ECONNREFUSED);
}

/// An io_uring of one entry, as far as one connect needs it.
struct Ring {
    fd: OwnedFd,
    rings: *mut u8,
    entries: *mut u8,
    parameters: Parameters,
}

const RING_BYTES: usize = 4096;
const IORING_OP_CONNECT: u8 = 16;

/// `struct io_uring_params`: a head, then the offsets within the submission and the completion ring.
#[repr(C)]
struct Parameters {
    head: [u32; 10],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, and 12 bytes more
    submission: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, and 12 bytes more
    completion: [u32; 10],
}

impl Ring {
    fn new() -> std::io::Result<Self> {
        // SAFETY: integers; zero is the request for the defaults.
        let mut parameters: Parameters = unsafe { zeroed() };
        // SAFETY: the kernel fills the live structure.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut parameters) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a new descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        const SINGLE_MMAP: u32 = 1;
        assert_eq!(
            parameters.head[5] & SINGLE_MMAP,
            SINGLE_MMAP,
            "since Linux 5.4"
        );
        let map = |offset: i64| {
            // SAFETY: a new mapping of what the kernel offers at this offset.
            let address = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    RING_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_POPULATE,
                    fd.as_raw_fd(),
                    offset,
                )
            };
            assert_ne!(
                address,
                libc::MAP_FAILED,
                "{}",
                std::io::Error::last_os_error()
            );
            address.cast::<u8>()
        };
        let (rings, entries) = (map(0), map(0x1000_0000));
        Ok(Self {
            fd,
            rings,
            entries,
            parameters,
        })
    }

    fn word(&self, offset: u32) -> *mut u32 {
        // SAFETY: an offset that the kernel gave for this mapping.
        unsafe { self.rings.add(offset as usize).cast() }
    }

    /// The completion's result.
    fn connect(&mut self, socket: &Socket, address: &SockAddr) -> i32 {
        // SAFETY: the only entry of the mapped rings, which nobody else uses; the address lives over the
        // call, which waits for the completion.
        unsafe {
            let entry = self.entries;
            entry.write(IORING_OP_CONNECT);
            entry.add(4).cast::<i32>().write(socket.as_raw_fd());
            entry.add(8).cast::<u64>().write(u64::from(address.len()));
            entry.add(16).cast::<u64>().write(address.as_ptr() as u64);
            self.word(self.parameters.submission[6]).write(0);
            let tail = self.word(self.parameters.submission[1]);
            tail.write_volatile(tail.read_volatile() + 1);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            const GETEVENTS: u32 = 1;
            let submitted = libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd.as_raw_fd(),
                1,
                1,
                GETEVENTS,
                ptr::null::<u8>(),
                0,
            );
            assert_eq!(submitted, 1, "{}", std::io::Error::last_os_error());
            // user_data (8 bytes), then the result.
            self.word(self.parameters.completion[5] + 8)
                .cast::<i32>()
                .read_volatile()
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for mapping in [self.rings, self.entries] {
            // SAFETY: our own mapping of this length.
            unsafe { libc::munmap(mapping.cast(), RING_BYTES) };
        }
    }
}
