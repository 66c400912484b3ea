//! A node's capture: its hooks, and its pods as they are enrolled, released and withdrawn.
//!
//! The order of steps is what keeps a pod's traffic from getting past the mesh: everything that a captured
//! connection meets is in place before the pod's entry in the cookie map makes the hook capture, and the
//! entry goes first when the pod leaves. What a process leaves behind stays in force (pins), and is found
//! by the next one in the map of enrolments.

mod hook;
mod maps;
mod reconcile;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use socket2::SockRef;

use crate::MARK_OUT;
use crate::abi::{MAX_PODS, MAX_UID, Slot};
use crate::bpf::AttachType;
use crate::capabilities::{capabilities, shared_ports};
use crate::links::PinnedLink;
use crate::netns::{self, NetnsFd};
use crate::pins::{NodeConfig, Pins};
use crate::programs::{LoadError, Loader};
use crate::routing::{self, Established, RoutingError};
use crate::sysctl::SYSCTLS;
use crate::watch::SteeringWatch;
use hook::Hook;
use maps::Maps;
pub use reconcile::ReconcileReport;

/// Why capture could not be set up, for the node or for a pod.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or the machine lacks something.
    #[error("{feature} is missing (needed for {needed_for}; since {since}): {detail}")]
    Missing {
        /// What is missing.
        feature: &'static str,
        /// What it is needed for.
        needed_for: &'static str,
        /// The first kernel that has it, or the setting that gives it.
        since: &'static str,
        /// What the kernel said.
        detail: String,
    },
    /// A file, map, pin or link could not be used.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A program was refused.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The pod's network namespace could not be prepared.
    #[error("pod {uid}: {source}")]
    Routing {
        /// The pod.
        uid: String,
        /// The reason.
        source: RoutingError,
    },
    /// The uid cannot be kept.
    #[error("a pod's uid has 1 to {MAX_UID} bytes; this one has {0}")]
    InvalidUid(usize),
    /// A pod without addresses cannot be steered to.
    #[error("pod {0} has no address")]
    NoAddress(String),
    /// The node is full.
    #[error("the node has {MAX_PODS} pods enrolled, which is the most there can be")]
    TooManyPods,
    /// The pod is not enrolled, nor was it left by an earlier process.
    #[error("pod {0} is not enrolled")]
    UnknownPod(String),
    /// The outbound listener has a mark with which the kernel's own answers would leave the pod.
    #[error("pod {0}: the outbound listener must have MARK_OUT (socket::Direction::Outbound)")]
    ListenerMark(String),
    /// The namespace is not the one that the pod was enrolled with.
    #[error("pod {0} was enrolled with another network namespace")]
    OtherNamespace(String),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// A pod that shall be captured.
#[derive(Debug)]
pub struct PodRedirection<'a> {
    /// The pod's uid.
    pub uid: &'a str,
    /// Its network namespace.
    pub netns: BorrowedFd<'a>,
    /// Its addresses, the primary one of each family first. Other addresses of its interfaces are found by
    /// themselves.
    pub addresses: &'a [IpAddr],
    /// Plaintext that arrives goes to the app, as without a mesh (`ambient.istio.io/bypass-inbound-capture`);
    /// what arrives on the HBONE port is still captured.
    pub outbound_only: bool,
    /// ztunnel's listeners.
    pub listeners: Listeners<'a>,
}

/// One socket for each slot: TCP, transparent, listening in the pod's network namespace
/// ([`crate::socket::listener_socket`]), the first member of its `SO_REUSEPORT` group. Capture is refused as
/// soon as this member closes, whatever becomes of the group.
#[derive(Debug, Clone, Copy)]
pub struct Listeners<'a> {
    /// For what the app connects to.
    pub outbound: BorrowedFd<'a>,
    /// For plaintext that arrives.
    pub plaintext: BorrowedFd<'a>,
    /// For HBONE that arrives.
    pub hbone: BorrowedFd<'a>,
}

impl Listeners<'_> {
    fn of(&self, slot: Slot) -> BorrowedFd<'_> {
        match slot {
            Slot::Outbound => self.outbound,
            Slot::Plaintext => self.plaintext,
            Slot::Hbone => self.hbone,
        }
    }
}

/// What is true of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodState {
    /// An earlier process left it, and this one has not enrolled it: it is captured as that process left it,
    /// for listeners that are that process's, or gone.
    Left,
    /// Both directions are captured.
    Captured,
    /// New outbound connections pass; what arrives is still captured.
    Released,
}

/// A pod that this node's maps know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStatus {
    /// The pod's uid.
    pub uid: String,
    /// What is true of it.
    pub state: PodState,
    /// How often it was enrolled.
    pub generation: u32,
    /// The addresses it was enrolled with.
    pub addresses: Vec<IpAddr>,
    /// Whether arriving plaintext passes.
    pub outbound_only: bool,
    /// The inode of its network namespace.
    pub netns_inode: u64,
    /// Whether each of the outbound, plaintext and HBONE slots has a listener.
    pub listeners: [bool; 3],
}

/// The capture of one node. Dropping it leaves everything in force.
///
/// The methods block: entering a namespace, rtnetlink and loading a program take milliseconds, and an
/// address that is still being checked for duplicates up to four seconds.
pub struct Redirector {
    node: String,
    pins: Pins,
    maps: Maps,
    loader: Loader,
    hooks: Vec<Hook>,
    pods: BTreeMap<String, Pod>,
    outdated: Vec<PathBuf>,
    watch: Arc<SteeringWatch>,
}

struct Pod {
    index: u32,
    cookie: u64,
    netns_inode: u64,
    /// Held so that what was made there can be removed; unknown for a pod that was left.
    netns: Option<NetnsFd>,
    state: PodState,
    generation: u32,
    outbound_only: bool,
    given: Vec<IpAddr>,
    /// With the other addresses of its interfaces.
    addresses: Vec<IpAddr>,
    sysctls_before: [u8; SYSCTLS.len()],
    link: Option<PinnedLink>,
}

impl Redirector {
    /// Sets up the node's hooks, or takes over those of an earlier process, and finds the pods it left.
    ///
    /// # Errors
    /// [`Error::Missing`] names what the kernel lacks and since when there is such a thing.
    pub fn open(config: NodeConfig) -> Result<Self, Error> {
        if let Some(missing) = capabilities(&config)
            .into_iter()
            .find(|found| found.required && !found.present)
        {
            let crate::Capability {
                feature,
                needed_for,
                since,
                detail,
                ..
            } = missing;
            return Err(Error::Missing {
                feature,
                needed_for,
                since,
                detail,
            });
        }
        let pins = Pins::open(&config.bpffs, &config.node).map_err(io_error(format!(
            "the pins below {}",
            config.bpffs.display()
        )))?;
        if let Some(reason) = Maps::incompatible(&pins) {
            tracing::warn!(%reason, node = config.node, "removing the maps of another version");
            pins.clear()
                .map_err(io_error("removing the maps of another version"))?;
        }
        let mut loader = Loader::new(pins.maps());
        let bind = shared_ports().inspect_err(|reason| {
            tracing::warn!(
                reason,
                "apps without SO_REUSEADDR may find ports of theirs in use"
            );
        });
        let programs = loader.node_programs(bind.is_ok())?;
        let maps = Maps::open(&pins)?;
        let mut hooks = vec![
            Hook::establish(
                &pins,
                "connect4",
                AttachType::Connect4,
                programs.connect4,
                &config.cgroup,
            )?,
            Hook::establish(
                &pins,
                "connect6",
                AttachType::Connect6,
                programs.connect6,
                &config.cgroup,
            )?,
        ];
        if let Some([bind4, bind6]) = programs.bind {
            for (name, attach_type, program) in [
                ("bind4", AttachType::Bind4, bind4),
                ("bind6", AttachType::Bind6, bind6),
            ] {
                let hook = Hook::establish(&pins, name, attach_type, program, &config.cgroup)?;
                hooks.push(hook);
            }
        }
        if let Some(kubelet) = &config.kubelet_cgroup {
            let program = loader.probe(config.kubelet_netns)?;
            let probe = Hook::establish(&pins, PROBE, AttachType::SockOps, program, kubelet)?;
            hooks.push(probe);
        } else if let Some(link) = PinnedLink::open(&pins.of(PROBE), AttachType::SockOps) {
            link.remove()
                .map_err(io_error("detaching the probe program"))?;
        }
        let outdated = pins.outdated().map_err(io_error("listing pins"))?;
        if !outdated.is_empty() {
            tracing::warn!(
                node = config.node,
                ?outdated,
                "another version's capture is still in force"
            );
        }
        let pods = maps.left_behind(&pins)?;
        Ok(Self {
            node: config.node,
            pins,
            maps,
            loader,
            hooks,
            pods,
            outdated,
            watch: Arc::new(SteeringWatch::new().map_err(io_error("watching pods"))?),
        })
    }

    /// Lets connections from another cgroup than so far reach the pods without the mesh: the kubelet has
    /// moved, or was found only now. `netns` as [`NodeConfig::kubelet_netns`].
    ///
    /// # Errors
    /// Failures of the kernel; what was in force then stays.
    pub fn set_kubelet(
        &mut self,
        cgroup: &std::path::Path,
        netns: Option<u64>,
    ) -> Result<(), Error> {
        let program = self.loader.probe(netns)?;
        let probe = Hook::establish(&self.pins, PROBE, AttachType::SockOps, program, cgroup)?;
        self.hooks
            .retain(|hook| hook.attach_type != AttachType::SockOps);
        self.hooks.push(probe);
        Ok(())
    }

    /// Ends the node's capture for good: every pod's, the hooks, the pins. The node leaves the mesh; a
    /// process that ends for its successor leaves everything in force. Nothing else may be called after it.
    ///
    /// # Errors
    /// The first failure; everything that could be removed is.
    pub fn remove_all(&mut self) -> Result<(), Error> {
        let mut first = None;
        for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
            if let Err(error) = self.withdraw(&uid) {
                first.get_or_insert(error);
            }
        }
        self.hooks.clear();
        if let Err(source) = self.pins.remove() {
            first.get_or_insert(io_error("removing the pins")(source));
        }
        first.map_or(Ok(()), Err)
    }

    /// Tells of rules and routes that others remove from the pods that this process enrols.
    pub fn watch(&self) -> Arc<SteeringWatch> {
        self.watch.clone()
    }

    /// Captures a pod, or gives a pod that is captured new listeners, addresses or a new namespace. When
    /// this returns, every new connection of the pod is captured.
    ///
    /// # Errors
    /// A new pod is left as it was; one that was captured stays captured as it was.
    pub fn enrol(&mut self, redirection: PodRedirection<'_>) -> Result<(), Error> {
        let uid = redirection.uid;
        if uid.is_empty() || uid.len() > MAX_UID {
            return Err(Error::InvalidUid(uid.len()));
        }
        if redirection.addresses.is_empty() {
            return Err(Error::NoAddress(uid.to_owned()));
        }
        let outbound = SockRef::from(&redirection.listeners.outbound);
        let mark = outbound
            .mark()
            .map_err(io_error(format!("pod {uid}: its outbound listener")))?;
        if mark != MARK_OUT {
            return Err(Error::ListenerMark(uid.to_owned()));
        }
        let what = format!("pod {uid}: its network namespace");
        let netns = redirection
            .netns
            .try_clone_to_owned()
            .and_then(NetnsFd::try_from)
            .map_err(io_error(what.clone()))?;
        let cookie = netns.cookie().map_err(io_error(what))?;
        self.vacate(uid, cookie)?;
        if let Err(error) = self.watch.follow(uid, &netns, redirection.addresses) {
            tracing::warn!(uid, %error, "rules that others remove will be noticed late");
        }
        let establish = || routing::establish(&netns, redirection.addresses);
        let established = match self.watch.exclusively(uid, establish) {
            Ok(established) => established,
            Err(source) => {
                self.unwatch_changes(uid);
                return Err(Error::Routing {
                    uid: uid.to_owned(),
                    source,
                });
            }
        };
        let known = self.pods.remove(uid);
        let new = known.is_none();
        let mut pod = match known {
            Some(pod) => pod,
            None => Pod {
                index: match self.free_index() {
                    Some(index) => index,
                    None => {
                        self.watch.forget(uid);
                        self.undo_routing(uid, &netns, established.sysctls_before);
                        return Err(Error::TooManyPods);
                    }
                },
                cookie,
                netns_inode: netns.inode(),
                netns: None,
                state: PodState::Left,
                generation: 0,
                outbound_only: redirection.outbound_only,
                given: Vec::new(),
                addresses: Vec::new(),
                sysctls_before: established.sysctls_before,
                link: None,
            },
        };
        pod.netns = Some(netns);
        let result = self.capture(uid, &mut pod, &redirection, &established);
        if new && result.is_err() {
            // The first error is the one that says what is wrong.
            if let Err(error) = self.remove(uid, pod) {
                tracing::warn!(uid, %error, "undoing an enrolment that failed");
            }
            return result;
        }
        self.pods.insert(uid.to_owned(), pod);
        result
    }

    /// Lets new outbound connections of a pod pass; what arrives is still captured. The first step out of
    /// the mesh: drain, then [`Redirector::withdraw`].
    ///
    /// # Errors
    /// [`Error::UnknownPod`]; failures of the kernel, after which it may be tried again.
    pub fn release(&mut self, uid: &str) -> Result<(), Error> {
        let pod = self
            .pods
            .get_mut(uid)
            .ok_or_else(|| Error::UnknownPod(uid.to_owned()))?;
        self.maps.forget_cookie(pod)?;
        pod.state = PodState::Released;
        self.maps.record(uid, pod)
    }

    /// Lets what arrives at a released pod go to its app by itself; only HBONE still finds its listener,
    /// by its port. Rules and routes stay, for connections that are open or wait to be accepted. The step
    /// between [`Redirector::release`] and [`Redirector::withdraw`] that loses none of them.
    ///
    /// # Errors
    /// [`Error::UnknownPod`]; failures of the kernel, after which it may be tried again.
    pub fn unsteer(&mut self, uid: &str) -> Result<(), Error> {
        let pod = self
            .pods
            .get_mut(uid)
            .ok_or_else(|| Error::UnknownPod(uid.to_owned()))?;
        detach(uid, pod)
    }

    /// Ends the capture of a pod: its entry, program, listeners, rules and routes. Connections of the pod
    /// that are still captured break. Works for a pod whose network namespace is gone, and for one that an
    /// earlier process left.
    ///
    /// # Errors
    /// [`Error::UnknownPod`]; [`Error::Routing`] if rules or routes could not be removed, after which the
    /// pod is no longer captured all the same; other failures of the kernel, after which it may be tried
    /// again.
    pub fn withdraw(&mut self, uid: &str) -> Result<(), Error> {
        let pod = self
            .pods
            .remove(uid)
            .ok_or_else(|| Error::UnknownPod(uid.to_owned()))?;
        self.remove(uid, pod)
    }

    /// The pods that are captured, by this process or an earlier one.
    pub fn pods(&self) -> Vec<PodStatus> {
        let status = |(uid, pod): (&String, &Pod)| PodStatus {
            uid: uid.clone(),
            state: pod.state,
            generation: pod.generation,
            addresses: pod.given.clone(),
            outbound_only: pod.outbound_only,
            netns_inode: pod.netns_inode,
            listeners: Slot::ALL.map(|slot| self.maps.has_listener(pod.index, slot)),
        };
        self.pods.iter().map(status).collect()
    }

    /// Names the network namespace of a pod that an earlier process left, so that [`Redirector::withdraw`]
    /// finds it even if no process of the pod runs.
    ///
    /// # Errors
    /// [`Error::UnknownPod`]; [`Error::OtherNamespace`].
    pub fn adopt(&mut self, uid: &str, netns: BorrowedFd<'_>) -> Result<(), Error> {
        let pod = self
            .pods
            .get_mut(uid)
            .ok_or_else(|| Error::UnknownPod(uid.to_owned()))?;
        let what = format!("pod {uid}: its network namespace");
        let netns = netns
            .try_clone_to_owned()
            .and_then(NetnsFd::try_from)
            .map_err(io_error(what.clone()))?;
        if netns.cookie().map_err(io_error(what))? != pod.cookie {
            return Err(Error::OtherNamespace(uid.to_owned()));
        }
        pod.netns = Some(netns);
        Ok(())
    }

    /// Removes what a ztunnel with another layout of maps left. Not done by [`Redirector::open`]: until
    /// their enrolment here, that version's programs are all that keeps its pods' traffic from passing.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn remove_outdated(&mut self) -> Result<usize, Error> {
        let mut removed = 0;
        while let Some(directory) = self.outdated.pop() {
            std::fs::remove_dir_all(&directory)
                .map_err(io_error(format!("removing {}", directory.display())))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Makes room for a pod's enrolment with a namespace: no other pod may have it, nor this pod another.
    fn vacate(&mut self, uid: &str, cookie: u64) -> Result<(), Error> {
        let other = |(known, pod): (&String, &Pod)| {
            (known != uid && pod.cookie == cookie).then(|| known.clone())
        };
        if let Some(other) = self.pods.iter().find_map(other) {
            tracing::warn!(
                uid,
                other,
                "a pod's network namespace belonged to another pod"
            );
            self.withdraw(&other)?;
        }
        // The same pod with a new sandbox.
        if self.pods.get(uid).is_some_and(|pod| pod.cookie != cookie) {
            self.withdraw(uid)?;
        }
        Ok(())
    }

    /// The steps of [`Redirector::enrol`] once the namespace is prepared, the entry last.
    fn capture(
        &mut self,
        uid: &str,
        pod: &mut Pod,
        redirection: &PodRedirection<'_>,
        established: &Established,
    ) -> Result<(), Error> {
        pod.given = redirection
            .addresses
            .iter()
            .map(IpAddr::to_canonical)
            .collect();
        pod.outbound_only = redirection.outbound_only;
        pod.generation = pod.generation.wrapping_add(1);
        self.maps.record(uid, pod)?;
        self.maps.describe(uid, pod, established)?;
        for slot in Slot::ALL {
            self.maps
                .fill(slot.of(pod.index), redirection.listeners.of(slot))
                .map_err(io_error(format!("pod {uid}: its {slot:?} listener")))?;
        }
        if let Some(netns) = &pod.netns {
            let mine = pod.state != PodState::Left
                && pod
                    .link
                    .as_ref()
                    .is_some_and(|link| link.is_attached_to(netns.as_fd()) && link.is_pinned());
            if !mine {
                pod.link = Some(self.attach(uid, pod.index, netns)?);
            }
        }
        self.maps.remember_cookie(pod)?;
        pod.state = PodState::Captured;
        self.maps.record(uid, pod)
    }

    fn attach(&mut self, uid: &str, index: u32, netns: &NetnsFd) -> Result<PinnedLink, Error> {
        let program = self.loader.lookup(index)?;
        PinnedLink::establish(
            &self.pins.of_pod(index),
            AttachType::SkLookup,
            program.as_fd(),
            netns.as_fd(),
        )
        .map_err(io_error(format!("pod {uid}: attaching sk_lookup")))
    }

    /// The steps out, the entry first and the routing last: a marked connection that lives would otherwise
    /// leave by the pod's interface in the middle.
    fn remove(&mut self, uid: &str, mut pod: Pod) -> Result<(), Error> {
        if let Err(error) = self
            .maps
            .forget_cookie(&pod)
            .and_then(|()| detach(uid, &mut pod))
        {
            self.pods.insert(uid.to_owned(), pod);
            return Err(error);
        }
        self.maps.forget(uid, &pod)?;
        self.watch.forget(uid);
        let netns = pod.netns.take().or_else(|| {
            netns::find(pod.netns_inode).filter(|found| found.cookie().ok() == Some(pod.cookie))
        });
        match netns {
            None => Ok(()),
            Some(netns) => {
                routing::withdraw(&netns, pod.sysctls_before).map_err(|source| Error::Routing {
                    uid: uid.to_owned(),
                    source,
                })
            }
        }
    }

    /// After an attempt to enrol that failed: a pod that is captured stays watched as it was captured.
    fn unwatch_changes(&self, uid: &str) {
        let captured = self.pods.get(uid);
        let followed = captured.and_then(|pod| {
            let netns = pod.netns.as_ref()?;
            (pod.state != PodState::Left).then(|| self.watch.follow(uid, netns, &pod.given))
        });
        if !matches!(followed, Some(Ok(()))) {
            self.watch.forget(uid);
        }
    }

    fn undo_routing(&self, uid: &str, netns: &NetnsFd, before: [u8; SYSCTLS.len()]) {
        if let Err(error) = routing::withdraw(netns, before) {
            tracing::warn!(uid, %error, "undoing an enrolment that failed");
        }
    }

    fn free_index(&self) -> Option<u32> {
        let mut taken = vec![false; MAX_PODS as usize];
        for pod in self.pods.values() {
            if let Some(taken) = taken.get_mut(pod.index as usize) {
                *taken = true;
            }
        }
        // Below 1024.
        taken
            .iter()
            .position(|taken| !taken)
            .map(|index| index as u32)
    }
}

fn detach(uid: &str, pod: &mut Pod) -> Result<(), Error> {
    match pod.link.take() {
        Some(link) => link
            .remove()
            .map_err(io_error(format!("pod {uid}: detaching sk_lookup"))),
        None => Ok(()),
    }
}

/// The pin of the link of the kubelet's cgroup.
const PROBE: &str = "probe";
