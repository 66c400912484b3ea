//! A node's capture: its hooks, and its pods as they are enrolled, released and withdrawn.
//!
//! The order of steps is what keeps a pod's traffic from getting past the mesh: everything that a captured
//! connection meets is in place before the pod's entry in the cookie map makes the hook capture, and the
//! entry goes first when the pod leaves. What a process leaves behind stays in force (pins), and is found
//! by the next one in the map of enrolments.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use socket2::SockRef;

use crate::MARK_OUT;
use crate::abi::{
    self, Address, Enrolment, MAX_ADDRESSES, MAX_PODS, MAX_UID, POD_IPV4, POD_IPV6,
    POD_OUTBOUND_ONLY, SLOTS_PER_POD, Slot,
};
use crate::bpf::{AttachType, Map};
use crate::capabilities::{capabilities, shared_ports};
use crate::links::PinnedLink;
use crate::netns::{self, NetnsFd};
use crate::pins::{NodeConfig, Pins};
use crate::programs::{LoadError, Loader};
use crate::routing::{self, Established, RoutingError};
use crate::sysctl::{SYSCTLS, UNKNOWN};
use crate::watch::SteeringWatch;

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

/// What [`Redirector::reconcile`] found to be wrong, and put right.
#[derive(Debug, Default)]
pub struct ReconcileReport {
    /// Rules that were missing or changed.
    pub restored_rules: usize,
    /// Routes that were missing or changed.
    pub restored_routes: usize,
    /// Settings of pods that had been changed.
    pub restored_sysctls: usize,
    /// Links that had been detached.
    pub restored_links: usize,
    /// Pins that had been removed.
    pub restored_pins: usize,
    /// Pods whose entry had been removed from the maps.
    pub restored_entries: usize,
    /// Pods that gained or lost an address.
    pub updated_addresses: usize,
    /// Slots of captured pods without a listener: connections there are refused.
    pub empty_slots: usize,
    /// What could not be put right.
    pub failures: Vec<Error>,
}

impl ReconcileReport {
    /// Everything that was put right.
    pub fn restored(&self) -> usize {
        self.restored_rules
            + self.restored_routes
            + self.restored_sysctls
            + self.restored_links
            + self.restored_pins
            + self.restored_entries
    }
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

struct Maps {
    cookies: Map<u64, u32>,
    pods: Map<u32, abi::Pod>,
    slots: Map<u32, u64>,
    addresses: Map<Address, u32>,
    enrolments: Map<u32, Enrolment>,
    probes: Map<abi::Flow, u8>,
}

/// A program of a cgroup.
struct Hook {
    attach_type: AttachType,
    program: OwnedFd,
    cgroup: File,
    path: PathBuf,
    pin: PathBuf,
    link: PinnedLink,
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

    /// Puts back what others removed: hooks, links, pins, entries, and of pods that this process enrolled
    /// rules, routes and settings.
    pub fn reconcile(&mut self) -> ReconcileReport {
        let mut report = ReconcileReport::default();
        if let Err(error) = self.reconcile_node(&mut report) {
            report.failures.push(error);
        }
        for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(mut pod) = self.pods.remove(&uid) else {
                continue;
            };
            if let Err(error) = self.reconcile_pod(&uid, &mut pod, &mut report) {
                report.failures.push(error);
            }
            self.pods.insert(uid, pod);
        }
        let restored = report.restored();
        if restored > 0 || !report.failures.is_empty() {
            tracing::warn!(
                node = self.node,
                ?report,
                "the capture had been tampered with"
            );
        }
        report
    }

    fn reconcile_node(&mut self, report: &mut ReconcileReport) -> Result<(), Error> {
        self.pins.create().map_err(io_error("the pin directory"))?;
        report.restored_pins += self.maps.pin_again(&self.pins)?;
        for hook in &mut self.hooks {
            if let Err(error) = hook.find_cgroup() {
                // A kubelet that restarts has none for a moment; the pods' is always there.
                if hook.attach_type == AttachType::SockOps {
                    continue;
                }
                return Err(io_error(format!("the cgroup {}", hook.path.display()))(
                    error,
                ));
            }
            if !hook.link.is_attached_to(hook.cgroup.as_fd()) {
                hook.link = PinnedLink::establish(
                    &hook.pin,
                    hook.attach_type,
                    hook.program.as_fd(),
                    hook.cgroup.as_fd(),
                )
                .map_err(io_error(format!("attaching {:?} again", hook.attach_type)))?;
                report.restored_links += 1;
            } else if !hook.link.is_pinned() {
                hook.link
                    .pin_again()
                    .map_err(io_error("pinning a hook again"))?;
                report.restored_pins += 1;
            }
        }
        Ok(())
    }

    fn reconcile_pod(
        &mut self,
        uid: &str,
        pod: &mut Pod,
        report: &mut ReconcileReport,
    ) -> Result<(), Error> {
        if pod.state == PodState::Left {
            return Ok(());
        }
        let Some(netns) = &pod.netns else {
            return Ok(());
        };
        let establish = || routing::establish(netns, &pod.given);
        let established =
            self.watch
                .exclusively(uid, establish)
                .map_err(|source| Error::Routing {
                    uid: uid.to_owned(),
                    source,
                })?;
        report.restored_rules += established.changed.rules;
        report.restored_routes += established.changed.routes;
        report.restored_sysctls += established.changed.sysctls;
        match &pod.link {
            Some(link) if link.is_attached_to(netns.as_fd()) => {
                if !link.is_pinned() {
                    link.pin_again()
                        .map_err(io_error(format!("pod {uid}: pinning its link")))?;
                    report.restored_pins += 1;
                }
            }
            // Taken off on purpose: see `unsteer`.
            None if pod.state == PodState::Released => {}
            _ => {
                pod.link = Some(self.attach(uid, pod.index, netns)?);
                report.restored_links += 1;
            }
        }
        if established.addresses != pod.addresses {
            report.updated_addresses += 1;
        }
        self.maps.describe(uid, pod, &established)?;
        self.maps.record(uid, pod)?;
        if pod.state == PodState::Captured {
            report.empty_slots += Slot::ALL
                .iter()
                .filter(|slot| !self.maps.has_listener(pod.index, **slot))
                .count();
            if self.maps.remember_cookie(pod)? {
                report.restored_entries += 1;
            }
        }
        Ok(())
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

impl Hook {
    fn establish(
        pins: &Pins,
        name: &str,
        attach_type: AttachType,
        program: OwnedFd,
        cgroup: &std::path::Path,
    ) -> Result<Self, Error> {
        let what = format!("attaching {name} to {}", cgroup.display());
        let pin = pins.of(name);
        let file = File::open(cgroup).map_err(io_error(what.clone()))?;
        let link = PinnedLink::establish(&pin, attach_type, program.as_fd(), file.as_fd())
            .map_err(io_error(what))?;
        Ok(Self {
            attach_type,
            program,
            cgroup: file,
            path: cgroup.to_owned(),
            pin,
            link,
        })
    }

    /// Looks whether the cgroup is there; one that was made anew under its path takes the place of
    /// the old one.
    fn find_cgroup(&mut self) -> io::Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let now = std::fs::metadata(&self.path)?.ino();
        if !self.cgroup.metadata().is_ok_and(|held| held.ino() == now) {
            self.cgroup = File::open(&self.path)?;
        }
        Ok(())
    }
}

/// The pin of the link of the kubelet's cgroup.
const PROBE: &str = "probe";

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
    fn open(pins: &Pins) -> Result<Self, Error> {
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
    fn incompatible(pins: &Pins) -> Option<Error> {
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
    fn pin_again(&self, pins: &Pins) -> Result<usize, Error> {
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
    fn left_behind(&self, pins: &Pins) -> Result<BTreeMap<String, Pod>, Error> {
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
    fn record(&self, uid: &str, pod: &Pod) -> Result<(), Error> {
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
    fn describe(&self, uid: &str, pod: &mut Pod, found: &Established) -> Result<(), Error> {
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
    fn remember_cookie(&self, pod: &Pod) -> Result<bool, Error> {
        let failed = |error| io_error("a pod's cookie")(error);
        if self.cookies.get(&pod.cookie).map_err(failed)? == Some(pod.index) {
            return Ok(false);
        }
        self.cookies.set(&pod.cookie, &pod.index).map_err(failed)?;
        Ok(true)
    }

    fn forget_cookie(&self, pod: &Pod) -> Result<(), Error> {
        self.cookies
            .remove(&pod.cookie)
            .map(drop)
            .map_err(io_error("a pod's cookie"))
    }

    /// Removes what the maps know of a pod, the enrolment last.
    fn forget(&self, uid: &str, pod: &Pod) -> Result<(), Error> {
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
    fn fill(&self, slot: u32, listener: BorrowedFd<'_>) -> io::Result<()> {
        // What user space reads from a SOCKMAP is the socket's cookie.
        if self.slots.get(&slot)? == Some(SockRef::from(&listener).cookie()?) {
            return Ok(());
        }
        self.slots.set(&slot, &(listener.as_raw_fd() as u64))
    }

    fn has_listener(&self, index: u32, slot: Slot) -> bool {
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
