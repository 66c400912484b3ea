//! The embedded objects, loaded by aya. Maps are opened by pin or made and pinned; programs come out as
//! descriptors, and what becomes of them is `links`' business.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};

use crate::abi::MAX_PODS;
use crate::bpf;

static SOCK: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sock.o"));
static LOOKUP: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lookup.o"));
static PROBE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe.o"));

/// Why a program could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The object or one of its maps was refused.
    #[error("loading the {object} object: {source}")]
    Object {
        /// The source file's name.
        object: &'static str,
        /// aya's reason.
        source: Box<EbpfError>,
    },
    /// The kernel's verifier refused a program, or does not know its type.
    #[error("loading the program {program}: {source}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// aya's reason, with the verifier's log.
        source: Box<ProgramError>,
    },
    /// The program is not in the object, or not of the type it is made for.
    #[error("the object has no program {0} of the right type")]
    Absent(&'static str),
    /// No descriptor was left for the program.
    #[error("keeping the program {program}: {source}")]
    Descriptor {
        /// The program's name.
        program: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// The programs of a node's cgroup.
pub(crate) struct NodePrograms {
    pub(crate) connect4: OwnedFd,
    pub(crate) connect6: OwnedFd,
    /// Those of bind(), where the kernel has them.
    pub(crate) bind: Option<[OwnedFd; 2]>,
}

/// Loads programs over the maps of one pin directory.
pub(crate) struct Loader {
    pods: EbpfLoader<'static>,
    maps: PathBuf,
}

/// The constant of each pod's instance: the loader borrows what it patches into an object.
static INDICES: [u32; MAX_PODS as usize] = {
    let mut indices = [0; MAX_PODS as usize];
    let mut index = 0;
    while index < MAX_PODS {
        indices[index as usize] = index;
        index += 1;
    }
    indices
};

impl Loader {
    pub(crate) fn new(maps: &Path) -> Self {
        let mut loader = EbpfLoader::new();
        // Nothing is relocated against the kernel's types, which aya would keep in memory.
        loader.btf(None).default_map_pin_directory(maps);
        Self {
            pods: loader,
            maps: maps.to_owned(),
        }
    }

    /// `bind` says whether the kernel has what the programs of bind() need.
    pub(crate) fn node_programs(&mut self, bind: bool) -> Result<NodePrograms, LoadError> {
        let mut sock = self.object("sock", SOCK)?;
        Ok(NodePrograms {
            connect4: program(&mut sock, "adit_connect4")?,
            connect6: program(&mut sock, "adit_connect6")?,
            bind: match bind {
                true => Some([
                    program(&mut sock, "adit_bind4")?,
                    program(&mut sock, "adit_bind6")?,
                ]),
                false => None,
            },
        })
    }

    /// The program of the kubelet's cgroup. `netns` restricts it to one network namespace.
    pub(crate) fn probe(&self, netns: Option<u64>) -> Result<OwnedFd, LoadError> {
        let netns = netns.unwrap_or_default();
        let mut loader = EbpfLoader::new();
        loader.btf(None).default_map_pin_directory(&self.maps);
        loader.override_global("KUBELET_NETNS", &netns, true);
        let mut probe = loader.load(PROBE).map_err(|source| LoadError::Object {
            object: "probe",
            source: Box::new(source),
        })?;
        program(&mut probe, "adit_probe")
    }

    /// The steering program of one pod. `index` is below `MAX_PODS`.
    pub(crate) fn lookup(&mut self, index: u32) -> Result<OwnedFd, LoadError> {
        let index = INDICES
            .get(index as usize)
            .ok_or(LoadError::Absent("adit_lookup"))?;
        self.pods.override_global("POD_INDEX", index, true);
        let mut lookup = self.object("lookup", LOOKUP)?;
        program(&mut lookup, "adit_lookup")
    }

    fn object(&mut self, object: &'static str, bytes: &[u8]) -> Result<Ebpf, LoadError> {
        self.pods.load(bytes).map_err(|source| LoadError::Object {
            object,
            source: Box::new(source),
        })
    }
}

fn program(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, LoadError> {
    let refused = |source| LoadError::Program {
        program: name,
        source: Box::new(source),
    };
    let program = object.program_mut(name).ok_or(LoadError::Absent(name))?;
    let mut attempts = 0;
    loop {
        let loaded = match &mut *program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            _ => return Err(LoadError::Absent(name)),
        };
        attempts += 1;
        match loaded {
            Ok(()) => break,
            // A signal interrupted the verifier.
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN)
                    && attempts < bpf::LOAD_ATTEMPTS => {}
            Err(source) => return Err(refused(source)),
        }
    }
    let fd = program.fd().map_err(refused)?;
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| LoadError::Descriptor {
            program: name,
            source,
        })
}
