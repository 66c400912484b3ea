//! Policies come, change and go; many of them cost nothing where they are not meant.

use std::time::Instant;

use super::support::*;
use crate::policy::TrustDomains;
use crate::policy::http::HttpUpdate;
use crate::proto::waypoint as proto;
use crate::proto::waypoint::authorization_policy::Action;

#[test]
fn updates() {
    let one = allow(vec![methods(&["GET"])]);
    let mut policies = store(std::slice::from_ref(&one));
    let web = "web.srv.svc.cluster.local";
    let permits = |policies: &crate::policy::http::HttpPolicies, service: &str, call: Call| {
        let set = policies.for_service("srv/waypoint", "srv", service);
        let verdict = call.with(|request| {
            set.evaluate_deny_allow(request, &TrustDomains::default())
                .verdict
                .is_permitted()
        });
        verdict.expect("a path")
    };
    assert!(!permits(&policies, web, get("/").method("PUT")));
    let before = policies.clone();
    // It moves to another service.
    let moved = proto::AuthorizationPolicy {
        targets: vec![service("srv", "other")],
        ..one
    };
    policies.apply([HttpUpdate::Upsert(convert(&moved))]);
    assert!(permits(&policies, web, get("/").method("PUT")));
    assert!(!permits(
        &policies,
        "Other.srv.svc.cluster.local",
        get("/").method("PUT")
    ));
    assert_eq!(policies.len(), 1);
    // What was handed out stays as it was.
    assert!(!permits(&before, web, get("/").method("PUT")));
    policies.apply([
        HttpUpdate::Remove("srv/allow".into()),
        HttpUpdate::Remove("no/such".into()),
    ]);
    assert!(policies.is_empty());
    assert!(
        policies
            .for_service("srv/waypoint", "srv", "other")
            .is_empty()
    );
}

/// Rules of many policies at one service are found by account or path, and the first of
/// those that match is named.
#[test]
fn an_index_finds_what_a_search_finds() {
    let mut policies: Vec<_> = (0..200)
        .map(|i| {
            let rule = match i % 3 {
                0 => principals(&[&format!("cluster.local/ns/A/sa/sa{}", i / 3)]),
                1 => paths(&[&format!("/p/{}", i / 3)]),
                _ => paths(&[&format!("/q/{}/*", i / 3)]),
            };
            named("srv", &format!("p{i:03}"), Action::Allow, vec![rule])
        })
        .collect();
    let by = |call: Call, policies: &[_]| match call.evaluate(policies).verdict {
        crate::policy::Verdict::Permitted(permitted) => permitted.policy().map(|p| p.to_string()),
        crate::policy::Verdict::Denied(_) => None,
    };
    assert_eq!(
        by(get("/p/7").by("A/sa1"), &policies).as_deref(),
        Some("srv/p003")
    );
    assert_eq!(
        by(get("/p/1").by("A/sa60"), &policies).as_deref(),
        Some("srv/p004")
    );
    assert_eq!(by(get("/q/5/x"), &policies).as_deref(), Some("srv/p017"));
    assert_eq!(by(get("/p/70"), &policies), None);
    assert_eq!(
        by(get("/p/7").by("A/other"), &policies).as_deref(),
        Some("srv/p022")
    );
    // Both readings of a path are looked up.
    policies.extend((0..20).map(|i| {
        let rule = paths(&[&format!("/admin{i}")]);
        named("srv", &format!("d{i}"), Action::Deny, vec![rule])
    }));
    policies.push(named("srv", "all", Action::Allow, vec![everything()]));
    assert_eq!(by(get("/x"), &policies).as_deref(), Some("srv/all"));
    assert_eq!(by(get("/x/..%2fadmin7"), &policies), None);
    assert_eq!(
        by(tcp(1), &policies),
        None,
        "paths are left out of a DENY on TCP"
    );
}

/// Printed, for the measure of things; asserted only where it would be absurd.
#[test]
fn cost() {
    let ten: Vec<_> = (0..10)
        .map(|i| {
            let rule = proto::AuthorizationRule {
                from: principals(&[&format!("cluster.local/ns/A/sa/sa{i}")]).from,
                to: methods(&["GET"]).to,
                when: vec![],
            };
            named("srv", &format!("p{i}"), Action::Allow, vec![rule])
        })
        .collect();
    let mut many: Vec<_> = (0..10_000)
        .map(|i| proto::AuthorizationPolicy {
            targets: vec![service("srv", &format!("other{i}"))],
            ..named("srv", &format!("o{i}"), Action::Deny, vec![everything()])
        })
        .collect();
    many.extend(ten.iter().cloned());
    let here: Vec<_> = (0..10_000)
        .map(|i| {
            let rule = principals(&[&format!("cluster.local/ns/A/sa/sa{i}")]);
            named("srv", &format!("h{i}"), Action::Allow, vec![rule])
        })
        .collect();
    let call = get("/api/v1/items").by("A/sa9");
    let trust = TrustDomains::default();
    for (what, policies) in [
        ("10", ten),
        ("10 and 10,000 elsewhere", many),
        ("10,000", here),
    ] {
        let set = set(&policies);
        let each = call.with(|request| {
            let rounds = 20_000;
            let start = Instant::now();
            for _ in 0..rounds {
                let request = std::hint::black_box(request);
                let evaluation = set.evaluate_deny_allow(request, &trust);
                assert!(std::hint::black_box(evaluation).verdict.is_permitted());
            }
            start.elapsed() / rounds
        });
        let each = each.expect("a path");
        println!("{what} policies: {each:?}");
        assert!(each.as_micros() < 100, "{what}: {each:?}");
    }
}
