//! Two of our own streams over sockets that deliver in arbitrary pieces, and the memory that a
//! stream holds.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex,
};
use tokio::time::timeout;

use super::chunky::Chunky;
use super::tls::{HANDSHAKE, Pki, SUITES, name};
use crate::hbone::buffer::BufferPool;
use crate::hbone::record::{RecordError, TlsError, TlsStream};

/// A client's and a server's stream over the two ends of a socket.
pub(super) async fn pair<A, B>(pki: &Pki, suite: usize, a: A, b: B) -> (TlsStream<A>, TlsStream<B>)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let client = Arc::new(pki.client(SUITES[suite]));
    let server = Arc::new(pki.server(SUITES[suite]));
    let (client, server) = tokio::join!(
        TlsStream::connect(a, client, name(), HANDSHAKE),
        TlsStream::accept(b, server, HANDSHAKE),
    );
    (client.expect("client"), server.expect("server"))
}

pub(super) type Plain = TlsStream<DuplexStream>;

pub(super) async fn plain_pair() -> (Plain, Plain) {
    let (a, b) = duplex(4 << 20);
    pair(&Pki::new(), 0, a, b).await
}

/// Writes `data` in slices of the given sizes, taken in turn, then closes.
async fn send<IO>(mut stream: TlsStream<IO>, data: &[u8], sizes: &[usize]) -> TlsStream<IO>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut sizes = sizes.iter().cycle();
    let mut rest = data;
    while !rest.is_empty() {
        let mut slices = Vec::new();
        let mut offered = rest;
        for _ in 0..3 {
            let size = offered.len().min(*sizes.next().expect("a size"));
            let (slice, later) = offered.split_at(size);
            slices.push(IoSlice::new(slice));
            offered = later;
        }
        let taken = stream.write_vectored(&slices).await.expect("written");
        rest = &rest[taken..];
    }
    stream.shutdown().await.expect("shut down");
    stream
}

/// Reads all, alternately by copy (into fresh and into initialised memory) and by borrowing.
async fn receive<IO>(mut stream: TlsStream<IO>, sizes: &[usize]) -> (TlsStream<IO>, Vec<u8>)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut data = Vec::new();
    for (turn, size) in sizes.iter().cycle().enumerate() {
        let before = data.len();
        match turn % 3 {
            0 => {
                let mut part = vec![0; *size];
                let len = stream.read(&mut part).await.expect("read");
                data.extend_from_slice(&part[..len]);
            }
            1 => {
                let mut part = Vec::with_capacity(*size);
                stream.read_buf(&mut part).await.expect("read");
                data.extend_from_slice(&part);
            }
            _ => {
                let part = stream.fill_buf().await.expect("read");
                let len = part.len().min(*size);
                data.extend_from_slice(&part[..len]);
                stream.consume(len);
            }
        }
        if data.len() == before {
            break;
        }
    }
    (stream, data)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_fragmentation_of_reads_and_writes_delivers_the_same_bytes(
        seed in any::<u64>(),
        largest in prop_oneof![1usize..64, 1usize..40_000],
        pipe in 1usize..200_000,
        len in 0usize..120_000,
        writes in proptest::collection::vec(1usize..70_000, 1..4),
        reads in proptest::collection::vec(1usize..70_000, 1..5),
        suite in 0usize..3,
        limit in 2u64..6,
        pool in prop_oneof![Just(0usize), 0usize..300_000, Just(16usize << 20)],
    ) {
        // This thread's pool: also one that is always dry.
        BufferPool::local().set_limit(pool);
        let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let len = if largest < 64 { len / 20 } else { len };
        let data = &data[..len];
        runtime().block_on(async {
            let (a, b) = duplex(pipe);
            let (a, b) = (Chunky::new(a, seed, largest), Chunky::new(b, seed ^ 77, largest));
            let (mut client, mut server) = pair(&Pki::new(), suite, a, b).await;
            client.limit_records_per_key(limit);
            server.limit_records_per_key(limit);
            // Both ways, one after the other: the second half works after the first is closed.
            let (client, (server, got)) =
                tokio::join!(send(client, data, &writes), receive(server, &reads));
            assert!(got == data, "client to server");
            let ((client, got), server) =
                tokio::join!(receive(client, &reads), send(server, data, &writes));
            assert!(got == data, "server to client");
            assert_eq!((client.memory(), server.memory()), (0, 0));
        });
    }
}

#[tokio::test]
async fn both_directions_at_once_do_not_disturb_each_other() {
    let (a, b) = duplex(64 << 10);
    let (client, server) = pair(&Pki::new(), 0, a, b).await;
    let data: Vec<u8> = (0..5_000_000).map(|i| (i % 253) as u8).collect();
    let relay = async |stream: TlsStream<DuplexStream>| {
        let (mut rx, mut tx) = tokio::io::split(stream);
        let send = async {
            tx.write_all(&data).await.expect("written");
            tx.shutdown().await.expect("shut down");
        };
        let mut got = Vec::new();
        let receive = async { rx.read_to_end(&mut got).await.expect("read") };
        tokio::join!(send, receive);
        got
    };
    let (one, two) = tokio::join!(relay(client), relay(server));
    assert!(one == data && two == data);
}

#[tokio::test]
async fn an_idle_stream_holds_no_buffer() {
    let (mut client, mut server) = plain_pair().await;
    for size in [1, 16 << 10, 1 << 20] {
        let data = vec![1; size];
        // Larger than the data: records are opened straight into it, the last one too.
        let mut got = vec![0; size + 100];
        for _ in 0..4 {
            let write = async {
                client.write_all(&data).await.expect("written");
                client.flush().await.expect("flushed");
            };
            let read = async {
                let mut len = 0;
                while len < size {
                    len += server.read(&mut got[len..]).await.expect("read");
                }
            };
            tokio::join!(write, read);
        }
        assert_eq!(
            (client.memory(), server.memory()),
            (0, 0),
            "after {size} bytes"
        );
    }
    let stats = client.pool.stats();
    assert_eq!(stats.bytes_in_use(), 0);
    assert!(
        stats.bytes_held() > 1 << 20,
        "the large buffers are kept for the next turn"
    );
}

#[tokio::test]
async fn a_partial_record_is_kept_compactly() {
    let (mut client, mut server) = plain_pair().await;
    // A full read makes the next one large, and then half a record stays.
    let data = vec![1; 1 << 20];
    client.write_all(&data).await.expect("written");
    let mut got = vec![0; 1 << 20];
    server.read_exact(&mut got).await.expect("read");
    for (cut, memory) in [(3, 3), (900, 900), (9_000, 16 << 10)] {
        let mut record = vec![0; 11_000];
        let (_, len) = client
            .tx
            .sealer
            .seal_data(&[IoSlice::new(&[5; 10_000])], usize::MAX, &mut record)
            .expect("sealed");
        client.io.write_all(&record[..cut]).await.expect("written");
        let nothing = timeout(Duration::from_millis(20), server.read_u8()).await;
        assert!(nothing.is_err(), "half a record is no data");
        let held = server.memory();
        assert!(
            (memory..memory + 600).contains(&held),
            "{held} bytes for {cut}"
        );
        client
            .io
            .write_all(&record[cut..len])
            .await
            .expect("written");
        server.read_exact(&mut got[..10_000]).await.expect("read");
        assert_eq!(got[..10_000], [5; 10_000]);
        assert_eq!(server.memory(), 0);
    }
}

#[tokio::test]
async fn nothing_more_is_accepted_while_the_socket_is_full() {
    let (a, b) = duplex(1000);
    let (mut client, mut server) = pair(&Pki::new(), 0, a, b).await;
    let data = vec![1; 4 << 20];
    let taken = client.write(&data).await.expect("one turn is accepted");
    assert!((1 << 20..(1 << 20) + 1024).contains(&taken));
    let more = timeout(Duration::from_millis(20), client.write(&data)).await;
    assert!(more.is_err(), "the second turn waits");
    let mut got = vec![0; taken];
    tokio::join!(async { client.flush().await.expect("flushed") }, async {
        server.read_exact(&mut got).await.expect("read")
    },);
    assert_eq!(got, data[..taken]);
}

#[tokio::test]
async fn the_end_is_clean_only_with_close_notify() {
    let (mut client, mut server) = plain_pair().await;
    client.write_all(b"all").await.expect("written");
    client.shutdown().await.expect("shut down");
    assert_eq!(
        client.write(b"more").await.expect_err("closed").kind(),
        io::ErrorKind::BrokenPipe
    );
    let mut got = Vec::new();
    server.read_to_end(&mut got).await.expect("a clean end");
    assert_eq!(got, b"all");
    assert_eq!(server.read(&mut [0]).await.expect("still the end"), 0);
    // The other direction is open yet.
    server.write_all(b"answer").await.expect("written");
    server.flush().await.expect("flushed");
    let mut got = [0; 6];
    client.read_exact(&mut got).await.expect("read");
    drop(server);
    let error = client.read(&mut got).await.expect_err("cut off");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(RecordError::of(&error), Some(RecordError::Truncated));
}

#[tokio::test]
async fn a_record_cut_in_the_middle_is_no_clean_end() {
    let (mut client, mut server) = plain_pair().await;
    let mut record = [0; 100];
    let (_, len) = client
        .tx
        .sealer
        .seal_data(&[IoSlice::new(b"data")], usize::MAX, &mut record)
        .expect("sealed");
    client
        .io
        .write_all(&record[..len - 1])
        .await
        .expect("written");
    drop(client);
    let error = server.read(&mut [0; 9]).await.expect_err("cut off");
    assert_eq!(RecordError::of(&error), Some(RecordError::Truncated));
}

#[tokio::test]
async fn a_handshake_has_a_deadline() {
    let pki = Pki::new();
    let (a, b) = duplex(1 << 16);
    let deadline = Duration::from_millis(30);
    let silent = TlsStream::accept(a, Arc::new(pki.server(SUITES[0])), deadline).await;
    assert!(matches!(silent, Err(TlsError::Timeout)));
    drop(b);
    let (a, _b) = duplex(1 << 16);
    let config = Arc::new(pki.client(SUITES[0]));
    let silent = TlsStream::connect(a, config, name(), deadline).await;
    assert!(matches!(silent, Err(TlsError::Timeout)));
}

#[tokio::test]
async fn a_configuration_that_keeps_its_secrets_is_refused() {
    let pki = Pki::new();
    let (a, b) = duplex(1 << 16);
    let mut client = pki.client(SUITES[0]);
    client.enable_secret_extraction = false;
    let (client, _server) = tokio::join!(
        TlsStream::connect(a, Arc::new(client), name(), HANDSHAKE),
        TlsStream::accept(b, Arc::new(pki.server(SUITES[0])), HANDSHAKE),
    );
    assert!(matches!(client, Err(TlsError::Handshake(_))));
}

#[tokio::test]
async fn what_was_agreed_can_be_asked() {
    let (mut client, server) = plain_pair().await;
    for stream in [&client, &server] {
        assert_eq!(stream.alpn(), Some(&b"h2"[..]));
        assert_eq!(stream.cipher_suite(), SUITES[0].suite());
        assert_eq!(stream.peer_certificates().len(), 1);
    }
    assert_eq!(client.take_peer_certificates().len(), 1);
    assert!(client.peer_certificates().is_empty());
}
