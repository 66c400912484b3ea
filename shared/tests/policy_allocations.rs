//! A verdict over a request allocates nothing. A process of its own, because it replaces the
//! allocator to count.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::IpAddr;

use adit_shared::identity::{SpiffeId, TrustDomain};
use adit_shared::policy::TrustDomains;
use adit_shared::policy::http::{
    HttpFields, HttpPolicies, HttpPolicy, HttpRequest, HttpUpdate, PathNormalization, normalize,
};
use adit_shared::proto::waypoint as proto;
use adit_shared::proto::waypoint::authorization_policy::Action;
use http::HeaderMap;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are those of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those of the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn list(values: &[&str]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn policy(i: usize, action: Action) -> HttpPolicy {
    let name = format!("p{i}");
    let wire = proto::AuthorizationPolicy {
        object: Some(proto::ObjectRef {
            kind: "AuthorizationPolicy".into(),
            namespace: "srv".into(),
            name: name.clone(),
            created: 0,
        }),
        action: action.into(),
        rules: vec![proto::AuthorizationRule {
            from: vec![proto::Source {
                principals: list(&["cluster.local/ns/a/sa/x", "*/sa/y"]),
                not_ip_blocks: list(&["192.168.0.0/16"]),
                ..Default::default()
            }],
            to: vec![proto::Operation {
                methods: list(&["GET", "P*"]),
                paths: list(&["/api/*", "/v1/{*}/x"]),
                hosts: list(&["web.srv"]),
                ports: vec![80],
                ..Default::default()
            }],
            when: vec![proto::Condition {
                key: "request.headers[x-team]".into(),
                values: list(&["a"]),
                not_values: if action == Action::Deny {
                    list(&["a"])
                } else {
                    Vec::new()
                },
            }],
        }],
        ..Default::default()
    };
    HttpPolicy::from_resource(&format!("AuthorizationPolicy/srv/{name}"), &wire)
}

#[test]
fn a_verdict_allocates_nothing() {
    let mut policies = HttpPolicies::new();
    let all = (0..50).map(|i| {
        let action = if i % 2 == 0 {
            Action::Allow
        } else {
            Action::Deny
        };
        HttpUpdate::Upsert(policy(i, action))
    });
    policies.apply(all);
    assert!(policies.iter().all(|policy| policy.problems().is_empty()));
    let set = policies.for_service("srv/waypoint", "srv", "web.srv.svc.cluster.local");
    let trust = TrustDomains::default();
    let caller = SpiffeId::new(TrustDomain::default(), "a", "x").expect("an id");
    let mut headers = HeaderMap::new();
    headers.insert("x-team", "a".parse().expect("a value"));
    let before = ALLOCATIONS.with(Cell::get);
    let path = normalize("/api/items", PathNormalization::MergeSlashes).expect("a path");
    let request = HttpRequest {
        source_identity: Some(&caller),
        source_ip: IpAddr::from([10, 0, 0, 1]),
        remote_ip: IpAddr::from([10, 0, 0, 1]),
        destination_ip: IpAddr::from([10, 0, 0, 2]),
        destination_port: 80,
        sni: None,
        http: Some(HttpFields {
            method: "GET",
            path: &path,
            query: Some("a=b"),
            host: "Web.srv:80",
            headers: &headers,
            claims: None,
        }),
    };
    assert!(set.custom(&request, &trust).is_empty());
    let permitted = set
        .evaluate_deny_allow(&request, &trust)
        .verdict
        .is_permitted();
    let after = ALLOCATIONS.with(Cell::get);
    assert!(permitted);
    assert_eq!(after - before, 0);
}
