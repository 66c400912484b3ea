//! The body of a message as it comes, whatever version of HTTP carries it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{HeaderMap, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::task::AbortHandle;

use super::body::BodyError;
use super::headers::list_size;
use super::http::MAX_HEADER_LIST;
use super::http2::Before;

/// A body that comes.
pub enum Incoming {
    /// None.
    Empty,
    /// Over HTTP/1.
    Http1(hyper::body::Incoming),
    /// Over HTTP/2.
    Http2(Stream),
}

/// One that comes over HTTP/2.
pub struct Stream {
    recv: RecvStream,
    /// What is left of the length that was stated.
    left: Option<u64>,
    data_ended: bool,
    side: Side,
}

enum Side {
    /// From a client, which waits for 100 if that is there.
    Client(Option<Before>),
    /// From an endpoint. The request's body goes on being sent, and is not without the response.
    Endpoint(Option<AbortHandle>),
}

impl From<hyper::body::Incoming> for Incoming {
    fn from(incoming: hyper::body::Incoming) -> Self {
        Self::Http1(incoming)
    }
}

impl Incoming {
    /// The body of a request, of that length if it is known. Its client waits for 100 if
    /// `expects` is there, which gets it when the body is asked for.
    pub fn request(recv: RecvStream, length: Option<u64>, expects: Option<Before>) -> Self {
        Self::http2(recv, length, Side::Client(expects))
    }

    /// The body of a response. `upload` sends what is left of its request's body.
    pub fn response(recv: RecvStream, length: Option<u64>, upload: Option<AbortHandle>) -> Self {
        Self::http2(recv, length, Side::Endpoint(upload))
    }

    fn http2(recv: RecvStream, length: Option<u64>, side: Side) -> Self {
        if recv.is_end_stream() {
            return Self::Empty;
        }
        Self::Http2(Stream {
            recv,
            left: length,
            data_ended: false,
            side,
        })
    }
}

impl Stream {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.data_ended {
            let data = self.recv.poll_data(cx);
            if let Side::Client(expects) = &mut self.side
                && let Some(expects) = expects.take()
                && data.is_pending()
            {
                expects.push(StatusCode::CONTINUE, HeaderMap::new());
            }
            match ready!(data) {
                Some(Ok(data)) => {
                    // Whoever takes it passes it on before it asks for more.
                    let _ = self.recv.flow_control().release_capacity(data.len());
                    if let Some(left) = &mut self.left {
                        *left = left.saturating_sub(data.len() as u64);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(self.failed(error)),
                None => self.data_ended = true,
            }
        }
        match ready!(self.recv.poll_trailers(cx)) {
            Ok(Some(trailers)) if list_size(&trailers) > MAX_HEADER_LIST as usize => {
                Poll::Ready(Some(Err(BodyError::Trailers)))
            }
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(self.failed(error)),
        }
    }

    /// An endpoint that has answered may want no more of the request, and says NO_ERROR after
    /// its response (RFC 9113 8.1). What came before is whole then, if it is as long as stated.
    fn failed(&self, error: h2::Error) -> Option<Result<Frame<Bytes>, BodyError>> {
        let whole = matches!(self.side, Side::Endpoint(_))
            && error.reason() == Some(Reason::NO_ERROR)
            && self.left.is_none_or(|left| left == 0);
        (!whole).then_some(Err(error.into()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Who does not want all of a response has no use for the rest of its request either.
        if let Side::Endpoint(Some(upload)) = &self.side
            && !self.recv.is_end_stream()
        {
            upload.abort();
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Http1(incoming) => Pin::new(incoming).poll_frame(cx).map_err(BodyError::Http1),
            Self::Http2(stream) => stream.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Http1(incoming) => incoming.is_end_stream(),
            Self::Http2(stream) => stream.recv.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Http1(incoming) => incoming.size_hint(),
            Self::Http2(stream) => match stream.left {
                Some(left) => SizeHint::with_exact(left),
                None => SizeHint::default(),
            },
        }
    }
}
