//! bpf(2) for the tests' own programs: what others might attach beside ours.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Instruction {
    pub code: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

#[repr(C)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

fn bpf<T>(command: i64, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: a live exclusive borrow of the size that is passed; its pointers are to live borrows.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands used return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Loads a `connect4` program.
pub fn load_connect4(name: &str, instructions: &[Instruction]) -> OwnedFd {
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    let mut attributes = Load {
        program_type: 18,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 2],
        kernel_version: 0,
        flags: 0,
        name: padded,
        ifindex: 0,
        expected_attach_type: 10,
    };
    bpf(5, &mut attributes).expect("the test's program is loaded")
}

/// Attaches a `connect4` program to a cgroup; it ends with the descriptor.
pub fn attach_connect4(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> OwnedFd {
    let mut attributes = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, 10, 0];
    bpf(28, &mut attributes).expect("the test's program is attached")
}

/// Detaches a link behind its owner's back: `bpftool link detach`.
pub fn detach_pinned(pin: &std::path::Path) {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes()).expect("a path");
    let mut get = [path.as_ptr() as u64, 0];
    let link = bpf(7, &mut get).expect("the pin opens");
    let mut attributes = link.as_raw_fd() as u32;
    // SAFETY: four bytes that are live; the command reads the descriptor from them.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, 34, std::ptr::from_mut(&mut attributes), 4) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// A socket load balancer of a CNI: every IPv4 destination becomes `address`.
pub fn rewrite_to(address: std::net::Ipv4Addr) -> [Instruction; 4] {
    let network_order = i32::from_ne_bytes(address.octets());
    [
        // r2 = address
        Instruction {
            code: 0xb4,
            registers: 2,
            offset: 0,
            immediate: network_order,
        },
        // ctx->user_ip4 = r2
        Instruction {
            code: 0x63,
            registers: 1 | 2 << 4,
            offset: 4,
            immediate: 0,
        },
        Instruction {
            code: 0xb7,
            registers: 0,
            offset: 0,
            immediate: 1,
        },
        Instruction {
            code: 0x95,
            registers: 0,
            offset: 0,
            immediate: 0,
        },
    ]
}

/// How many entries a pinned map has, whose keys have `KEY` bytes.
pub fn entries<const KEY: usize>(pin: &std::path::Path) -> usize {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes()).expect("a path");
    let mut get = [path.as_ptr() as u64, 0];
    let map = bpf(7, &mut get).expect("the pin opens");
    let (mut key, mut next) = ([0u8; KEY], [0u8; KEY]);
    let mut count = 0;
    loop {
        let previous = if count == 0 { 0 } else { key.as_ptr() as u64 };
        let mut attributes = [map.as_raw_fd() as u64, previous, next.as_mut_ptr() as u64];
        // SAFETY: the descriptor, and pointers to live buffers of the map's key size.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                4,
                attributes.as_mut_ptr(),
                size_of_val(&attributes),
            )
        };
        if result != 0 {
            return count;
        }
        key = next;
        count += 1;
    }
}

/// The kernel's id of a pinned link.
pub fn link_id(pin: &std::path::Path) -> u32 {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes()).expect("a path");
    let mut get = [path.as_ptr() as u64, 0];
    let link = bpf(7, &mut get).expect("the pin opens");
    let mut info = [0u32; 16];
    let mut attributes = [
        u64::from(link.as_raw_fd() as u32) | (size_of_val(&info) as u64) << 32,
        info.as_mut_ptr() as u64,
    ];
    // SAFETY: the descriptor and the length, then a pointer to the live buffer of that length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            15,
            attributes.as_mut_ptr(),
            size_of_val(&attributes),
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    info[1]
}
