//! What this kernel and this machine can do, each found out by doing it: a version number would not tell
//! of backports, of build options, or of what a container may not do.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use socket2::{Domain, Socket, Type};

use crate::bpf::{self, AttachType, Instruction, ProgramType};
use crate::foreign::foreign_programs;
use crate::netns::{NetnsFd, socket_netns_cookie};
use crate::pins::{NodeConfig, is_bpffs, is_cgroup2};
use crate::routing;
use crate::socket::{Direction, listener_socket};
use crate::sysctl;

/// One thing that capture needs of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// What it is, in the kernel's words.
    pub feature: &'static str,
    /// What Adit does with it.
    pub needed_for: &'static str,
    /// The first kernel that has it, or the setting that gives it.
    pub since: &'static str,
    /// Whether pods can be enrolled without it.
    pub required: bool,
    /// Whether it is there.
    pub present: bool,
    /// What was found: the reason when it is missing.
    pub detail: String,
}

/// Tries everything that capture needs. Attaches programs that let everything pass, for a moment; changes
/// nothing else.
pub fn capabilities(config: &NodeConfig) -> Vec<Capability> {
    let connect4 = |code: &[Instruction]| {
        bpf::load_program(ProgramType::CgroupSockAddr, AttachType::Connect4, code)
    };
    let lookup =
        |code: &[Instruction]| bpf::load_program(ProgramType::SkLookup, AttachType::SkLookup, code);
    let mut found = vec![
        required(
            "cgroup v2",
            "telling the pods' processes from others",
            "4.5; not cgroup v1",
            {
                if is_cgroup2(&config.cgroup) {
                    Ok(config.cgroup.display().to_string())
                } else {
                    Err(format!(
                        "{} is not in a cgroup v2 hierarchy",
                        config.cgroup.display()
                    ))
                }
            },
        ),
        required(
            "BPF file system",
            "capture that outlives ztunnel's process",
            "4.4",
            bpffs(config),
        ),
        required(
            "cgroup/connect4",
            "capturing outbound IPv4",
            "4.17",
            outcome(connect4(&allow())),
        ),
        required(
            "cgroup/connect6",
            "capturing outbound IPv6",
            "4.17",
            outcome(bpf::load_program(
                ProgramType::CgroupSockAddr,
                AttachType::Connect6,
                &allow(),
            )),
        ),
        required(
            "network namespace cookie in connect hooks",
            "knowing the pod that connects",
            "5.7",
            outcome(connect4(&with_call(&[], GET_NETNS_COOKIE))),
        ),
        required(
            "bpf_setsockopt(SO_MARK) in connect hooks",
            "steering a connection",
            "5.8",
            outcome(connect4(&set_option(libc::SO_MARK))),
        ),
        required(
            "bpf_set_retval",
            "answering ECONNREFUSED while ztunnel is away",
            "5.18",
            outcome(connect4(&with_call(
                &[move_immediate(1, -libc::ECONNREFUSED)],
                SET_RETVAL,
            ))),
        ),
        required(
            "cgroup links",
            "replacing a running program without a gap",
            "5.7",
            attach_to_cgroup(config),
        ),
        required(
            "sk_lookup",
            "handing connections to ztunnel",
            "5.9",
            outcome(lookup(&allow())),
        ),
        required(
            "ingress interface in sk_lookup",
            "telling arriving connections from ztunnel's own",
            "5.17",
            outcome(lookup(&[
                load_word(0, 1, INGRESS_IFINDEX),
                move_immediate(0, 1),
                EXIT,
            ])),
        ),
        required(
            "network namespace links",
            "replacing a running program without a gap",
            "5.9",
            attach_to_netns(),
        ),
        required(
            "listening sockets in a SOCKMAP",
            "noticing at once that ztunnel has gone",
            "5.7",
            listener_in_sockmap(),
        ),
        required(
            "SO_NETNS_COOKIE",
            "naming a pod to the hooks",
            "5.14",
            own_cookie(),
        ),
        required(
            "transparent sockets",
            "keeping source and destination addresses",
            "2.6.28 and CAP_NET_ADMIN",
            outcome(listener_socket(
                (Ipv4Addr::LOCALHOST, 0).into(),
                Direction::Inbound,
            )),
        ),
        required(
            "policy routing",
            "looping marked connections over lo",
            "CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES",
            match routing::supports_rules() {
                Ok(()) => Ok(String::new()),
                Err(error) => Err(error.to_string()),
            },
        ),
        required(
            "mark settings of TCP",
            "answers of the app that find ztunnel",
            "5.14",
            {
                let missing = sysctl::missing();
                if missing.is_empty() {
                    Ok(String::new())
                } else {
                    Err(missing.join(", "))
                }
            },
        ),
    ];
    found.push(Capability {
        required: false,
        ..required(
            "bpf_setsockopt(SO_REUSEADDR) in bind hooks",
            "apps without SO_REUSEADDR that bind a port which captured connections use",
            "6.1",
            shared_ports(),
        )
    });
    found.push(Capability {
        required: false,
        ..required(
            "sockops",
            "letting the kubelet's probes through",
            // For the cookie of its network namespace.
            "5.15",
            outcome(bpf::load_program(
                ProgramType::SockOps,
                AttachType::SockOps,
                &with_call(&[], GET_NETNS_COOKIE),
            )),
        )
    });
    found.push(Capability {
        required: false,
        ..required(
            "no other socket load balancer",
            "seeing the service that a pod asks for",
            "a setting of the CNI",
            no_foreign_programs(config),
        )
    });
    found
}

/// Whether the programs of bind() can do their work.
pub(crate) fn shared_ports() -> Result<String, String> {
    let code = set_option(libc::SO_REUSEADDR);
    outcome(
        [AttachType::Bind4, AttachType::Bind6]
            .into_iter()
            .try_for_each(|attach_type| {
                bpf::load_program(ProgramType::CgroupSockAddr, attach_type, &code).map(drop)
            }),
    )
}

fn required(
    feature: &'static str,
    needed_for: &'static str,
    since: &'static str,
    result: Result<String, String>,
) -> Capability {
    let present = result.is_ok();
    let detail = result.unwrap_or_else(|reason| reason);
    Capability {
        feature,
        needed_for,
        since,
        required: true,
        present,
        detail,
    }
}

fn outcome<T>(result: io::Result<T>) -> Result<String, String> {
    result
        .map(|_| String::new())
        .map_err(|error| error.to_string())
}

fn bpffs(config: &NodeConfig) -> Result<String, String> {
    let path = config.bpffs.display();
    if is_bpffs(&config.bpffs) {
        return Ok(format!("mounted on {path}"));
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known
        .lines()
        .any(|line| line.split_whitespace().last() == Some("bpf"))
    {
        Ok(format!("will be mounted on {path}"))
    } else {
        Err("the kernel has none (CONFIG_BPF_SYSCALL)".to_owned())
    }
}

fn attach_to_cgroup(config: &NodeConfig) -> Result<String, String> {
    let attach = || -> io::Result<OwnedFd> {
        let program =
            bpf::load_program(ProgramType::CgroupSockAddr, AttachType::Connect4, &allow())?;
        let cgroup = File::open(&config.cgroup)?;
        bpf::create_link(program.as_fd(), cgroup.as_fd(), AttachType::Connect4)
    };
    attach().map(drop).map(|()| String::new()).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => {
            "not permitted: CAP_BPF and CAP_NET_ADMIN are needed, and no other program may be attached exclusively".to_owned()
        }
        _ => error.to_string(),
    })
}

fn attach_to_netns() -> Result<String, String> {
    let attach = || -> io::Result<OwnedFd> {
        let program = bpf::load_program(ProgramType::SkLookup, AttachType::SkLookup, &allow())?;
        bpf::create_link(
            program.as_fd(),
            NetnsFd::current()?.as_fd(),
            AttachType::SkLookup,
        )
    };
    outcome(attach())
}

fn listener_in_sockmap() -> Result<String, String> {
    let insert = || -> io::Result<()> {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        listener.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        listener.listen(1)?;
        bpf::create_sockmap()?.set(&0, &(listener.as_raw_fd() as u64))
    };
    outcome(insert())
}

fn own_cookie() -> Result<String, String> {
    let read = || -> io::Result<u64> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        socket_netns_cookie(socket.as_fd())
    };
    outcome(read())
}

fn no_foreign_programs(config: &NodeConfig) -> Result<String, String> {
    let programs = foreign_programs(&config.cgroup).map_err(|error| error.to_string())?;
    if programs.is_empty() {
        return Ok(String::new());
    }
    let described: Vec<String> = programs
        .iter()
        .map(|program| {
            format!(
                "{} (id {}, {}) at {}: {}",
                program.name,
                program.id,
                program.owner.unwrap_or("unknown"),
                program.cgroup,
                program.remedy
            )
        })
        .collect();
    Err(described.join("; "))
}

const GET_NETNS_COOKIE: i32 = 122;
const SETSOCKOPT: i32 = 49;
const SET_RETVAL: i32 = 187;
/// Offset of `ingress_ifindex` in `struct bpf_sk_lookup`.
const INGRESS_IFINDEX: i16 = 64;

const EXIT: Instruction = Instruction {
    code: 0x95,
    registers: 0,
    offset: 0,
    immediate: 0,
};

const fn move_immediate(register: u8, immediate: i32) -> Instruction {
    Instruction {
        code: 0xb7,
        registers: register,
        offset: 0,
        immediate,
    }
}

const fn load_word(register: u8, base: u8, offset: i16) -> Instruction {
    Instruction {
        code: 0x61,
        registers: register | base << 4,
        offset,
        immediate: 0,
    }
}

const fn call(helper: i32) -> Instruction {
    Instruction {
        code: 0x85,
        registers: 0,
        offset: 0,
        immediate: helper,
    }
}

/// `return 1`: allow, or pass.
fn allow() -> [Instruction; 2] {
    [move_immediate(0, 1), EXIT]
}

fn with_call(arguments: &[Instruction], helper: i32) -> Vec<Instruction> {
    [arguments, &[call(helper)], &allow()].concat()
}

/// `u32 value = 0; bpf_setsockopt(ctx, SOL_SOCKET, option, &value, 4); return 1`
fn set_option(option: i32) -> Vec<Instruction> {
    let store_zero = Instruction {
        code: 0x62,
        registers: 10,
        offset: -4,
        immediate: 0,
    };
    let frame_to_4 = Instruction {
        code: 0xbf,
        registers: 4 | 10 << 4,
        offset: 0,
        immediate: 0,
    };
    let minus_4 = Instruction {
        code: 0x07,
        registers: 4,
        offset: 0,
        immediate: -4,
    };
    let arguments = [
        store_zero,
        frame_to_4,
        minus_4,
        move_immediate(2, libc::SOL_SOCKET),
        move_immediate(3, option),
        move_immediate(5, 4),
    ];
    with_call(&arguments, SETSOCKOPT)
}
