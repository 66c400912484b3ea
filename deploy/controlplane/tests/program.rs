//! The program itself: started, configured from a directory, asked, changed, stopped.

mod support;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::identity::{TokenSource, TrustBundle};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use adit_shared::xds::client::{ClientConfig, NodeMetadata, TransportConfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{PATIENCE, Proxy, sign};

const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u1}
spec: {nodeName: n1, serviceAccountName: cart, containers: [{name: c, image: i}]}
status: {phase: Running, podIP: 10.0.0.5, podIPs: [{ip: 10.0.0.5}], conditions: [{type: Ready, status: 'True'}]}
";

const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  rules:
  - from:
    - source: {namespaces: [shop]}
";

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

fn start(dir: &Path, listen: SocketAddr, monitoring: SocketAddr) -> Program {
    let child = Command::new(env!("CARGO_BIN_EXE_aditd"))
        .arg("--config-dir")
        .arg(dir.join("config"))
        .arg("--status-dir")
        .arg(dir.join("status"))
        .arg("--ca-dir")
        .arg(dir.join("ca"))
        .arg("--token-key")
        .arg(dir.join("token.pem"))
        .arg(format!("--listen={listen}"))
        .arg(format!("--monitoring-listen={monitoring}"))
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    Program(child)
}

async fn terminate(mut program: Program) -> ExitStatus {
    let pid = i32::try_from(program.0.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("signalled");
    let start = Instant::now();
    loop {
        if let Some(status) = program.0.try_wait().expect("waited") {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "does not stop");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn serves_a_directory_follows_it_and_stops_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["config", "status"] {
        std::fs::create_dir(dir.path().join(name)).expect("made");
    }
    std::fs::write(dir.path().join("config/mesh.yaml"), MANIFESTS).expect("written");
    let key = rcgen::KeyPair::generate().expect("a key");
    std::fs::write(dir.path().join("token.pem"), key.public_key_pem()).expect("written");
    let (listen, monitoring) = (free_address(), free_address());

    let program = start(dir.path(), listen, monitoring);
    let claims = support::claims("istio-system", "ztunnel", "n1");
    // The client may start before the server: neither the root nor the port is there yet.
    let proxy = Proxy::start(ClientConfig {
        transport: TransportConfig {
            address: format!("https://{listen}").parse().expect("a URI"),
            trust: Some(Arc::new(TrustBundle::from_file(
                dir.path().join("ca/root-cert.pem"),
            ))),
            server_name: Some("istiod.istio-system.svc".into()),
            allow_plaintext: false,
        },
        token: Some(TokenSource::Literal(sign(&key, &claims).into())),
        headers: vec![],
        node: NodeMetadata {
            namespace: "istio-system".into(),
            node_name: "n1".into(),
            ..NodeMetadata::default()
        },
    });
    proxy.ready().await;
    proxy
        .holds(ADDRESS_TYPE, &["Kubernetes//Pod/shop/cart"])
        .await;
    assert!(proxy.names(AUTHORIZATION_TYPE).is_empty());
    assert_eq!(support::page(monitoring, "/ready").await.0, 200);

    std::fs::write(dir.path().join("config/policy.yaml"), POLICY).expect("written");
    proxy.holds(AUTHORIZATION_TYPE, &["shop/allow"]).await;

    // A restart keeps the authority and disturbs nobody.
    let root = std::fs::read(dir.path().join("ca/root-cert.pem")).expect("written");
    let program = {
        assert!(terminate(program).await.success());
        proxy.wait("disconnected", |status| !status.connected).await;
        start(dir.path(), listen, monitoring)
    };
    proxy.ready().await;
    assert_eq!(
        std::fs::read(dir.path().join("ca/root-cert.pem")).expect("there"),
        root
    );
    assert_eq!(proxy.names(AUTHORIZATION_TYPE), ["shop/allow"]);
    assert!(terminate(program).await.success());
}

#[test]
fn a_key_that_is_none_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("token.pem"), "no key").expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_aditd"))
        .args(["--config-dir", "/nonexistent", "--ca-dir"])
        .arg(dir.path().join("ca"))
        .arg("--token-key")
        .arg(dir.path().join("token.pem"))
        .output()
        .expect("ran");
    assert!(!output.status.success());
    let log = String::from_utf8_lossy(&output.stdout);
    assert!(log.contains("token.pem"), "{log}");
}
