//! TLS that passes by the name in its ClientHello, and TLS that begins here, with a certificate.

use std::sync::Arc;

use adit_shared::hbone::Tunnel;
use adit_shared::model::{TunnelProtocol, Update};
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::support::{App, DEADLINE, Mesh, Raw, Vip, new_address, run, workload};

fn reference(vip: &Vip) -> pb::ServiceRef {
    pb::ServiceRef {
        namespace: vip.key.namespace.to_string(),
        hostname: vip.key.hostname.to_string(),
    }
}

fn route(
    mesh: &Mesh,
    name: &str,
    created: i64,
    parent: &Vip,
    hostnames: &[&str],
    to: Option<&Vip>,
) {
    let backends = to.into_iter().map(|to| pb::Backend {
        weight: 1,
        to: Some(pb::backend::To::Service(pb::BackendService {
            service: Some(reference(to)),
            port: 80,
            subset: String::new(),
        })),
        filters: Vec::new(),
    });
    let route = pb::Route {
        object: Some(pb::ObjectRef {
            kind: "TLSRoute".into(),
            namespace: "shop".into(),
            name: name.into(),
            created,
        }),
        parents: vec![pb::RouteParent {
            service: Some(reference(parent)),
            port: 0,
            rejected: String::new(),
        }],
        hostnames: hostnames.iter().map(ToString::to_string).collect(),
        kind: Some(pb::route::Kind::Tls(pb::L4Rules {
            rules: vec![pb::L4Rule {
                name: String::new(),
                backends: backends.collect(),
                invalid: String::new(),
            }],
        })),
    };
    mesh.put(pb::ROUTE_TYPE, &format!("TLSRoute/shop/{name}"), &route);
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn hello(name: &str) -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Says who it is, and how many bytes it has got, when it has got `expected`.
fn named(name: &'static str, expected: usize) -> impl App {
    Raw(move |mut tunnel: Tunnel| async move {
        let mut got = 0;
        while got < expected {
            match tunnel.read_chunk().await {
                Ok(Some(chunk)) => {
                    got += chunk.len();
                    tunnel.release(chunk.len());
                }
                _ => return,
            }
        }
        let _ = tunnel
            .write_chunk(Bytes::from(format!("{name} {got}")))
            .await;
        let _ = tunnel.finish();
    })
}

/// Who answers a ClientHello, sent in pieces; nothing: the connection was cut.
async fn answers(mesh: &Mesh, vip: &Vip, hello: &[u8]) -> String {
    let client = mesh.client("default", "curl").await;
    let tunnel = client.tunnel(vip.address).await.expect("accepted");
    let mut io = tunnel.into_io();
    for piece in hello.chunks(100) {
        if io.write_all(piece).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let mut text = Vec::new();
    let _ = timeout(DEADLINE, io.read_to_end(&mut text))
        .await
        .expect("in time");
    String::from_utf8(text).unwrap()
}

#[test]
fn the_name_in_the_client_hello_chooses_the_route() {
    run(async {
        let mesh = Mesh::new().await;
        let length = hello("a.shop.example").len();
        let mut services = Vec::new();
        let mut pods = Vec::new();
        for name in ["front", "exact", "wild", "wilder"] {
            let vip = mesh.service(name, Protocol::Tls);
            pods.push(mesh.pod(&vip, name, named(name, length)).await);
            services.push(vip);
        }
        let [front, exact, wild, wilder] = &services[..] else {
            unreachable!()
        };
        route(&mesh, "z", 1, front, &["*.example"], Some(wild));
        route(
            &mesh,
            "y",
            2,
            front,
            &["*.shop.example", "*.test"],
            Some(wilder),
        );
        route(&mesh, "x", 3, front, &["A.shop.example"], Some(exact));
        // Younger, for the same name: it has nothing.
        route(&mesh, "w", 4, front, &["a.shop.example"], Some(wild));
        for (name, who) in [
            ("a.shop.example", "exact"),
            ("b.shop.example", "wilder"),
            ("b.b.shop.exampl", ""),
            ("shop.example.ab", ""),
            ("ab.shopa.exampl", ""),
            ("b.shop0.example", "wild"),
        ] {
            // As long as the others, so that the endpoint knows when it has it all.
            let hello = hello(name);
            let got = answers(&mesh, front, &hello).await;
            let expected = match who {
                "" => String::new(),
                who => format!("{who} {}", hello.len()),
            };
            assert!(
                got.starts_with(&expected) && got.is_empty() == who.is_empty(),
                "{name}: {got}"
            );
        }
        // Without a name nothing is matched, until there is a route that wants none.
        assert_eq!(answers(&mesh, front, &hello("10.0.0.1")).await, "");
        assert_eq!(answers(&mesh, front, b"GET / HTTP/1.1\r\n\r\n").await, "");
        route(&mesh, "v", 5, front, &[], Some(front));
        let mut unnamed = hello("10.0.0.1");
        unnamed.resize(length, 0x17);
        assert!(answers(&mesh, front, &unnamed).await.starts_with("front "));
        // A rule that names no backend rejects (Gateway API TLSRouteRule.backendRefs).
        route(&mesh, "v", 5, front, &[], None);
        assert_eq!(answers(&mesh, front, &unnamed).await, "");
    });
}

struct Pair {
    chain: String,
    key: String,
}

impl Pair {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        Self {
            chain: params.self_signed(&key).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    fn certificate(&self) -> CertificateDer<'static> {
        use rustls::pki_types::pem::PemObject as _;
        CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap()
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        use rustls::pki_types::pem::PemObject as _;
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap()
    }
}

#[test]
fn a_server_that_demands_a_certificate_gets_the_one_of_the_secret() {
    run(async {
        let mesh = Mesh::new().await;
        let (server, client, other) = (
            Pair::new("backend.example"),
            Pair::new("client.example"),
            Pair::new("other.example"),
        );
        let mut roots = RootCertStore::empty();
        roots.add(client.certificate()).unwrap();
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .unwrap();
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![server.certificate()], server.private_key())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let ip = new_address();
        let listener = TcpListener::bind((ip, 8080)).await.unwrap();
        let serving = spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                spawn_local(async move {
                    let Ok(mut tls) = acceptor.accept(stream).await else {
                        return;
                    };
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match tls.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let _ = tls
                        .write_all(
                            b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nsecret",
                        )
                        .await;
                    let _ = tls.shutdown().await;
                });
            }
        });
        let web = mesh.service("web", Protocol::Http);
        let pod = workload("web-a", ip, &[&web.key], TunnelProtocol::None);
        mesh.state.apply_addresses([Update::UpsertWorkload(pod)]);
        let policy = pb::TrafficPolicy {
            object: Some(pb::ObjectRef {
                kind: "DestinationRule".into(),
                namespace: "shop".into(),
                name: "tls".into(),
                created: 1,
            }),
            host: web.key.hostname.to_string(),
            settings: Some(pb::TrafficSettings {
                tls: Some(pb::ClientTls {
                    mode: pb::client_tls::Mode::Mutual.into(),
                    sni: "backend.example".into(),
                    ca_certificates: server.chain.clone(),
                    client_secret: "shop/client".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        mesh.put(pb::TRAFFIC_POLICY_TYPE, "DestinationRule/shop/tls", &policy);
        let curl = mesh.client("default", "curl").await;
        let secret = |pair: &Pair| pb::Secret {
            name: "shop/client".into(),
            certificate_chain: pair.chain.clone(),
            private_key: pair.key.clone(),
            ..Default::default()
        };
        // Without it nothing is sent.
        let refused = curl.get(&web, "/").await;
        assert_eq!(refused.header("x-adit-reason"), "upstream_tls_failure");
        // With that of somebody else the server refuses.
        mesh.put(pb::SECRET_TYPE, "shop/client", &secret(&other));
        assert_eq!(curl.get(&web, "/").await.status, 503);
        mesh.put(pb::SECRET_TYPE, "shop/client", &secret(&client));
        let answer = curl.get(&web, "/").await;
        assert_eq!((answer.status, answer.text()), (200, "secret"));
        // What it is made of is not shown.
        let shown = format!("{:?}", secret(&client));
        assert!(
            !shown.contains("PRIVATE") && !shown.contains("BEGIN"),
            "{shown}"
        );
        // Gone again, connections are not made any more.
        mesh.remove(pb::SECRET_TYPE, "shop/client");
        assert_eq!(curl.get(&web, "/").await.status, 503);
        serving.abort();
    });
}
