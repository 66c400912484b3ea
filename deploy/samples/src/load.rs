//! Load generators, each bounded by time and number, with one JSON report at the end.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use crate::socket::resolve;
use crate::stats::Histogram;

/// One operation that takes longer has failed.
const OPERATION: Duration = Duration::from_secs(10);
const MAX_SECONDS: u64 = 3600;
const MAX_CLIENTS: usize = 4096;
const MAX_HELD: usize = 60_000;
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// Connections that are opened at the same time.
const OPENING: usize = 64;

/// Options of `rr`.
#[derive(Args)]
pub(crate) struct RrOptions {
    /// `host:port` of an echo port
    target: String,
    /// Bytes each way
    #[arg(long, default_value_t = 1)]
    bytes: usize,
    /// How long
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Connections, each with one request under way
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Milliseconds at the beginning that do not count
    #[arg(long, default_value_t = 200)]
    warmup: u64,
}

/// Measures round trips.
pub(crate) async fn rr(options: RrOptions) -> anyhow::Result<()> {
    ensure!(
        options.seconds <= MAX_SECONDS,
        "at most {MAX_SECONDS} seconds"
    );
    ensure!(
        (1..=MAX_MESSAGE).contains(&options.bytes),
        "1 to {MAX_MESSAGE} bytes"
    );
    ensure!(
        (1..=MAX_CLIENTS).contains(&options.connections),
        "1 to {MAX_CLIENTS} connections"
    );
    let address = resolve(&options.target).await?;
    let warm = Instant::now() + Duration::from_millis(options.warmup);
    let end = warm + Duration::from_secs(options.seconds);
    let bytes = options.bytes;
    let results = fan_out(options.connections, move || async move {
        let mut histogram = Histogram::new();
        let mut stream = connect(address).await?;
        let message = vec![b'x'; bytes];
        let mut answer = vec![0; bytes];
        loop {
            let begin = Instant::now();
            if begin >= end {
                return anyhow::Ok(histogram);
            }
            let trip = async {
                stream.write_all(&message).await?;
                stream.read_exact(&mut answer).await
            };
            timeout(OPERATION, trip)
                .await
                .context("no answer in time")??;
            if begin >= warm {
                histogram.record(begin.elapsed());
            }
        }
    })
    .await;
    let mut all = Histogram::new();
    for histogram in results {
        all.merge(&histogram?);
    }
    let per_second = all.count() as f64 / options.seconds.max(1) as f64;
    let report = json!({"kind": "rr", "bytes": bytes, "connections": options.connections,
        "seconds": options.seconds, "round_trips": all.count(), "per_second": per_second,
        "latency": all.summary()});
    println!("{report}");
    Ok(())
}

/// Options of `conns`.
#[derive(Args)]
pub(crate) struct ConnsOptions {
    /// `host:port` of an echo port
    target: String,
    /// Clients that connect one time after the other
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// How long
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// Measures connections per second. Failures are counted, not fatal: a proxy that
/// refuses under load is a finding.
pub(crate) async fn conns(options: ConnsOptions) -> anyhow::Result<()> {
    ensure!(
        options.seconds <= MAX_SECONDS,
        "at most {MAX_SECONDS} seconds"
    );
    ensure!(
        (1..=MAX_CLIENTS).contains(&options.clients),
        "1 to {MAX_CLIENTS} clients"
    );
    let address = resolve(&options.target).await?;
    let begin = Instant::now();
    let end = begin + Duration::from_secs(options.seconds);
    let last_error = Rc::new(RefCell::new(None));
    let shared = last_error.clone();
    let results = fan_out(options.clients, move || {
        let last_error = shared.clone();
        async move {
            let mut histogram = Histogram::new();
            let mut failures = 0u64;
            while Instant::now() < end {
                let begin = Instant::now();
                let one = async {
                    let mut stream = connect(address).await?;
                    stream.write_all(b"x").await?;
                    stream.read_exact(&mut [0]).await?;
                    // Closing first leaves TIME_WAIT here, as real clients do.
                    anyhow::Ok(())
                };
                match timeout(OPERATION, one).await.context("too slow").flatten() {
                    Ok(()) => histogram.record(begin.elapsed()),
                    Err(error) => {
                        failures += 1;
                        *last_error.borrow_mut() = Some(format!("{error:#}"));
                        // A refusal is quick; a loop of them must not take the machine.
                        sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            (histogram, failures)
        }
    })
    .await;
    let took = begin.elapsed().as_secs_f64();
    let mut all = Histogram::new();
    let mut failures = 0;
    for (histogram, failed) in &results {
        all.merge(histogram);
        failures += failed;
    }
    let report = json!({"kind": "conns", "clients": options.clients, "seconds": took,
        "connections": all.count(), "per_second": all.count() as f64 / took,
        "failures": failures, "last_error": *last_error.borrow(), "latency": all.summary()});
    println!("{report}");
    Ok(())
}

/// Options of `hold`.
#[derive(Args)]
pub(crate) struct HoldOptions {
    /// `host:port` of an echo port
    target: String,
    /// Connections to hold
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// How long, after all are open; ends earlier on SIGTERM
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Holds idle connections: says when they are open, and how many were left at the end.
pub(crate) async fn hold(options: HoldOptions) -> anyhow::Result<()> {
    ensure!(
        options.seconds <= MAX_SECONDS,
        "at most {MAX_SECONDS} seconds"
    );
    ensure!(
        (1..=MAX_HELD).contains(&options.count),
        "1 to {MAX_HELD} connections"
    );
    let address = resolve(&options.target).await?;
    let begin = Instant::now();
    let mut held = Vec::with_capacity(options.count);
    let mut failures = 0u64;
    while held.len() + (failures as usize) < options.count {
        let left = options.count - held.len() - failures as usize;
        let opened = fan_out(left.min(OPENING), move || async move {
            let mut stream = connect(address).await?;
            // The proxies between must have built their part too.
            stream.write_all(b"x").await?;
            timeout(OPERATION, stream.read_exact(&mut [0])).await??;
            anyhow::Ok(stream)
        })
        .await;
        for stream in opened {
            match stream {
                Ok(stream) => held.push(stream),
                Err(_) => failures += 1,
            }
        }
    }
    let report = json!({"kind": "hold", "event": "open", "open": held.len(),
        "failures": failures, "took_ms": begin.elapsed().as_millis() as u64});
    println!("{report}");
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        () = sleep(Duration::from_secs(options.seconds)) => {}
        _ = terminate.recv() => {}
    }
    let alive = held.iter().filter(|stream| is_open(stream)).count();
    println!("{}", json!({"kind": "hold", "event": "end", "open": alive}));
    Ok(())
}

fn is_open(stream: &TcpStream) -> bool {
    match stream.try_read(&mut [0]) {
        Ok(read) => read > 0,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

/// Options of `stream`.
#[derive(Args)]
pub(crate) struct StreamOptions {
    /// `host:port` of a sink, or of a source with `--receive`
    target: String,
    /// Connections
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// How long
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Read from a source in place of writing to a sink
    #[arg(long)]
    receive: bool,
}

/// Measures throughput.
pub(crate) async fn stream(options: StreamOptions) -> anyhow::Result<()> {
    const BUFFER: usize = 256 * 1024;
    ensure!(
        options.seconds <= MAX_SECONDS,
        "at most {MAX_SECONDS} seconds"
    );
    ensure!(
        (1..=MAX_CLIENTS).contains(&options.streams),
        "1 to {MAX_CLIENTS} streams"
    );
    let address = resolve(&options.target).await?;
    let begin = Instant::now();
    let end = begin + Duration::from_secs(options.seconds);
    let receive = options.receive;
    let results = fan_out(options.streams, move || async move {
        let mut stream = connect(address).await?;
        let mut buffer = vec![0; BUFFER];
        let mut moved = 0u64;
        while Instant::now() < end {
            let step = async {
                match receive {
                    true => stream.read(&mut buffer).await,
                    false => stream.write(&buffer).await,
                }
            };
            let step = timeout(OPERATION, step).await.context("nothing moves")??;
            ensure!(step > 0, "the peer closed");
            moved += step as u64;
        }
        anyhow::Ok(moved)
    })
    .await;
    let took = begin.elapsed().as_secs_f64();
    let mut bytes = 0;
    for moved in results {
        bytes += moved?;
    }
    let report = json!({"kind": "stream", "streams": options.streams, "receive": receive,
        "seconds": took, "bytes": bytes, "gbit_per_second": bytes as f64 * 8.0 / took / 1e9});
    println!("{report}");
    Ok(())
}

async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let connected = timeout(OPERATION, TcpStream::connect(address)).await;
    let stream = connected.context("no connection in time")??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Runs `count` times the same thing at the same time, on this thread.
async fn fan_out<T, F, Fut>(count: usize, make: F) -> Vec<T>
where
    T: 'static,
    F: Fn() -> Fut,
    Fut: Future<Output = T> + 'static,
{
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut tasks = JoinSet::new();
            for _ in 0..count {
                tasks.spawn_local(make());
            }
            tasks.join_all().await
        })
        .await
}
