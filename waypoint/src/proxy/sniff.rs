//! What a client speaks on a port that does not say: looked at in the first bytes. A client
//! that says nothing for a moment waits for its server to speak first, and so is no HTTP
//! client (SMTP, MySQL, FTP).

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

pub use adit_shared::net::first_bytes::{ENOUGH, HTTP2_PREFACE as PREFACE, Spoken, judge};
use tokio::time::timeout;

use super::http::HEADER_DEADLINE;
use super::io::Io;

/// How long a client may be silent before it counts as waiting for the server.
pub const SILENCE: Duration = Duration::from_millis(200);
/// Looks at what comes first, which stays unread.
///
/// # Errors
/// Those of the stream.
pub async fn sniff(io: &mut Io) -> io::Result<Spoken> {
    let looking = poll_fn(|cx| poll_judge(io, cx));
    match timeout(SILENCE, looking).await {
        Ok(judged) => judged,
        Err(_) => Ok(judge(io.peeked()).unwrap_or(Spoken::Other)),
    }
}

/// Waits for the first bytes of what is declared to be HTTP and says which version it is.
///
/// # Errors
/// Those of the stream; at its end without a byte, `UnexpectedEof`.
pub async fn http_version(io: &mut Io, deadline: Duration) -> io::Result<Spoken> {
    let first = poll_fn(|cx| {
        if !io.peeked().is_empty() {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(match ready!(io.poll_peek(cx)) {
            Ok([]) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        })
    });
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    timeout(deadline, first).await.map_err(late)??;
    let looking = poll_fn(|cx| {
        loop {
            let seen = io.peeked().len();
            let common = seen.min(PREFACE.len());
            if seen > 0 && (common == PREFACE.len() || io.peeked()[..common] != PREFACE[..common]) {
                let http2 = io.peeked()[..common] == *PREFACE;
                return Poll::Ready(Ok(if http2 { Spoken::Http2 } else { Spoken::Http1 }));
            }
            match io.poll_peek(cx) {
                Poll::Ready(Ok(bytes)) if bytes.len() == seen => {
                    return Poll::Ready(Ok(Spoken::Http1));
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    // Whoever has begun HTTP/2's preface has nothing to wait for.
    timeout(HEADER_DEADLINE, looking).await.map_err(late)?
}

fn poll_judge(io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<Spoken>> {
    loop {
        let seen = io.peeked().len();
        if let Some(spoken) = judge(io.peeked()) {
            return Poll::Ready(Ok(spoken));
        }
        if seen > ENOUGH {
            return Poll::Ready(Ok(Spoken::Other));
        }
        match io.poll_peek(cx) {
            Poll::Ready(Ok(bytes)) if bytes.len() == seen => {
                return Poll::Ready(Ok(Spoken::Other));
            }
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }
}
