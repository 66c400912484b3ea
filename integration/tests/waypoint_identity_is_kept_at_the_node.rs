//! Behind a waypoint the destination's node judges and names the caller, not only the waypoint;
//! and a destination that is marked takes nothing that has not passed its waypoint.

use adit_integration::{TestMesh, pod, reviews_mesh};
use anyhow::ensure;

const REVIEWS: &str = "http://reviews.shop/";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const VISITOR: &str = "spiffe://cluster.local/ns/shop/sa/visitor";
const WAYPOINT: &str = "spiffe://cluster.local/ns/shop/sa/waypoint";
const REQUIRE: &str = "istio.io/require-waypoint";

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: gate, namespace: shop }}\nspec: {{ selector: {{ matchLabels: {{ app: reviews }} }}, {spec} }}\n"
    )
}

/// What the nodes of `reviews` say of callers that came by the waypoint.
fn has_origin(mesh: &TestMesh, identity: &str) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for node in ["node1", "node2"] {
        lines.extend(mesh.access_log(node)?);
    }
    let named = lines.iter().any(|line| {
        line.get("direction") == "inbound"
            && line.get("src.identity") == WAYPOINT
            && line.get("origin.identity") == identity
    });
    ensure!(named, "no line with {identity} behind {WAYPOINT}");
    Ok(())
}

#[test]
fn policies_at_the_node_judge_the_caller_behind_the_waypoint() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    let (client, visitor) = (pod("shop/client"), pod("shop/visitor"));
    // Before that the waypoint, which is not the client, was refused by the node.
    let spec = "action: DENY, rules: [{ from: [{ source: { notPrincipals: [cluster.local/ns/shop/sa/client] } }] }]";
    mesh.apply("gate.yaml", &policy(spec))?;
    mesh.eventually("the policy", || {
        mesh.ask(visitor, REVIEWS, &[])?.has_status(403)
    })?;
    let counted = mesh.requests(client, REVIEWS, &["-n", "50"])?;
    assert_eq!(counted.status("200"), 50, "{counted:?}");
    // A field that L4 does not know does not make the node refuse the waypoint.
    let spec = "action: DENY, rules: [{ to: [{ operation: { ports: ['80', '8080'], methods: [DELETE] } }] }, { from: [{ source: { principals: [cluster.local/ns/shop/sa/nobody] } }] }]";
    mesh.apply("gate.yaml", &policy(spec))?;
    mesh.eventually("the other policy", || {
        mesh.ask(visitor, REVIEWS, &[])?.has_status(200)?;
        mesh.ask(client, REVIEWS, &["-X", "DELETE"])?
            .has_status(403)?;
        mesh.ask(client, REVIEWS, &[])?.has_status(200)
    })?;
    // Connections of different callers are different ones, and each names its own.
    mesh.kill_component("waypoint.shop")?;
    mesh.start_component("waypoint.shop")?;
    mesh.eventually("both in the log", || {
        mesh.ask(client, REVIEWS, &[])?.has_status(200)?;
        mesh.ask(visitor, REVIEWS, &[])?.has_status(200)?;
        has_origin(&mesh, CLIENT)?;
        has_origin(&mesh, VISITOR)
    })?;
    Ok(())
}

#[test]
fn a_destination_that_requires_its_waypoint_refuses_what_has_not_passed_it() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    let (client, legacy) = (pod("shop/client"), pod("legacy/client"));
    let direct = format!("http://{}:8080/", mesh.address(pod("shop/web-b"))?);
    let by_service = "http://web.shop/";
    for from in [client, legacy] {
        assert_eq!(mesh.call(from, &direct)?.ok(), Some("web-b"));
    }
    mesh.ask(client, by_service, &[])?.has_status(200)?;
    let label = format!("{REQUIRE}=true");
    mesh.adit(&["local", "label", "namespace", "shop", &label])?;
    mesh.eventually("the refusal", || {
        for from in [client, legacy] {
            let call = mesh.call(from, &direct)?;
            ensure!(call.ok().is_none(), "{call:?}");
        }
        Ok(())
    })?;
    mesh.ask(client, by_service, &[])?.has_status(200)?;
    mesh.access_line(&mesh.node_of(pod("shop/web-b"))?, |line| {
        line.get("direction") == "inbound"
            && line.get("src.identity") == CLIENT
            && line
                .get("error")
                .contains("takes only what has passed its waypoint")
    })?;
    let label = format!("{REQUIRE}-");
    mesh.adit(&["local", "label", "namespace", "shop", &label])?;
    mesh.eventually("direct calls", || {
        let call = mesh.call(client, &direct)?;
        ensure!(call.ok() == Some("web-b"), "{call:?}");
        Ok(())
    })?;
    Ok(())
}
