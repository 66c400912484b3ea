//! The readiness and metrics servers over loopback, and what they survive. One test at a
//! time: the last one takes all file descriptors of the process.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::telemetry::{Metrics, Readiness, http};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

const SOON: Duration = Duration::from_secs(20);

async fn listener() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = http::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Sends a request and reads all of the answer.
async fn call(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    answer
}

async fn answers() {
    let readiness = Readiness::new();
    let mut xds = readiness.task("xds");
    let mut proxies = readiness.task("proxies");
    let (probe, ready) = listener().await;
    tokio::spawn(http::serve_readiness(probe, readiness));
    let answer = call(ready, "GET", "/healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(
        answer.contains("not ready, pending: proxies, xds"),
        "{answer}"
    );
    xds.done();
    proxies.done();
    let answer = call(ready, "GET", "/healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("ready\n"), "{answer}");
    proxies.pending();
    let answer = call(ready, "GET", "/healthz/ready").await;
    assert!(answer.contains("pending: proxies"), "{answer}");
    assert!(call(ready, "GET", "/").await.starts_with("HTTP/1.1 404 "));
    let answer = call(ready, "POST", "/healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");

    let (scrape, metrics) = listener().await;
    tokio::spawn(http::serve_metrics(
        scrape,
        Arc::new(Metrics::new("ztunnel", "t")),
    ));
    for path in ["/metrics", "/stats/prometheus"] {
        let answer = call(metrics, "GET", path).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let kind = "content-type: application/openmetrics-text; version=1.0.0";
        assert!(answer.contains(kind), "{answer}");
        assert!(
            answer.contains("istio_build{component=\"ztunnel\""),
            "{answer}"
        );
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    }
}

/// A client that says nothing, or only half, is sent away in time.
async fn slow_clients_leave() {
    let (probe, address) = listener().await;
    tokio::spawn(http::serve_readiness(probe, Readiness::new()));
    let begin = Instant::now();
    for said in ["", "GET /healthz/ready HTTP/1.1\r\nx: "] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    }
    assert!(begin.elapsed() < 2 * SOON);
}

/// With every slot taken by silent clients, others are served once those are sent away.
async fn a_crowd_does_not_shut_others_out() {
    let (probe, address) = listener().await;
    tokio::spawn(http::serve_readiness(probe, Readiness::new()));
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(address).await.unwrap());
    }
    let answer = timeout(3 * SOON, call_patiently(address)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

async fn call_patiently(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A process without file descriptors keeps its listener and serves again later.
async fn survives_emfile() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (probe, address) = listener().await;
    tokio::spawn(http::serve_readiness(probe, Readiness::new()));
    assert!(call(address, "GET", "/healthz/ready").await.contains("200"));
    // The client's socket exists before the descriptors run out.
    let client = tokio::net::TcpSocket::new_v4().unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    setrlimit(Resource::RLIMIT_NOFILE, open + 8, hard).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        hoard.push(file);
    }
    let mut stream = client.connect(address).await.unwrap();
    let request = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    let starved = timeout(
        Duration::from_millis(300),
        stream.read_to_string(&mut answer),
    )
    .await;
    drop(hoard);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(starved.is_err(), "accepted without a descriptor? {answer}");
    timeout(SOON, stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn readiness_and_metrics_are_served_whatever_comes() {
    tokio::join!(
        answers(),
        slow_clients_leave(),
        a_crowd_does_not_shut_others_out()
    );
    survives_emfile().await;
}
