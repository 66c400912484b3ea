//! bpf(2), as far as aya does not give it: links that can be replaced atomically and inspected
//! (`BPF_LINK_UPDATE` is missing there for cgroup and netns links), pins, and maps shared by pin.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::abi::Plain;

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// `enum bpf_attach_type`, those that are used here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum AttachType {
    SockOps = 3,
    Bind4 = 8,
    Bind6 = 9,
    Connect4 = 10,
    Connect6 = 11,
    SkLookup = 36,
}

/// `enum bpf_prog_type`, those that are used here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum ProgramType {
    SockOps = 13,
    CgroupSockAddr = 18,
    SkLookup = 30,
}

/// One instruction: `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    _pad: u32,
    key: u64,
    /// The value, or the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjectPath {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjectInfo {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramQuery {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    _pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// `struct bpf_link_info` for cgroup and netns links.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    target: [u32; 2],
    rest: [u64; 4],
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct RawMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    skipped: [u64; 6],
    name: [u8; 16],
}

fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is the command's part of `union bpf_attr`, a live exclusive borrow of the size
    // that is passed; the pointers in it are to borrows that the callers hold over this call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *mut T, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as RawFd)
    }
}

fn call_for_fd<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the command returned a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd() as u32
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins a map, program or link at a path below a bpffs.
pub(crate) fn pin(path: &Path, fd: BorrowedFd<'_>) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attributes = ObjectPath {
        path: path.as_ptr() as u64,
        fd: raw(fd),
        ..ObjectPath::default()
    };
    call(OBJ_PIN, &mut attributes).map(drop)
}

/// Opens what is pinned at a path.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attributes = ObjectPath {
        path: path.as_ptr() as u64,
        ..ObjectPath::default()
    };
    call_for_fd(OBJ_GET, &mut attributes)
}

fn info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attributes = ObjectInfo {
        fd: raw(fd),
        length: size_of::<T>() as u32,
        info: (&raw mut info) as u64,
    };
    call(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// What a link is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinkInfo {
    /// The kernel's id of the link.
    pub(crate) id: u32,
    /// Inode of the cgroup directory or of the network namespace; 0 when that is gone or was detached.
    pub(crate) target: u64,
}

/// Attaches a program by a link, which lives as long as its descriptor or a pin of it.
pub(crate) fn create_link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreate {
        program: raw(program),
        target: raw(target),
        attach_type: attach_type as u32,
        flags: 0,
    };
    call_for_fd(LINK_CREATE, &mut attributes)
}

/// Replaces the program of a link; there is no moment at which none is attached.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate {
        link: raw(link),
        new_program: raw(program),
        ..LinkUpdate::default()
    };
    call(LINK_UPDATE, &mut attributes).map(drop)
}

/// Detaches the program of a link at once; closing the last descriptor of a link that was pinned does so
/// some time later.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkDetach { link: raw(link) };
    call(LINK_DETACH, &mut attributes).map(drop)
}

/// What a link of this attach type is attached to.
pub(crate) fn link_info(link: BorrowedFd<'_>, attach_type: AttachType) -> io::Result<LinkInfo> {
    let raw: RawLinkInfo = info(link)?;
    let target = match attach_type {
        // struct { u32 netns_ino; u32 attach_type; }
        AttachType::SkLookup => u64::from(raw.target[0]),
        // struct { u64 cgroup_id; u32 attach_type; }
        _ => u64::from_ne_bytes(
            // SAFETY: two u32 are eight bytes, and every pattern of them is one.
            unsafe { std::mem::transmute::<[u32; 2], [u8; 8]>(raw.target) },
        ),
    };
    Ok(LinkInfo { id: raw.id, target })
}

/// The ids of the programs attached to a cgroup, in the order in which they run there.
pub(crate) fn attached_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<Vec<u32>> {
    // The kernel admits 64 programs per hook and cgroup.
    let mut ids = [0u32; 64];
    let mut attributes = ProgramQuery {
        target: raw(cgroup),
        attach_type: attach_type as u32,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..ProgramQuery::default()
    };
    call(PROG_QUERY, &mut attributes)?;
    Ok(ids[..ids.len().min(attributes.count as usize)].to_vec())
}

/// The name of a loaded program (at most 15 bytes).
pub(crate) fn program_name(id: u32) -> io::Result<String> {
    #[repr(C)]
    #[derive(Default)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    let fd = call_for_fd(
        PROG_GET_FD_BY_ID,
        &mut ById {
            id,
            ..ById::default()
        },
    )?;
    let raw: RawProgramInfo = info(fd.as_fd())?;
    let length = raw
        .name
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(raw.name.len());
    Ok(String::from_utf8_lossy(&raw.name[..length]).into_owned())
}

/// Loads a program that uses no map: the probes of `capabilities`.
pub(crate) fn load_program(
    program_type: ProgramType,
    attach_type: AttachType,
    instructions: &[Instruction],
) -> io::Result<OwnedFd> {
    let mut attributes = ProgramLoad {
        program_type: program_type as u32,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        name: *b"adit_check\0\0\0\0\0\0",
        expected_attach_type: attach_type as u32,
        ..ProgramLoad::default()
    };
    let mut attempts = 0;
    loop {
        attempts += 1;
        match call_for_fd(PROG_LOAD, &mut attributes) {
            // A signal interrupted the verifier.
            Err(error)
                if error.raw_os_error() == Some(libc::EAGAIN) && attempts < LOAD_ATTEMPTS => {}
            result => return result,
        }
    }
}

/// How often a program is loaded before an interruption is taken for a failure (libbpf's number).
pub(crate) const LOAD_ATTEMPTS: u32 = 5;

/// Makes an unpinned SOCKMAP of one slot: a probe of `capabilities`.
pub(crate) fn create_sockmap() -> io::Result<Map<u32, u64>> {
    const SOCKMAP: u32 = 15;
    let mut attributes = MapCreate {
        map_type: SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        flags: 0,
    };
    Ok(Map {
        fd: call_for_fd(MAP_CREATE, &mut attributes)?,
        types: std::marker::PhantomData,
    })
}

/// A map, typed by its key and value.
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    types: std::marker::PhantomData<fn(K, V)>,
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Opens a pinned map.
    ///
    /// # Errors
    /// `InvalidData` if its sizes are not those of `K`, `V` and `entries`: an other layout's map.
    pub(crate) fn open(path: &Path, entries: u32) -> io::Result<Self> {
        let fd = open_pin(path)?;
        let raw: RawMapInfo = info(fd.as_fd())?;
        if (
            raw.key_size as usize,
            raw.value_size as usize,
            raw.max_entries,
        ) != (size_of::<K>(), size_of::<V>(), entries)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the pinned map has keys of {} bytes, values of {} and {} entries; expected {}, {} and {entries}",
                    raw.key_size,
                    raw.value_size,
                    raw.max_entries,
                    size_of::<K>(),
                    size_of::<V>()
                ),
            ));
        }
        Ok(Self {
            fd,
            types: std::marker::PhantomData,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn element(&self, key: u64, value: u64) -> MapElement {
        MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key,
            value,
            ..MapElement::default()
        }
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = std::mem::MaybeUninit::<V>::zeroed();
        let mut attributes = self.element((&raw const *key) as u64, value.as_mut_ptr() as u64);
        match call(MAP_LOOKUP_ELEM, &mut attributes) {
            // SAFETY: zeroed or filled by the kernel; any bit pattern is a `V` (`Plain`).
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of a key, new or not.
    pub(crate) fn set(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attributes = self.element((&raw const *key) as u64, (&raw const *value) as u64);
        call(MAP_UPDATE_ELEM, &mut attributes).map(drop)
    }

    /// Removes a key; whether it was there. (A SOCKMAP reports an empty slot as EINVAL.)
    pub(crate) fn remove(&self, key: &K) -> io::Result<bool> {
        let mut attributes = self.element((&raw const *key) as u64, 0);
        match call(MAP_DELETE_ELEM, &mut attributes) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// All keys. Nobody else changes the map meanwhile, or the caller can live with a miss.
    pub(crate) fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        loop {
            let previous = keys.last().map_or(0, |key| (&raw const *key) as u64);
            let mut next = std::mem::MaybeUninit::<K>::zeroed();
            let mut attributes = self.element(previous, next.as_mut_ptr() as u64);
            match call(MAP_GET_NEXT_KEY, &mut attributes) {
                // SAFETY: zeroed or filled by the kernel; any bit pattern is a `K` (`Plain`).
                Ok(_) => keys.push(unsafe { next.assume_init() }),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }
}
