//! Configuration from the control plane to a proxy, over TCP and TLS.

mod support;

use std::time::Duration;

use adit_controlplane::serve::{ResourceSnapshot, SnapshotBuilder};
use adit_shared::identity::TokenSource;
use adit_shared::proto::enrolment::Enrolment;
use adit_shared::proto::security::Authorization;
use adit_shared::proto::workload::Address;
use adit_shared::proto::xds::DeltaDiscoveryRequest;
use adit_shared::proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::xds::client::Termination;
use serde_json::Value;
use support::{Mesh, PATIENCE, Proxy, eventually};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

fn policy(name: &str) -> Authorization {
    Authorization {
        name: name.to_owned(),
        ..Authorization::default()
    }
}

fn enrolment(uid: &str) -> Enrolment {
    Enrolment {
        uid: uid.to_owned(),
        ..Enrolment::default()
    }
}

fn three_of_each() -> ResourceSnapshot {
    let mut builder = SnapshotBuilder::new();
    for name in ["a", "b", "c"] {
        builder.set(AUTHORIZATION_TYPE, name, &policy(name));
        builder.set(ADDRESS_TYPE, name, &Address::default());
        builder.set_enrolment("n1", &enrolment(name));
    }
    builder.set_enrolment("n2", &enrolment("d"));
    builder.build()
}

#[tokio::test]
async fn a_proxy_gets_everything_then_changes_then_removals() {
    let mesh = Mesh::start_with(|_| {}, three_of_each()).await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    proxy.holds(AUTHORIZATION_TYPE, &["a", "b", "c"]).await;
    proxy.holds(ADDRESS_TYPE, &["a", "b", "c"]).await;
    proxy.holds(ENROLMENT_TYPE, &["a", "b", "c"]).await;
    let initial = proxy.messages().len();
    assert_eq!(initial, 3, "{:?}", proxy.messages());

    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "d", &Address::default());
        edit.set(AUTHORIZATION_TYPE, "d", &policy("d"));
        edit.remove(AUTHORIZATION_TYPE, "a");
        edit.remove_enrolment("n1", "b");
    });
    proxy.holds(ADDRESS_TYPE, &["a", "b", "c", "d"]).await;
    proxy.holds(AUTHORIZATION_TYPE, &["b", "c", "d"]).await;
    proxy.holds(ENROLMENT_TYPE, &["a", "c"]).await;
    assert_eq!(
        proxy.messages()[initial..],
        [
            "Authorization +d",
            "Address +d",
            "Authorization -a",
            "Enrolment -b"
        ]
    );
}

#[tokio::test]
async fn nothing_is_served_before_the_configuration_has_been_read() {
    let mesh = Mesh::start_with(|_| {}, ResourceSnapshot::default()).await;
    assert_eq!(mesh.page("/ready").await.0, 503);
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy
        .wait("refused", |status| {
            let error = status.last_error.as_deref().unwrap_or_default();
            error.contains("Unavailable")
        })
        .await;
    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "a", &Address::default());
    });
    proxy.ready().await;
    proxy.holds(ADDRESS_TYPE, &["a"]).await;
    assert_eq!(mesh.page("/ready").await.0, 200);
}

#[tokio::test]
async fn enrolments_go_to_the_proxy_of_their_node_only() {
    let mesh = Mesh::start_with(|_| {}, three_of_each()).await;
    let first = Proxy::start(mesh.client_config("n1"));
    let second = Proxy::start(mesh.client_config("n2"));
    // Some other pod of the node, with a token that is as good.
    let mut config = mesh.client_config("n1");
    let claims = mesh.claims("shop", "cart", "n1");
    config.token = Some(TokenSource::Literal(mesh.sign(&claims).into()));
    config.node.namespace = "shop".into();
    config.node.service_account = "cart".into();
    let other = Proxy::start(config);
    for proxy in [&first, &second, &other] {
        proxy.ready().await;
        proxy.holds(ADDRESS_TYPE, &["a", "b", "c"]).await;
    }
    first.holds(ENROLMENT_TYPE, &["a", "b", "c"]).await;
    second.holds(ENROLMENT_TYPE, &["d"]).await;
    mesh.publish(|edit| {
        edit.set_enrolment("n2", &enrolment("e"));
        edit.set(ADDRESS_TYPE, "d", &Address::default());
    });
    second.holds(ENROLMENT_TYPE, &["d", "e"]).await;
    for proxy in [&first, &other] {
        proxy.holds(ADDRESS_TYPE, &["a", "b", "c", "d"]).await;
    }
    assert_eq!(first.names(ENROLMENT_TYPE), ["a", "b", "c"]);
    assert!(other.names(ENROLMENT_TYPE).is_empty());
}

#[tokio::test]
async fn a_rejected_resource_is_reported_and_the_others_are_kept() {
    let mesh = Mesh::start().await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    mesh.publish(|edit| {
        edit.set(AUTHORIZATION_TYPE, "good", &policy("good"));
        edit.set(AUTHORIZATION_TYPE, "bad", &policy("bad"));
    });
    proxy.holds(AUTHORIZATION_TYPE, &["good"]).await;
    let rejects = &mesh.serving().metrics().rejects;
    eventually("counted", || rejects.get(AUTHORIZATION_TYPE) == 1).await;

    let (status, body) = mesh.page("/debug/syncz").await;
    assert_eq!(status, 200);
    let clients: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(clients[0]["proxy"], "ztunnel-n1.istio-system");
    assert_eq!(clients[0]["node"], "n1");
    let types = clients[0]["types"].as_array().expect("types");
    let policies = types
        .iter()
        .find(|kind| kind["type_url"] == AUTHORIZATION_TYPE)
        .expect("subscribed");
    assert_eq!(policies["status"], "ERROR");
    assert_eq!(policies["error"], "bad: is bad");
    assert_eq!(policies["sent"], policies["acknowledged"]);

    // It is not sent again by itself, and the next good state clears the error.
    mesh.publish(|edit| {
        edit.remove(AUTHORIZATION_TYPE, "bad");
    });
    eventually("removed", || {
        proxy
            .messages()
            .last()
            .is_some_and(|m| m == "Authorization -bad")
    })
    .await;
    let sent = proxy.messages();
    let bad = sent.iter().filter(|message| message.contains("+bad"));
    assert_eq!(bad.count(), 1, "{sent:?}");
    let (_, metrics) = mesh.page("/metrics").await;
    let line = format!("pilot_total_xds_rejects{{type=\"{AUTHORIZATION_TYPE}\"}} 1");
    assert!(metrics.contains(&line), "{metrics}");
}

#[tokio::test]
async fn after_a_restart_only_differences_are_sent() {
    let mut mesh = Mesh::start_with(|_| {}, three_of_each()).await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    proxy.holds(ENROLMENT_TYPE, &["a", "b", "c"]).await;
    let before = proxy.messages().len();

    assert!(mesh.stop().await, "streams end in good order");
    proxy
        .wait("disconnected", |status| !status.connected && status.ready)
        .await;
    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "d", &Address::default());
        edit.remove(AUTHORIZATION_TYPE, "b");
    });
    mesh.serve().await;
    proxy.ready().await;
    proxy.holds(ADDRESS_TYPE, &["a", "b", "c", "d"]).await;
    proxy.holds(AUTHORIZATION_TYPE, &["a", "c"]).await;
    let mut sent = proxy.messages()[before..].to_vec();
    sent.retain(|message| message.contains([' ']));
    sent.sort();
    assert_eq!(sent, ["Address +d", "Authorization -b"]);
}

#[tokio::test]
async fn connections_are_recycled_without_loss_or_repetition() {
    let mesh = Mesh::start_with(
        |config| config.streams.max_age = Duration::from_millis(1500),
        three_of_each(),
    )
    .await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    eventually("recycled", || !proxy.terminations().is_empty()).await;
    assert_eq!(proxy.terminations()[0], Termination::Complete);
    proxy.ready().await;
    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "d", &Address::default());
    });
    proxy.holds(ADDRESS_TYPE, &["a", "b", "c", "d"]).await;
    let sent = proxy.messages();
    let repeated = sent.iter().filter(|message| message.contains("+a"));
    assert_eq!(repeated.count(), 3, "once for each type: {sent:?}");
}

#[tokio::test]
async fn tokens_are_checked_and_nothing_is_told() {
    let mesh = Mesh::start().await;
    let now = jsonwebtoken::get_current_timestamp();
    let mut expired = mesh.claims("istio-system", "ztunnel", "n1");
    expired["exp"] = (now - 120).into();
    let mut audience = mesh.claims("istio-system", "ztunnel", "n1");
    audience["aud"] = "api".into();
    let stranger = Mesh::start().await;
    let foreign = stranger.sign(&stranger.claims("istio-system", "ztunnel", "n1"));
    for (what, token) in [
        ("expired", mesh.sign(&expired)),
        ("wrong audience", mesh.sign(&audience)),
        ("foreign key", foreign),
        ("junk", "junk".to_owned()),
    ] {
        let mut config = mesh.client_config("n1");
        config.token = Some(TokenSource::Literal(token.into()));
        let proxy = Proxy::start(config);
        proxy
            .wait(what, |status| {
                let error = status.last_error.as_deref().unwrap_or_default();
                error.contains("Unauthenticated: authentication failure")
                    && !error.to_lowercase().contains("expired")
            })
            .await;
    }
    let mut config = mesh.client_config("n1");
    config.token = None;
    let proxy = Proxy::start(config);
    proxy
        .wait("no token", |status| {
            let error = status.last_error.as_deref().unwrap_or_default();
            error.contains("Unauthenticated")
        })
        .await;
    let failures = &mesh.serving().metrics().authentication_failures;
    assert!(failures.get("invalid") >= 4);
    assert!(failures.get("missing") >= 1);
}

#[tokio::test]
async fn a_node_cannot_say_that_it_is_another() {
    let mesh = Mesh::start_with(|_| {}, three_of_each()).await;
    let mut config = mesh.client_config("n1");
    config.node.node_name = "n2".into();
    let proxy = Proxy::start(config);
    proxy
        .wait("refused", |status| {
            let error = status.last_error.as_deref().unwrap_or_default();
            error.contains("PermissionDenied") && error.contains("NODE_NAME")
        })
        .await;
    assert!(proxy.messages().is_empty());
}

#[tokio::test]
async fn streams_are_bounded() {
    let mesh = Mesh::start_with(|config| config.streams.streams = 1, three_of_each()).await;
    let first = Proxy::start(mesh.client_config("n1"));
    first.ready().await;
    let second = Proxy::start(mesh.client_config("n2"));
    second
        .wait("refused", |status| {
            let error = status.last_error.as_deref().unwrap_or_default();
            error.contains("ResourceExhausted")
        })
        .await;
    drop(first);
    second.ready().await;
}

#[tokio::test]
async fn a_server_of_another_root_gets_no_token() {
    let mesh = Mesh::start().await;
    let other = Mesh::start().await;
    let mut config = mesh.client_config("n1");
    config.transport.trust = Some(other.trust());
    let proxy = Proxy::start(config);
    proxy
        .wait("refused", |status| {
            let error = status.last_error.as_deref().unwrap_or_default();
            error.to_lowercase().contains("certificate")
        })
        .await;
    assert_eq!(proxy.terminations()[0], Termination::ConnectionError);
}

/// Opens a stream by hand; what the server says about it in the end.
async fn ended_with(mesh: &Mesh, requests: Vec<DeltaDiscoveryRequest>) -> Code {
    ended_with_as(mesh, mesh.node_token("n1"), requests).await
}

async fn ended_with_as(
    mesh: &Mesh,
    token: TokenSource,
    requests: Vec<DeltaDiscoveryRequest>,
) -> Code {
    let mut client = AggregatedDiscoveryServiceClient::new(mesh.endpoint().channel())
        .max_decoding_message_size(usize::MAX);
    // The sender lives as long as this function: the stream stays open on our side.
    let (sender, queue) = mpsc::channel(16);
    for request in requests {
        sender.try_send(request).expect("room");
    }
    let mut call = tonic::Request::new(ReceiverStream::new(queue));
    let token = token.authorization().expect("a token");
    call.metadata_mut().insert("authorization", token);
    let mut responses = match client.delta_aggregated_resources(call).await {
        Ok(accepted) => accepted.into_inner(),
        Err(status) => return status.code(),
    };
    loop {
        match timeout(PATIENCE, responses.message()).await {
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) => return Code::Ok,
            Ok(Err(status)) => return status.code(),
            Err(_) => panic!("still open"),
        }
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_or_acknowledges_nothing_is_dropped() {
    let mesh = Mesh::start_with(
        |config| {
            config.streams.first_request = Duration::from_millis(200);
            config.streams.acknowledgement = Duration::from_millis(200);
        },
        three_of_each(),
    )
    .await;
    let addresses = DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.into(),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(ended_with(&mesh, vec![]).await, Code::DeadlineExceeded);
    assert_eq!(
        ended_with(&mesh, vec![addresses]).await,
        Code::DeadlineExceeded
    );
    let nothing = DeltaDiscoveryRequest::default();
    assert_eq!(
        ended_with(&mesh, vec![nothing]).await,
        Code::InvalidArgument
    );
    let ends = &mesh.serving().metrics().stream_ends;
    for reason in ["no_request", "not_acknowledged", "protocol"] {
        eventually(reason, || ends.get(reason) == 1).await;
    }
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
}

/// Node proxies and waypoints claim what they have; nobody else has that much.
#[tokio::test]
async fn only_those_that_hold_a_mesh_may_claim_one() {
    let mesh = Mesh::start_with(
        |config| config.streams.acknowledgement = Duration::from_millis(200),
        three_of_each(),
    )
    .await;
    let claim = |count: usize| {
        let version = |i| (format!("Kubernetes//Pod/shop/{i:064}"), "v".to_owned());
        DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE.into(),
            initial_resource_versions: (0..count).map(version).collect(),
            ..DeltaDiscoveryRequest::default()
        }
    };
    let token = |namespace: &str, account: &str| {
        let claims = mesh.claims(namespace, account, "n1");
        TokenSource::Literal(mesh.sign(&claims).into())
    };
    // Whatever is read is answered, and nobody acknowledges.
    let (read, refused) = (Code::DeadlineExceeded, Code::OutOfRange);
    for (namespace, account, count, expected) in [
        ("istio-system", "ztunnel", 60_000, read),
        ("shop", "waypoint", 60_000, read),
        ("shop", "cart", 60_000, refused),
        ("shop", "cart", 20_000, read),
    ] {
        let ended = ended_with_as(&mesh, token(namespace, account), vec![claim(count)]).await;
        assert_eq!(ended, expected, "{namespace}/{account} {count}");
    }
    assert_eq!(mesh.serving().metrics().stream_ends.get("malformed"), 1);
}

#[tokio::test]
async fn streams_of_a_pod_are_bounded() {
    let mesh = Mesh::start_with(|config| config.streams.streams_of_pod = 2, three_of_each()).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(Proxy::start(mesh.client_config("n1")));
        held[held.len() - 1].ready().await;
    }
    assert_eq!(ended_with(&mesh, vec![]).await, Code::ResourceExhausted);
    Proxy::start(mesh.client_config("n2")).ready().await;
    held.pop();
    let again = Proxy::start(mesh.client_config("n1"));
    again.ready().await;
}
