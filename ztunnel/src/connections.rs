//! The connections that one worker carries: what the admin endpoint lists, and what is
//! closed when a policy no longer allows it or its pod goes.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use adit_shared::identity::SpiffeId;
use adit_shared::policy::{self, Connection};
use adit_shared::telemetry::Origin;
use serde::Serialize;
use slab::Slab;

use crate::pod::Pod;

/// Why a connection was closed from this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// A policy changed and denies it now.
    #[error("closed: no longer allowed by policy")]
    Denied,
    /// The certificate that its caller proved itself with is not valid any more.
    #[error("closed: the caller's certificate has expired")]
    CertificateExpired,
    /// Its pod left the mesh or the node, and the drain deadline has passed.
    #[error("closed: the pod is no longer enrolled")]
    PodGone,
    /// The proxy stops, and the drain deadline has passed.
    #[error("closed: the proxy is shutting down")]
    Shutdown,
}

/// What policy is asked about an inbound connection, kept to ask again.
#[derive(Debug, Clone)]
pub struct PolicyInput {
    /// Who calls; `None` over plaintext.
    pub identity: Option<SpiffeId>,
    /// The address it calls from.
    pub source: SocketAddr,
    /// The app's address and port.
    pub destination: SocketAddr,
    /// Whom it says that it speaks for.
    pub origin: Option<Box<Origin>>,
}

impl PolicyInput {
    /// As policies see it.
    pub fn connection(&self) -> Connection<'_> {
        Connection {
            source_identity: self.identity.as_ref(),
            source_ip: self.source.ip(),
            destination_ip: self.destination.ip(),
            destination_port: self.destination.port(),
            origin: self.origin.as_ref().map(|origin| policy::Origin {
                identity: &origin.identity,
                ip: origin.address.ip(),
            }),
        }
    }
}

/// Which way a connection goes, with what belongs to that way.
#[derive(Debug, Clone)]
pub enum Flow {
    /// The pod is the client.
    Outbound {
        /// What the app dialled.
        original: SocketAddr,
        /// Where the connection went.
        actual: SocketAddr,
        /// Whether it went through HBONE.
        hbone: bool,
    },
    /// The pod is the server.
    Inbound(PolicyInput),
}

/// One open connection.
#[derive(Debug)]
pub struct Live {
    /// Whose it is.
    pub pod: Arc<Pod>,
    /// The app's or the caller's address.
    pub client: SocketAddr,
    /// Which way it goes.
    pub flow: Flow,
    /// Version of the model whose policies allowed it last.
    judged: Cell<u64>,
    closed: Cell<Option<Closed>>,
    /// Of the task that carries it.
    waker: RefCell<Option<Waker>>,
}

impl Live {
    /// Version of the model whose policies allowed it last; 0 before that.
    pub fn judged(&self) -> u64 {
        self.judged.get()
    }

    /// The policies of that version allow it.
    pub fn set_judged(&self, version: u64) {
        self.judged.set(version);
    }

    /// Ends the connection; [`Entry::closed`] returns.
    pub fn close(&self, why: Closed) {
        if self.closed.replace(Some(why)).is_none()
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}

/// All open connections of one worker.
#[derive(Debug, Default)]
pub struct Connections {
    live: RefCell<Slab<Rc<Live>>>,
}

impl Connections {
    /// Enters a connection until the [`Entry`] is dropped.
    pub fn enter(self: &Rc<Self>, pod: Arc<Pod>, client: SocketAddr, flow: Flow) -> Entry {
        let live = Rc::new(Live {
            pod,
            client,
            flow,
            judged: Cell::new(0),
            closed: Cell::new(None),
            waker: RefCell::new(None),
        });
        let key = self.live.borrow_mut().insert(live.clone());
        Entry {
            table: self.clone(),
            key,
            live,
        }
    }

    /// Calls `visit` for each.
    pub fn for_each(&self, mut visit: impl FnMut(&Live)) {
        for (_, live) in self.live.borrow().iter() {
            visit(live);
        }
    }

    /// How many of a pod's are open.
    pub fn count(&self, uid: &str) -> usize {
        self.live
            .borrow()
            .iter()
            .filter(|(_, live)| &*live.pod.spec.uid == uid)
            .count()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.live.borrow().is_empty()
    }

    /// What the admin endpoint shows, in the shape that `istioctl` reads.
    pub fn views(&self) -> Vec<ConnectionView> {
        let mut views = Vec::with_capacity(self.live.borrow().len());
        self.for_each(|live| {
            let (inbound, original_dst, actual_dst, protocol, identity, origin) = match &live.flow {
                Flow::Outbound {
                    original,
                    actual,
                    hbone,
                } => (
                    false,
                    *original,
                    *actual,
                    if *hbone { "HBONE" } else { "TCP" },
                    None,
                    None,
                ),
                Flow::Inbound(input) => {
                    let protocol = if input.identity.is_some() {
                        "HBONE"
                    } else {
                        "TCP"
                    };
                    (
                        true,
                        input.destination,
                        input.destination,
                        protocol,
                        input.identity.clone(),
                        input
                            .origin
                            .as_ref()
                            .map(|origin| origin.identity.to_string()),
                    )
                }
            };
            views.push(ConnectionView {
                uid: live.pod.spec.uid.clone(),
                inbound,
                src: live.client,
                original_dst,
                actual_dst,
                protocol,
                identity: identity.map(|id| id.to_string()),
                origin,
            });
        });
        views
    }
}

/// One open connection in the admin endpoint's dump.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionView {
    /// Whose it is.
    #[serde(skip)]
    pub uid: Arc<str>,
    /// Which list it belongs to.
    #[serde(skip)]
    pub inbound: bool,
    /// Client address.
    pub src: SocketAddr,
    /// What was dialled.
    pub original_dst: SocketAddr,
    /// Where it went.
    pub actual_dst: SocketAddr,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// Who calls, for inbound HBONE.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Whom it says that it speaks for; believed of waypoints that serve the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
}

/// Keeps a connection in the table.
#[derive(Debug)]
pub struct Entry {
    table: Rc<Connections>,
    key: usize,
    live: Rc<Live>,
}

impl Entry {
    /// Which way the connection goes.
    pub fn flow(&self) -> &Flow {
        &self.live.flow
    }

    /// The policies of that version of the model allow it.
    pub fn set_judged(&self, version: u64) {
        self.live.set_judged(version);
    }

    /// Runs `carrying` to its end, unless the connection has to end before.
    ///
    /// # Errors
    /// Why it had to.
    pub fn unless_closed<F: Future + Unpin>(
        &self,
        mut carrying: F,
    ) -> impl Future<Output = Result<F::Output, Closed>> {
        poll_fn(move |cx| {
            if let Some(why) = self.live.closed.get() {
                return Poll::Ready(Err(why));
            }
            let ended = Pin::new(&mut carrying).poll(cx).map(Ok);
            if ended.is_pending() {
                let mut waker = self.live.waker.borrow_mut();
                // One task carries it from its beginning to its end.
                waker.get_or_insert_with(|| cx.waker().clone());
            }
            ended
        })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.live.borrow_mut().remove(self.key);
    }
}
