//! Recycled buffers for bulk data.
//!
//! Bulk turns want up to 1 MiB per read, seal and write; an idle connection wants nothing.
//! Buffers are therefore borrowed from a pool that belongs to the worker's thread, only while
//! bytes are in them, and go back when they are empty. They are never returned to the allocator
//! in between: giving pages back and faulting them in again costs more than the cipher.
//!
//! The pool is capped. When the cap is reached, large requests are answered with smaller
//! buffers and, as a last resort, with a 16 KiB buffer outside the cap, so that `take` never
//! fails: the transfer becomes slower, not wrong.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;

/// The cap of a worker's default pool: sixteen connections that are blocked in the middle of a
/// 1 MiB turn; beyond it, turns shrink.
pub const DEFAULT_LIMIT: usize = 16 << 20;

/// What every sealed TLS 1.3 record adds: header, content type, authentication tag.
const RECORD_OVERHEAD: usize = 5 + 1 + 16;
/// Payload of a full record.
const RECORD_PAYLOAD: usize = 16 * 1024;
/// Room for what is not payload: the padding a received record may carry (RFC 8446 5.2 allows
/// 256 bytes in all), and an alert and a KeyUpdate in front of data that is sent.
const SLACK: usize = 490;

/// The sizes that buffers come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum SizeClass {
    /// 16 KiB: one record; small messages.
    Kib16,
    /// 64 KiB.
    Kib64,
    /// 256 KiB.
    Kib256,
    /// 1 MiB: a full bulk turn.
    Mib1,
}

impl SizeClass {
    /// All classes, smallest first.
    pub const ALL: [Self; 4] = [Self::Kib16, Self::Kib64, Self::Kib256, Self::Mib1];

    /// Bytes of payload that a buffer of this class holds.
    pub const fn bytes(self) -> usize {
        RECORD_PAYLOAD << (2 * self as usize)
    }

    /// Bytes that are really there: the payload and the TLS overhead of that many records.
    const fn whole_bytes(self) -> usize {
        self.bytes() + (self.bytes() / RECORD_PAYLOAD) * RECORD_OVERHEAD + SLACK
    }

    /// The smallest class that holds `len` bytes of payload; the largest if none does.
    pub const fn for_len(len: usize) -> Self {
        if len <= Self::Kib16.bytes() {
            Self::Kib16
        } else if len <= Self::Kib64.bytes() {
            Self::Kib64
        } else if len <= Self::Kib256.bytes() {
            Self::Kib256
        } else {
            Self::Mib1
        }
    }

    /// The next larger class; the largest stays.
    pub const fn larger(self) -> Self {
        match self {
            Self::Kib16 => Self::Kib64,
            Self::Kib64 => Self::Kib256,
            Self::Kib256 | Self::Mib1 => Self::Mib1,
        }
    }

    /// The next smaller class; the smallest stays.
    pub const fn smaller(self) -> Self {
        match self {
            Self::Kib16 | Self::Kib64 => Self::Kib16,
            Self::Kib256 => Self::Kib64,
            Self::Mib1 => Self::Kib256,
        }
    }
}

/// What a pool did, readable from any thread.
#[derive(Debug, Default)]
pub struct PoolStats {
    held: AtomicUsize,
    in_use: AtomicUsize,
    misses: AtomicU64,
    overflows: AtomicU64,
}

impl PoolStats {
    /// Bytes that lie in the pool, free to be taken.
    pub fn bytes_held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes in buffers that were taken and not dropped yet, frozen ones included.
    pub fn bytes_in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }

    /// How often a buffer had to be allocated, since none of its size was free.
    pub fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// How often the cap gave a caller less than it asked for.
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }
}

/// A capped pool of recycled buffers. Cloning gives another handle of the same pool.
///
/// It belongs to the thread that made it (`!Send`), like everything a worker owns.
#[derive(Clone)]
pub struct BufferPool {
    inner: Rc<Inner>,
}

struct Inner {
    free: RefCell<[FreeList; 4]>,
    limit: Cell<usize>,
    stats: Arc<PoolStats>,
}

#[derive(Default)]
struct FreeList {
    buffers: Vec<Box<[u8]>>,
    /// The fewest that were free since the last `trim`: nobody needed these.
    unneeded: usize,
}

thread_local! {
    static LOCAL: BufferPool = BufferPool::new(DEFAULT_LIMIT);
    /// The pools of this thread, so that a frozen buffer, which may travel, finds its way home.
    static POOLS: RefCell<Vec<Weak<Inner>>> = const { RefCell::new(Vec::new()) };
}

impl BufferPool {
    /// A pool that keeps free and in-use buffers together below `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        let inner = Rc::new(Inner {
            free: RefCell::default(),
            limit: Cell::new(limit_bytes),
            stats: Arc::default(),
        });
        // While the thread ends there is no registry; then buffers are simply freed.
        let _ = POOLS.try_with(|pools| {
            let mut pools = pools.borrow_mut();
            pools.retain(|pool| pool.strong_count() > 0);
            pools.push(Rc::downgrade(&inner));
        });
        Self { inner }
    }

    /// The pool of this thread.
    pub fn local() -> Self {
        // Only a destructor that runs while the thread ends finds no local pool.
        LOCAL
            .try_with(Self::clone)
            .unwrap_or_else(|_| Self::new(DEFAULT_LIMIT))
    }

    /// Changes the cap. What is above it is freed as it comes back.
    pub fn set_limit(&self, limit_bytes: usize) {
        self.inner.limit.set(limit_bytes);
        self.inner.make_room(0, None);
    }

    /// The counters of this pool.
    pub fn stats(&self) -> Arc<PoolStats> {
        self.inner.stats.clone()
    }

    /// A buffer of `class`, or of a smaller one if the cap does not allow it. Its content is
    /// whatever an earlier user left there.
    pub fn take(&self, class: SizeClass) -> PooledBuf {
        let mut candidate = class;
        loop {
            if let Some(data) = self.inner.take_free(candidate).or_else(|| {
                self.inner
                    .make_room(candidate.whole_bytes(), Some(candidate))
                    .then(|| self.inner.allocate(candidate))
            }) {
                if candidate != class {
                    self.inner.stats.overflows.fetch_add(1, Ordering::Relaxed);
                }
                return self.lend(data, candidate);
            }
            if candidate == SizeClass::Kib16 {
                break;
            }
            // A dry pool answers with 64 KiB where it can: a much smaller turn, but not tiny.
            candidate = match candidate {
                SizeClass::Mib1 | SizeClass::Kib256 => SizeClass::Kib64,
                SizeClass::Kib64 | SizeClass::Kib16 => SizeClass::Kib16,
            };
        }
        self.inner.stats.overflows.fetch_add(1, Ordering::Relaxed);
        let data = self.inner.allocate(SizeClass::Kib16);
        self.lend(data, SizeClass::Kib16)
    }

    /// Frees the buffers that nobody needed since the last call. A worker calls this now and
    /// then, so that a burst does not hold its memory for ever.
    pub fn trim(&self) {
        let mut free = self.inner.free.borrow_mut();
        for list in free.iter_mut() {
            let keep = list.buffers.len() - list.unneeded.min(list.buffers.len());
            for data in list.buffers.drain(keep..) {
                self.inner
                    .stats
                    .held
                    .fetch_sub(data.len(), Ordering::Relaxed);
            }
            list.unneeded = list.buffers.len();
        }
    }

    fn lend(&self, data: Box<[u8]>, class: SizeClass) -> PooledBuf {
        self.inner
            .stats
            .in_use
            .fetch_add(data.len(), Ordering::Relaxed);
        PooledBuf {
            data,
            class,
            pool: self.inner.clone(),
        }
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("limit", &self.inner.limit.get())
            .field("stats", &self.inner.stats)
            .finish()
    }
}

impl Inner {
    fn take_free(&self, class: SizeClass) -> Option<Box<[u8]>> {
        let list = &mut self.free.borrow_mut()[class as usize];
        let data = list.buffers.pop()?;
        list.unneeded = list.unneeded.min(list.buffers.len());
        self.stats.held.fetch_sub(data.len(), Ordering::Relaxed);
        Some(data)
    }

    fn allocate(&self, class: SizeClass) -> Box<[u8]> {
        self.stats.misses.fetch_add(1, Ordering::Relaxed);
        // The one time that this memory is zeroed, and for large ones the kernel does it page
        // by page as they are touched.
        vec![0; class.whole_bytes()].into_boxed_slice()
    }

    /// Whether `need` more bytes fit below the cap, after freeing buffers of other classes
    /// than `spare` that lie unused.
    fn make_room(&self, need: usize, spare: Option<SizeClass>) -> bool {
        let limit = self.limit.get();
        let mut free = self.free.borrow_mut();
        loop {
            let total = self.stats.bytes_held() + self.stats.bytes_in_use();
            if total + need <= limit {
                return true;
            }
            let victim = SizeClass::ALL
                .into_iter()
                .rev()
                .filter(|class| Some(*class) != spare)
                .find_map(|class| free[class as usize].buffers.pop());
            let Some(data) = victim else {
                return false;
            };
            self.stats.held.fetch_sub(data.len(), Ordering::Relaxed);
        }
    }

    fn give_back(&self, data: Box<[u8]>, class: SizeClass) {
        // The counter still has this buffer in use: it fits if the sum does.
        let total = self.stats.bytes_held() + self.stats.bytes_in_use();
        self.stats.in_use.fetch_sub(data.len(), Ordering::Relaxed);
        if total <= self.limit.get() {
            self.stats.held.fetch_add(data.len(), Ordering::Relaxed);
            self.free.borrow_mut()[class as usize].buffers.push(data);
        }
    }
}

/// A buffer on loan; it goes back to its pool when it is dropped.
pub struct PooledBuf {
    data: Box<[u8]>,
    class: SizeClass,
    pool: Rc<Inner>,
}

impl PooledBuf {
    /// Its size, which may be smaller than what was asked for.
    pub fn class(&self) -> SizeClass {
        self.class
    }

    /// The first `len` bytes as shareable, immutable data. The buffer goes back to its pool
    /// when the last reference is dropped on this thread, and is freed if that happens on
    /// another.
    ///
    /// A `len` beyond the buffer means all of it.
    pub fn freeze(mut self, len: usize) -> Bytes {
        let data = std::mem::take(&mut self.data);
        let len = len.min(data.len());
        Bytes::from_owner(FrozenBuf {
            data,
            len,
            class: self.class,
            stats: self.pool.stats.clone(),
        })
    }

    /// All bytes, with the room behind the payload for the overhead of TLS records.
    pub(crate) fn whole(&self) -> &[u8] {
        &self.data
    }

    /// See [`Self::whole`].
    pub(crate) fn whole_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }
}

impl Deref for PooledBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.data[..self.class.bytes()]
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.data[..self.class.bytes()]
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        // Empty: it was frozen, and `FrozenBuf` accounts for it.
        if !data.is_empty() {
            self.pool.give_back(data, self.class);
        }
    }
}

impl fmt::Debug for PooledBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledBuf")
            .field("class", &self.class)
            .finish()
    }
}

/// The owner behind [`PooledBuf::freeze`]. It is `Send`, so it holds no `Rc`: the shared
/// counters name the pool, and a thread finds the pool among its own or not at all.
struct FrozenBuf {
    data: Box<[u8]>,
    len: usize,
    class: SizeClass,
    stats: Arc<PoolStats>,
}

impl AsRef<[u8]> for FrozenBuf {
    fn as_ref(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

impl Drop for FrozenBuf {
    fn drop(&mut self) {
        let home = POOLS
            .try_with(|pools| {
                pools
                    .borrow()
                    .iter()
                    .filter_map(Weak::upgrade)
                    .find(|pool| Arc::ptr_eq(&pool.stats, &self.stats))
            })
            .ok()
            .flatten();
        let data = std::mem::take(&mut self.data);
        match home {
            Some(pool) => pool.give_back(data, self.class),
            None => {
                self.stats.in_use.fetch_sub(data.len(), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_what_their_names_say_and_have_room_for_record_overhead() {
        assert_eq!(
            SizeClass::ALL.map(SizeClass::bytes),
            [16 << 10, 64 << 10, 256 << 10, 1 << 20]
        );
        for class in SizeClass::ALL {
            assert_eq!(SizeClass::for_len(class.bytes()), class);
            // The largest record a peer may send fits into the smallest buffer.
            assert!(class.whole_bytes() >= 5 + 16384 + 256);
        }
        assert_eq!(SizeClass::for_len(0), SizeClass::Kib16);
        assert_eq!(SizeClass::for_len((16 << 10) + 1), SizeClass::Kib64);
        assert_eq!(SizeClass::for_len(usize::MAX), SizeClass::Mib1);
    }

    #[test]
    fn a_dropped_buffer_is_the_next_one_taken() {
        let pool = BufferPool::new(4 << 20);
        let mut buf = pool.take(SizeClass::Kib64);
        assert_eq!(buf.len(), 64 << 10);
        buf[7] = 9;
        let stats = pool.stats();
        assert_eq!((stats.bytes_held(), stats.misses()), (0, 1));
        let whole = stats.bytes_in_use();
        drop(buf);
        assert_eq!((stats.bytes_held(), stats.bytes_in_use()), (whole, 0));
        let buf = pool.take(SizeClass::Kib64);
        assert_eq!(buf[7], 9, "recycled, not zeroed");
        assert_eq!(stats.misses(), 1);
    }

    #[test]
    fn a_dry_pool_answers_with_smaller_buffers_and_never_fails() {
        let pool = BufferPool::new((1 << 20) + (128 << 10));
        let first = pool.take(SizeClass::Mib1);
        let second = pool.take(SizeClass::Mib1);
        let third = pool.take(SizeClass::Mib1);
        let beyond: Vec<_> = (0..8).map(|_| pool.take(SizeClass::Mib1)).collect();
        assert_eq!(first.class(), SizeClass::Mib1);
        assert_eq!(second.class(), SizeClass::Kib64);
        assert_eq!(third.class(), SizeClass::Kib16);
        assert!(beyond.iter().all(|buf| buf.class() == SizeClass::Kib16));
        assert_eq!(pool.stats().overflows(), 10);
        drop((first, second, third, beyond));
        let stats = pool.stats();
        assert_eq!(stats.bytes_in_use(), 0);
        assert!(
            stats.bytes_held() <= (1 << 20) + (128 << 10),
            "what was above the cap is freed"
        );
        assert_eq!(pool.take(SizeClass::Mib1).class(), SizeClass::Mib1);
    }

    #[test]
    fn free_buffers_of_another_class_make_room() {
        let pool = BufferPool::new((1 << 20) + (64 << 10));
        let small: Vec<_> = (0..40).map(|_| pool.take(SizeClass::Kib16)).collect();
        drop(small);
        assert!(pool.stats().bytes_held() > 600 << 10);
        assert_eq!(pool.take(SizeClass::Mib1).class(), SizeClass::Mib1);
    }

    #[test]
    fn trim_frees_what_was_not_needed_since_the_last_trim() {
        let pool = BufferPool::new(8 << 20);
        drop(
            (0..4)
                .map(|_| pool.take(SizeClass::Mib1))
                .collect::<Vec<_>>(),
        );
        let stats = pool.stats();
        pool.trim();
        assert!(
            stats.bytes_held() > 4 << 20,
            "all four were needed in this period"
        );
        drop(pool.take(SizeClass::Mib1));
        pool.trim();
        assert!(
            stats.bytes_held() < 2 << 20,
            "one was needed in this period"
        );
        pool.trim();
        assert_eq!(stats.bytes_held(), 0);
    }

    #[test]
    fn a_frozen_buffer_comes_home_on_its_thread_only() {
        let pool = BufferPool::new(4 << 20);
        let stats = pool.stats();
        let mut buf = pool.take(SizeClass::Kib16);
        buf[..3].copy_from_slice(b"abc");
        let bytes = buf.freeze(3);
        assert_eq!(&bytes[..], b"abc");
        let part = bytes.slice(1..2);
        drop(bytes);
        assert_eq!(stats.bytes_held(), 0, "still referenced");
        assert!(stats.bytes_in_use() > 0);
        drop(part);
        assert!(stats.bytes_held() > 0);
        assert_eq!(stats.bytes_in_use(), 0);

        let bytes = pool.take(SizeClass::Kib16).freeze(usize::MAX);
        std::thread::spawn(move || drop(bytes))
            .join()
            .expect("the thread ends");
        assert_eq!(
            (stats.bytes_held(), stats.bytes_in_use()),
            (0, 0),
            "freed over there"
        );
        drop(pool);
    }

    #[test]
    fn a_buffer_may_outlive_the_callers_handle_of_its_pool() {
        let pool = BufferPool::new(1 << 20);
        let stats = pool.stats();
        let frozen = pool.take(SizeClass::Kib16).freeze(1);
        let buf = pool.take(SizeClass::Kib16);
        drop(pool);
        drop(buf);
        drop(frozen);
        assert_eq!(stats.bytes_in_use(), 0);
    }

    #[test]
    fn a_lower_limit_applies_at_once_to_what_lies_free() {
        let pool = BufferPool::new(8 << 20);
        drop(
            (0..4)
                .map(|_| pool.take(SizeClass::Mib1))
                .collect::<Vec<_>>(),
        );
        pool.set_limit(2 << 20);
        assert!(pool.stats().bytes_held() <= 2 << 20);
    }
}
