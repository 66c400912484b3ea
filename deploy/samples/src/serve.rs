//! The server's sockets: HTTP/1.1, HTTP/2 with prior knowledge, gRPC and WebSocket on one
//! port, told apart by the first bytes; raw TCP on others.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::answer::{Server, answer};
use crate::socket::listen;
use crate::tcp;

/// How long open requests may go on after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Options of `serve`.
#[derive(Args)]
pub(crate) struct Options {
    /// HTTP/1.1, HTTP/2 and gRPC
    #[arg(long, default_value = "[::]:8080", env = "HTTP_ADDRESS")]
    http: SocketAddr,
    /// Raw TCP: echo
    #[arg(long, default_value = "[::]:9090", env = "TCP_ADDRESS")]
    tcp: SocketAddr,
    /// Raw TCP: reads and throws away
    #[arg(long, default_value = "[::]:9091", env = "SINK_ADDRESS")]
    sink: SocketAddr,
    /// Raw TCP: sends zeros until the client closes
    #[arg(long, default_value = "[::]:9092", env = "SOURCE_ADDRESS")]
    source: SocketAddr,
    /// A line that the echo port sends first (server-first protocols)
    #[arg(long, env = "GREETING")]
    greeting: Option<String>,
    /// Name that answers carry
    #[arg(long, env = "POD_NAME")]
    name: Option<String>,
    /// Version that answers carry
    #[arg(long, default_value = "v1", env = "VERSION")]
    version: String,
}

/// Serves until SIGTERM or SIGINT.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let name = match options.name {
        Some(name) => name,
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")?
            .trim()
            .to_owned(),
    };
    let http = listen(options.http)?;
    let echo = listen(options.tcp)?;
    let sink = listen(options.sink)?;
    let source = listen(options.source)?;
    let server = Rc::new(Server::new(name.clone(), options.version));
    println!(
        "{name} serves HTTP on {}, TCP on {}, a sink on {}, a source on {}",
        options.http, options.tcp, options.sink, options.source
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async move {
            let (stop, stopping) = watch::channel(false);
            tokio::task::spawn_local(tcp::serve(echo, tcp::Mode::Echo(options.greeting)));
            tokio::task::spawn_local(tcp::serve(sink, tcp::Mode::Sink));
            tokio::task::spawn_local(tcp::serve(source, tcp::Mode::Source));
            let mut open = JoinSet::new();
            tokio::select! {
                () = accept(http, server, &mut open, stopping) => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.send_replace(true);
            // Requests that are answered in time are answered; the rest is cut.
            let all = async { while open.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(GRACE, all).await;
        })
        .await;
    Ok(())
}

async fn accept(
    listener: TcpListener,
    server: Rc<Server>,
    open: &mut JoinSet<()>,
    stopping: watch::Receiver<bool>,
) {
    loop {
        while open.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: waiting is all that helps.
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some((peer, local)) = addresses(&stream) else {
            continue;
        };
        let server = server.clone();
        let service = service_fn(move |request| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(answer(server, request, peer, local).await) }
        });
        // TCP_NODELAY only speeds things up.
        let _ = stream.set_nodelay(true);
        let mut stopping = stopping.clone();
        open.spawn_local(async move {
            let builder = auto::Builder::new(LocalExecutor);
            let mut connection =
                pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
            // Here and below: a client that goes away is no news.
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = stopping.wait_for(|stop| *stop) => {}
            }
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        });
    }
}

/// Runs the streams of a connection on this thread.
#[derive(Clone, Copy)]
struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future<Output = ()> + 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Peer and own address; none when the peer has gone already.
pub(crate) fn addresses(stream: &TcpStream) -> Option<(SocketAddr, SocketAddr)> {
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let peer = stream.peer_addr().ok()?;
    Some((canonical(peer), canonical(stream.local_addr().ok()?)))
}
