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

const PAIRS: usize = 60;
/// Bytes per stream, with some room above what was measured (about 3,500).
const PROMISED: usize = 4096;

/// Bytes that glibc's allocator has handed out, whoever asked.
fn allocated() -> usize {
    // SAFETY: mallinfo2 takes nothing and returns a plain struct.
    unsafe { libc::mallinfo2() }.uordblks
}

#[tokio::test]
async fn an_idle_stream_is_small() {
    let pki = Pki::new();
    let (client, server) = (
        Arc::new(pki.client(SUITES[0])),
        Arc::new(pki.server(SUITES[0])),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut streams = Vec::with_capacity(2 * PAIRS);
    let mut before = 0;
    // The first pair warms up what is there once: pools, tickets, error strings.
    for pair in 0..=PAIRS {
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut one, mut two) = {
            let one =
                TlsStream::connect(ours.expect("connected"), client.clone(), name(), HANDSHAKE);
            let two = TlsStream::accept(theirs.expect("accepted").0, server.clone(), HANDSHAKE);
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
        if pair == 0 {
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
