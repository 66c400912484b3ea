//! A body on its way into a stream: a frame is taken when the one before has been.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body;

use crate::proxy::body::BodyError;

/// Why a body was not sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum PipeError {
    /// Its source failed; the stream has been reset.
    #[error(transparent)]
    Body(BodyError),
    /// The peer takes no more of it, or the connection has ended.
    #[error(transparent)]
    Peer(#[from] h2::Error),
    /// The stream has ended.
    #[error("the stream has ended")]
    Ended,
}

/// Sends `body` on `stream`, as fast as its peer takes it.
pub struct Pipe<B> {
    stream: SendStream<Bytes>,
    body: B,
    /// Waits for the stream's window; and whether it is the last.
    waiting: Option<(Bytes, bool)>,
    /// What the peer is told if the body fails and does not say itself why.
    failure: Reason,
}

impl<B> Pipe<B>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    /// The peer is told `failure` if the body fails and does not say why.
    pub fn new(body: B, stream: SendStream<Bytes>, failure: Reason) -> Self {
        Self {
            stream,
            body,
            waiting: None,
            failure,
        }
    }

    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, PipeError>> {
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => return Poll::Ready(Err(PipeError::Ended)),
            }
        }
        let Some((data, last)) = self.waiting.take() else {
            return Poll::Ready(Ok(false));
        };
        self.stream.send_data(data, last)?;
        Poll::Ready(Ok(last))
    }
}

impl<B> Future for Pipe<B>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    type Output = Result<(), PipeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            if this.waiting.is_some() && ready!(this.poll_waiting(cx))? {
                return Poll::Ready(Ok(()));
            }
            let frame = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                // Who waits for the body's source hears here that its peer wants no more.
                Poll::Pending => {
                    let reason = ready!(this.stream.poll_reset(cx))?;
                    return Poll::Ready(Err(h2::Error::from(reason).into()));
                }
            };
            match frame {
                None => {
                    this.stream.send_data(Bytes::new(), true)?;
                    return Poll::Ready(Ok(()));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let last = this.body.is_end_stream();
                        if data.is_empty() {
                            // It needs no window.
                            this.stream.send_data(data, last)?;
                            if last {
                                return Poll::Ready(Ok(()));
                            }
                            continue;
                        }
                        // The least claim to the connection's window until the peer lets
                        // something pass: what one stream claims, others do not have. h2 claims
                        // the rest when it is given the data.
                        this.stream.reserve_capacity(1);
                        this.waiting = Some((data, last));
                    }
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            this.stream.send_trailers(trailers)?;
                            return Poll::Ready(Ok(()));
                        }
                    }
                },
                Some(Err(error)) => {
                    // NO_ERROR would make it whole for some who read it.
                    let reason = error.reason().filter(|reason| *reason != Reason::NO_ERROR);
                    let reason = reason.unwrap_or(this.failure);
                    this.stream.send_reset(reason);
                    return Poll::Ready(Err(PipeError::Body(error)));
                }
            }
        }
    }
}
