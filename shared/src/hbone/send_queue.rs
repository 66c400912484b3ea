//! What the streams of one connection have queued and its socket has not taken yet.
//!
//! HTTP/2 bounds what a stream may queue, and a peer chooses the windows and the number of
//! streams: one that stops reading its socket would have us hold that bound for each of them.
//! Bytes that are queued have window, so they wait for the socket alone; a bound of the
//! connection therefore slows nobody that another stream does not slow anyway.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;

/// More wakers than streams.
const MAX_WAITING: usize = 1024;

/// The queue of one connection. Cloning gives another handle.
#[derive(Clone)]
pub(super) struct SendQueue(Arc<Inner>);

struct Inner {
    limit: usize,
    queued: AtomicUsize,
    /// Streams that wait for room.
    waiting: Mutex<Vec<Waker>>,
}

impl SendQueue {
    pub(super) fn new(limit: usize) -> Self {
        Self(Arc::new(Inner {
            limit,
            queued: AtomicUsize::new(0),
            waiting: Mutex::default(),
        }))
    }

    /// Ready with how many bytes may be queued, when there is room for any.
    pub(super) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<usize> {
        let room = self.room();
        if room > 0 {
            return Poll::Ready(room);
        }
        let mut waiting = self.0.waiting.lock();
        // Streams that are gone leave theirs behind; those that live come back.
        if waiting.len() >= MAX_WAITING {
            waiting.drain(..).for_each(Waker::wake);
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Bytes that count as queued until they are dropped.
    pub(super) fn track(&self, bytes: Bytes) -> Bytes {
        self.0.queued.fetch_add(bytes.len(), Ordering::Relaxed);
        Bytes::from_owner(Tracked {
            bytes,
            queue: self.clone(),
        })
    }

    fn room(&self) -> usize {
        self.0
            .limit
            .saturating_sub(self.0.queued.load(Ordering::Relaxed))
    }
}

struct Tracked {
    bytes: Bytes,
    queue: SendQueue,
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let inner = &self.queue.0;
        let before = inner.queued.fetch_sub(self.bytes.len(), Ordering::Relaxed);
        if before >= inner.limit && before - self.bytes.len() < inner.limit {
            let waiting = std::mem::take(&mut *inner.waiting.lock());
            for waker in waiting {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_returns_when_bytes_are_dropped() {
        let queue = SendQueue::new(10);
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(queue.poll_room(&mut cx), Poll::Ready(10));
        let first = queue.track(Bytes::from_static(b"12345678"));
        assert_eq!(queue.poll_room(&mut cx), Poll::Ready(2));
        // One chunk may go beyond the limit.
        let second = queue.track(Bytes::from_static(b"12345"));
        assert_eq!(queue.poll_room(&mut cx), Poll::Pending);
        assert_eq!(queue.0.waiting.lock().len(), 1);
        let part = first.slice(..1);
        drop(first);
        assert_eq!(queue.poll_room(&mut cx), Poll::Pending, "a part is left");
        drop(part);
        assert_eq!(queue.0.waiting.lock().len(), 0, "woken");
        assert_eq!(queue.poll_room(&mut cx), Poll::Ready(5));
        drop(second);
        assert_eq!(queue.poll_room(&mut cx), Poll::Ready(10));
    }
}
