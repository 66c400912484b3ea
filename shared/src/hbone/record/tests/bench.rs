//! What the record layer costs. Not run by default:
//! `cargo test --release -p adit-shared --lib record::tests::bench -- --ignored --nocapture --test-threads 1`

use std::hint::black_box;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Algorithm};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::key;
use super::tls::{HANDSHAKE, Pki, SUITES, name};
use crate::hbone::buffer::{BufferPool, SizeClass};
use crate::hbone::record::{Content, Opener, Sealer, TlsStream, inner_len, record_len};

const TURN: usize = 1 << 20;
const ROUNDS: usize = 2_000;
const RELAYED: usize = 6 << 30;

fn ms_per_gb(elapsed: Duration, bytes: usize) -> f64 {
    elapsed.as_secs_f64() * 1e3 / (bytes as f64 / 1e9)
}

#[test]
#[ignore = "a benchmark"]
fn sealing_and_opening() {
    for (algorithm, name) in [(&AES_128_GCM, "AES-128-GCM"), (&AES_256_GCM, "AES-256-GCM")] {
        for (len, payload) in [
            (TURN, "1 MiB turns"),
            (1400, "1400 bytes"),
            (26, "26 bytes"),
        ] {
            let rounds = if len == TURN { ROUNDS } else { ROUNDS * 100 };
            let direct = seal(algorithm, len, 1, rounds);
            let gathered = seal(algorithm, len, 2, rounds);
            let (in_place, apart) = (
                open(algorithm, len, rounds, false),
                open(algorithm, len, rounds, true),
            );
            println!(
                "{name}, {payload}: seal {direct:.0} (gathered {gathered:.0}), \
                 open in place {in_place:.0}, into the caller's buffer {apart:.0} ms/GB",
            );
        }
    }
}

fn seal(algorithm: &'static Algorithm, len: usize, slices: usize, rounds: usize) -> f64 {
    let data = vec![1; len];
    // Short slices, so that every record has to be gathered from several.
    let parts: Vec<_> = match slices {
        1 => vec![IoSlice::new(&data)],
        _ => data.chunks(1000).map(IoSlice::new).collect(),
    };
    let mut out = vec![0; TURN + 2000];
    let mut sealer = Sealer::with_key(key(algorithm, 0));
    let start = Instant::now();
    for _ in 0..rounds {
        black_box(sealer.seal_data(&parts, TURN, &mut out).expect("sealed"));
    }
    ms_per_gb(start.elapsed(), rounds * len)
}

fn open(algorithm: &'static Algorithm, len: usize, rounds: usize, apart: bool) -> f64 {
    let data = vec![1; len];
    let mut sealed = vec![0; TURN + 2000];
    let mut out = vec![0; 1 << 15];
    let mut sealer = Sealer::with_key(key(algorithm, 0));
    let mut opener = Opener::with_key(key(algorithm, 0));
    let mut elapsed = Duration::ZERO;
    for _ in 0..rounds {
        let (_, written) = sealer
            .seal_data(&[IoSlice::new(&data)], TURN, &mut sealed)
            .expect("sealed");
        let start = Instant::now();
        let mut rest = &mut sealed[..written];
        while let Some(len) = record_len(rest).expect("a header") {
            let (record, later) = rest.split_at_mut(len);
            let content = if apart {
                opener.open_into(record, &mut out[..inner_len(len)])
            } else {
                opener.open(record)
            };
            assert!(matches!(black_box(content), Ok(Content::Data(_))));
            rest = later;
        }
        elapsed += start.elapsed();
    }
    ms_per_gb(elapsed, rounds * len)
}

/// User and system time of this thread.
fn cpu() -> (Duration, Duration) {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("usage");
    let duration = |time: TimeVal| {
        Duration::from_micros(
            u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).expect("positive"),
        )
    };
    (duration(usage.user_time()), duration(usage.system_time()))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Proxy {
    Plain,
    TokioRustls,
    Ours,
}

/// source - proxy - TLS - proxy - sink, each a thread, over loopback.
#[test]
#[ignore = "a benchmark"]
fn relaying() {
    for proxy in [Proxy::Ours, Proxy::TokioRustls, Proxy::Plain, Proxy::Ours] {
        let pki = Arc::new(Pki::new());
        let ports = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
        let at = |i: usize| ports[i].local_addr().expect("an address");
        let (first, wire, sink) = (at(0), at(1), at(2));
        let [first_listener, wire_listener, sink_listener] = ports;
        let client = pki.client(SUITES[0]);
        let mut server = pki.server(SUITES[0]);
        // The first proxy never reads: a ticket in its socket would make its close a reset.
        server.send_tls13_tickets = 0;
        let threads = [
            thread(move || async move {
                let app = accept(first_listener).await;
                let socket = TcpStream::connect(wire).await.expect("connected");
                let client = Arc::new(client);
                match proxy {
                    Proxy::Plain => copy(app, socket).await,
                    Proxy::Ours => {
                        let tls = TlsStream::connect(socket, client, name(), HANDSHAKE).await;
                        copy(app, tls.expect("connected")).await;
                    }
                    Proxy::TokioRustls => {
                        let tls = TlsConnector::from(client).connect(name(), socket).await;
                        copy(app, tls.expect("connected")).await;
                    }
                }
            }),
            thread(move || async move {
                let socket = accept(wire_listener).await;
                let server = Arc::new(server);
                match proxy {
                    Proxy::Plain => copy(socket, connect(sink).await).await,
                    Proxy::Ours => {
                        let tls = TlsStream::accept(socket, server, HANDSHAKE).await;
                        copy(tls.expect("accepted"), connect(sink).await).await;
                    }
                    Proxy::TokioRustls => {
                        let tls = TlsAcceptor::from(server).accept(socket).await;
                        copy(tls.expect("accepted"), connect(sink).await).await;
                    }
                }
            }),
            thread(move || async move {
                let mut sink = accept(sink_listener).await;
                let mut buf = vec![0; TURN];
                let mut total = 0;
                loop {
                    match sink.read(&mut buf).await.expect("read") {
                        0 => break,
                        len => total += len,
                    }
                }
                assert_eq!(total, RELAYED);
            }),
        ];
        let start = Instant::now();
        let source = thread(move || async move {
            let mut source = connect(first).await;
            let data = vec![1; TURN];
            for _ in 0..RELAYED / TURN {
                source.write_all(&data).await.expect("written");
            }
            source.shutdown().await.expect("shut down");
        });
        let [one, two, _] = threads.map(|thread| thread.join().expect("a good end"));
        source.join().expect("a good end");
        let cost = |cpu: Duration| ms_per_gb(cpu, RELAYED);
        println!(
            "{proxy:?}: {:.1} Gbit/s, pair {:.0} ms/GB (p1 {:.0}+{:.0}, p2 {:.0}+{:.0})",
            RELAYED as f64 * 8e-9 / start.elapsed().as_secs_f64(),
            cost(one.0 + one.1 + two.0 + two.1),
            cost(one.0),
            cost(one.1),
            cost(two.0),
            cost(two.1),
        );
    }
}

fn thread<F: Future<Output = ()>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> std::thread::JoinHandle<(Duration, Duration)> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(work());
        cpu()
    })
}

async fn accept(listener: std::net::TcpListener) -> TcpStream {
    listener.set_nonblocking(true).expect("nonblocking");
    let listener = TcpListener::from_std(listener).expect("a listener");
    listener.accept().await.expect("accepted").0
}

async fn connect(address: std::net::SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("connected")
}

/// As the data plane copies: turns that grow from 16 KiB to 1 MiB while they come back full.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let pool = BufferPool::local();
    let mut class = SizeClass::Kib16;
    loop {
        let mut buf = pool.take(class);
        match from.read(&mut buf).await.expect("read") {
            0 => break,
            len => {
                to.write_all(&buf[..len]).await.expect("written");
                if len == buf.len() {
                    class = class.larger();
                }
            }
        }
    }
    to.shutdown().await.expect("shut down");
}
