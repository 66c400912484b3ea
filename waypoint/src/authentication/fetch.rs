//! Issuers' keys, kept fresh. One task per address on the control runtime fetches them, so
//! that however many requests want them there is one fetch; workers read what was fetched
//! last without a lock.
//!
//! Keys are fetched at once, every 20 minutes, and when a token names a key that is not
//! known, but then no sooner than 10 seconds after the last attempt. A failed fetch leaves
//! the last keys in force and is tried again with growing pauses. The task ends with the
//! last rule that uses the address.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::Uri;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::client::{FetchError, Fetcher, parse_uri};
use super::keys::KeySet;

/// Istio's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`.
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Between fetches that requests ask for: what an attacker can make us do to an issuer.
const MIN_INTERVAL: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Where keys are fetched from. Clones share the sources.
#[derive(Debug, Clone)]
pub struct KeySources {
    runtime: Handle,
    fetcher: Fetcher,
    timing: Timing,
    known: Arc<Mutex<HashMap<Address, Weak<KeySource>>>>,
}

#[derive(Debug, Clone, Copy)]
struct Timing {
    refresh: Duration,
    min_interval: Duration,
    first_retry: Duration,
}

/// The keys at one address. Its task ends when it is dropped.
#[derive(Debug)]
pub struct KeySource {
    shared: Arc<Shared>,
}

/// What is known of a source, to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceStatus {
    /// Address of the key set, or of the issuer that is asked for it.
    pub uri: String,
    /// How many keys are in force.
    pub keys: usize,
    /// Attempts so far.
    pub attempts: u64,
    /// Why the last one failed.
    pub last_error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Address {
    uri: Uri,
    /// The document at `uri` says where the keys are (OpenID Connect Discovery 4).
    discovery: bool,
    timeout: Duration,
}

#[derive(Debug)]
struct Shared {
    address: Address,
    timing: Timing,
    keys: ArcSwapOption<KeySet>,
    state: Mutex<State>,
    /// How many fetches are over.
    attempts: watch::Sender<u64>,
    wanted: Notify,
    closed: Notify,
}

#[derive(Debug)]
struct State {
    /// A fetch is under way, or about to be.
    fetching: bool,
    finished: Option<Instant>,
    last_error: Option<String>,
    /// What `keys` were read from.
    document: Bytes,
}

#[derive(Deserialize)]
struct Discovery {
    jwks_uri: String,
}

impl KeySources {
    /// Sources whose fetches run on `runtime`.
    pub fn new(runtime: Handle, fetcher: Fetcher) -> Self {
        Self {
            runtime,
            fetcher,
            timing: Timing {
                refresh: REFRESH,
                min_interval: MIN_INTERVAL,
                first_retry: FIRST_RETRY,
            },
            known: Arc::default(),
        }
    }

    /// The same with other times: how long keys are good for, the least time between
    /// fetches that requests ask for, and the first pause after a failure.
    pub fn with_timing(
        mut self,
        refresh: Duration,
        min_interval: Duration,
        first_retry: Duration,
    ) -> Self {
        self.timing = Timing {
            refresh,
            min_interval,
            first_retry,
        };
        self
    }

    /// The key set at `uri`; the same for everyone who asks.
    ///
    /// # Errors
    /// What is wrong with the address.
    pub fn key_set(&self, uri: &str, timeout: Duration) -> Result<Arc<KeySource>, String> {
        let uri = parse_uri(uri).map_err(|error| error.to_string())?;
        Ok(self.source(Address {
            uri,
            discovery: false,
            timeout,
        }))
    }

    /// The key set that the issuer's discovery document names.
    ///
    /// # Errors
    /// The issuer is not an address.
    pub fn discover(&self, issuer: &str, timeout: Duration) -> Result<Arc<KeySource>, String> {
        let base = issuer.trim_end_matches('/');
        let uri = parse_uri(&format!("{base}/.well-known/openid-configuration"))
            .map_err(|error| error.to_string())?;
        Ok(self.source(Address {
            uri,
            discovery: true,
            timeout,
        }))
    }

    /// Every source that is in use.
    pub fn status(&self) -> Vec<SourceStatus> {
        let known = self.known.lock();
        let mut all: Vec<SourceStatus> = known
            .values()
            .filter_map(Weak::upgrade)
            .map(|source| source.status())
            .collect();
        all.sort_unstable_by(|a, b| a.uri.cmp(&b.uri));
        all
    }

    fn source(&self, address: Address) -> Arc<KeySource> {
        let mut known = self.known.lock();
        if let Some(source) = known.get(&address).and_then(Weak::upgrade) {
            return source;
        }
        known.retain(|_, source| source.strong_count() > 0);
        let shared = Arc::new(Shared {
            address: address.clone(),
            timing: self.timing,
            keys: ArcSwapOption::empty(),
            state: Mutex::new(State {
                fetching: true,
                finished: None,
                last_error: None,
                document: Bytes::new(),
            }),
            attempts: watch::Sender::new(0),
            wanted: Notify::new(),
            closed: Notify::new(),
        });
        self.runtime
            .spawn(shared.clone().keep_fresh(self.fetcher.clone()));
        let source = Arc::new(KeySource { shared });
        known.insert(address, Arc::downgrade(&source));
        source
    }
}

impl KeySource {
    /// The keys that were fetched last.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.shared.keys.load_full()
    }

    /// Keys other than `seen`: those that have come meanwhile, or those of one more fetch,
    /// which is waited for. `None` where there are none, or it is too soon to ask again.
    pub async fn newer_than(&self, seen: Option<&Arc<KeySet>>) -> Option<Arc<KeySet>> {
        let shared = &self.shared;
        let newer = || {
            let current = shared.keys.load_full()?;
            let same = seen.is_some_and(|seen| Arc::ptr_eq(seen, &current));
            (!same).then_some(current)
        };
        // Subscribed before anything is asked, so that no end of a fetch is missed.
        let mut attempts = shared.attempts.subscribe();
        if let Some(keys) = newer() {
            return Some(keys);
        }
        {
            let mut state = shared.state.lock();
            if !state.fetching {
                let since = state.finished.map(|finished| finished.elapsed());
                if since.is_some_and(|since| since < shared.timing.min_interval) {
                    return None;
                }
                state.fetching = true;
                shared.wanted.notify_one();
            }
        }
        // A fetch may have ended since we subscribed; then `changed` is immediate.
        let _ = timeout(shared.address.timeout, attempts.changed()).await;
        newer()
    }

    fn status(&self) -> SourceStatus {
        let shared = &self.shared;
        SourceStatus {
            uri: shared.address.uri.to_string(),
            keys: shared.keys.load().as_ref().map_or(0, |keys| keys.len()),
            attempts: *shared.attempts.borrow(),
            last_error: shared.state.lock().last_error.clone(),
        }
    }
}

impl Drop for KeySource {
    fn drop(&mut self) {
        self.shared.closed.notify_one();
    }
}

impl Shared {
    async fn keep_fresh(self: Arc<Self>, fetcher: Fetcher) {
        let mut retry = self.timing.first_retry;
        loop {
            self.state.lock().fetching = true;
            let result = tokio::select! {
                () = self.closed.notified() => return,
                result = timeout(self.address.timeout, self.fetch(&fetcher)) => {
                    result.unwrap_or(Err(FetchError::Timeout))
                }
            };
            let pause = match &result {
                Ok(()) => {
                    retry = self.timing.first_retry;
                    self.timing.refresh
                }
                Err(error) => {
                    tracing::warn!(uri = %self.address.uri, %error, "cannot fetch the keys of an issuer");
                    let pause = retry;
                    retry = (retry * 2).min(LAST_RETRY).min(self.timing.refresh);
                    pause
                }
            };
            {
                let mut state = self.state.lock();
                state.fetching = false;
                state.finished = Some(Instant::now());
                state.last_error = result.err().map(|error| error.to_string());
            }
            self.attempts.send_modify(|attempts| *attempts += 1);
            tokio::select! {
                () = self.closed.notified() => return,
                () = self.wanted.notified() => {}
                () = sleep(pause) => {}
            }
        }
    }

    async fn fetch(&self, fetcher: &Fetcher) -> Result<(), FetchError> {
        let uri = if self.address.discovery {
            let document = fetcher.get(&self.address.uri).await?;
            let found: Discovery = serde_json::from_slice(&document)
                .map_err(|error| FetchError::Document(format!("discovery: {error}")))?;
            parse_uri(&found.jwks_uri)?
        } else {
            self.address.uri.clone()
        };
        let document = fetcher.get(&uri).await?;
        // The same keys stay the same value, so that tokens checked by them stay known.
        if self.state.lock().document == document && self.keys.load().is_some() {
            return Ok(());
        }
        let keys =
            KeySet::parse(&document).map_err(|error| FetchError::Document(error.to_string()))?;
        self.keys.store(Some(Arc::new(keys)));
        self.state.lock().document = document;
        Ok(())
    }
}
