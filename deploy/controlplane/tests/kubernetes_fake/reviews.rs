//! TokenReview: one question for many callers, and what holds while nobody answers.

use std::time::Duration;

use adit_controlplane::auth::{AuthError, Authenticator as _, ReviewOptions, TokenReviewer};
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
    let asked = (0..100).map(|_| reviewer.authenticate("t"));
    for answer in futures_util::future::join_all(asked).await {
        assert_eq!(answer.expect("good").node, "n1");
    }
    assert_eq!(server.requests("tokenreviews").len(), 1);
    reviewer.authenticate("other").await.expect("good");
    assert_eq!(server.requests("tokenreviews").len(), 2);
    tokio::time::sleep(options().fresh).await;
    reviewer.authenticate("t").await.expect("good");
    assert_eq!(server.requests("tokenreviews").len(), 3, "asked again");
}

/// The first of several callers may go away; the others get their answer.
#[tokio::test]
async fn a_caller_that_leaves_takes_nobody_along() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::from_millis(300));
    let reviewer = TokenReviewer::new(server.client(), options());
    let leaves = tokio::time::timeout(Duration::from_millis(50), reviewer.authenticate("t"));
    assert!(leaves.await.is_err());
    reviewer.authenticate("t").await.expect("good");
}

#[tokio::test]
async fn an_outage_lets_only_those_in_who_were_in_before() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::ZERO);
    let reviewer = TokenReviewer::new(server.client(), options());
    reviewer.authenticate("t").await.expect("good");
    server.refuse("tokenreviews", 503);
    tokio::time::sleep(options().fresh).await;
    reviewer
        .authenticate("t")
        .await
        .expect("was good a moment ago");
    let stranger = reviewer.authenticate("stranger").await;
    assert!(
        matches!(stranger, Err(AuthError::Unavailable(_))),
        "{stranger:?}"
    );
    tokio::time::sleep(options().stale).await;
    let late = reviewer.authenticate("t").await;
    assert!(matches!(late, Err(AuthError::Unavailable(_))), "{late:?}");
    server.recover();
    reviewer.authenticate("t").await.expect("good");
}

#[tokio::test]
async fn a_token_that_ends_is_not_good_any_more() {
    let server = ApiServer::start().await;
    server.answer_reviews(good(), Duration::ZERO);
    let reviewer = TokenReviewer::new(server.client(), options());
    reviewer.authenticate("t").await.expect("good");
    server.answer_reviews(json!({"authenticated": false}), Duration::ZERO);
    tokio::time::sleep(options().fresh).await;
    let refused = reviewer.authenticate("t").await;
    assert!(matches!(refused, Err(AuthError::Invalid(_))), "{refused:?}");
    // An outage now does not bring it back.
    server.refuse("tokenreviews", 503);
    assert!(reviewer.authenticate("t").await.is_err());
}
