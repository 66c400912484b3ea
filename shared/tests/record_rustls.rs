//! Our record layer against plain rustls, as client and as server, with every suite.

#[path = "support/tls.rs"]
#[allow(dead_code)]
mod tls;

use std::sync::Arc;
use std::time::Duration;

use adit_shared::hbone::record::TlsStream;
use rustls::{ClientConnection, HandshakeKind};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex, split,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use tls::{HANDSHAKE, Pki, SUITES, name};

/// Bytes per direction, suite and role: 6 times both ways makes 768 MiB.
const BULK: usize = 64 << 20;

/// The same at both ends. Its length is a prime, so that no boundary of a record or a buffer
/// comes to lie at the same place twice.
fn pattern() -> Vec<u8> {
    let mut state = 1u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(1_000_003)
    .collect()
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.expect("connected"), server.expect("accepted").0)
}

/// Sends `total` bytes of the pattern in chunks of odd sizes, then closes this direction.
async fn send(mut stream: impl AsyncWrite + Unpin, pattern: &[u8], total: usize) {
    let sizes = [1, 70_001, 16_384, 16_385, 999, 300_007, 1_000_003];
    let (mut at, mut left) = (0, total);
    for size in sizes.iter().cycle() {
        let len = (*size).min(left).min(pattern.len() - at);
        stream
            .write_all(&pattern[at..at + len])
            .await
            .expect("written");
        at = (at + len) % pattern.len();
        left -= len;
        if left == 0 {
            break;
        }
    }
    stream.shutdown().await.expect("shut down");
}

/// Receives until the end, compares, and returns how much it was.
async fn receive(mut stream: impl AsyncRead + Unpin, pattern: &[u8]) -> usize {
    let sizes = [3, 100_003, 16_384, 17_001, 1 << 20];
    let mut buf = vec![0; 1 << 20];
    let (mut at, mut total) = (0, 0);
    for size in sizes.iter().cycle() {
        let len = stream.read(&mut buf[..*size]).await.expect("read");
        if len == 0 {
            break;
        }
        let mut part = &buf[..len];
        while !part.is_empty() {
            let same = part.len().min(pattern.len() - at);
            assert!(
                part[..same] == pattern[at..at + same],
                "bytes differ after {total}"
            );
            part = &part[same..];
            at = (at + same) % pattern.len();
            total += same;
        }
    }
    total
}

/// Both directions at once, each closed on its own.
async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, pattern: &[u8], total: usize) {
    let (rx, tx) = split(stream);
    let (received, ()) = tokio::join!(receive(rx, pattern), send(tx, pattern, total));
    assert_eq!(received, total);
}

/// rustls runs in a thread of its own: both ends are busy.
fn in_thread(work: impl Future<Output = ()> + Send + 'static) -> std::thread::JoinHandle<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    std::thread::spawn(move || runtime.block_on(work))
}

fn moved(stream: TcpStream) -> std::net::TcpStream {
    stream.into_std().expect("a socket")
}

#[tokio::test]
async fn bulk_both_ways_as_a_client_of_rustls() {
    let pki = Pki::new();
    for suite in SUITES {
        let (ours, theirs) = sockets().await;
        let (theirs, config) = (moved(theirs), Arc::new(pki.server(suite)));
        let peer = in_thread(async move {
            let theirs = TcpStream::from_std(theirs).expect("a socket");
            let stream = TlsAcceptor::from(config)
                .accept(theirs)
                .await
                .expect("accepted");
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            exchange(stream, &pattern(), BULK).await;
        });
        let config = Arc::new(pki.client(suite));
        let stream = TlsStream::connect(ours, config, name(), HANDSHAKE)
            .await
            .expect("connected");
        assert_eq!(stream.cipher_suite(), suite.suite());
        exchange(stream, &pattern(), BULK).await;
        peer.join().expect("the peer is content");
    }
}

#[tokio::test]
async fn bulk_both_ways_as_a_server_of_rustls() {
    let pki = Pki::new();
    for suite in SUITES {
        let (theirs, ours) = sockets().await;
        let (theirs, config) = (moved(theirs), Arc::new(pki.client(suite)));
        let peer = in_thread(async move {
            let theirs = TcpStream::from_std(theirs).expect("a socket");
            let stream = TlsConnector::from(config)
                .connect(name(), theirs)
                .await
                .expect("connected");
            exchange(stream, &pattern(), BULK).await;
        });
        let config = Arc::new(pki.server(suite));
        let stream = TlsStream::accept(ours, config, HANDSHAKE)
            .await
            .expect("accepted");
        assert_eq!(stream.peer_certificates().len(), 1);
        exchange(stream, &pattern(), BULK).await;
        peer.join().expect("the peer is content");
    }
}

#[tokio::test]
async fn keys_are_updated_by_either_side_again_and_again() {
    let pki = Pki::new();
    for suite in SUITES {
        let (a, b) = duplex(1 << 20);
        let acceptor = TlsAcceptor::from(Arc::new(pki.server(suite)));
        let (ours, theirs) = tokio::join!(
            TlsStream::connect(a, Arc::new(pki.client(suite)), name(), HANDSHAKE),
            acceptor.accept(b),
        );
        let (mut ours, mut theirs) = (ours.expect("connected"), theirs.expect("accepted"));
        ours.limit_records_per_key(3);
        let data = vec![5; 100_000];
        let mut got = vec![0; data.len()];
        for _ in 0..20 {
            theirs.get_mut().1.refresh_traffic_keys().expect("updated");
            theirs.write_all(&data).await.expect("written");
            theirs.flush().await.expect("flushed");
            ours.read_exact(&mut got).await.expect("read");
            assert!(got == data);
            got.fill(0);
            // Seven records and so three keys of ours, and the answer to theirs.
            ours.write_all(&data).await.expect("written");
            ours.flush().await.expect("flushed");
            theirs.read_exact(&mut got).await.expect("read");
            assert!(got == data);
        }
    }
}

#[tokio::test]
async fn tickets_reach_the_session_store_and_resume() {
    let pki = Pki::new();
    let (client, server) = (
        Arc::new(pki.client(SUITES[0])),
        Arc::new(pki.server(SUITES[0])),
    );
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (a, b) = duplex(1 << 20);
        let acceptor = TlsAcceptor::from(server.clone());
        let (ours, theirs) = tokio::join!(
            TlsStream::connect(a, client.clone(), name(), HANDSHAKE),
            acceptor.accept(b),
        );
        let (mut ours, mut theirs) = (ours.expect("connected"), theirs.expect("accepted"));
        assert_eq!(theirs.get_ref().1.handshake_kind(), Some(expected));
        theirs.write_all(b"x").await.expect("written");
        theirs.flush().await.expect("flushed");
        assert_eq!(
            ours.read_u8().await.expect("the tickets are in front"),
            b'x'
        );
        assert_eq!(ours.peer_certificates().len(), 1, "{expected:?}");
    }
}

#[tokio::test]
async fn our_tickets_are_good_for_rustls() {
    let pki = Pki::new();
    let (client, server) = (
        Arc::new(pki.client(SUITES[0])),
        Arc::new(pki.server(SUITES[0])),
    );
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (a, b) = duplex(1 << 20);
        let connector = TlsConnector::from(client.clone());
        let (theirs, ours) = tokio::join!(
            connector.connect(name(), a),
            TlsStream::accept(b, server.clone(), HANDSHAKE),
        );
        let (mut theirs, mut ours) = (theirs.expect("connected"), ours.expect("accepted"));
        assert_eq!(theirs.get_ref().1.handshake_kind(), Some(expected));
        ours.write_all(b"x").await.expect("written");
        ours.flush().await.expect("flushed");
        assert_eq!(theirs.read_u8().await.expect("read"), b'x');
    }
}

/// The client's Finished, its first data, its KeyUpdate, data under the new key and its
/// close_notify, in one segment; the last record also in two.
#[tokio::test]
async fn data_that_comes_with_the_last_flight_is_not_lost() {
    for held_back in [0, 1, 30] {
        let pki = Pki::new();
        let (mut socket, ours) = duplex(1 << 20);
        let client = async {
            let config = Arc::new(pki.client(SUITES[0]));
            let mut client = ClientConnection::new(config, name()).expect("a client");
            let mut sent = Vec::new();
            client.write_tls(&mut sent).expect("sent");
            socket.write_all(&sent).await.expect("written");
            while client.is_handshaking() {
                let mut received = vec![0; 1 << 16];
                let len = socket.read(&mut received).await.expect("read");
                let mut received = &received[..len];
                while !received.is_empty() {
                    client.read_tls(&mut received).expect("read");
                    client.process_new_packets().expect("a good server");
                }
            }
            use std::io::Write;
            client.writer().write_all(b"first").expect("taken");
            client.refresh_traffic_keys().expect("updated");
            client.writer().write_all(&[b'y'; 50_000]).expect("taken");
            client.send_close_notify();
            let mut sent = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut sent).expect("sent");
            }
            let (now, later) = sent.split_at(sent.len() - held_back);
            socket.write_all(now).await.expect("written");
            tokio::time::sleep(Duration::from_millis(20)).await;
            socket.write_all(later).await.expect("written");
            socket
        };
        let server = async {
            let config = Arc::new(pki.server(SUITES[0]));
            let mut stream = TlsStream::accept(ours, config, HANDSHAKE)
                .await
                .expect("accepted");
            assert_eq!(stream.fill_buf().await.expect("read"), b"first");
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.expect("a clean end");
            assert_eq!(got.len(), 50_005, "held back: {held_back}");
        };
        tokio::join!(client, server);
    }
}
