//! Which CONNECT authorities a workload accepts (ztunnel: server-side checks).

use super::wire::*;
use crate::model::inbound::{AuthorityError, target};
use crate::proto::workload as proto;

#[test]
fn authorities() {
    let plain = || {
        let listed = member(
            pod("a", "web", &["10.0.0.1", "fd00::1"]),
            "a/api.a",
            &[(81, 9001)],
        );
        member(listed, "a/named.a", &[])
    };
    let tunnelled = |protocol, port| proto::Workload {
        application_tunnel: Some(proto::ApplicationTunnel { protocol, port }),
        ..plain()
    };
    let api = proto::Service {
        ports: ports(&[(80, 8080), (81, 0), (82, 0)]),
        ..service("a", "api.a", &["10.9.0.1"])
    };
    let named = proto::Service {
        ports: ports(&[(80, 0)]),
        ..service("a", "named.a", &["10.9.0.2"])
    };
    let behind = |waypoint| proto::Service {
        waypoint,
        ..service("b", "behind.b", &["10.9.0.3"])
    };
    let pod_behind = |waypoint| proto::Workload {
        waypoint,
        ..pod("b", "behind", &["10.0.0.9"])
    };
    let by_host = || gateway_host("a/api.a");
    let by_ip = || gateway_ip("", "10.0.0.1");
    let by_vip = || gateway_ip("", "10.9.0.1");
    let weighted = proto::Service {
        weighted_waypoints: vec![proto::WeightedWaypoint {
            destination: by_host(),
            weight: 1,
        }],
        ..service("b", "weighted.b", &["10.9.0.4"])
    };
    // Authority, the workload, waypoint of the others; port and upstream port, or status.
    let cases = [
        ("10.0.0.1:8080", plain(), None, Ok((8080, 8080, false))),
        (
            "[::ffff:10.0.0.1]:8080",
            plain(),
            None,
            Ok((8080, 8080, false)),
        ),
        ("10.0.0.2:8080", plain(), None, Err(400)),
        // The pod's other address is not the one that was dialled.
        ("[fd00::1]:8080", plain(), None, Err(400)),
        ("127.0.0.1:15000", plain(), None, Err(400)),
        ("10.0.0.1:0", plain(), None, Err(400)),
        ("10.0.0.1", plain(), None, Err(400)),
        ("10.0.0.1:65536", plain(), None, Err(400)),
        ("", plain(), None, Err(400)),
        (":80", plain(), None, Err(400)),
        ("api.a:", plain(), None, Err(400)),
        ("api.a:+80", plain(), None, Err(400)),
        ("user@api.a:80", plain(), None, Err(400)),
        ("http://api.a:80", plain(), None, Err(400)),
        ("api.a:80", plain(), None, Ok((8080, 8080, false))),
        ("API.a:80", plain(), None, Ok((8080, 8080, false))),
        ("api.a:81", plain(), None, Ok((9001, 9001, false))),
        ("api.a:82", plain(), None, Err(503)),
        ("api.a:83", plain(), None, Err(503)),
        ("named.a:80", plain(), None, Err(503)),
        ("nobody:80", plain(), None, Err(503)),
        (
            "10.7.7.7:80",
            tunnelled(1, 15088),
            None,
            Ok((80, 15088, true)),
        ),
        ("10.7.7.7:80", tunnelled(0, 0), None, Ok((80, 80, false))),
        (
            "named.a:80",
            tunnelled(0, 15088),
            None,
            Ok((80, 15088, false)),
        ),
        ("10.9.0.3:80", plain(), None, Err(400)),
        ("10.9.0.3:80", plain(), by_host(), Ok((80, 80, false))),
        ("10.9.0.3:80", plain(), by_ip(), Ok((80, 80, false))),
        ("10.9.0.3:80", plain(), by_vip(), Ok((80, 80, false))),
        ("10.0.0.9:80", plain(), None, Err(400)),
        ("10.0.0.9:80", plain(), by_host(), Ok((80, 80, false))),
        (
            "10.0.0.9:80",
            plain(),
            gateway_ip("far", "10.0.0.1"),
            Err(400),
        ),
        ("10.0.0.9:80", plain(), gateway_host("b/behind.b"), Err(400)),
        ("10.9.0.4:80", plain(), None, Ok((80, 80, false))),
    ];
    for (authority, web, waypoint, expected) in cases {
        let store = store(
            [web, pod_behind(waypoint.clone())],
            [
                api.clone(),
                named.clone(),
                behind(waypoint),
                weighted.clone(),
            ],
        );
        let snapshot = store.snapshot();
        let web = snapshot.pod("Kubernetes", "a", "web").expect("known");
        let found = target(snapshot, web, ip("10.0.0.1"), authority);
        let found = found.map(|t| (t.port, t.upstream_port, t.proxy_protocol));
        assert_eq!(
            found.map_err(|error| error.status()),
            expected,
            "{authority}"
        );
    }
}

#[test]
fn a_refusal_says_what_was_asked_of_whom() {
    let store = store([pod("a", "web", &["10.0.0.1"])], []);
    let web = store
        .snapshot()
        .pod("Kubernetes", "a", "web")
        .expect("known");
    let error = target(store.snapshot(), web, ip("10.0.0.1"), "10.0.0.2:80").expect_err("refused");
    assert!(matches!(error, AuthorityError::NotLocal { .. }));
    assert_eq!(
        error.to_string(),
        "authority 10.0.0.2:80 is not an address of this workload (10.0.0.1)"
    );
}
