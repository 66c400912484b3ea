//! The last requests, for whoever watches at this moment (`adit tap`).
//!
//! A watcher asks again and again; when nobody has for a while, nothing is kept, and a
//! request costs one load of a number.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::event::{Peer, RequestEvent};

/// Requests that are kept for a watcher that is slow.
const MAX_EVENTS: usize = 1000;
/// A watcher that has not asked for so long is gone.
const WATCHED_FOR: Duration = Duration::from_secs(10);

/// Keeps requests while somebody watches.
#[derive(Debug)]
pub struct Tap {
    started: Instant,
    /// Milliseconds after `started`; 0: nobody watches.
    watched_until: AtomicU64,
    ring: Mutex<Ring>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Ring {
    /// Number of the next event.
    next: u64,
    events: VecDeque<Value>,
}

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Tapped {
    /// To ask with the next time.
    pub next: u64,
    /// Requests that came and could not be kept.
    pub missed: u64,
    /// The others, oldest first.
    pub events: Vec<Value>,
}

impl Default for Tap {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            watched_until: AtomicU64::new(0),
            ring: Mutex::default(),
            news: Notify::new(),
        }
    }
}

impl Tap {
    /// A request has ended.
    pub fn offer(&self, event: &RequestEvent<'_>) {
        let until = self.watched_until.load(Ordering::Relaxed);
        if until == 0 {
            return;
        }
        if self.now() > until {
            // Somebody may ask at this moment and misses what is in it.
            self.watched_until.store(0, Ordering::Relaxed);
            self.ring.lock().events.clear();
            return;
        }
        let shown = shown(event);
        let mut ring = self.ring.lock();
        if ring.events.len() == MAX_EVENTS {
            ring.events.pop_front();
        }
        ring.events.push_back(shown);
        ring.next += 1;
        drop(ring);
        self.news.notify_waiters();
    }

    /// The requests from number `since` on; where there are none, those of the next `wait`.
    /// Without a number it begins to watch.
    pub async fn read(&self, since: Option<u64>, wait: Duration) -> Tapped {
        let until = u64::try_from(WATCHED_FOR.as_millis()).unwrap_or(u64::MAX);
        let until = self.now().saturating_add(until);
        self.watched_until.store(until, Ordering::Relaxed);
        let news = self.news.notified();
        let Some(since) = since else {
            return self.since(u64::MAX);
        };
        let now = self.since(since);
        if !now.events.is_empty() {
            return now;
        }
        // Nothing came: that is an answer as well.
        let _ = timeout(wait, news).await;
        self.since(since)
    }

    fn since(&self, since: u64) -> Tapped {
        let ring = self.ring.lock();
        let first = ring.next - ring.events.len() as u64;
        let since = since.min(ring.next);
        let skip = since.saturating_sub(first);
        Tapped {
            next: ring.next,
            missed: first.saturating_sub(since),
            events: ring.events.iter().skip(skip as usize).cloned().collect(),
        }
    }

    fn now(&self) -> u64 {
        // Never 0, which means something else.
        u64::try_from(self.started.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .max(1)
    }
}

fn shown(event: &RequestEvent<'_>) -> Value {
    let mut trace = String::with_capacity(32);
    for byte in event.trace.trace_id {
        let _ = write!(trace, "{byte:02x}");
    }
    json!({
        "time": humantime::format_rfc3339_millis(event.started).to_string(),
        "source": peer(Some(event.source)),
        "sourceAddress": event.downstream_remote,
        "destination": peer(event.destination),
        "destinationAddress": event.upstream_host,
        "service": event.service.map(|service| &*service.hostname),
        "protocol": event.protocol.version(),
        "method": event.method.as_str(),
        "authority": event.authority,
        "path": event.path,
        "status": event.status,
        "grpcStatus": event.grpc_status,
        "flags": event.flags.to_string(),
        "details": event.details,
        "failure": event.upstream_failure,
        "route": event.route_name,
        "policy": event.policy,
        "retries": event.retries,
        "durationMs": event.duration.as_secs_f64() * 1000.0,
        "upstreamMs": event.upstream_time.map(|time| time.as_secs_f64() * 1000.0),
        "requestBytes": event.traffic.request_bytes,
        "responseBytes": event.traffic.response_bytes,
        "traceId": trace,
    })
}

fn peer(peer: Option<&Peer>) -> Value {
    let Some(peer) = peer else { return Value::Null };
    json!({
        "workload": &*peer.workload,
        "namespace": &*peer.namespace,
        "principal": peer.principal.as_ref().map(ToString::to_string),
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Sample;
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[tokio::test]
    async fn requests_are_seen_while_somebody_watches() {
        let tap = Tap::default();
        let sample = Sample::new();
        tap.offer(&sample.event());
        let begin = tap.read(None, SHORT).await;
        assert_eq!((begin.next, begin.events.len()), (0, 0));
        assert_eq!(tap.read(Some(begin.next), SHORT).await.events.len(), 0);
        tap.offer(&sample.event());
        let seen = tap.read(Some(0), SHORT).await;
        assert_eq!((seen.next, seen.missed, seen.events.len()), (1, 0, 1));
        assert_eq!(seen.events[0]["path"], "/reviews/1?full=yes");
        let source = &seen.events[0]["source"]["principal"];
        assert_eq!(source, "spiffe://cluster.local/ns/shop/sa/productpage");
        for _ in 0..MAX_EVENTS + 5 {
            tap.offer(&sample.event());
        }
        let seen = tap.read(Some(1), SHORT).await;
        assert_eq!((seen.missed, seen.events.len()), (5, MAX_EVENTS));
    }

    #[tokio::test]
    async fn one_who_waits_is_woken() {
        let tap = Tap::default();
        let begin = tap.read(None, SHORT).await;
        let sample = Sample::new();
        let read = tap.read(Some(begin.next), Duration::from_secs(60));
        let (seen, ()) = tokio::join!(read, async { tap.offer(&sample.event()) });
        assert_eq!(seen.events.len(), 1);
    }
}
