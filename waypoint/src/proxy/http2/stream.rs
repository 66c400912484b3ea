//! A stream of HTTP/2 whose two sides have agreed on another protocol (RFC 8441), as the bytes
//! that it carries.

use std::io;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

/// Most that is claimed of the windows at once.
const MOST: usize = 64 << 10;

/// Bytes in both directions.
pub struct Stream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    finished: bool,
}

impl Stream {
    /// Of a stream whose response has been sent, or has come.
    pub fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self {
            send,
            recv,
            finished: false,
        }
    }

    /// The next bytes; `None` at the end. They count against the window until they are
    /// [released](Self::release).
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_read_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            match ready!(self.recv.poll_data(cx)) {
                None => return Poll::Ready(Ok(None)),
                // DATA without bytes ends nothing.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Ok(Some(data))),
                // It has sent all and wants no more (RFC 9113 8.1).
                Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => {
                    return Poll::Ready(Ok(None));
                }
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
            }
        }
    }

    /// `n` bytes that were read have been consumed.
    pub fn release(&mut self, n: usize) {
        // It fails for what was not read, or if the stream has ended.
        let _ = self.recv.flow_control().release_capacity(n);
    }

    /// How much of `want` bytes may be sent now; at least one.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_capacity(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(want.clamp(1, MOST));
        loop {
            match self.send.capacity() {
                0 => match ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                    None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                },
                n => return Poll::Ready(Ok(n)),
            }
        }
    }

    /// Sends what there is capacity for.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn send(&mut self, data: Bytes) -> io::Result<()> {
        self.send.send_data(data, false).map_err(into_io)
    }

    /// Nothing more is sent.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn finish(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.finished, true) {
            return Ok(());
        }
        self.send.send_data(Bytes::new(), true).map_err(into_io)
    }

    /// Ends both directions, as RST does a connection of TCP (RFC 8441 5).
    pub fn reset(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}

fn into_io(error: h2::Error) -> io::Error {
    match error.reason() {
        _ if error.is_io() => error
            .into_io()
            .unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()),
        Some(Reason::STREAM_CLOSED) => io::Error::new(io::ErrorKind::BrokenPipe, error),
        // RFC 8441 5.
        Some(Reason::CANCEL) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        _ => io::Error::other(error),
    }
}
