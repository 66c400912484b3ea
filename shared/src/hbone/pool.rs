//! Connections shared between app connections, one pool per worker.
//!
//! A key (for ztunnel: source identity, destination workload, address) has as many connections
//! as its demand needs: a new one is made when all others are full, and those that the demand no
//! longer needs are left to run empty and closed.
//!
//! What trips it: a destination that does not answer. Waiters of one key share the attempts that
//! are under way and fail with them, all at once; nobody queues behind anybody's timeout, and
//! keys do not see each other. A waiter whose leader is cancelled takes over with its own
//! closure. A connection that was closed by its peer while it lay here is replaced before the
//! caller hears of it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::client::{Connection, ConnectionWatch, ResponseInfo, StreamGuard};
use super::error::{OpenError, Retry};
use super::headers::ConnectRequest;
use super::tunnel::Tunnel;

/// The limits of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSettings {
    /// Streams per connection, if the peer allows that many.
    pub max_streams: usize,
    /// Connections per key. Beyond it checkouts wait for a stream to end.
    pub max_connections: usize,
    /// A connection without streams is closed after this long.
    pub unused_release: Duration,
    /// How often the pool looks for unused connections.
    pub sweep: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            max_streams: 100,
            max_connections: 1024,
            unused_release: Duration::from_secs(300),
            sweep: Duration::from_secs(15),
        }
    }
}

/// Why a checkout failed. `E` is the error of the connect closure, shared by all that waited
/// for the same attempt.
#[derive(Debug)]
pub enum CheckoutError<E> {
    /// No connection could be made.
    Connect(Rc<E>),
    /// There is a connection, but the peer did not open the stream.
    Open(OpenError),
    /// Neither a connection nor a free stream came before the deadline.
    Timeout,
    /// The pool is shutting down.
    Draining,
}

impl<E> CheckoutError<E> {
    /// Where another attempt can succeed. `connect` judges an error of the connect closure.
    pub fn retry(&self, connect: impl FnOnce(&E) -> Retry) -> Retry {
        match self {
            Self::Connect(error) => connect(error),
            Self::Open(error) => error.retry(),
            Self::Timeout => Retry::Elsewhere,
            Self::Draining => Retry::Never,
        }
    }
}

impl<E: fmt::Display> fmt::Display for CheckoutError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => error.fmt(f),
            Self::Open(error) => error.fmt(f),
            Self::Timeout => f.write_str("no connection to the peer in time"),
            Self::Draining => f.write_str("the proxy is shutting down"),
        }
    }
}

impl<E: std::error::Error> std::error::Error for CheckoutError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(error) => error.source(),
            Self::Open(error) => error.source(),
            Self::Timeout | Self::Draining => None,
        }
    }
}

/// Counts of a pool. The first three are of now, the others since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// Connections that may be given to checkouts.
    pub connections: usize,
    /// Streams on them.
    pub streams: usize,
    /// Connection attempts under way.
    pub attempts: usize,
    /// Connections made.
    pub connected: u64,
    /// Connection attempts that failed.
    pub failed: u64,
    /// Checkouts that were given an existing connection.
    pub reused: u64,
    /// Connections closed because they were unused or surplus.
    pub released: u64,
    /// Connections taken out by [`Pool::evict`].
    pub evicted: u64,
}

/// A worker's connections. Cloning gives another handle.
pub struct Pool<K, E> {
    inner: Rc<Inner<K, E>>,
}

struct Inner<K, E> {
    settings: PoolSettings,
    entries: RefCell<HashMap<K, Rc<Entry<E>>>>,
    draining: Cell<bool>,
    counts: Rc<Counts>,
    sweeper: RefCell<Option<AbortHandle>>,
}

#[derive(Default)]
struct Counts {
    connected: Cell<u64>,
    failed: Cell<u64>,
    reused: Cell<u64>,
    released: Cell<u64>,
    evicted: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

/// The connections of one key.
struct Entry<E> {
    connections: RefCell<Vec<Pooled>>,
    /// Attempts under way.
    attempts: Cell<usize>,
    /// Checkouts that wait for an attempt or a stream.
    waiting: Cell<usize>,
    /// The last failed attempt and its number.
    failure: RefCell<(u64, Option<Failure<E>>)>,
    /// Woken when there is something new for waiters.
    changed: Rc<Notify>,
    /// Most streams at once in this period and in the one before.
    peak: Cell<(usize, usize)>,
    /// Taken out of the pool: what is made for it is not kept.
    evicted: Cell<bool>,
}

struct Pooled {
    connection: Connection,
    /// Gets no new streams while others have room: the demand does not need it.
    surplus: bool,
}

/// A place for a stream.
struct Place {
    connection: Connection,
    slot: StreamGuard,
}

enum Failure<E> {
    Connect(Rc<E>),
    Timeout,
}

impl<E> Failure<E> {
    fn to_error(&self) -> CheckoutError<E> {
        match self {
            Self::Connect(error) => CheckoutError::Connect(error.clone()),
            Self::Timeout => CheckoutError::Timeout,
        }
    }
}

impl<K: Eq + Hash + Clone + 'static, E: 'static> Pool<K, E> {
    /// An empty pool.
    pub fn new(settings: PoolSettings) -> Self {
        Self {
            inner: Rc::new(Inner {
                settings,
                entries: RefCell::default(),
                draining: Cell::new(false),
                counts: Rc::default(),
                sweeper: RefCell::default(),
            }),
        }
    }

    /// Opens a stream to `key`: on a connection that has room, else on a new one, which
    /// `connect` makes (with its own, shorter deadline or until `deadline`).
    ///
    /// # Errors
    /// See [`CheckoutError`]. No byte of the app has been sent.
    pub async fn checkout(
        &self,
        key: &K,
        request: &ConnectRequest,
        deadline: Instant,
        connect: impl AsyncFn() -> Result<Connection, E>,
    ) -> Result<(Tunnel, ResponseInfo), CheckoutError<E>> {
        /// A connection that ended while it lay in the pool, or that its peer closes because
        /// another process takes over from it, is replaced this often.
        const STALE: usize = 3;
        let mut stale = 0;
        loop {
            let entry = self.entry(key)?;
            let Some(place) = self.acquire(&entry, deadline, &connect).await? else {
                continue;
            };
            let Place { connection, slot } = place;
            let error = match connection.open_in(slot, request, deadline).await {
                Ok(opened) => return Ok(opened),
                Err(error) => error,
            };
            stale += 1;
            if stale == STALE || error.retry() != Retry::Anywhere {
                return Err(CheckoutError::Open(error));
            }
        }
    }

    /// Takes out the connections of all keys that match: their workload is gone or is another
    /// one now. Streams on them go on, new ones are not opened. Returns how many there were.
    pub fn evict(&self, predicate: impl Fn(&K) -> bool) -> usize {
        let mut gone = Vec::new();
        self.inner.entries.borrow_mut().retain(|key, entry| {
            let keep = !predicate(key);
            if !keep {
                gone.push(entry.clone());
            }
            keep
        });
        let mut connections = 0;
        for entry in gone {
            connections += entry.retire().len();
        }
        let evicted = &self.inner.counts.evicted;
        evicted.set(evicted.get() + connections as u64);
        connections
    }

    /// Refuses new checkouts, and waits until all streams have ended and all connections are
    /// closed, or until `deadline`. Returns whether they have.
    pub async fn drain(&self, deadline: Instant) -> bool {
        self.inner.draining.set(true);
        let entries = std::mem::take(&mut *self.inner.entries.borrow_mut());
        let watches: Vec<_> = entries.values().flat_map(|entry| entry.retire()).collect();
        drop(entries);
        let all = async {
            for watch in watches {
                watch.closed().await;
            }
        };
        timeout_at(deadline, all).await.is_ok()
    }

    /// Calls `visit` for each connection that the pool holds.
    pub fn for_each(&self, mut visit: impl FnMut(&K, &Connection)) {
        for (key, entry) in self.inner.entries.borrow().iter() {
            for pooled in entry.connections.borrow().iter() {
                visit(key, &pooled.connection);
            }
        }
    }

    /// Counts for metrics.
    pub fn counts(&self) -> PoolCounts {
        let entries = self.inner.entries.borrow();
        let (mut connections, mut streams, mut attempts) = (0, 0, 0);
        for entry in entries.values() {
            attempts += entry.attempts.get();
            for pooled in entry.connections.borrow().iter() {
                streams += pooled.connection.live_streams();
                connections += usize::from(pooled.connection.is_usable());
            }
        }
        let counts = &self.inner.counts;
        PoolCounts {
            connections,
            streams,
            attempts,
            connected: counts.connected.get(),
            failed: counts.failed.get(),
            reused: counts.reused.get(),
            released: counts.released.get(),
            evicted: counts.evicted.get(),
        }
    }

    fn entry(&self, key: &K) -> Result<Rc<Entry<E>>, CheckoutError<E>> {
        if self.inner.draining.get() {
            return Err(CheckoutError::Draining);
        }
        let mut entries = self.inner.entries.borrow_mut();
        if let Some(entry) = entries.get(key) {
            return Ok(entry.clone());
        }
        let entry = Rc::new(Entry::new());
        entries.insert(key.clone(), entry.clone());
        drop(entries);
        self.start_sweeper();
        Ok(entry)
    }

    /// A connection with a place on it; `None` if the entry was evicted meanwhile.
    async fn acquire(
        &self,
        entry: &Rc<Entry<E>>,
        deadline: Instant,
        connect: &impl AsyncFn() -> Result<Connection, E>,
    ) -> Result<Option<Place>, CheckoutError<E>> {
        let settings = &self.inner.settings;
        if let Some(place) = entry.pick(settings.max_streams) {
            count(&self.inner.counts.reused);
            return Ok(Some(place));
        }
        let (seen, _) = *entry.failure.borrow();
        let _waiting = Waiting::new(entry);
        loop {
            let changed = entry.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that nothing is missed in between.
            changed.as_mut().enable();
            if entry.evicted.get() {
                return Ok(None);
            }
            if let Some(place) = entry.pick(settings.max_streams) {
                count(&self.inner.counts.reused);
                return Ok(Some(place));
            }
            if let (number, Some(failure)) = &*entry.failure.borrow()
                && *number != seen
                && entry.attempts.get() == 0
            {
                return Err(failure.to_error());
            }
            if entry.wants_attempt(settings) {
                let connection = self.attempt(entry, deadline, connect).await?;
                let slot = entry.add(&connection, settings.max_streams);
                // A peer that allows no stream at all has the request wait in its queue.
                let slot = slot.unwrap_or_else(|| connection.slot());
                return Ok(Some(Place { connection, slot }));
            }
            timeout_at(deadline, changed)
                .await
                .map_err(|_| CheckoutError::Timeout)?;
        }
    }

    async fn attempt(
        &self,
        entry: &Rc<Entry<E>>,
        deadline: Instant,
        connect: &impl AsyncFn() -> Result<Connection, E>,
    ) -> Result<Connection, CheckoutError<E>> {
        let attempt = Attempt::new(entry);
        // Boxed: handshakes are large and rare, and every checkout would carry their size.
        let failure = match timeout_at(deadline, Box::pin(connect())).await {
            Ok(Ok(connection)) => {
                count(&self.inner.counts.connected);
                drop(attempt);
                return Ok(connection);
            }
            Ok(Err(error)) => Failure::Connect(Rc::new(error)),
            Err(_) => Failure::Timeout,
        };
        count(&self.inner.counts.failed);
        let error = failure.to_error();
        let mut last = entry.failure.borrow_mut();
        *last = (last.0 + 1, Some(failure));
        drop(last);
        drop(attempt);
        Err(error)
    }

    /// One timer for the whole pool; it ends when the pool is empty.
    fn start_sweeper(&self) {
        let mut sweeper = self.inner.sweeper.borrow_mut();
        if sweeper.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let weak = Rc::downgrade(&self.inner);
        let period = self.inner.settings.sweep;
        *sweeper = Some(spawn_local(sweep(weak, period)).abort_handle());
    }
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<K, E> fmt::Debug for Pool<K, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("keys", &self.inner.entries.borrow().len())
            .finish_non_exhaustive()
    }
}

impl<K, E> Drop for Inner<K, E> {
    fn drop(&mut self) {
        if let Some(task) = self.sweeper.get_mut().take() {
            task.abort();
        }
    }
}

async fn sweep<K: Eq + Hash, E>(pool: Weak<Inner<K, E>>, period: Duration) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut rolled = Instant::now();
    loop {
        ticks.tick().await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        let now = Instant::now();
        let settings = &pool.settings;
        let roll = now.duration_since(rolled) >= settings.unused_release;
        if roll {
            rolled = now;
        }
        let mut entries = pool.entries.borrow_mut();
        entries.retain(|_, entry| {
            let released = entry.sweep(settings, now, roll);
            pool.counts
                .released
                .set(pool.counts.released.get() + released);
            // One reference is the map's; others are checkouts under way.
            Rc::strong_count(entry) > 1 || !entry.connections.borrow().is_empty()
        });
        if entries.is_empty() {
            return;
        }
    }
}

impl<E> Entry<E> {
    fn new() -> Self {
        Self {
            connections: RefCell::default(),
            attempts: Cell::new(0),
            waiting: Cell::new(0),
            failure: RefCell::new((0, None)),
            changed: Rc::new(Notify::new()),
            peak: Cell::new((0, 0)),
            evicted: Cell::new(false),
        }
    }

    /// A place on the least loaded connection that has one; on a surplus one only if no other
    /// has room.
    fn pick(&self, max_streams: usize) -> Option<Place> {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|pooled| pooled.connection.is_usable());
        let streams: usize = connections
            .iter()
            .map(|p| p.connection.live_streams())
            .sum();
        let (peak, previous) = self.peak.get();
        self.peak.set((peak.max(streams + 1), previous));
        connections
            .iter_mut()
            .filter(|pooled| pooled.connection.has_room(max_streams))
            .min_by_key(|pooled| (pooled.surplus, pooled.connection.live_streams()))
            .and_then(|pooled| {
                let slot = pooled.connection.try_slot(max_streams)?;
                pooled.surplus = false;
                Some(Place {
                    connection: pooled.connection.clone(),
                    slot,
                })
            })
    }

    /// Whether those who wait need one more connection than what is under way.
    fn wants_attempt(&self, settings: &PoolSettings) -> bool {
        let attempts = self.attempts.get();
        let total = attempts + self.connections.borrow().len();
        total < settings.max_connections && attempts * settings.max_streams < self.waiting.get()
    }

    /// Puts a new connection in and takes the first place on it, before anybody else can.
    fn add(&self, connection: &Connection, max_streams: usize) -> Option<StreamGuard> {
        let slot = connection.try_slot(max_streams);
        if !self.evicted.get() {
            connection.notify_freed(self.changed.clone());
            self.connections.borrow_mut().push(Pooled {
                connection: connection.clone(),
                surplus: false,
            });
        }
        self.changed.notify_waiters();
        slot
    }

    /// Lets go of all connections. They close when their streams have ended.
    fn retire(&self) -> Vec<ConnectionWatch> {
        self.evicted.set(true);
        let connections = std::mem::take(&mut *self.connections.borrow_mut());
        // Waiters go on with what is under way, or start anew.
        self.changed.notify_waiters();
        connections.iter().map(|p| p.connection.watch()).collect()
    }

    /// Lets go of connections that ended, were unused for long, or that the demand of the last
    /// two periods would not have needed and that have run empty. Returns how many of the
    /// latter two there were.
    fn sweep(&self, settings: &PoolSettings, now: Instant, roll: bool) -> u64 {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|pooled| pooled.connection.is_usable());
        let (peak, previous) = self.peak.get();
        let needed = peak.max(previous).div_ceil(settings.max_streams).max(1);
        if roll {
            let streams = connections.iter().map(|p| p.connection.live_streams());
            self.peak.set((streams.sum(), peak));
        }
        let mut order: Vec<usize> = (0..connections.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(connections[*i].connection.live_streams()));
        for i in order.into_iter().skip(needed) {
            connections[i].surplus = true;
        }
        let before = connections.len();
        connections.retain(|pooled| match pooled.connection.idle_since() {
            Some(since) => !pooled.surplus && now.duration_since(since) < settings.unused_release,
            None => true,
        });
        (before - connections.len()) as u64
    }
}

/// Counts a connection attempt, also when it is cancelled; wakes waiters when it ends.
struct Attempt<'a, E>(&'a Entry<E>);

impl<'a, E> Attempt<'a, E> {
    fn new(entry: &'a Entry<E>) -> Self {
        entry.attempts.set(entry.attempts.get() + 1);
        Self(entry)
    }
}

impl<E> Drop for Attempt<'_, E> {
    fn drop(&mut self) {
        self.0.attempts.set(self.0.attempts.get() - 1);
        self.0.changed.notify_waiters();
    }
}

/// Counts a checkout that waits.
struct Waiting<'a, E>(&'a Entry<E>);

impl<'a, E> Waiting<'a, E> {
    fn new(entry: &'a Entry<E>) -> Self {
        entry.waiting.set(entry.waiting.get() + 1);
        Self(entry)
    }
}

impl<E> Drop for Waiting<'_, E> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}
