//! Workers from outside: how they are started and asked, and how they hand each other
//! connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use adit_shared::net::accept::AcceptPermit;
use adit_shared::net::socket::{Keepalive, prepare};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use super::{Shared, Worker};
use crate::live::Listing;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// Commands and connections that may wait for a worker.
const QUEUE: usize = 1024;

/// What a worker has to do, as others see it.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// HBONE connections, with those on their way to it.
    pub(super) connections: AtomicUsize,
    /// CONNECT streams that are open.
    pub(super) streams: AtomicUsize,
    /// Requests that have ended.
    pub(super) requests: AtomicUsize,
}

/// A connection on its way from one worker to another.
pub(super) struct HandOver {
    pub(super) stream: std::net::TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) permit: AcceptPermit,
}

/// What a worker is told.
pub(super) enum Command {
    Serve(HandOver),
    Connections { reply: oneshot::Sender<Counts> },
    List { reply: oneshot::Sender<Listing> },
}

/// What a worker holds at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// HBONE connections of clients.
    pub connections: usize,
    /// CONNECT streams on them.
    pub streams: usize,
    /// HTTP connections inside of those.
    pub http_connections: usize,
    /// Requests that have ended.
    pub requests: usize,
    /// Connections of HTTP/1 to endpoints that lie idle.
    pub idle_upstream: usize,
    /// Connections of HTTP/2 to endpoints.
    pub http2_upstream: usize,
}

/// The other workers, as each of them sees them.
#[derive(Clone)]
pub(super) struct Peer {
    pub(super) load: Arc<Load>,
    pub(super) commands: mpsc::Sender<Command>,
}

/// The outside of a worker, which ends when it is told to drain.
pub struct WorkerHandle {
    peer: Peer,
}

/// The worker's thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the worker has stopped")]
pub struct Stopped;

impl WorkerHandle {
    /// Starts all workers with their listeners. Returns the address that they listen on.
    ///
    /// # Errors
    /// The address is taken, or a thread or its runtime could not be made.
    pub fn start_all(shared: &Arc<Shared>) -> io::Result<(Vec<Self>, SocketAddr)> {
        let mut inboxes = Vec::new();
        let mut peers = Vec::new();
        let mut listeners = Vec::new();
        let mut address = shared.config.hbone_address;
        for _ in 0..shared.config.workers {
            let (commands, inbox) = mpsc::channel(QUEUE);
            let listener = listen(address)?;
            // Port 0 is one port for all.
            address = listener.local_addr()?;
            peers.push(Peer {
                load: Arc::default(),
                commands,
            });
            inboxes.push(inbox);
            listeners.push(listener);
        }
        let mut handles = Vec::new();
        for (index, (inbox, listener)) in inboxes.into_iter().zip(listeners).enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let (shared, all) = (shared.clone(), peers.clone());
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    shared
                        .telemetry
                        .metrics()
                        .watch_runtime(runtime.handle().clone());
                    let local = LocalSet::new();
                    local.block_on(&runtime, Worker::run(shared, index, all, inbox, listener));
                })?;
            handles.push(Self {
                peer: peers[index].clone(),
            });
        }
        Ok((handles, address))
    }

    /// What the worker holds now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn counts(&self) -> Result<Counts, Stopped> {
        let (reply, answer) = oneshot::channel();
        let asked = self.peer.commands.send(Command::Connections { reply });
        asked.await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// What the worker has open now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn listing(&self) -> Result<Listing, Stopped> {
        let (reply, answer) = oneshot::channel();
        let asked = self.peer.commands.send(Command::List { reply });
        asked.await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Completes when all have ended, some time after the drain signal has been given.
    pub async fn all_stopped(workers: &[Self]) {
        for worker in workers {
            worker.peer.commands.closed().await;
        }
    }

    /// Completes when one of them has ended. Before a drain that is a fault.
    pub async fn any_stopped(workers: &[Self]) {
        let ends = workers
            .iter()
            .map(|worker| Box::pin(worker.peer.commands.closed()));
        if workers.is_empty() {
            std::future::pending::<()>().await;
        }
        futures_util::future::select_all(ends).await;
    }
}

/// One member of the listener's group.
fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // What is accepted inherits it. Without it an answer in two segments waits for the delayed
    // acknowledgement of the first, 40 ms.
    prepare(&socket, &Keepalive::default())?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
