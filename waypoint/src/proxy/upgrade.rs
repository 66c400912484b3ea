//! A request that client and endpoint have agreed to turn into another protocol (101,
//! RFC 9110 7.8), such as WebSocket: from then on bytes are passed on, and the request ends
//! when they do.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::time::timeout;
use tracing::debug;

use super::copy::{Traffic, between};
use super::exchange::Exchange;
use super::io::Io;
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

struct Counted<'a> {
    exchange: RefCell<&'a mut Exchange>,
    up: Cell<u64>,
}

impl Traffic for Counted<'_> {
    fn request(&self, bytes: usize) {
        self.up.set(self.up.get() + bytes as u64);
    }

    fn response(&self, bytes: usize) {
        self.exchange.borrow_mut().count_response(bytes as u64);
    }
}

impl Upgrade {
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
        let request = exchange.request.clone();
        let counted = Counted {
            exchange: RefCell::new(&mut exchange),
            up: Cell::new(0),
        };
        let ended = between(client, upgraded.io, &counted, None).await;
        request.bytes.set(request.bytes.get() + counted.up.get());
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
