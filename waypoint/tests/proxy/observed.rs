//! What is told of requests and connections: to endpoints' nodes, and to who asks.

use std::time::Duration;

use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::telemetry::{Filter, NotFollowed};

use crate::support::{Mesh, echo, eventually, get, identity, run, send, send2};

/// Where policies at the endpoint's node depend on who calls, connections of one caller carry
/// nobody else's requests, and the node is told whose they are.
#[test]
fn callers_are_kept_apart_and_named_where_it_matters() {
    for matters in [false, true] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http);
            let (app, _) = echo("a");
            let pod = mesh.pod(&web, "web-a", app).await;
            mesh.join_as(&web, &pod, |workload| workload.callers_matter = matters);
            for account in ["ann", "bob"] {
                let client = mesh.client("default", account).await;
                for http2 in [false, true] {
                    for _ in 0..3 {
                        let status = match http2 {
                            false => send(&mut client.http1(&web).await, get("/")).await.status,
                            true => {
                                let mut request = get("/");
                                *request.uri_mut() = "http://web.shop/".parse().unwrap();
                                send2(&client.http2(&web).await, request).await.status
                            }
                        };
                        assert_eq!(status, 200);
                    }
                }
            }
            let named = |account| Some(identity("default", account));
            let expected = match matters {
                // One for HTTP/1, one for HTTP/2.
                false => vec![None, None],
                true => vec![named("ann"), named("ann"), named("bob"), named("bob")],
            };
            assert_eq!(*pod.callers.borrow(), expected);
            assert_eq!(pod.connections.get(), 1, "one tunnel carries them");
        });
    }
}

/// Bytes that are no HTTP have one caller anyway.
#[test]
fn a_connection_names_its_caller() {
    run(async {
        let mesh = Mesh::new().await;
        let tcp = mesh.service("tcp", Protocol::Tcp);
        let (app, _) = echo("a");
        let pod = mesh.pod(&tcp, "tcp-a", app).await;
        let client = mesh.client("default", "ann").await;
        let answer = send(&mut client.http1(&tcp).await, get("/")).await;
        assert_eq!(answer.status, 200);
        assert_eq!(*pod.callers.borrow(), [Some(identity("default", "ann"))]);
        let listed = mesh.workers[0].listing().await.expect("it runs");
        let open = &listed.downstream[0];
        assert_eq!(open.protocol, "TCP");
        let ann = "spiffe://cluster.local/ns/default/sa/ann";
        assert_eq!(open.identity.as_deref(), Some(ann));
        assert!(open.received > 0 && open.sent > 0, "{open:?}");
    });
}

#[test]
fn what_is_open_is_listed_with_identities_and_bytes() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("hello");
        let pod = mesh.pod(&web, "web-a", app).await;
        mesh.join_as(&web, &pod, |workload| workload.callers_matter = true);
        let client = mesh.client("default", "ann").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, get("/")).await.status, 200);
        let listed = mesh.workers[0].listing().await.expect("it runs");
        let ann = "spiffe://cluster.local/ns/default/sa/ann";
        let web_a = "spiffe://cluster.local/ns/shop/sa/web-a";
        assert_eq!(listed.tunnels.len(), 1);
        assert_eq!(listed.tunnels[0].identity, ann);
        assert_eq!(listed.tunnels[0].streams, 1);
        let [down] = &listed.downstream[..] else {
            panic!("{listed:?}");
        };
        assert_eq!((down.protocol, down.active), ("HTTP/1", 0));
        assert_eq!(down.identity.as_deref(), Some(ann));
        assert_eq!(down.dst, web.address.to_string());
        assert!(down.received > 10 && down.sent > 10, "{down:?}");
        let [up] = &listed.upstream[..] else {
            panic!("{listed:?}");
        };
        assert_eq!((up.protocol, up.way), ("HTTP/1", "HBONE"));
        assert_eq!(up.identity.as_deref(), Some(web_a));
        assert_eq!(up.caller.as_deref(), Some(ann));
        assert!(up.received > Some(10) && up.sent > 10, "{up:?}");
        let [tunnel] = &listed.upstream_tunnels[..] else {
            panic!("{listed:?}");
        };
        assert_eq!((tunnel.streams, tunnel.carried), (1, 1));
        assert_eq!(tunnel.identity, web_a);
        // What has ended is not there any more.
        drop(sender);
        drop(client);
        eventually("the client is gone", || async {
            let listed = mesh.workers[0].listing().await.expect("it runs");
            listed.downstream.is_empty() && listed.tunnels.is_empty()
        })
        .await;
    });
}

#[test]
fn the_next_request_that_matches_is_followed_through_every_stage() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "ann").await;
        let following = mesh.requests.following();
        let filter = Filter {
            method: Some("GET".into()),
            path: Some("/wanted".into()),
            source: Some("cluster.local/ns/default/sa/ann".into()),
            ..Filter::default()
        };
        let calls = async {
            assert_eq!(client.get(&web, "/other").await.status, 200);
            assert_eq!(client.get(&web, "/wanted/1").await.status, 200);
            assert_eq!(client.get(&web, "/wanted/2").await.status, 200);
        };
        let next = following.next(filter, Duration::from_secs(20));
        let (told, ()) = tokio::join!(biased; next, calls);
        let told = told.expect("followed");
        assert_eq!(told["ended"], true, "{told:#}");
        let steps = told["steps"].as_array().expect("a list");
        let stages: Vec<_> = steps.iter().map(|s| s["stage"].as_str().unwrap()).collect();
        let expected = [
            "received",
            "destination",
            "route",
            "endpoint",
            "attempt",
            "retry",
            "end",
        ];
        assert_eq!(stages, expected, "{told:#}");
        let times: Vec<_> = steps
            .iter()
            .map(|s| s["atMicros"].as_u64().unwrap())
            .collect();
        assert!(times.is_sorted(), "{times:?}");
        assert_eq!(steps[0]["path"], "/wanted/1");
        assert_eq!(steps[1]["service"], web.key.to_string());
        assert_eq!(steps[3]["workload"], "Kubernetes//Pod/shop/web-a");
        assert_eq!(steps[4]["status"], 200);
        assert_eq!(steps[5]["again"], false);
        // None is followed that nobody has asked for.
        let nothing = following
            .next(Filter::default(), Duration::from_millis(1))
            .await;
        assert_eq!(nothing, Err(NotFollowed::Nothing));
    });
}
