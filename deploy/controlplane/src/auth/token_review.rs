//! Tokens that the API server verifies (TokenReview), which knows what no signature says:
//! that the pod and the service account are still there.
//!
//! A good answer holds for a minute, so that a node which wants certificates for a hundred
//! pods is one question. While the API server cannot be reached a token that it has called
//! good goes on a little longer; every other is refused, with an error that says a retry
//! can help. One token is one question at a time, however many wait for the answer, and it is
//! asked to the end even if nobody waits any more: a stranger who brings a token and leaves
//! holds nothing up.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use kube::api::{Api, ObjectMeta, PostParams};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::{AUDIENCE, AuthError, Authenticator, Caller};
use crate::kubernetes::explain;
use crate::quota::{Quota, Share};

/// What the API server says of a token of a pod (KEP-4193).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// How the API server is asked.
#[derive(Debug, Clone, Copy)]
pub struct ReviewOptions {
    /// For this long after a good answer it is not asked again.
    pub fresh: Duration,
    /// For this long after a good answer a token is good while the API server is away.
    pub stale: Duration,
    /// For one answer.
    pub deadline: Duration,
    /// Questions at a time; more wait.
    pub concurrent: usize,
    /// Callers that may wait; more are turned away.
    pub waiting: usize,
    /// Questions that the tokens of one address may have open; more are turned away. A node
    /// needs one, a translated address stands for many nodes.
    pub waiting_of_peer: usize,
    /// Good answers that are kept: one for each node and gateway.
    pub kept: usize,
}

impl Default for ReviewOptions {
    fn default() -> Self {
        Self {
            fresh: Duration::from_secs(60),
            stale: Duration::from_secs(300),
            deadline: Duration::from_secs(10),
            concurrent: 32,
            waiting: 4096,
            waiting_of_peer: 64,
            kept: 16_384,
        }
    }
}

/// Asks the API server who a token belongs to. Cheap to clone.
#[derive(Clone)]
pub struct TokenReviewer {
    shared: Arc<Inner>,
}

type Review = Shared<BoxFuture<'static, Result<Caller, AuthError>>>;

struct Inner {
    api: Api<TokenReview>,
    options: ReviewOptions,
    concurrent: Semaphore,
    peers: Quota<IpAddr>,
    state: Mutex<State>,
}

/// Keyed by the tokens themselves: who is who is not decided by a hash.
#[derive(Default)]
struct State {
    good: HashMap<Arc<str>, Good>,
    under_way: HashMap<Arc<str>, Review>,
}

struct Good {
    caller: Caller,
    since: Instant,
    /// By the token's own words; the API server has verified them.
    expires: Option<SystemTime>,
}

impl Good {
    fn holds(&self, within: Duration) -> bool {
        self.since.elapsed() < within
            && self
                .expires
                .is_none_or(|expires| SystemTime::now() < expires)
    }
}

impl TokenReviewer {
    /// Asks through `client`.
    pub fn new(client: kube::Client, options: ReviewOptions) -> Self {
        Self {
            shared: Arc::new(Inner {
                api: Api::all(client),
                options,
                concurrent: Semaphore::new(options.concurrent.max(1)),
                peers: Quota::new(options.waiting_of_peer),
                state: Mutex::default(),
            }),
        }
    }

    /// The caller, or the question that will tell.
    fn begin(
        &self,
        token: &str,
        peer: Option<IpAddr>,
    ) -> Result<Result<Caller, Review>, AuthError> {
        let options = self.shared.options;
        let mut state = self.shared.state.lock();
        if let Some(good) = state
            .good
            .get(token)
            .filter(|good| good.holds(options.fresh))
        {
            return Ok(Ok(good.caller.clone()));
        }
        if let Some(review) = state.under_way.get(token) {
            return Ok(Err(review.clone()));
        }
        if state.under_way.len() >= options.waiting {
            return Err(AuthError::Unavailable("too many wait already".to_owned()));
        }
        let share = match peer {
            None => None,
            Some(peer) => Some(self.shared.peers.take(peer).ok_or_else(|| {
                AuthError::Unavailable("too many of this address wait already".to_owned())
            })?),
        };
        let token: Arc<str> = token.into();
        // A task of its own: whoever waits may leave, and then nobody would drive it.
        let task = tokio::spawn(review(self.shared.clone(), token.clone(), share));
        let review = task
            .map(|ended| {
                ended.unwrap_or_else(|_| {
                    Err(AuthError::Unavailable("the question was given up".into()))
                })
            })
            .boxed()
            .shared();
        state.under_way.insert(token, review.clone());
        Ok(Err(review))
    }
}

impl Authenticator for TokenReviewer {
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
        peer: Option<IpAddr>,
    ) -> BoxFuture<'a, Result<Caller, AuthError>> {
        async move {
            match self.begin(token, peer)? {
                Ok(caller) => Ok(caller),
                Err(review) => review.await,
            }
        }
        .boxed()
    }
}

/// A question is under way until this is dropped, however that comes about.
struct UnderWay<'a> {
    inner: &'a Inner,
    token: Arc<str>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.inner.state.lock().under_way.remove(&self.token);
    }
}

/// Asks, and writes down what was answered.
async fn review(
    inner: Arc<Inner>,
    token: Arc<str>,
    _share: Option<Share<IpAddr>>,
) -> Result<Caller, AuthError> {
    let _under_way = UnderWay {
        inner: &inner,
        token: token.clone(),
    };
    let answer = timeout(inner.options.deadline, async {
        // The semaphore is never closed.
        let _slot = inner.concurrent.acquire().await;
        inner
            .api
            .create(&PostParams::default(), &question(&token))
            .await
    })
    .await;
    let result = match answer {
        Ok(Ok(review)) => caller(review.status.unwrap_or_default()),
        Ok(Err(error)) => Err(AuthError::Unavailable(explain(
            "create",
            "tokenreviews.authentication.k8s.io",
            &error,
        ))),
        Err(_) => Err(AuthError::Unavailable(format!(
            "no answer from the API server within {:?}",
            inner.options.deadline
        ))),
    };
    let mut state = inner.state.lock();
    match result {
        Ok(caller) => {
            make_room(&mut state.good, inner.options);
            let good = Good {
                caller: caller.clone(),
                since: Instant::now(),
                expires: expiry(&token),
            };
            state.good.insert(token, good);
            Ok(caller)
        }
        Err(AuthError::Unavailable(reason)) => {
            let known = state.good.get(&token);
            match known.filter(|good| good.holds(inner.options.stale)) {
                Some(good) => {
                    warn!(caller = %good.caller, reason, "the token was good a moment ago and goes on");
                    Ok(good.caller.clone())
                }
                None => Err(AuthError::Unavailable(reason)),
            }
        }
        Err(error) => {
            state.good.remove(&token);
            Err(error)
        }
    }
}

/// What does not hold any more goes; if that is not enough, all of it: the API server is
/// asked again, and nobody is taken for another.
fn make_room(good: &mut HashMap<Arc<str>, Good>, options: ReviewOptions) {
    if good.len() < options.kept {
        return;
    }
    good.retain(|_, good| good.holds(options.fresh));
    if good.len() >= options.kept {
        good.clear();
    }
}

fn question(token: &str) -> TokenReview {
    TokenReview {
        metadata: ObjectMeta::default(),
        spec: TokenReviewSpec {
            audiences: Some(vec![AUDIENCE.to_owned()]),
            token: Some(token.to_owned()),
        },
        status: None,
    }
}

fn caller(status: TokenReviewStatus) -> Result<Caller, AuthError> {
    if status.authenticated != Some(true) {
        let reason = status.error.filter(|error| !error.is_empty());
        return Err(AuthError::Invalid(reason.unwrap_or_else(|| {
            format!("the API server does not know it for the audience {AUDIENCE}")
        })));
    }
    // An API server that does not look at audiences says nothing of them.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|audience| audience == AUDIENCE) {
        return Err(AuthError::Invalid(format!(
            "it is not for the audience {AUDIENCE}"
        )));
    }
    let UserInfo {
        username, extra, ..
    } = status.user.unwrap_or_default();
    let extra = extra.unwrap_or_default();
    let account = username
        .as_deref()
        .and_then(|name| name.strip_prefix("system:serviceaccount:"))
        .and_then(|name| name.split_once(':'))
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
    let Some((namespace, service_account)) = account else {
        return Err(AuthError::Invalid(format!(
            "{:?} is not a service account",
            username.unwrap_or_default()
        )));
    };
    Ok(Caller {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        pod_name: only(&extra, POD_NAME)?,
        pod_uid: only(&extra, POD_UID)?,
        // Without the node nothing of the node can be checked, so nothing is allowed.
        node: only(&extra, NODE_NAME)?,
    })
}

fn only(extra: &BTreeMap<String, Vec<String>>, key: &'static str) -> Result<String, AuthError> {
    match extra.get(key).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Ok(value.clone()),
        _ => Err(AuthError::Claim(key)),
    }
}

/// The `exp` of a JWT, without looking at anything else.
fn expiry(token: &str) -> Option<SystemTime> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let payload = token.split('.').nth(1)?;
    let json = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(payload)
        .ok()?;
    let claims: Claims = serde_json::from_slice(&json).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(claims.exp))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> TokenReviewStatus {
        let one = |value: &str| vec![value.to_owned()];
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(one(AUDIENCE)),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:istio-system:ztunnel".into()),
                extra: Some(
                    [
                        (POD_NAME.to_owned(), one("ztunnel-a")),
                        (POD_UID.to_owned(), one("u")),
                        (NODE_NAME.to_owned(), one("n1")),
                    ]
                    .into(),
                ),
                ..UserInfo::default()
            }),
        }
    }

    fn with(change: impl FnOnce(&mut TokenReviewStatus)) -> TokenReviewStatus {
        let mut status = status();
        change(&mut status);
        status
    }

    fn user(change: impl FnOnce(&mut UserInfo)) -> TokenReviewStatus {
        with(|status| change(status.user.as_mut().expect("a user")))
    }

    #[test]
    fn the_answer_names_pod_and_node() {
        let caller = caller(status()).expect("good");
        assert_eq!(
            caller.to_string(),
            "istio-system/ztunnel pod ztunnel-a node n1"
        );
        assert_eq!(caller.pod_uid, "u");
    }

    #[test]
    fn everything_else_is_refused() {
        let extra = |change: fn(&mut BTreeMap<String, Vec<String>>)| {
            user(|user| change(user.extra.as_mut().expect("extra")))
        };
        let cases = [
            ("not authenticated", with(|s| s.authenticated = Some(false))),
            ("says nothing", with(|s| s.authenticated = None)),
            ("no audiences", with(|s| s.audiences = None)),
            (
                "another audience",
                with(|s| s.audiences = Some(vec!["api".into()])),
            ),
            ("nobody", with(|s| s.user = None)),
            ("a person", user(|u| u.username = Some("admin".into()))),
            (
                "no account",
                user(|u| u.username = Some("system:serviceaccount:x:".into())),
            ),
            ("no extra", user(|u| u.extra = None)),
            ("no pod", extra(|e| drop(e.remove(POD_NAME)))),
            ("no uid", extra(|e| drop(e.remove(POD_UID)))),
            ("no node", extra(|e| drop(e.remove(NODE_NAME)))),
            (
                "two nodes",
                extra(|e| drop(e.insert(NODE_NAME.into(), vec!["a".into(), "b".into()]))),
            ),
            (
                "empty node",
                extra(|e| drop(e.insert(NODE_NAME.into(), vec![String::new()]))),
            ),
        ];
        for (what, status) in cases {
            assert!(caller(status).is_err(), "{what}");
        }
    }

    #[test]
    fn a_token_says_when_it_ends() {
        let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(r#"{"exp":100}"#);
        assert_eq!(
            expiry(&format!("h.{payload}.s")),
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(100))
        );
        for token in ["", "junk", "a.b.c", "a.e30.c"] {
            assert_eq!(expiry(token), None, "{token}");
        }
    }
}
