//! `adit-sample`: one small server that speaks HTTP/1.1, HTTP/2, gRPC, WebSocket and raw
//! TCP, and
//! the clients that measure and observe it. The pods of the demo, of the tests and of
//! the benchmarks run it.

mod answer;
mod client;
mod collector;
mod echo;
mod fault;
mod grpc;
mod grpc_client;
mod load;
mod requests;
mod serve;
mod socket;
mod stats;
mod tcp;
mod websocket;
mod websocket_client;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A sample server and its clients.
#[derive(Parser)]
#[command(name = "adit-sample", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP/1.1, HTTP/2 and gRPC on one port, raw TCP on others
    Serve(serve::Options),
    /// Send HTTP requests and print a JSON line for each
    Call(client::CallOptions),
    /// Call the gRPC Echo service and print a JSON line for each call
    Grpc(grpc_client::GrpcOptions),
    /// Send many HTTP or gRPC requests over kept connections and count who answered what
    Requests(requests::RequestsOptions),
    /// Send WebSocket messages and print a JSON line for each that comes back
    Websocket(websocket_client::WebsocketOptions),
    /// Hold one TCP connection, send a line at intervals, say when it ends
    Tcp(client::TcpOptions),
    /// Measure round trips on one TCP connection
    Rr(load::RrOptions),
    /// Measure connections per second: connect, one byte each way, close
    Conns(load::ConnsOptions),
    /// Hold idle TCP connections
    Hold(load::HoldOptions),
    /// Measure throughput to a sink, or from a source
    Stream(load::StreamOptions),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("adit-sample: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    socket::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve(options) => serve::run(options).await,
            Command::Call(options) => client::call(options).await,
            Command::Grpc(options) => grpc_client::grpc(options).await,
            Command::Requests(options) => requests::requests(options).await,
            Command::Websocket(options) => websocket_client::websocket(options).await,
            Command::Tcp(options) => client::tcp(options).await,
            Command::Rr(options) => load::rr(options).await,
            Command::Conns(options) => load::conns(options).await,
            Command::Hold(options) => load::hold(options).await,
            Command::Stream(options) => load::stream(options).await,
        }
    })
}
