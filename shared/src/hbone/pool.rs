//! A worker's HBONE connections to other workloads, by a key of the user's choice: the real
//! key, never a hash of it.
//!
//! Connections are made on demand. Whoever finds none with room starts one attempt, which
//! others with the same key wait for; different keys never wait for each other. When an
//! attempt fails, all who waited for it get its error. A connection that is full comes back
//! into use when streams end.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::Shared;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;

use super::client::{Connection, OpenError, ResponseInfo};
use super::headers::ConnectRequest;
use super::tunnel::Tunnel;

/// A request whose pooled connection turned out to be gone is sent again so often.
const STALE_RETRIES: usize = 2;

/// Bounds and times of a pool.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Streams on one connection, as far as the peer allows. Default 100.
    pub max_streams: usize,
    /// A connection without streams is closed after so long. Default 5 min.
    pub unused_release: Duration,
    /// How long the answer to a CONNECT may take. Default 20 s: the peer's own connect to the
    /// app has 10.
    pub open_deadline: Duration,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            max_streams: 100,
            unused_release: Duration::from_secs(300),
            open_deadline: Duration::from_secs(20),
        }
    }
}

/// Why a checkout failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckoutError<E> {
    /// No connection could be made.
    #[error("{0}")]
    Connect(Rc<E>),
    /// There is a connection, but the stream was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

type Attempt<E> = Shared<Pin<Box<dyn Future<Output = Result<Connection, Rc<E>>>>>>;

/// Connections by key.
pub struct Pool<K, E> {
    options: PoolOptions,
    slots: RefCell<HashMap<K, Slot<E>>>,
    janitor: RefCell<Option<AbortHandle>>,
}

struct Slot<E> {
    connections: Vec<Connection>,
    attempt: Option<Attempt<E>>,
}

impl<E> Default for Slot<E> {
    fn default() -> Self {
        Self {
            connections: Vec::new(),
            attempt: None,
        }
    }
}

impl<K, E> Drop for Pool<K, E> {
    fn drop(&mut self) {
        if let Some(janitor) = self.janitor.take() {
            janitor.abort();
        }
    }
}

enum Found<E> {
    Connection(Connection),
    Attempt(Attempt<E>),
}

impl<K, E> Pool<K, E>
where
    K: Eq + Hash + Clone + 'static,
    E: 'static,
{
    /// An empty pool. Its clean-up is a task of the current worker.
    pub fn new(options: PoolOptions) -> Rc<Self> {
        let period = options.unused_release / 4;
        let pool = Rc::new(Self {
            options,
            slots: RefCell::default(),
            janitor: RefCell::default(),
        });
        let janitor = spawn_local(release_unused(Rc::downgrade(&pool), period));
        pool.janitor.replace(Some(janitor.abort_handle()));
        pool
    }

    /// Opens a stream to `key`, over a connection that is there or one that `connect` makes.
    ///
    /// # Errors
    /// [`CheckoutError`].
    pub async fn checkout<C, F>(
        &self,
        key: &K,
        request: &ConnectRequest,
        connect: C,
    ) -> Result<(Tunnel, ResponseInfo), CheckoutError<E>>
    where
        C: Fn() -> F,
        F: Future<Output = Result<Connection, E>> + 'static,
    {
        let mut retries = 0;
        loop {
            let (connection, fresh) = match self.find(key, &connect) {
                Found::Connection(connection) => (connection, false),
                Found::Attempt(attempt) => {
                    let result = attempt.clone().await;
                    self.settle(key, &attempt, result.as_ref().ok());
                    let connection = result.map_err(CheckoutError::Connect)?;
                    if !self.has_room(&connection) {
                        // Others were faster; there is a new attempt to be made or joined.
                        continue;
                    }
                    (connection, true)
                }
            };
            match connection.open(request, self.options.open_deadline).await {
                Err(error) if !fresh && retries < STALE_RETRIES && stale(&error, &connection) => {
                    // Nothing has been read from the app yet: nothing is lost or doubled.
                    retries += 1;
                    self.discard(key, &connection);
                }
                result => return Ok(result?),
            }
        }
    }

    /// Takes the connections whose key `gone` says yes to out of use: streams go on, the
    /// connections close behind the last one.
    pub fn evict(&self, gone: impl Fn(&K) -> bool) {
        self.slots.borrow_mut().retain(|key, _| !gone(key));
    }

    /// Connections that are open and in use for new streams.
    pub fn len(&self) -> usize {
        self.slots
            .borrow()
            .values()
            .map(|slot| slot.connections.len())
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn has_room(&self, connection: &Connection) -> bool {
        !connection.is_closed()
            && connection.streams() < self.options.max_streams.min(connection.max_streams())
    }

    fn find<C, F>(&self, key: &K, connect: &C) -> Found<E>
    where
        C: Fn() -> F,
        F: Future<Output = Result<Connection, E>> + 'static,
    {
        let mut slots = self.slots.borrow_mut();
        if !slots.contains_key(key) {
            slots.insert(key.clone(), Slot::default());
        }
        let slot = slots.entry(key.clone()).or_default();
        slot.connections
            .retain(|connection| !connection.is_closed());
        let room = slot
            .connections
            .iter()
            .filter(|connection| self.has_room(connection));
        if let Some(connection) = room.min_by_key(|connection| connection.streams()) {
            return Found::Connection(connection.clone());
        }
        let attempt = slot.attempt.get_or_insert_with(|| {
            let connecting = connect();
            let connecting = async move { connecting.await.map_err(Rc::new) };
            (Box::pin(connecting) as Pin<Box<dyn Future<Output = _>>>).shared()
        });
        Found::Attempt(attempt.clone())
    }

    /// Called by each who waited; the first one moves the connection into the slot.
    fn settle(&self, key: &K, attempt: &Attempt<E>, connection: Option<&Connection>) {
        let mut slots = self.slots.borrow_mut();
        // An eviction may have come in between; then the connection serves only those who
        // waited for it.
        let Some(slot) = slots.get_mut(key) else {
            return;
        };
        if slot
            .attempt
            .as_ref()
            .is_some_and(|current| current.ptr_eq(attempt))
        {
            slot.attempt = None;
            slot.connections.extend(connection.cloned());
            if slot.connections.is_empty() {
                slots.remove(key);
            }
        }
    }

    fn discard(&self, key: &K, connection: &Connection) {
        if let Some(slot) = self.slots.borrow_mut().get_mut(key) {
            slot.connections.retain(|other| !other.is_same(connection));
        }
    }
}

fn stale(error: &OpenError, connection: &Connection) -> bool {
    error.not_processed() || (matches!(error, OpenError::Connection(_)) && connection.is_closed())
}

async fn release_unused<K, E>(pool: Weak<Pool<K, E>>, period: Duration)
where
    K: Eq + Hash + Clone + 'static,
    E: 'static,
{
    loop {
        sleep(period.max(Duration::from_millis(10))).await;
        let Some(pool) = pool.upgrade() else { return };
        let limit = pool.options.unused_release;
        pool.slots.borrow_mut().retain(|_, slot| {
            slot.connections.retain(|connection| {
                let unused = connection
                    .idle_since()
                    .is_some_and(|since| since.elapsed() >= limit);
                !unused && !connection.is_closed()
            });
            !slot.connections.is_empty() || slot.attempt.is_some()
        });
    }
}
