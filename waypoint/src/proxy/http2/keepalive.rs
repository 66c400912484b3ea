//! PING, so that a dead peer is noticed where a stream waits for it.
//!
//! A peer of which anything was heard within an interval is alive, and is not asked; nor is one
//! from which nobody waits for anything, where that is wanted.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use super::wire::Heard;

/// Asks one peer.
pub struct Keepalive {
    ping: h2::PingPong,
    heard: Heard,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    /// After so long a silence it is asked.
    interval: Duration,
    /// How long it may take to answer.
    patience: Duration,
}

impl Keepalive {
    /// `ping` is `None` only if it was taken from the connection before.
    pub fn new(
        ping: Option<h2::PingPong>,
        heard: Heard,
        interval: Duration,
        patience: Duration,
    ) -> Option<Self> {
        Some(Self {
            ping: ping?,
            heard,
            timer: Box::pin(sleep(interval)),
            waiting: false,
            interval,
            patience,
        })
    }

    /// Ready when the peer is dead. `idle`: nobody waits for it, and it need not be asked.
    pub fn poll_dead(&mut self, cx: &mut Context<'_>, idle: bool) -> Poll<()> {
        loop {
            if self.waiting && self.ping.poll_pong(cx).is_ready() {
                // An error means that the connection has ended, which its task sees itself.
                self.waiting = false;
                self.rearm(self.interval);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let heard = self.heard.take();
            if self.waiting {
                if !heard {
                    return Poll::Ready(());
                }
                // The answer queues behind bulk data.
                self.rearm(self.patience);
            } else if heard || idle {
                self.rearm(self.interval);
            } else {
                self.waiting = self.ping.send_ping(h2::Ping::opaque()).is_ok();
                self.rearm(self.patience);
            }
        }
    }

    fn rearm(&mut self, after: Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::duplex;
    use tokio::time::timeout;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const PATIENCE: Duration = Duration::from_secs(20);

    /// When a peer was taken for dead.
    async fn dead(answers: bool, idle: bool) -> Option<Duration> {
        let (ours, theirs) = duplex(64 << 10);
        let answering = async {
            if answers {
                let mut connection = h2::server::handshake(theirs).await.expect("a preface");
                let _ = connection.accept().await;
            } else {
                let _theirs = theirs;
                std::future::pending::<()>().await;
            }
        };
        let (_sender, mut connection) =
            h2::client::handshake(ours).await.expect("it does not wait");
        let ping = connection.ping_pong();
        let keepalive = Keepalive::new(ping, Heard::default(), INTERVAL, PATIENCE);
        let mut keepalive = keepalive.expect("the first to take it");
        let begun = Instant::now();
        let asking = poll_fn(|cx| {
            let _ = Pin::new(&mut connection).poll(cx);
            keepalive.poll_dead(cx, idle)
        });
        tokio::select! {
            asked = timeout(Duration::from_secs(600), asking) => asked.ok().map(|()| begun.elapsed()),
            () = answering => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_dead_unless_nobody_waits_for_it() {
        assert_eq!(dead(true, false).await, None);
        assert_eq!(dead(false, true).await, None);
        let after = dead(false, false).await.expect("dead");
        let expected = INTERVAL + PATIENCE;
        assert!(
            after >= expected && after < expected + Duration::from_secs(1),
            "{after:?}"
        );
    }
}
