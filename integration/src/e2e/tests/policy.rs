//! PeerAuthentication and AuthorizationPolicy as ztunnel enforces them.

use anyhow::ensure;

use crate::e2e::case::{Case, cases};
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Shared: [
    strict_refuses_plaintext_and_permissive_takes_it,
    identities_decide_who_may_call,
    a_policy_closes_what_it_forbids,
    network_policies_may_stand_beside,
]];

async fn strict_refuses_plaintext_and_permissive_takes_it(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("inside").on(0)])
        .await?;
    let outside = t.beside("outside").await?;
    outside
        .run(&[App::server("near").on(1), App::server("far").on(0)])
        .await?;
    let url = format!("http://web.{}/", t.namespace());
    let mode = async |mode: &str| {
        t.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        ))
        .await
    };
    for client in ["near", "far"] {
        outside.reaches(client, &url).await?;
    }
    mode("STRICT").await?;
    for client in ["near", "far"] {
        outside.refused(client, &url).await?;
    }
    t.reaches("inside", &url).await?;
    mode("PERMISSIVE").await?;
    for client in ["near", "far"] {
        outside.reaches(client, &url).await?;
    }
    t.reaches("inside", &url).await?;
    Ok(())
}

async fn identities_decide_who_may_call(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[
        App::server("web").on(1).account("web"),
        App::server("friend").on(0).account("friend"),
        App::server("stranger").on(0).account("stranger"),
        // On the destination's node: nothing is on the wire, and yet it is no friend.
        App::server("neighbour").on(1).account("stranger"),
    ])
    .await?;
    for client in ["friend", "stranger", "neighbour"] {
        t.reaches(client, "http://web/").await?;
    }
    t.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: friends}}\n\
         spec:\n  selector: {{matchLabels: {{app: web}}}}\n  action: ALLOW\n  rules:\n  - from:\n    \
         - source: {{principals: [\"cluster.local/ns/{}/sa/friend\"]}}\n",
        t.namespace()
    ))
    .await?;
    t.refused("stranger", "http://web/").await?;
    t.refused("neighbour", "http://web/").await?;
    let call = t.call("friend", "http://web/").await?;
    ensure!(call.ok() == Some("web"), "{call:?}");
    // ztunnel says whom it refused, and why.
    let line = t
        .access_line(t.node(1), |line| {
            line.message == "connection failed" && line.get("src.workload") == "stranger"
        })
        .await?;
    ensure!(
        line.get("src.identity").ends_with("/sa/stranger"),
        "{line:?}"
    );
    Ok(())
}

/// A connection that a new policy forbids does not live on.
async fn a_policy_closes_what_it_forbids(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.reaches("client", "http://web/").await?;
    t.run(&[App::command("stream", &["tcp", "web:9090", "--interval", "50"]).on(0)])
        .await?;
    let said = async |word: &str| {
        let log = t.cluster().logs(t.namespace(), "stream", false).await?;
        let last = log.lines().next_back().unwrap_or_default();
        ensure!(
            log.contains(&format!("\"event\":\"{word}\"")),
            "last: {last}"
        );
        Ok(())
    };
    eventually("the stream echoes", SOON, async || said("echo").await).await?;
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody}\n\
         spec: {}\n",
    )
    .await?;
    t.refused("client", "http://web/").await?;
    // The container may have been started again; its former log tells.
    eventually("the stream ends", SOON, async || {
        let previous = t.cluster().logs(t.namespace(), "stream", true).await;
        let log = match previous {
            Ok(log) => log,
            Err(_) => t.cluster().logs(t.namespace(), "stream", false).await?,
        };
        ensure!(log.contains("\"event\":\"ended\""), "it goes on");
        Ok(())
    })
    .await
}

/// Objects of the CNI's own policy are no obstacle, enforced or not, when they let through
/// what every ambient mesh needs: port 15008.
async fn network_policies_may_stand_beside(t: Test) -> anyhow::Result<()> {
    t.apply(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed}\n\
         spec: {podSelector: {}, policyTypes: [Ingress]}\n---\n\
         apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web}\nspec:\n  \
         podSelector: {matchLabels: {app: web}}\n  policyTypes: [Ingress]\n  ingress:\n  - from: \
         [{podSelector: {}}]\n    ports: [{port: 8080}, {port: 15008}]\n",
    )
    .await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    // The node's kube-proxy has to know the Service first.
    t.reaches("client", "http://web/").await?;
    let pace = std::time::Duration::from_millis(50);
    let load = t.caller("load", 0, "http://web/", pace).await?;
    t.ambient(true).await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    t.ambient(false).await?;
    t.is_plaintext("client", "web").await?;
    load.without_failure().await?;
    Ok(())
}
