//! TokenReview: one question for many callers, and what holds while nobody answers.

use std::time::Duration;

use adit_controlplane::auth::{AuthError, Authenticator as _, ReviewOptions, TokenReviewer};
use futures_util::FutureExt as _;
use serde_json::{Value, json};

use super::api_server::ApiServer;

fn good() -> Value {
    json!({
        "authenticated": true, "audiences": ["istio-ca"],
        "user": {
            "username": "system:serviceaccount:istio-system:ztunnel",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["ztunnel-a"],
                "authentication.kubernetes.io/pod-uid": ["u"],
                "authentication.kubernetes.io/node-name": ["n1"],
            },
        },
    })
}

fn options() -> ReviewOptions {
    ReviewOptions {
        fresh: Duration::from_millis(300),
        stale: Duration::from_millis(1500),
        deadline: Duration::from_secs(5),
        ..ReviewOptions::default()
    }
}

#[tokio::test]
async fn a_hundred_callers_are_one_question() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::from_millis(200));
    let reviewer = TokenReviewer::new(server.client(), options());
    let asked = (0..100).map(|_| reviewer.authenticate("t", None));
    for answer in futures_util::future::join_all(asked).await {
        assert_eq!(answer.expect("good").node, "n1");
    }
    assert_eq!(server.requests("tokenreviews").len(), 1);
    reviewer.authenticate("other", None).await.expect("good");
    assert_eq!(server.requests("tokenreviews").len(), 2);
    tokio::time::sleep(options().fresh).await;
    reviewer.authenticate("t", None).await.expect("good");
    assert_eq!(server.requests("tokenreviews").len(), 3, "asked again");
}

/// The first of several callers may go away; the others get their answer.
#[tokio::test]
async fn a_caller_that_leaves_takes_nobody_along() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::from_millis(300));
    let reviewer = TokenReviewer::new(server.client(), options());
    let leaves = tokio::time::timeout(Duration::from_millis(50), reviewer.authenticate("t", None));
    assert!(leaves.await.is_err());
    reviewer.authenticate("t", None).await.expect("good");
}

/// Strangers who bring tokens and leave, as many as there are places and places to wait.
#[tokio::test]
async fn callers_that_leave_hold_up_nobody() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::from_millis(100));
    let options = ReviewOptions {
        concurrent: 2,
        waiting: 4,
        ..options()
    };
    let reviewer = TokenReviewer::new(server.client(), options);
    for token in ["a", "b", "c", "d"] {
        // Each is asked once and never again.
        let asked = reviewer.authenticate(token, None).now_or_never();
        assert!(asked.is_none(), "{token}");
    }
    let full = reviewer.authenticate("e", None).await;
    assert!(matches!(full, Err(AuthError::Unavailable(_))), "{full:?}");
    let served = async {
        while reviewer.authenticate("t", None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let served = tokio::time::timeout(options.deadline, served).await;
    assert!(served.is_ok(), "those who left are waited for");
}

#[tokio::test]
async fn one_address_does_not_take_all_places() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::from_millis(300));
    let options = ReviewOptions {
        waiting_of_peer: 2,
        ..options()
    };
    let reviewer = TokenReviewer::new(server.client(), options);
    let (flood, other) = (Some([10, 0, 0, 1].into()), Some([10, 0, 0, 2].into()));
    for token in ["a", "b"] {
        let asked = reviewer.authenticate(token, flood).now_or_never();
        assert!(asked.is_none(), "{token}");
    }
    let more = reviewer.authenticate("c", flood).now_or_never();
    assert!(
        matches!(more, Some(Err(AuthError::Unavailable(_)))),
        "{more:?}"
    );
    // Waiting for an answer that is on its way costs nothing more.
    let same = reviewer.authenticate("a", flood);
    let (same, another) = tokio::join!(same, reviewer.authenticate("c", other));
    same.expect("good");
    another.expect("good");
    reviewer
        .authenticate("d", flood)
        .await
        .expect("has room again");
}

#[tokio::test]
async fn an_outage_lets_only_those_in_who_were_in_before() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::ZERO);
    let reviewer = TokenReviewer::new(server.client(), options());
    reviewer.authenticate("t", None).await.expect("good");
    server.refuse("tokenreviews", 503);
    tokio::time::sleep(options().fresh).await;
    reviewer
        .authenticate("t", None)
        .await
        .expect("was good a moment ago");
    let stranger = reviewer.authenticate("stranger", None).await;
    assert!(
        matches!(stranger, Err(AuthError::Unavailable(_))),
        "{stranger:?}"
    );
    tokio::time::sleep(options().stale).await;
    let late = reviewer.authenticate("t", None).await;
    assert!(matches!(late, Err(AuthError::Unavailable(_))), "{late:?}");
    server.recover();
    reviewer.authenticate("t", None).await.expect("good");
}

#[tokio::test]
async fn a_token_that_ends_is_not_good_any_more() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::ZERO);
    let reviewer = TokenReviewer::new(server.client(), options());
    reviewer.authenticate("t", None).await.expect("good");
    server.answer_reviews(json!({"authenticated": false}), Duration::ZERO);
    tokio::time::sleep(options().fresh).await;
    let refused = reviewer.authenticate("t", None).await;
    assert!(matches!(refused, Err(AuthError::Invalid(_))), "{refused:?}");
    // An outage now does not bring it back.
    server.refuse("tokenreviews", 503);
    assert!(reviewer.authenticate("t", None).await.is_err());
}
