//! PINGs of an HBONE connection: a peer that is gone without a word is noticed.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

/// Returns when the peer has not answered a PING in time, or the connection is over.
pub(super) async fn peer_lost(mut pings: PingPong, interval: Duration, limit: Duration) {
    loop {
        sleep(interval).await;
        match timeout(limit, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
