//! The body of a request, towards an endpoint.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

use super::progress::poll_incoming;
use super::{BodyError, Replay, RequestProgress};
use crate::proxy::incoming::Incoming;
use crate::proxy::mirror::Piece;

/// The body of a request towards an endpoint.
pub enum RequestBody {
    /// None.
    Empty,
    /// Passed on once.
    Stream {
        /// From the client.
        incoming: Incoming,
        /// What is known of it.
        progress: Rc<RequestProgress>,
    },
    /// Kept, as long as it is short, to be sent again.
    Replay {
        /// What all tries share.
        shared: Rc<Replay>,
        /// Which try this is.
        attempt: u32,
        /// The next of the kept chunks.
        at: usize,
    },
    /// One piece.
    Full(Option<Bytes>),
    /// A copy of another request's.
    Mirrored(mpsc::Receiver<Piece>),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Stream { incoming, progress } => poll_incoming(incoming, progress, cx),
            Self::Replay {
                shared,
                attempt,
                at,
            } => shared.poll_frame(cx, *attempt, at),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Mirrored(pieces) => Poll::Ready(match ready!(pieces.poll_recv(cx)) {
                Some(Piece::Frame(frame)) => Some(Ok(frame)),
                Some(Piece::End) => None,
                None => Some(Err(BodyError::Superseded)),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream { incoming, .. } => incoming.is_end_stream(),
            Self::Replay { shared, at, .. } => shared.is_end_stream(*at),
            Self::Full(bytes) => bytes.is_none(),
            Self::Mirrored(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream { incoming, .. } => incoming.size_hint(),
            Self::Replay { shared, at, .. } => shared.size_hint(*at),
            Self::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Mirrored(_) => SizeHint::default(),
        }
    }
}
