//! The body of a response, towards the client.

use std::future::Future as _;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

use super::{BodyError, RequestProgress};
use crate::proxy::exchange::Exchange;
use crate::proxy::headers::clean_trailers;
use crate::proxy::incoming::Incoming;
use crate::proxy::recheck::Recheck;
use crate::proxy::upstream::Lease;

/// The body of a response towards the client. Dropped, it ends its exchange.
pub struct ResponseBody {
    kind: Kind,
    /// Ends with the body.
    exchange: Option<Box<Exchange>>,
    recheck: Recheck,
}

enum Kind {
    Empty,
    Full(Bytes),
    Upstream {
        incoming: Incoming,
        /// Goes back into the pool when the body has been read.
        lease: Option<Lease>,
        /// Whether the request has been sent, without which the connection is of no use.
        request: Rc<RequestProgress>,
        /// The request's whole time.
        deadline: Option<Pin<Box<Sleep>>>,
    },
}

impl ResponseBody {
    /// No body.
    pub fn empty() -> Self {
        Self {
            kind: Kind::Empty,
            exchange: None,
            recheck: Recheck::default(),
        }
    }

    /// One piece.
    pub fn full(bytes: Bytes) -> Self {
        Self {
            kind: Kind::Full(bytes),
            exchange: None,
            recheck: Recheck::default(),
        }
    }

    /// What an endpoint sends.
    pub fn upstream(
        incoming: Incoming,
        lease: Option<Lease>,
        request: Rc<RequestProgress>,
        deadline: Option<Pin<Box<Sleep>>>,
    ) -> Self {
        let mut body = Self {
            kind: Kind::Upstream {
                incoming,
                lease,
                request,
                deadline,
            },
            exchange: None,
            recheck: Recheck::default(),
        };
        body.settle();
        body
    }

    /// Has `exchange` end with this body.
    pub fn with_exchange(mut self, exchange: Box<Exchange>) -> Self {
        self.exchange = Some(exchange);
        if self.is_end_stream() {
            self.finish();
        }
        self
    }

    /// The endpoint's connection is free as soon as the last of its body has been read.
    fn settle(&mut self) {
        if let Kind::Upstream {
            incoming,
            lease,
            request,
            ..
        } = &mut self.kind
            && incoming.is_end_stream()
            && let Some(lease) = lease.take()
            && request.finished.get()
        {
            lease.give_back();
        }
    }

    /// It is not sent, as the response to HEAD has none, and ends its exchange as if it were.
    pub fn leave_out(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.finish();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut frame = match &mut this.kind {
            Kind::Empty => None,
            Kind::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                (!bytes.is_empty()).then(|| Ok(Frame::data(bytes)))
            }
            Kind::Upstream {
                incoming, deadline, ..
            } => match Pin::new(incoming).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    if let Some(deadline) = deadline
                        && deadline.as_mut().poll(cx).is_ready()
                    {
                        Some(Err(BodyError::Timeout))
                    } else if let Some(exchange) = &mut this.exchange
                        && let Poll::Ready(denied) = this.recheck.poll_denied(exchange, cx)
                    {
                        exchange.policy = denied.policy;
                        Some(Err(BodyError::Denied))
                    } else {
                        return Poll::Pending;
                    }
                }
            },
        };
        match &mut frame {
            None => {
                this.settle();
                this.finish();
            }
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    clean_trailers(trailers);
                }
                if let Some(exchange) = &mut this.exchange {
                    if let Some(data) = frame.data_ref() {
                        exchange.see_response(data);
                    } else if let Some(trailers) = frame.trailers_ref() {
                        exchange.see_trailers(trailers);
                    }
                }
                this.settle();
                if this.is_end_stream() {
                    this.finish();
                }
            }
            Some(Err(error)) => {
                if let Some(exchange) = this.exchange.take() {
                    exchange.fail_body(error);
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Upstream { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Upstream { incoming, .. } => incoming.size_hint(),
        }
    }
}
