//! An accept loop that survives what the system may answer, and bounds what it takes on.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// Out of descriptors or memory: others have to give some back first.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Accepts one connection. `exhausted` is told each time the system has no descriptor or
/// memory for it; the connection waits in the backlog meanwhile.
///
/// # Errors
/// Only when the listener itself cannot be used any more.
pub async fn accept(
    listener: &TcpListener,
    exhausted: impl Fn(&io::Error),
) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        let error = match listener.accept().await {
            Ok(accepted) => return Ok(accepted),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                exhausted(&error);
                sleep(EXHAUSTED_PAUSE).await;
            }
            Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK) => return Err(error),
            // The connection died in the backlog, or its network did (accept(2)).
            _ => {}
        }
    }
}
