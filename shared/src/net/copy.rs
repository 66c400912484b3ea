//! The copy loop between an app's socket and a tunnel, or between two sockets.
//!
//! An idle connection holds no buffer: a direction waits for its socket to be readable, then
//! borrows one. The first is small; while reads come back full the next is larger, up to
//! 1 MiB, which is what makes bulk cheap; and it shrinks again.
//!
//! Ends are kept apart: an orderly end (FIN) in one direction becomes an orderly end in the
//! other, a reset becomes a reset. After one direction has ended the other may go on, but not
//! for ever without a byte.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::splice::Splicer;
use crate::hbone::buffer::{BufferPool, SizeClass};
use crate::hbone::{ResetReason, Tunnel, TunnelError, TunnelReader, TunnelWriter};

/// Counts what is copied.
pub trait Meter {
    /// `bytes` were read from the app and given on.
    fn from_app(&self, bytes: u64);
    /// `bytes` were given to the app.
    fn to_app(&self, bytes: u64);
}

/// Times of a copy.
#[derive(Debug, Clone, Copy)]
pub struct CopyOptions {
    /// After one direction has ended, the other ends when it moved nothing for so long.
    pub half_closed_idle: Duration,
    /// Both end when nothing moved for so long; `None`: never.
    pub idle: Option<Duration>,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            half_closed_idle: Duration::from_secs(3600),
            idle: None,
        }
    }
}

/// Why a copy ended before both directions were done.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The app's socket failed.
    #[error("app: {0}")]
    App(#[source] io::Error),
    /// The other socket failed.
    #[error("peer: {0}")]
    Peer(#[source] io::Error),
    /// The tunnel failed.
    #[error("tunnel: {0}")]
    Tunnel(#[from] TunnelError),
    /// Nothing moved for too long.
    #[error("idle for {0:?}")]
    Idle(Duration),
}

/// Closes `stream` so that its peer reads a reset, not an end.
pub fn abort(stream: &TcpStream) {
    // If it fails the peer reads an end after all; there is nothing better to do.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Copies both ways between an app and a tunnel until both have ended.
///
/// # Errors
/// [`CopyError`]; both sides have been reset then.
pub async fn app_to_tunnel(
    app: &TcpStream,
    tunnel: Tunnel,
    meter: &impl Meter,
    options: CopyOptions,
) -> Result<(), CopyError> {
    let (mut reader, mut writer) = tunnel.split();
    let moved = Cell::new(0);
    let result = {
        let up = pin!(upload(app, &mut writer, meter, &moved));
        let down = pin!(download(app, &mut reader, meter, &moved));
        both(up, down, &moved, options).await
    };
    if result.is_err() {
        abort(app);
        writer.reset(ResetReason::ConnectionReset);
    }
    result
}

/// Copies both ways between an app and another socket until both have ended.
///
/// # Errors
/// [`CopyError`]; both sides have been reset then.
pub async fn app_to_tcp(
    app: &TcpStream,
    peer: &TcpStream,
    meter: &impl Meter,
    options: CopyOptions,
) -> Result<(), CopyError> {
    let moved = Cell::new(0);
    let count = |bytes: usize| moved.set(moved.get() + bytes as u64);
    let result = {
        let up = pin!(async {
            let counted = |n| {
                meter.from_app(n as u64);
                count(n);
            };
            pump(app, peer, counted)
                .await
                .map_err(|side| side.error(CopyError::App, CopyError::Peer))
        });
        let down = pin!(async {
            let counted = |n| {
                meter.to_app(n as u64);
                count(n);
            };
            pump(peer, app, counted)
                .await
                .map_err(|side| side.error(CopyError::Peer, CopyError::App))
        });
        both(up, down, &moved, options).await
    };
    if result.is_err() {
        abort(app);
        abort(peer);
    }
    result
}

/// Runs both directions to their ends, within the times of `options`.
async fn both(
    mut up: impl Future<Output = Result<(), CopyError>> + Unpin,
    mut down: impl Future<Output = Result<(), CopyError>> + Unpin,
    moved: &Cell<u64>,
    options: CopyOptions,
) -> Result<(), CopyError> {
    // Boxed, so that a connection without this timer does not carry it.
    let mut idle = options.idle.map(|limit| Box::pin(stalled(moved, limit)));
    let up_ended = tokio::select! {
        biased;
        ended = &mut up => { ended?; true }
        ended = &mut down => { ended?; false }
        error = async { match &mut idle { Some(idle) => idle.await, None => std::future::pending().await } } => {
            return Err(error);
        }
    };
    let limit = options.idle.map_or(options.half_closed_idle, |i| {
        i.min(options.half_closed_idle)
    });
    let idle = Box::pin(stalled(moved, limit));
    tokio::select! {
        biased;
        ended = async { if up_ended { down.await } else { up.await } } => ended,
        error = idle => Err(error),
    }
}

/// Returns when nothing has moved for `limit` (at the most twice that).
async fn stalled(moved: &Cell<u64>, limit: Duration) -> CopyError {
    loop {
        let before = moved.get();
        sleep(limit).await;
        if moved.get() == before {
            return CopyError::Idle(limit);
        }
    }
}

async fn upload(
    app: &TcpStream,
    writer: &mut TunnelWriter,
    meter: &impl Meter,
    moved: &Cell<u64>,
) -> Result<(), CopyError> {
    let mut class = SizeClass::Kib16;
    loop {
        app.readable().await.map_err(CopyError::App)?;
        // Room first, buffer second: a connection whose peer reads slowly holds neither.
        let capacity = writer.capacity(class.bytes()).await?;
        let mut buffer = BufferPool::local().take(SizeClass::for_len(capacity));
        let room = capacity.min(buffer.class().bytes());
        match app.try_read(&mut buffer[..room]) {
            Ok(0) => return Ok(writer.finish()?),
            Ok(read) => {
                writer.send_chunk(buffer.freeze(read))?;
                meter.from_app(read as u64);
                moved.set(moved.get() + read as u64);
                class = next_class(class, read, room);
                if read < room {
                    // Others on the connection may want what this one does not need now.
                    writer.release_capacity();
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => writer.release_capacity(),
            Err(e) => return Err(CopyError::App(e)),
        }
    }
}

async fn download(
    app: &TcpStream,
    reader: &mut TunnelReader,
    meter: &impl Meter,
    moved: &Cell<u64>,
) -> Result<(), CopyError> {
    while let Some(chunk) = reader.read_chunk().await? {
        write_all(app, &chunk).await.map_err(CopyError::App)?;
        reader.release(chunk.len());
        meter.to_app(chunk.len() as u64);
        moved.set(moved.get() + chunk.len() as u64);
    }
    end_of_stream(app).map_err(CopyError::App)
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// FIN. A socket whose peer is gone already needs none.
fn end_of_stream(to: &TcpStream) -> io::Result<()> {
    match SockRef::from(to).shutdown(Shutdown::Write) {
        Err(e) if e.kind() != io::ErrorKind::NotConnected => Err(e),
        _ => Ok(()),
    }
}

/// Which socket failed.
enum Side {
    Source(io::Error),
    Sink(io::Error),
}

impl Side {
    fn error(
        self,
        source: impl FnOnce(io::Error) -> CopyError,
        sink: impl FnOnce(io::Error) -> CopyError,
    ) -> CopyError {
        match self {
            Self::Source(e) => source(e),
            Self::Sink(e) => sink(e),
        }
    }
}

/// One direction between two sockets: through a small buffer at first, and inside the kernel
/// (splice) while it is bulk.
async fn pump(from: &TcpStream, to: &TcpStream, counted: impl Fn(usize)) -> Result<(), Side> {
    let small = SizeClass::Kib16;
    loop {
        from.readable().await.map_err(Side::Source)?;
        let mut buffer = BufferPool::local().take(small);
        match from.try_read(&mut buffer[..small.bytes()]) {
            Ok(0) => return end_of_stream(to).map_err(Side::Sink),
            Ok(read) => {
                write_all(to, &buffer[..read]).await.map_err(Side::Sink)?;
                counted(read);
                if read < small.bytes() {
                    continue;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(Side::Source(e)),
        }
        drop(buffer);
        // Out of descriptors: the buffer does it too.
        let Ok(mut splicer) = Splicer::new() else {
            continue;
        };
        loop {
            match splicer.fill(from) {
                Ok(0) => return end_of_stream(to).map_err(Side::Sink),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(Side::Source(e)),
            }
            while splicer.pending() > 0 {
                match splicer.drain(to) {
                    Ok(written) => counted(written),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        to.writable().await.map_err(Side::Sink)?;
                    }
                    Err(e) => return Err(Side::Sink(e)),
                }
            }
            // Lets the worker's other connections have their turn.
            tokio::task::consume_budget().await;
        }
    }
}

/// Full reads ask for more at once, small ones for less.
fn next_class(class: SizeClass, read: usize, room: usize) -> SizeClass {
    if read == room && room >= class.bytes() {
        class.larger()
    } else if read < class.smaller().bytes() {
        class.smaller()
    } else {
        class
    }
}
