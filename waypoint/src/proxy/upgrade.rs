//! A request that client and endpoint have agreed to turn into another protocol (101,
//! RFC 9110 7.8), such as WebSocket: from then on bytes are passed on, and the request ends
//! when they do.

use std::cell::Cell;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::debug;

use super::copy::{Traffic, between};
use super::exchange::Exchange;
use super::http2::stream::Stream;
use super::io::Io;
use super::recheck::unless_denied;
use super::reply::Reply;
use super::upstream::Lease;
use crate::telemetry::ResponseFlags;

/// How long hyper may take to give the endpoint's stream up after its 101.
const HAND_OVER: Duration = Duration::from_secs(5);

/// The endpoint's side of an upgrade, which waits for the client's.
pub struct Upgrade {
    /// The connection that answered 101.
    pub lease: Lease,
    /// The request.
    pub exchange: Box<Exchange>,
}

#[derive(Default)]
struct Counted {
    up: Cell<u64>,
    down: Cell<u64>,
}

impl Traffic for Counted {
    fn request(&self, bytes: usize) {
        self.up.set(self.up.get() + bytes as u64);
    }

    fn response(&self, bytes: usize) {
        self.down.set(self.down.get() + bytes as u64);
    }
}

impl Upgrade {
    /// Carries it to its end, when the client's stream of HTTP/2 has been handed over.
    pub async fn carry_stream(mut self, stream: oneshot::Receiver<Stream>) {
        match timeout(HAND_OVER, stream).await {
            Ok(Ok(stream)) => self.carry(Io::stream(Box::new(stream))).await,
            _ => {
                self.exchange.details = "upgrade_failed";
                self.exchange.finish();
            }
        }
    }

    /// Carries it to its end.
    pub async fn carry(self, client: Io) {
        let Self {
            lease,
            mut exchange,
        } = self;
        let handed = timeout(HAND_OVER, lease.into_upgraded()).await;
        let Ok(Some(upgraded)) = handed else {
            exchange.flags |= ResponseFlags::UPSTREAM_TERMINATION;
            exchange.details = "upgrade_failed";
            exchange.finish();
            return;
        };
        let counted = Counted::default();
        let copying = pin!(between(client, upgraded.io, &counted, None));
        let ended = unless_denied(&exchange, copying).await;
        let request = &exchange.request.bytes;
        request.set(request.get() + counted.up.get());
        exchange.count_response(counted.down.get());
        let ended = match ended {
            Ok(ended) => ended,
            // Dropped unfinished, both sides were reset.
            Err(denied) => {
                exchange.policy = denied.policy;
                exchange.details = Reply::DENIED.reason;
                return exchange.finish();
            }
        };
        match ended {
            Ok(()) => exchange.finish(),
            Err(error) => {
                debug!(client = %exchange.downstream.client, "upgraded connection: {error}");
                exchange.details = "upgraded_connection_reset";
                exchange.finish();
            }
        }
    }
}
