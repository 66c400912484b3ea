//! HTTP on a tunnel: what connections of either version have in common, and hyper's server of
//! HTTP/1 with the limits and deadlines of a proxy, and the hand-over of a connection that another
//! protocol takes. The server of HTTP/2 is [`super::http2::server`].

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future as _, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker, ready};
use std::time::Duration;

use arc_swap::Guard;
use http::StatusCode;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::destination::{Destination, Target};
use super::interim::{Interim, Wire};
use super::io::Io;
use super::reply::Reply;
use super::request::{self, Asker};
use super::tunnel::Caller;
use super::upgrade::Upgrade;
use crate::live::{self, DownstreamView, Moved};
use crate::state::View;
use crate::worker::Worker;

/// Bytes of a request's headers, names and values (431 beyond).
pub const MAX_HEADER_LIST: u32 = 64 << 10;
/// Headers of a request (431 beyond), as hyper and Envoy have it.
pub const MAX_HEADERS: usize = 100;
/// Streams of one HTTP/2 connection inside a tunnel.
pub const MAX_STREAMS: u32 = 200;
/// How long a head may take from its first byte.
pub const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// A connection on which nothing is asked for so long is closed (Envoy: an hour).
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long a client may leave a request's body unfinished, of which it has said how long it
/// is, without sending any of it (408 beyond), as nginx has it. A body without a length may be a
/// stream on which nothing happens for hours; it has [`IDLE_TIMEOUT`].
pub const BODY_DEADLINE: Duration = Duration::from_secs(60);
/// How long a client may take to close its side when ours is closed.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// How often connections are looked over for the idle and the slow ones.
pub const SWEEP: Duration = Duration::from_secs(1);

/// One connection of a client.
pub struct Downstream {
    /// Whose thread it is on.
    pub worker: Rc<Worker>,
    /// Who is at the other end of the tunnel.
    pub caller: Rc<Caller>,
    /// Where it leads.
    pub destination: Destination,
    /// The client's address, as its node tells it.
    pub client: SocketAddr,
    /// Its bytes.
    moved: Rc<Moved>,
    opened: Instant,
    /// What it leads to in the view that a request saw last.
    target: RefCell<Option<(u64, Target)>>,
    /// Requests under way.
    active: Cell<usize>,
    /// When it last became idle, or began to send a head.
    since: Cell<Instant>,
    /// Part of a head has been read.
    reading: Cell<bool>,
    /// It is one of HTTP/2, which tells its client of a drain without closing.
    http2: bool,
    /// What comes before the response to the current request of HTTP/1.
    pub interim: Interim,
    /// A response is on its way, and not everything of it has been flushed.
    responding: Cell<bool>,
    /// hyper has refused what it has read with this status.
    refused: Cell<Option<StatusCode>>,
    /// Another protocol takes over when the connection's own is done.
    pub upgrade: RefCell<Option<Upgrade>>,
    closing: Cell<Closing>,
    waker: RefCell<Option<Waker>>,
}

/// Whether a connection is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// It is not.
    Open,
    /// After the requests that are under way.
    Graceful,
    /// At once.
    Now,
}

impl Downstream {
    /// A connection that has just been opened.
    pub fn new(
        worker: Rc<Worker>,
        caller: Rc<Caller>,
        destination: Destination,
        client: SocketAddr,
        http2: bool,
        moved: Rc<Moved>,
    ) -> Rc<Self> {
        Rc::new(Self {
            moved,
            opened: Instant::now(),
            http2,
            worker,
            caller,
            destination,
            client,
            target: RefCell::new(None),
            active: Cell::new(0),
            since: Cell::new(Instant::now()),
            reading: Cell::new(false),
            interim: Interim::default(),
            responding: Cell::new(false),
            refused: Cell::new(None),
            upgrade: RefCell::new(None),
            closing: Cell::new(Closing::Open),
            waker: RefCell::new(None),
        })
    }

    /// The configuration as it is, and what the connection leads to in it. Looked up once for
    /// each state of the configuration.
    pub fn target(&self) -> (Guard<Arc<View>>, Option<Target>) {
        let view = self.worker.shared.state.load();
        if let Some((version, target)) = &*self.target.borrow()
            && *version == view.version()
        {
            let target = target.clone();
            return (view, Some(target));
        }
        let target = self.destination.target(&view);
        if let Some(target) = &target {
            self.target.replace(Some((view.version(), target.clone())));
        }
        (view, target)
    }

    /// A request begins.
    pub fn begin(&self) {
        self.active.set(self.active.get() + 1);
        self.reading.set(false);
    }

    /// A request has ended.
    pub fn end(&self) {
        let active = self.active.get().saturating_sub(1);
        self.active.set(active);
        if active == 0 {
            self.since.set(self.worker.now());
        }
    }

    /// Whether responses should say that this is the last one.
    pub fn is_closing(&self) -> bool {
        self.closing.get() != Closing::Open || self.worker.is_draining()
    }

    /// Whether it is one of HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.http2
    }

    /// Closes it if at `now` nobody has done anything with it for too long.
    pub fn sweep(&self, now: Instant) {
        let idle = now.saturating_duration_since(self.since.get());
        let how = overdue(self.active.get(), self.reading.get(), idle);
        if how != Closing::Open {
            self.close(how);
        }
    }

    /// The connection as the admin endpoint shows it.
    pub fn view(&self, now: Instant) -> DownstreamView {
        let (received, sent) = self.moved.totals();
        DownstreamView {
            src: self.client,
            identity: Some(self.caller.identity.to_string()),
            dst: match self.destination.dialled() {
                Some(address) => address.to_string(),
                None => format!("{}:{}", self.destination.host(), self.destination.port()),
            },
            protocol: if self.http2 { "HTTP/2" } else { "HTTP/1" },
            active: self.active.get(),
            received,
            sent,
            age: live::age(self.opened, now),
        }
    }

    /// Whether it is to end.
    pub fn closing(&self) -> Closing {
        self.closing.get()
    }

    /// Has `waker` woken when that changes.
    pub fn remember(&self, waker: &Waker) {
        let mut place = self.waker.borrow_mut();
        if !place.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *place = Some(waker.clone());
        }
    }

    /// Ends it after the requests that are under way.
    pub fn drain(&self) {
        self.close(Closing::Graceful);
    }

    fn close(&self, how: Closing) {
        if self.closing.replace(how) != how
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}

/// What becomes of a connection with `active` requests that has been idle, or has begun to send
/// a head (`reading`), for so long.
fn overdue(active: usize, reading: bool, idle: Duration) -> Closing {
    match (active, reading) {
        (0, true) if idle >= HEADER_DEADLINE => Closing::Now,
        (0, false) if idle >= IDLE_TIMEOUT => Closing::Graceful,
        _ => Closing::Open,
    }
}

/// Serves HTTP/1 until the connection ends.
pub async fn serve_http1(downstream: Rc<Downstream>, io: Io) {
    let mut builder = http1::Builder::new();
    builder
        .auto_date_header(false)
        .writev(false)
        .max_header_size(MAX_HEADER_LIST as usize)
        // A little more than the headers, so that too many of them are answered.
        .max_buf_size(MAX_HEADER_LIST as usize + (16 << 10))
        .max_headers(MAX_HEADERS);
    let io = Rc::new(RefCell::new(Wire::new(io, downstream.interim.clone())));
    let waits = Rc::new(Cell::new(false));
    let watched = Watched {
        io: io.clone(),
        waits: waits.clone(),
        downstream: downstream.clone(),
    };
    let serving = downstream.clone();
    let service = service_fn(move |request| {
        let serving = serving.clone();
        async move {
            let request = request.map(Into::into);
            let response = request::serve(serving.clone(), request, Asker::Http1).await;
            serving.interim.finish().await;
            serving.responding.set(true);
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = builder.serve_connection(watched, service);
    let served = {
        let mut told = false;
        poll_fn(|cx| {
            match downstream.closing.get() {
                Closing::Open => {}
                Closing::Graceful if told => {}
                Closing::Graceful => {
                    told = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
                Closing::Now => return Poll::Ready(Ok(())),
            }
            let mut served = Pin::new(&mut connection).poll(cx);
            while served.is_pending() {
                match io.borrow_mut().poll_interim(cx) {
                    Poll::Pending => break,
                    // The client is gone; hyper's next read or write says so, too.
                    Poll::Ready(Err(_)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Ok(())) => {}
                }
                served = Pin::new(&mut connection).poll(cx);
            }
            if served.is_pending() {
                // Who waits for bytes hears of a reset. An upload that its endpoint does not
                // read waits for nothing of its client, and would outlive it.
                if !waits.get() && io.borrow_mut().io().poll_reset(cx).is_ready() {
                    return Poll::Ready(Ok(()));
                }
                downstream.remember(cx.waker());
            }
            served
        })
        .await
    };
    if let Err(error) = &served {
        debug!(client = %downstream.client, "HTTP/1: {error}");
        let refused = downstream.refused.take();
        let refused = refused.or(error.is_parse().then_some(StatusCode::BAD_REQUEST));
        if let Some(status) = refused {
            request::refused(&downstream, &refusal(status));
        }
    }
    let upgrade = downstream.upgrade.take();
    if served.is_err() {
        return;
    }
    // hyper leaves the stream open where another protocol may take it over.
    let parts = connection.into_parts();
    drop(parts.io);
    let Some(io) = Rc::into_inner(io) else {
        return;
    };
    let mut io = io.into_inner().into_io();
    match upgrade {
        Some(upgrade) => {
            io.unread(parts.read_buf);
            upgrade.carry(io).await;
        }
        // It was not: what has been written must arrive, and a reset would overtake it.
        None => {
            let closing = poll_fn(|cx| hyper::rt::Write::poll_shutdown(Pin::new(&mut io), cx));
            let _ = timeout(CLOSE_DEADLINE, closing).await;
            let draining = poll_fn(|cx| {
                while let Some(chunk) = ready!(io.poll_chunk(cx))? {
                    io.release(chunk.len());
                }
                Poll::Ready(std::io::Result::Ok(()))
            });
            let _ = timeout(CLOSE_DEADLINE, draining).await;
        }
    }
}

/// What is said to a client whose request hyper could not read.
fn refusal(status: StatusCode) -> Reply {
    let reason = match status {
        StatusCode::URI_TOO_LONG => "uri_too_long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "headers_too_large",
        _ => "malformed_request",
    };
    Reply {
        status,
        ..Reply::bad_request(reason)
    }
}

/// The status of a head without a body that refuses a request.
fn refusing(head: &[u8]) -> Option<StatusCode> {
    let status = head.strip_prefix(b"HTTP/1.1 ")?.first_chunk::<3>()?;
    let status = StatusCode::from_bytes(status).ok()?;
    (status.is_client_error() && head.ends_with(b"\r\n\r\n")).then_some(status)
}

/// A stream that notices when a head begins to arrive.
struct Watched {
    io: Rc<RefCell<Wire>>,
    /// The last read has found nothing, and its reader is told when there is something.
    waits: Rc<Cell<bool>>,
    downstream: Rc<Downstream>,
}

impl hyper::rt::Read for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let read = Pin::new(&mut *self.io.borrow_mut()).poll_read(cx, buf);
        self.waits.set(read.is_pending());
        let downstream = &self.downstream;
        if read.is_ready() && downstream.active.get() == 0 && !downstream.reading.get() {
            downstream.reading.set(true);
            downstream.since.set(downstream.worker.now());
        }
        read
    }
}

impl hyper::rt::Write for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let mut io = self.io.borrow_mut();
        let downstream = &self.downstream;
        // Nobody has been asked for a response, so that it is hyper's own: in ours it says why.
        if downstream.active.get() == 0
            && !downstream.responding.get()
            && io.is_between()
            && let Some(status) = refusing(buf)
        {
            downstream.refused.set(Some(status));
            io.replace(refusal(status).head_and_body());
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut *io).poll_write(cx, buf)
    }

    fn poll_flush(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        // hyper flushes when its buffer is empty.
        if self.downstream.active.get() == 0 {
            self.downstream.responding.set(false);
        }
        Pin::new(&mut *self.io.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.io.borrow_mut()).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_closed_when_it_is_idle_or_slow() {
        let moment = Duration::from_millis(1);
        for (active, reading, idle, expected) in [
            (0, true, HEADER_DEADLINE - moment, Closing::Open),
            (0, true, HEADER_DEADLINE, Closing::Now),
            (0, false, HEADER_DEADLINE, Closing::Open),
            (0, false, IDLE_TIMEOUT - moment, Closing::Open),
            (0, false, IDLE_TIMEOUT, Closing::Graceful),
            // A request may take as long as its own deadlines let it.
            (1, false, IDLE_TIMEOUT, Closing::Open),
            (1, true, IDLE_TIMEOUT, Closing::Open),
        ] {
            assert_eq!(
                overdue(active, reading, idle),
                expected,
                "{active} {reading} {idle:?}"
            );
        }
    }
}
