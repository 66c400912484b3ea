//! Takes requests of other processes on the mesh's socket: one JSON line each way.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use super::event::Event;
use crate::control::{Reply, Request};

/// A client that connects sends its line at once.
const READ_DEADLINE: Duration = Duration::from_secs(5);
/// Room for what one `apply` brings.
const MAX_LINE: u64 = 4 << 20;

pub(super) async fn serve(listener: UnixListener, events: mpsc::Sender<Event>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let events = events.clone();
                tokio::task::spawn_local(async move {
                    if let Err(error) = answer(stream, events).await {
                        tracing::debug!(%error, "a request came to nothing");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors: waiting is all that helps.
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, events: mpsc::Sender<Event>) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(MAX_LINE));
    tokio::time::timeout(READ_DEADLINE, reader.read_line(&mut line)).await??;
    let outcome = match serde_json::from_str::<Request>(&line) {
        Ok(request) => {
            let (reply, outcome) = oneshot::channel();
            // A loop that has ended answers nothing, which the client understands.
            let _ = events.send(Event::Request { request, reply }).await;
            match outcome.await {
                Ok(outcome) => outcome,
                Err(_) => return Ok(()),
            }
        }
        Err(error) => Err(format!("this supervisor does not understand: {error}")),
    };
    let reply = match outcome {
        Ok(value) => Reply { error: None, value },
        Err(error) => Reply {
            error: Some(error),
            value: serde_json::Value::Null,
        },
    };
    let mut answer = serde_json::to_vec(&reply)?;
    answer.push(b'\n');
    write.write_all(&answer).await
}
