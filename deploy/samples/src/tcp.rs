//! Raw TCP servers: echo (after a greeting, if there is one), sink and source.

use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a port does.
#[derive(Clone)]
pub(crate) enum Mode {
    /// Says the greeting, then sends back what comes.
    Echo(Option<String>),
    /// Reads until the client closes.
    Sink,
    /// Sends until the client closes.
    Source,
}

/// Large enough for one system call to move what a socket buffer holds.
const BUFFER: usize = 256 * 1024;

/// Serves for ever.
pub(crate) async fn serve(listener: TcpListener, mode: Mode) {
    let mode = Rc::new(mode);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let mode = mode.clone();
                tokio::task::spawn_local(async move {
                    // A client that goes away is no news.
                    let _ = handle(stream, &mode).await;
                });
            }
            Err(error) => {
                // Out of descriptors: waiting is all that helps.
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn handle(mut stream: TcpStream, mode: &Mode) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    match mode {
        Mode::Echo(greeting) => {
            if let Some(greeting) = greeting {
                stream.write_all(format!("{greeting}\n").as_bytes()).await?;
            }
            // Small while idle: thousands of held connections are a test of their own.
            let mut buffer = vec![0; 4096];
            loop {
                let read = stream.read(&mut buffer).await?;
                if read == 0 {
                    return stream.shutdown().await;
                }
                stream.write_all(&buffer[..read]).await?;
                if read == buffer.len() && read < BUFFER {
                    buffer.resize(read * 2, 0);
                }
            }
        }
        Mode::Sink => {
            let mut buffer = vec![0; BUFFER];
            while stream.read(&mut buffer).await? > 0 {}
            stream.shutdown().await
        }
        Mode::Source => {
            let buffer = vec![0; BUFFER];
            loop {
                stream.write_all(&buffer).await?;
            }
        }
    }
}
