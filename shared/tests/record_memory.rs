//! What an idle stream costs in memory, all of it: rustls' key schedule, the AEAD contexts of
//! AWS-LC and the runtime's socket included.

#[path = "support/tls.rs"]
#[allow(dead_code)]
mod tls;

use std::sync::Arc;

use adit_shared::hbone::record::TlsStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use tls::{HANDSHAKE, Pki, SUITES, name};

const PAIRS: usize = 200;
/// Pairs that warm up what is there once: pools, tables, the allocator's caches.
const WARM: usize = 50;
/// Bytes per stream, with some room above what was measured (about 3,100).
const PROMISED: usize = 4096;

/// Bytes that glibc's allocator has handed out, whoever asked.
fn allocated() -> usize {
    // SAFETY: mallinfo2 takes nothing and returns a plain struct.
    unsafe { libc::mallinfo2() }.uordblks
}

#[tokio::test]
async fn an_idle_stream_is_small() {
    let pki = Pki::new();
    // No tickets: the stores of both sides would grow along.
    let mut server = pki.server(SUITES[0]);
    server.send_tls13_tickets = 0;
    let (client, server) = (Arc::new(pki.client(SUITES[0])), Arc::new(server));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut streams = Vec::with_capacity(2 * (WARM + PAIRS));
    let mut before = 0;
    for pair in 1..=WARM + PAIRS {
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (ours, theirs) = (ours.expect("connected"), theirs.expect("accepted").0);
        ours.set_nodelay(true).expect("a socket");
        theirs.set_nodelay(true).expect("a socket");
        let (mut one, mut two) = {
            let one = TlsStream::connect(ours, client.clone(), name(), HANDSHAKE);
            let two = TlsStream::accept(theirs, server.clone(), HANDSHAKE);
            let (one, two) = tokio::join!(one, two);
            (one.expect("connected"), two.expect("accepted"))
        };
        for _ in 0..2 {
            one.write_all(b"x").await.expect("written");
            assert_eq!(two.read_u8().await.expect("read"), b'x');
            (one, two) = (two, one);
        }
        assert_eq!((one.memory(), two.memory()), (0, 0));
        // The identity is known by now.
        drop((one.take_peer_certificates(), two.take_peer_certificates()));
        streams.push(one);
        streams.push(two);
        if pair == WARM {
            before = allocated();
        }
    }
    let each = (allocated() - before) / (2 * PAIRS);
    println!(
        "{each} bytes per idle stream, {} of them the struct",
        size_of::<TlsStream>()
    );
    assert!(each <= PROMISED, "{each} bytes per idle stream");
}
