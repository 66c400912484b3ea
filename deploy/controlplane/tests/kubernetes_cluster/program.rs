//! `aditd --kubernetes` as a whole: roots in every namespace, node proxies by their tokens,
//! certificates for the pods of their node.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_controlplane::kubernetes::{ROOT_CONFIG_MAP, ROOT_KEY};
use adit_shared::identity::{
    CaClient, CaClientOptions, CertificateAuthority as _, CertificateRequest, ControlPlaneEndpoint,
    SpiffeId, TokenSource, TrustBundle, WorkloadCertificate,
};
use adit_shared::proto::ADDRESS_TYPE;
use adit_shared::xds::client::{ClientConfig, NodeMetadata, TransportConfig};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::cluster::{Cluster, until};
use crate::support::{Proxy, page};

/// Killed if the test does not get to the end.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

async fn roots_in(client: &kube::Client, namespace: &str) -> Option<String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let found = maps.get_opt(ROOT_CONFIG_MAP).await.expect("an answer")?;
    found.data?.remove(ROOT_KEY)
}

#[tokio::test]
async fn a_control_plane_lives_off_the_cluster() {
    let Some(mut cluster) = Cluster::open("program").await else {
        return;
    };
    let namespace = cluster.namespace.clone();
    let (here, elsewhere) = (cluster.make_node("a").await, cluster.make_node("b").await);
    let ztunnel = cluster.make_pod("ztunnel", &here).await;
    let stranger = cluster.make_pod("stranger", &here).await;
    cluster.make_pod("cart", &here).await;
    cluster.make_pod("pay", &elsewhere).await;
    let pods: Api<Pod> = cluster.api();
    let running = json!({"status": {"phase": "Running", "podIP": "10.0.0.5",
        "podIPs": [{"ip": "10.0.0.5"}]}});
    pods.patch_status("cart", &PatchParams::default(), &Patch::Merge(&running))
        .await
        .expect("a status");

    let (listen, monitoring, webhook) = (free_address(), free_address(), free_address());
    let _program = Program(
        Command::new(env!("CARGO_BIN_EXE_aditd"))
            .arg("--kubernetes")
            .env("KUBECONFIG", &cluster.kubeconfig)
            .env("POD_NAME", "istiod-test")
            .env("POD_NAMESPACE", &namespace)
            .env("CA_TRUSTED_NODE_ACCOUNTS", format!("{namespace}/ztunnel"))
            .arg(format!("--listen={listen}"))
            .arg(format!("--monitoring-listen={monitoring}"))
            .arg(format!("--webhook-listen={webhook}"))
            .spawn()
            .expect("started"),
    );
    let roots = until("roots", || roots_in(&cluster.client, &namespace)).await;
    until("ready", || async {
        let open = tokio::net::TcpStream::connect(monitoring).await.is_ok();
        (open && page(monitoring, "/ready").await.0 == 200).then_some(())
    })
    .await;

    // The roots: everywhere, in new namespaces, mended, and put back.
    for other in ["default", "kube-system"] {
        let found = until("roots", || roots_in(&cluster.client, other)).await;
        assert_eq!(found, roots, "{other}");
    }
    let other = format!("{namespace}-2");
    cluster.make_namespace(&other).await;
    assert_eq!(
        until("roots", || roots_in(&cluster.client, &other)).await,
        roots
    );
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &other);
    let wrong = json!({"data": {ROOT_KEY: "wrong"}});
    maps.patch(
        ROOT_CONFIG_MAP,
        &PatchParams::default(),
        &Patch::Merge(&wrong),
    )
    .await
    .expect("patched");
    let right = || async {
        let found = roots_in(&cluster.client, &other).await;
        found.filter(|found| *found == roots).map(|_| ())
    };
    until("mended", right).await;
    maps.delete(ROOT_CONFIG_MAP, &DeleteParams::default())
        .await
        .expect("deleted");
    until("put back", right).await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    namespaces
        .delete(&other, &DeleteParams::default())
        .await
        .expect("deleted");

    // A node proxy, known by its token.
    let trust = Arc::new(TrustBundle::from_pem(&roots).expect("PEM"));
    let address = format!("https://{listen}");
    let token = cluster.token(&ztunnel, "istio-ca").await;
    let token = TokenSource::Literal(token.into());
    let proxy = Proxy::start(ClientConfig {
        transport: TransportConfig {
            address: address.parse().expect("a URI"),
            trust: Some(trust.clone()),
            server_name: Some(format!("istiod.{namespace}.svc")),
            allow_plaintext: false,
        },
        token: Some(token.clone()),
        headers: vec![],
        node: NodeMetadata {
            pod_name: "ztunnel".into(),
            namespace: namespace.clone(),
            service_account: "ztunnel".into(),
            node_name: here.clone(),
            ..NodeMetadata::default()
        },
    });
    proxy.ready().await;
    let cart = format!("Kubernetes//Pod/{namespace}/cart");
    until("the pod over xDS", || async {
        proxy.names(ADDRESS_TYPE).contains(&cart).then_some(())
    })
    .await;

    // Certificates: for pods of its node, and only for a node proxy.
    let endpoint =
        ControlPlaneEndpoint::new(&address, trust, Some(&format!("istiod.{namespace}.svc")))
            .expect("legal");
    let ask = |token: TokenSource, account: &str| {
        let identity: SpiffeId = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
            .parse()
            .expect("legal");
        let endpoint = &endpoint;
        async move {
            let options = CaClientOptions {
                token,
                cluster_id: "Kubernetes".into(),
                impersonate: true,
                headers: vec![],
            };
            let request = CertificateRequest::new(&identity).expect("a key");
            let client = CaClient::new(endpoint, options);
            let hour = Duration::from_secs(3600);
            let signed = client.sign(&identity, request.csr_pem(), hour).await?;
            let now = SystemTime::now();
            let made = WorkloadCertificate::new(&identity, signed, request.into_key(), now);
            Ok::<_, adit_shared::identity::SignError>(made.expect("valid"))
        }
    };
    ask(token.clone(), "cart").await.expect("issued");
    ask(token.clone(), "pay").await.expect_err("runs elsewhere");
    ask(token.clone(), "none").await.expect_err("runs nowhere");
    let strangers = cluster.token(&stranger, "istio-ca").await;
    ask(TokenSource::Literal(strangers.into()), "cart")
        .await
        .expect_err("no node proxy");
    let for_others = cluster.token(&ztunnel, "api").await;
    ask(TokenSource::Literal(for_others.into()), "cart")
        .await
        .expect_err("another audience");
    cluster.close().await;
}
