//! The cache against an authority that does what the test says, on paused time.

use super::*;
use crate::identity::{LocalCa, SignedChain, TrustDomain};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use tokio::sync::Semaphore;

/// A certificate authority whose mood can be set.
struct Authority {
    ca: LocalCa,
    ttl: Duration,
    down: AtomicBool,
    /// A permit for each answer.
    gate: Semaphore,
    asked: Mutex<Vec<SpiffeId>>,
    running: AtomicUsize,
    most: AtomicUsize,
}

const OPEN: usize = 1 << 20;

impl Authority {
    fn new(ttl: Duration, permits: usize) -> Arc<Self> {
        Arc::new(Self {
            ca: LocalCa::generate(&TrustDomain::default()).expect("a CA"),
            ttl,
            down: AtomicBool::new(false),
            gate: Semaphore::new(permits),
            asked: Mutex::default(),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        })
    }

    fn asked(&self) -> Vec<SpiffeId> {
        self.asked.lock().clone()
    }

    fn asked_times(&self) -> usize {
        self.asked.lock().len()
    }
}

impl CertificateAuthority for Authority {
    fn sign<'a>(
        &'a self,
        identity: &'a SpiffeId,
        csr_pem: &'a str,
        _: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
        async move {
            self.asked.lock().push(identity.clone());
            let running = self.running.fetch_add(1, SeqCst) + 1;
            self.most.fetch_max(running, SeqCst);
            self.gate.acquire().await.expect("open").forget();
            self.running.fetch_sub(1, SeqCst);
            if self.down.load(SeqCst) {
                return Err(SignError::Unreachable("down for the test".into()));
            }
            let signed = self.ca.sign(csr_pem, identity, self.ttl);
            signed.map_err(|e| SignError::Refused(e.to_string()))
        }
        .boxed()
    }
}

const DAY: Duration = Duration::from_secs(86_400);

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(TrustDomain::default(), "shop", name).expect("legal")
}

fn cache(authority: &Arc<Authority>) -> CertificateCache {
    CertificateCache::new(authority.clone(), CacheOptions::default())
}

/// Lets all tasks run until they wait for time or for the authority.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn fetches_once_for_all_who_wait() {
    let authority = Authority::new(DAY, 0);
    let cache = cache(&authority);
    assert!(cache.try_get(&id("a")).is_none());
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get(&id("a")).await })
        })
        .collect();
    settle().await;
    authority.gate.add_permits(1);
    let mut serials = Vec::new();
    for waiter in waiters {
        let certificate = waiter.await.expect("no panic").expect("a certificate");
        serials.push(certificate.facts().serial.clone());
    }
    serials.dedup();
    assert_eq!(serials.len(), 1);
    assert_eq!(authority.asked_times(), 1);
    assert!(cache.try_get(&id("a")).is_some());
    assert!(matches!(
        cache.snapshot()[0].state,
        CertificateState::Available
    ));
}

#[tokio::test(start_paused = true)]
async fn waiting_connections_overtake_prefetches_and_eight_run_at_once() {
    let authority = Authority::new(DAY, 0);
    let cache = cache(&authority);
    for n in 0..20 {
        cache.prefetch(&id(&format!("warm-{n:02}")));
    }
    settle().await;
    assert_eq!(authority.asked_times(), 8);
    let waiter = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get(&id("now")).await }
    });
    // One that is queued is moved forward too.
    let queued = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get(&id("warm-19")).await }
    });
    settle().await;
    authority.gate.add_permits(2);
    settle().await;
    assert_eq!(authority.asked()[8..], [id("now"), id("warm-19")]);
    authority.gate.add_permits(OPEN);
    waiter.await.expect("no panic").expect("a certificate");
    queued.await.expect("no panic").expect("a certificate");
    settle().await;
    assert_eq!(authority.asked_times(), 21);
    assert_eq!(authority.most.load(SeqCst), 8);
}

#[tokio::test(start_paused = true)]
async fn renews_at_about_half_of_the_life() {
    let authority = Authority::new(DAY, OPEN);
    let cache = cache(&authority);
    let first = cache.get(&id("a")).await.expect("a certificate");
    let begin = Instant::now();
    while authority.asked_times() == 1 {
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    let waited = begin.elapsed();
    assert!(
        waited > DAY.mul_f64(0.39) && waited < DAY.mul_f64(0.51),
        "{waited:?}"
    );
    settle().await;
    let second = cache.try_get(&id("a")).expect("a certificate");
    assert_ne!(first.facts().serial, second.facts().serial);
}

#[tokio::test(start_paused = true)]
async fn keeps_a_valid_certificate_while_the_authority_is_down() {
    let authority = Authority::new(DAY, OPEN);
    let cache = cache(&authority);
    let first = cache.get(&id("a")).await.expect("a certificate");
    authority.down.store(true, SeqCst);
    tokio::time::sleep(DAY.mul_f64(0.6)).await;
    assert!(authority.asked_times() > 2, "it was asked");
    let kept = cache.get(&id("a")).await.expect("still the first");
    assert_eq!(first.facts().serial, kept.facts().serial);
    let status = cache.snapshot().remove(0);
    assert!(matches!(status.state, CertificateState::Available));
    assert!(status.last_error.is_some());
}

#[tokio::test(start_paused = true)]
async fn failures_are_told_at_once_and_retried_with_growing_pauses() {
    let authority = Authority::new(DAY, OPEN);
    authority.down.store(true, SeqCst);
    let cache = cache(&authority);
    let error = cache.get(&id("a")).await.expect_err("down");
    assert!(matches!(
        error,
        CertificateError::Sign(SignError::Unreachable(_))
    ));
    // Within a second of the failure nobody asks again on a connection's behalf.
    let asked = authority.asked_times();
    for _ in 0..100 {
        assert!(cache.get(&id("a")).await.is_err());
    }
    assert_eq!(authority.asked_times(), asked);
    assert!(matches!(
        cache.snapshot()[0].state,
        CertificateState::Unavailable(_)
    ));

    // 0.5 s doubling to 150 s, jitter at most doubles a pause: an hour holds few tries.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let tries = authority.asked_times();
    assert!((20..=45).contains(&tries), "{tries}");

    // A connection does not wait for the end of the long pause.
    authority.down.store(false, SeqCst);
    let begin = Instant::now();
    cache.get(&id("a")).await.expect("a certificate");
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_silent_authority_costs_a_deadline() {
    let authority = Authority::new(DAY, 0);
    let cache = cache(&authority);
    let begin = Instant::now();
    let error = cache.get(&id("a")).await.expect_err("no answer");
    assert!(matches!(error, CertificateError::Timeout(_)), "{error}");
    assert!(begin.elapsed() <= Duration::from_secs(21));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_of_somebody_else_is_refused() {
    struct Wrong(LocalCa);
    impl CertificateAuthority for Wrong {
        fn sign<'a>(
            &'a self,
            _: &'a SpiffeId,
            csr_pem: &'a str,
            ttl: Duration,
        ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
            let signed = self.0.sign(csr_pem, &id("other"), ttl).expect("signed");
            std::future::ready(Ok(signed)).boxed()
        }
    }
    let ca = LocalCa::generate(&TrustDomain::default()).expect("a CA");
    let cache = CertificateCache::new(Arc::new(Wrong(ca)), CacheOptions::default());
    let error = cache.get(&id("a")).await.expect_err("not ours");
    assert!(
        matches!(
            error,
            CertificateError::Invalid(CertificateInvalid::Identity { .. })
        ),
        "{error}"
    );
    assert!(cache.try_get(&id("a")).is_none());
}

#[tokio::test(start_paused = true)]
async fn forgets_and_stops_renewing() {
    let authority = Authority::new(DAY, OPEN);
    let cache = cache(&authority);
    cache.get(&id("a")).await.expect("a certificate");
    cache.forget(&id("a"));
    assert!(cache.try_get(&id("a")).is_none());
    assert!(cache.snapshot().is_empty());
    tokio::time::sleep(DAY).await;
    assert_eq!(authority.asked_times(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_fetch_for_a_forgotten_entry_changes_nothing() {
    let authority = Authority::new(DAY, 0);
    let cache = cache(&authority);
    let waiter = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get(&id("a")).await }
    });
    settle().await;
    cache.forget(&id("a"));
    settle().await;
    let outcome = waiter.await.expect("no panic");
    assert!(matches!(outcome, Err(CertificateError::Forgotten)));
    authority.gate.add_permits(OPEN);
    settle().await;
    assert!(cache.try_get(&id("a")).is_none());
    assert!(cache.snapshot().is_empty());
    // Wanted again: fetched again.
    cache.get(&id("a")).await.expect("a certificate");
}

#[tokio::test(start_paused = true)]
async fn ends_with_its_last_handle() {
    let authority = Authority::new(DAY, OPEN);
    let cache = cache(&authority);
    cache.get(&id("a")).await.expect("a certificate");
    let weak = Arc::downgrade(&authority);
    drop(authority);
    drop(cache);
    settle().await;
    assert!(weak.upgrade().is_none());
}

#[test]
fn serves_other_runtimes() {
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let authority = Authority::new(DAY, OPEN);
    let cache = control.block_on(async { cache(&authority) });
    let worker = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    worker.block_on(cache.get(&id("a"))).expect("a certificate");
}
