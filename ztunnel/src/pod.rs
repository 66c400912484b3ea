//! A pod of this node whose traffic passes the proxy.

use std::fs::{File, Metadata};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use adit_shared::identity::{SpiffeId, SpiffeIdError, TrustDomain};
use adit_shared::model::WorkloadUid;
use adit_shared::model::enrolment::SandboxPod;
use adit_shared::net::drain::{self, DrainTrigger};
use adit_shared::proto::enrolment::Enrolment;

/// Where captured outbound connections arrive.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where plaintext for the pod arrives.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Where HBONE for the pod arrives.
pub const HBONE_PORT: u16 = 15008;

/// What the control plane asks to be enrolled, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Kubernetes pod uid.
    pub uid: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Who it is.
    pub identity: SpiffeId,
    /// Its key in workload discovery.
    pub workload: WorkloadUid,
    /// Its addresses; at least one.
    pub addresses: Vec<IpAddr>,
    /// Only what it sends is captured.
    pub outbound_only: bool,
}

/// Why an enrolment cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PodSpecError {
    /// The uid is empty or cannot be a file name.
    #[error("uid {0:?} is not a pod uid")]
    Uid(String),
    /// An address is neither 4 nor 16 bytes long.
    #[error("addresses: {0} bytes are not an IP address")]
    Address(usize),
    /// No address at all.
    #[error("addresses: at least one is needed")]
    NoAddress,
    /// Namespace and service account make no identity.
    #[error("identity: {0}")]
    Identity(#[from] SpiffeIdError),
}

impl PodSpec {
    /// Checks an [`Enrolment`].
    ///
    /// # Errors
    /// [`PodSpecError`] names the field.
    pub fn new(
        enrolment: &Enrolment,
        trust_domain: &TrustDomain,
        cluster: &str,
    ) -> Result<Self, PodSpecError> {
        let Enrolment {
            uid,
            name,
            namespace,
            service_account,
            addresses,
            outbound_only,
        } = enrolment;
        let addresses: Vec<IpAddr> = addresses
            .iter()
            .map(|raw| {
                match raw.len() {
                    4 => <[u8; 4]>::try_from(&raw[..]).map(IpAddr::from).ok(),
                    16 => <[u8; 16]>::try_from(&raw[..]).map(IpAddr::from).ok(),
                    _ => None,
                }
                .ok_or(PodSpecError::Address(raw.len()))
            })
            .collect::<Result<_, _>>()?;
        let pod = SandboxPod {
            uid: uid.clone(),
            name: name.clone(),
            namespace: namespace.clone(),
            service_account: service_account.clone(),
            addresses,
            outbound_only: *outbound_only,
            sandbox: String::new(),
        };
        Self::of_sandbox(&pod, trust_domain, cluster)
    }

    /// Checks what the CNI plugin says of a pod.
    ///
    /// # Errors
    /// [`PodSpecError`] names the field.
    pub fn of_sandbox(
        pod: &SandboxPod,
        trust_domain: &TrustDomain,
        cluster: &str,
    ) -> Result<Self, PodSpecError> {
        let SandboxPod {
            uid,
            name,
            namespace,
            ..
        } = pod;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if uid.is_empty() || uid.starts_with('.') || !uid.bytes().all(legal) {
            return Err(PodSpecError::Uid(uid.clone()));
        }
        if pod.addresses.is_empty() {
            return Err(PodSpecError::NoAddress);
        }
        Ok(Self {
            uid: uid.as_str().into(),
            name: name.as_str().into(),
            namespace: namespace.as_str().into(),
            identity: SpiffeId::new(trust_domain.clone(), namespace, &pod.service_account)?,
            workload: format!("{cluster}//Pod/{namespace}/{name}").into(),
            addresses: pod.addresses.clone(),
            outbound_only: pod.outbound_only,
        })
    }
}

/// Tells one enrolment of a pod from another one of the same pod: what was set up for an
/// earlier one (a tunnel, a listener) must not serve a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(u64);

/// An enrolled pod: its specification and a handle on its network namespace, which keeps
/// the namespace alive until the last connection is done.
#[derive(Debug)]
pub struct Pod {
    /// What the control plane said.
    pub spec: PodSpec,
    /// Which enrolment this is.
    pub incarnation: Incarnation,
    /// Ends the tunnels that peers have to this enrolment. Dropped, it ends them at once.
    pub drain: DrainTrigger,
    netns: OwnedFd,
    netns_id: Option<NetnsId>,
    busy: AtomicUsize,
}

/// A connection of the pod, from its accept to its end.
#[derive(Debug)]
pub struct Busy(Arc<Pod>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Device and inode of a network namespace, which nothing else has while it is open.
pub type NetnsId = (u64, u64);

/// The identity of the namespace that a file stands for.
pub fn netns_id(metadata: &Metadata) -> NetnsId {
    (metadata.dev(), metadata.ino())
}

impl Pod {
    /// Puts the two together.
    pub fn new(spec: PodSpec, netns: File) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            spec,
            incarnation: Incarnation(NEXT.fetch_add(1, Ordering::Relaxed)),
            drain: drain::channel().0,
            netns_id: netns.metadata().ok().as_ref().map(netns_id),
            netns: netns.into(),
            busy: AtomicUsize::new(0),
        }
    }

    /// Counts a connection, also while it is only being opened.
    pub fn busy(self: &Arc<Self>) -> Busy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.clone())
    }

    /// Whether there is any connection on any worker.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    /// Which network namespace it is in.
    pub fn netns_id(&self) -> Option<NetnsId> {
        self.netns_id
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Whether `address` is one of the pod's own.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.spec.addresses.contains(&address)
    }

    /// Whether a connection to `target` would come back to the proxy itself: its own
    /// listeners, by a loopback address or by the pod's.
    pub fn is_proxy_port(&self, target: SocketAddr) -> bool {
        matches!(target.port(), OUTBOUND_PORT | PLAINTEXT_PORT | HBONE_PORT)
            && (target.ip().is_loopback() || self.owns(target.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enrolment() -> Enrolment {
        Enrolment {
            uid: "7d0c".into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            addresses: vec![vec![10, 0, 0, 7], vec![0; 16]],
            outbound_only: false,
        }
    }

    fn spec(enrolment: &Enrolment) -> Result<PodSpec, PodSpecError> {
        PodSpec::new(enrolment, &TrustDomain::default(), "Kubernetes")
    }

    #[test]
    fn an_enrolment_becomes_a_pod() {
        let pod = spec(&enrolment()).expect("valid");
        assert_eq!(&*pod.workload, "Kubernetes//Pod/shop/web-1");
        assert_eq!(
            pod.identity.to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(pod.addresses.len(), 2);
    }

    #[test]
    fn what_cannot_be_enrolled_names_the_field() {
        for (change, text) in [
            ((|e| e.uid = "../x".into()) as fn(&mut Enrolment), "uid"),
            (|e| e.uid.clear(), "uid"),
            (|e| e.addresses = vec![vec![1, 2, 3]], "addresses: 3 bytes"),
            (|e| e.addresses.clear(), "addresses: at least one"),
            (|e| e.service_account.clear(), "identity"),
        ] {
            let mut enrolment = enrolment();
            change(&mut enrolment);
            let error = spec(&enrolment).expect_err(text).to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
