//! The body of a stream: encodes responses as the transport takes them.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use adit_shared::xds::response::{Pieces, SharedResponse};
use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;
use tonic::Status;

/// What is encoded at a time: four TLS records.
const PIECE: usize = 64 * 1024;

/// Ends with the first error, or in good order when there are no more responses.
pub(super) struct ResponseBody {
    responses: mpsc::Receiver<Result<SharedResponse, Status>>,
    current: Option<Pieces>,
    ended: bool,
}

impl ResponseBody {
    pub(super) fn new(responses: mpsc::Receiver<Result<SharedResponse, Status>>) -> Self {
        Self {
            responses,
            current: None,
            ended: false,
        }
    }

    fn end(&mut self, status: &Status) -> Result<Frame<Bytes>, Status> {
        self.ended = true;
        self.current = None;
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        loop {
            if let Some(pieces) = &mut this.current {
                match pieces.next(PIECE) {
                    Ok(Some(piece)) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
                    Ok(None) => this.current = None,
                    Err(error) => {
                        let status = Status::out_of_range(error.to_string());
                        return Poll::Ready(Some(this.end(&status)));
                    }
                }
            }
            match ready!(this.responses.poll_recv(cx)) {
                Some(Ok(response)) => this.current = Some(Pieces::new(response)),
                Some(Err(status)) => return Poll::Ready(Some(this.end(&status))),
                None => return Poll::Ready(Some(this.end(&Status::ok("")))),
            }
        }
    }
}
