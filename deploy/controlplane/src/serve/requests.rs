//! The requests of a stream, as they come.
//!
//! A client that comes back claims everything it has: megabytes in a large mesh, and all
//! clients come back when the control plane was restarted. So only some of them are read at a
//! time, the others are held back by HTTP/2's flow control; and nothing of it is kept.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::xds::DeltaDiscoveryRequest;
use bytes::{Buf as _, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

/// A client that claims a hundred thousand resources when it comes back does so in one
/// message.
const MAX_REQUEST: usize = 64 << 20;
/// Requests that are longer wait for a turn.
const LARGE: usize = 64 << 10;
/// For all of such a request to come.
const TURN: Duration = Duration::from_secs(30);
/// gRPC's compressed flag and length.
const HEADER: usize = 5;

pub(super) struct Requests {
    body: Incoming,
    buffer: BytesMut,
    turns: Arc<Semaphore>,
    turn: Option<Turn>,
}

/// To read a long request, within a time: others wait.
struct Turn {
    _permit: OwnedSemaphorePermit,
    until: Instant,
}

impl Requests {
    /// `turns` are the long requests that may be read at a time, over all streams.
    pub(super) fn new(body: Incoming, turns: Arc<Semaphore>) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            turns,
            turn: None,
        }
    }

    /// The next one; `None` if there are no more. Nothing is lost if this is dropped.
    ///
    /// # Errors
    /// `INTERNAL` or `OUT_OF_RANGE` for what is no request or too long, any other if the
    /// connection is gone.
    pub(super) async fn message(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        loop {
            if let Some(header) = self.buffer.get(..HEADER) {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
                let length = length as usize;
                if header[0] != 0 {
                    return Err(Status::internal("a compressed request"));
                }
                if length > MAX_REQUEST {
                    return Err(Status::out_of_range("the request is too long"));
                }
                if let Some(message) = self.buffer.get(HEADER..HEADER + length) {
                    let decoded = DeltaDiscoveryRequest::decode(message);
                    self.buffer.advance(HEADER + length);
                    if self.buffer.is_empty() {
                        self.buffer = BytesMut::new();
                    }
                    self.turn = None;
                    return decoded.map(Some).map_err(|error| {
                        Status::internal(format!("not a delta discovery request: {error}"))
                    });
                }
                if length > LARGE && self.turn.is_none() {
                    // The semaphore is never closed.
                    let permit = self.turns.clone().acquire_owned().await;
                    self.turn = permit.ok().map(|permit| Turn {
                        _permit: permit,
                        until: Instant::now() + TURN,
                    });
                }
            }
            let frame = match &self.turn {
                None => self.body.frame().await,
                Some(turn) => timeout_at(turn.until, self.body.frame())
                    .await
                    .map_err(|_| Status::deadline_exceeded("the request does not come"))?,
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    // Trailers: requests have none.
                    Err(_) => return Ok(None),
                },
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("half a request")),
                Some(Err(error)) => return Err(Status::cancelled(error.to_string())),
            }
        }
    }
}
