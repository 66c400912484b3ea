//! What a client may not do on the HBONE port (ztunnel's `malicious_calls`,
//! `hbone_ip_mismatch`, `trust_domain_mismatch`): each attempt ends with the documented status
//! or close, is counted, is logged with the peer's name, and disturbs nobody else.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use adit_integration::hbone::{RawTunnel, tls};
use adit_integration::mesh::MeshBuilder;
use adit_integration::{Credential, Manifest, RawHbone, TestMesh, pod};
use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const CLIENT: &str = "cluster.local/ns/shop/sa/client";

fn mesh() -> anyhow::Result<TestMesh> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .namespace("out", "")
        .namespace("mark", "")
        .client(pod("out/client"), "node1", "client")
        .server(pod("shop/web"), "node2", "web", "web")
        .server(pod("shop/other"), "node2", "other", "other")
        .service(pod("shop/web"), "web", "");
    MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()
}

/// A plain connection to the HBONE port, from a pod that the mesh does not know.
fn dial(mesh: &TestMesh) -> anyhow::Result<TcpStream> {
    let target = mesh.at(pod("shop/web"), 15008)?;
    let connect = move || TcpStream::connect_timeout(&target, Duration::from_secs(5));
    Ok(mesh.in_pod(pod("out/client"), connect)??)
}

async fn open(mesh: &TestMesh, credential: Credential<'_>) -> anyhow::Result<RawHbone> {
    RawHbone::open(dial(mesh)?, mesh.hbone_tls(credential)?).await
}

fn rejections(mesh: &TestMesh, reason: &str) -> anyhow::Result<f64> {
    let metrics = mesh.metrics("node2")?;
    Ok(metrics.sum("adit_inbound_rejections_total", &[("reason", reason)]))
}

fn failed_handshakes(mesh: &TestMesh) -> anyhow::Result<f64> {
    let metrics = mesh.metrics("node2")?;
    Ok(metrics.sum(
        "adit_tls_handshake_failures_total",
        &[("reporter", "destination")],
    ))
}

/// An HTTP request through a tunnel; the whole answer.
async fn get(tunnel: RawTunnel) -> anyhow::Result<String> {
    let RawTunnel {
        mut send,
        mut receive,
    } = tunnel;
    let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    send.send_data(Bytes::from_static(request.as_bytes()), false)?;
    let mut answer = Vec::new();
    let reading = async {
        while let Some(chunk) = receive.data().await {
            let chunk = chunk?;
            let _ = receive.flow_control().release_capacity(chunk.len());
            answer.extend_from_slice(&chunk);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(5), reading)
        .await
        .context("no answer")??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn run<T>(test: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(test)
}

#[test]
fn requests_for_what_is_not_the_pods_own_app_are_refused() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let address = mesh.address(pod("shop/web"))?;
    let other = mesh.address(pod("shop/other"))?;
    let outside = mesh.address(pod("out/client"))?;
    run(async {
        let mut peer = open(&mesh, Credential::Mesh(CLIENT)).await?;
        let mut refused = 0;
        let table = [
            // Other pods, on this node, on another, the mesh's own addresses.
            (format!("{other}:8080"), 400, "foreign_authority"),
            (format!("{outside}:8080"), 400, "foreign_authority"),
            ("172.18.0.11:15020".into(), 400, "foreign_authority"),
            ("192.0.2.1:80".into(), 400, "foreign_authority"),
            // Loopback, of whomever.
            ("127.0.0.1:8080".into(), 400, "foreign_authority"),
            ("[::1]:8080".into(), 400, "foreign_authority"),
            ("0.0.0.0:8080".into(), 400, "foreign_authority"),
            // The proxy's own ports.
            (format!("{address}:15001"), 503, "loop"),
            (format!("{address}:15006"), 503, "loop"),
            (format!("{address}:15008"), 503, "loop"),
            // Names that are no service, or not of this pod; no port; port 0.
            ("localhost:8080".into(), 503, "authority"),
            ("web.nowhere.svc.cluster.local:80".into(), 503, "authority"),
            ("web.shop.svc.cluster.local:81".into(), 503, "authority"),
            (address.clone(), 400, "authority"),
            (format!("{address}:0"), 400, "authority"),
        ];
        for (authority, status, reason) in table {
            refused += 1;
            let before = rejections(&mesh, reason)?;
            let (answer, _) = peer.connect(&authority).await.context(authority.clone())?;
            assert_eq!(answer.as_u16(), status, "{authority}");
            assert_eq!(
                rejections(&mesh, reason)?,
                before + 1.0,
                "{authority}: {reason}"
            );
        }
        // Admin ports are ports like others, of the pod; nobody listens there.
        for port in [15000, 15020, 15021] {
            let (answer, _) = peer.connect(&format!("{address}:{port}")).await?;
            assert_eq!(answer, StatusCode::SERVICE_UNAVAILABLE, "{port}");
        }
        // Other methods.
        for method in [Method::GET, Method::POST, Method::OPTIONS] {
            refused += 1;
            let before = rejections(&mesh, "method")?;
            let uri = format!("https://{address}:8080/");
            let request = Request::builder().method(&method).uri(uri).body(())?;
            let (response, _body) = peer.send(request).await?;
            assert_eq!(
                response.await?.status(),
                StatusCode::BAD_REQUEST,
                "{method}"
            );
            assert_eq!(rejections(&mesh, "method")?, before + 1.0, "{method}");
        }
        // All that on one connection, which is as good as new; and the app sees the address of
        // the connection, whatever a header says.
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(format!("{address}:8080"))
            .header("forwarded", "for=\"198.51.100.7:4711\"")
            .header(
                "baggage",
                "k8s.namespace.name=kube-system,service.name=admin",
            )
            .body(())?;
        let (response, send) = peer.send(request).await?;
        let response = response.await?;
        assert_eq!(response.status(), StatusCode::OK);
        let answer = get(RawTunnel {
            send,
            receive: response.into_body(),
        })
        .await?;
        assert!(answer.contains("200 OK"), "{answer}");
        assert!(
            answer.contains(&format!("\"peer\":\"{outside}:")),
            "{answer}"
        );

        mesh.eventually("lines that name the peer", || {
            let log = std::fs::read_to_string(mesh.component_log("ztunnel-node2")?)?;
            let named = log.lines().filter(|l| {
                let refused = l.contains("CONNECT refused") || l.contains("malformed request");
                refused && l.contains(&outside) && l.contains(CLIENT)
            });
            let named = named.count();
            anyhow::ensure!(named == refused, "{named} lines of {refused}:\n{log}");
            Ok(())
        })?;
        Ok(())
    })
}

#[test]
fn certificates_that_are_not_of_the_mesh_do_not_get_in() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let address = mesh.address(pod("shop/web"))?;
    let outside = mesh.address(pod("out/client"))?;
    run(async {
        // Somebody else's tunnel, all the while.
        let mut good = open(&mesh, Credential::Mesh(CLIENT)).await?;
        let table = [
            Credential::None,
            Credential::Expired(CLIENT),
            Credential::Foreign(CLIENT),
            Credential::Anonymous,
            Credential::Mesh("other.domain/ns/shop/sa/client"),
        ];
        for credential in table {
            let before = failed_handshakes(&mesh)?;
            let lines = mesh.access_log("node2")?.len();
            let config = mesh.hbone_tls(credential)?;
            // TLS 1.3: the client has finished before the server refuses.
            let refused = match tls(dial(&mesh)?, config).await {
                Err(_) => true,
                Ok(mut stream) => {
                    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
                    let reading = stream.read_u8();
                    tokio::time::timeout(Duration::from_secs(5), reading)
                        .await
                        .with_context(|| format!("{credential:?}: the server keeps still"))?
                        .is_err()
                }
            };
            assert!(refused, "{credential:?} was served");
            mesh.eventually("the counter", || {
                anyhow::ensure!(failed_handshakes(&mesh)? == before + 1.0, "{credential:?}");
                Ok(())
            })?;
            mesh.eventually("a line with the peer's address", || {
                let all = mesh.access_log("node2")?;
                let line = all[lines..]
                    .iter()
                    .find(|l| l.message == "connection failed");
                let line = line.with_context(|| format!("{credential:?}: {all:?}"))?;
                anyhow::ensure!(line.get("src.addr").starts_with(&outside), "{line:?}");
                anyhow::ensure!(!line.get("error").is_empty(), "{line:?}");
                Ok(())
            })?;
            let (status, _) = good.connect(&format!("{address}:8080")).await?;
            assert_eq!(status, StatusCode::OK, "{credential:?} disturbed another");
        }
        Ok(())
    })
}

#[test]
fn what_is_not_tls_or_not_http2_is_closed_and_counted() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let address = mesh.address(pod("shop/web"))?;
    run(async {
        // No TLS.
        for bytes in [
            &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
            &[0xff; 64],
            &[0x16, 3, 1, 0xff, 0xff],
        ] {
            let before = failed_handshakes(&mesh)?;
            let stream = dial(&mesh)?;
            stream.set_nonblocking(true)?;
            let mut stream = tokio::net::TcpStream::from_std(stream)?;
            stream.write_all(bytes).await?;
            stream.shutdown().await?;
            let mut answer = Vec::new();
            let reading = stream.read_to_end(&mut answer);
            let ended = tokio::time::timeout(Duration::from_secs(5), reading).await;
            assert!(ended.is_ok(), "{bytes:?}: it stays open");
            assert!(answer.len() < 64, "an alert and no more: {answer:?}");
            mesh.eventually("the counter", || {
                anyhow::ensure!(failed_handshakes(&mesh)? == before + 1.0, "{bytes:?}");
                Ok(())
            })?;
        }
        // TLS, and then no HTTP/2.
        let before = rejections(&mesh, "protocol")?;
        let mut stream = tls(dial(&mesh)?, mesh.hbone_tls(Credential::Mesh(CLIENT))?).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await?;
        let mut answer = Vec::new();
        let reading = stream.read_to_end(&mut answer);
        assert!(
            tokio::time::timeout(Duration::from_secs(5), reading)
                .await
                .is_ok()
        );
        mesh.eventually("the counter", || {
            anyhow::ensure!(rejections(&mesh, "protocol")? == before + 1.0);
            Ok(())
        })?;
        // Headers without end: the stream is refused, the connection lives.
        let mut peer = open(&mesh, Credential::Mesh(CLIENT)).await?;
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(format!("{address}:8080"))
            .header("baggage", "x".repeat(100 * 1024))
            .body(())?;
        let (response, _send) = peer.send(request).await?;
        let answer = tokio::time::timeout(Duration::from_secs(5), response).await?;
        let refused = match &answer {
            Ok(response) => response.status() == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Err(error) => error.is_reset() || error.is_go_away(),
        };
        assert!(refused, "{answer:?}");
        let mut peer = open(&mesh, Credential::Mesh(CLIENT)).await?;
        let (status, tunnel) = peer.connect(&format!("{address}:8080")).await?;
        assert_eq!(status, StatusCode::OK);
        let answer = get(tunnel.context("a tunnel")?).await?;
        assert!(answer.contains("200 OK"), "{answer}");
        Ok(())
    })
}

#[test]
fn a_policy_speaks_of_the_certificate_not_of_the_address() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let address = mesh.address(pod("shop/web"))?;
    let allow =
        "{ rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/client] } }] }] }";
    mesh.set_policies(Manifest::default().policy("AuthorizationPolicy", "shop", "p", "", allow))?;
    run(async {
        // Both come from the same pod, which is none of the mesh.
        for (who, expected) in [
            (CLIENT, StatusCode::OK),
            ("cluster.local/ns/shop/sa/other", StatusCode::UNAUTHORIZED),
        ] {
            let mut peer = open(&mesh, Credential::Mesh(who)).await?;
            let (status, _) = peer.connect(&format!("{address}:8080")).await?;
            assert_eq!(status, expected, "{who}");
        }
        Ok(())
    })?;
    let line = mesh.access_line("node2", |l| l.get("src.identity").ends_with("/sa/other"))?;
    assert!(line.get("error").contains("policy"), "{line:?}");
    Ok(())
}

/// Connections that do not get on are closed after a while and keep nobody waiting.
#[test]
fn slow_clients_are_closed_and_hinder_nobody() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let address: SocketAddr = mesh.at(pod("shop/web"), 8080)?;
    run(async {
        let mut idle = Vec::new();
        for _ in 0..100 {
            let stream = dial(&mesh)?;
            stream.set_nonblocking(true)?;
            idle.push(tokio::net::TcpStream::from_std(stream)?);
        }
        // Half a ClientHello.
        let mut half = tokio::net::TcpStream::from_std({
            let stream = dial(&mesh)?;
            stream.set_nonblocking(true)?;
            stream
        })?;
        half.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).await?;
        // TLS, and no HTTP/2 preface.
        let mut silent = tls(dial(&mesh)?, mesh.hbone_tls(Credential::Mesh(CLIENT))?).await?;
        let begin = tokio::time::Instant::now();
        // Meanwhile all is well.
        let mut peer = open(&mesh, Credential::Mesh(CLIENT)).await?;
        let (status, tunnel) = peer.connect(&address.to_string()).await?;
        assert_eq!(status, StatusCode::OK);
        assert!(get(tunnel.context("a tunnel")?).await?.contains("200 OK"));
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{:?}",
            begin.elapsed()
        );
        assert!(mesh.http_get(pod("out/client"), address)?.is_ok());

        let limit = Duration::from_secs(15);
        let mut byte = [0];
        let ended = tokio::time::timeout(limit, half.read(&mut byte)).await;
        assert!(ended.is_ok(), "half a ClientHello stays open");
        let ended = tokio::time::timeout(limit, silent.read(&mut byte)).await;
        assert!(ended.is_ok(), "a connection without HTTP/2 stays open");
        for stream in &mut idle {
            let ended = tokio::time::timeout(limit, stream.read(&mut byte)).await;
            assert!(ended.is_ok(), "a connection without TLS stays open");
        }
        assert!(
            begin.elapsed() > Duration::from_secs(5),
            "slow is not yet hostile"
        );
        assert!(failed_handshakes(&mesh)? >= 101.0);
        mesh.eventually("the counter", || {
            anyhow::ensure!(rejections(&mesh, "timeout")? >= 1.0);
            Ok(())
        })?;
        Ok(())
    })
}

/// An app that connects and says nothing does nothing wrong, for as long as it likes.
#[test]
fn a_silent_app_is_left_alone() -> anyhow::Result<()> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/client"), "node1", "client")
        .server(pod("shop/web"), "node2", "web", "web");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()?;
    let mut stream = mesh.connect(pod("shop/client"), mesh.at(pod("shop/web"), 9090)?)??;
    std::thread::sleep(Duration::from_secs(12));
    adit_integration::socket::echo_once(&mut stream, b"at last\n")?;
    Ok(())
}
