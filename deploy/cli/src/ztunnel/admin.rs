//! Requests to an admin endpoint that can be reached from here by its address.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A dump takes milliseconds; a ztunnel waits up to 2 s for a worker that is stuck.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest answer: the dump of a large mesh is some ten megabytes.
pub const MAX_ANSWER: usize = 256 << 20;

/// Sends a request without body to `address` (host:port).
///
/// # Errors
/// When nobody answers in time, or the answer is too long. Every status is an answer.
pub fn request(address: &str, method: &Method, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        timeout(DEADLINE, exchange(address, method, path))
            .await
            .with_context(|| format!("no answer within {} s", DEADLINE.as_secs()))?
    })
}

async fn exchange(
    address: &str,
    method: &Method,
    path: &str,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, address)
        .header(header::CONTENT_LENGTH, 0)
        .body(Empty::<Bytes>::new())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        anyhow::Ok((status, body.to_bytes()))
    };
    let drive = async {
        let ended = connection.await;
        // A connection that has ended well may have left an answer to be read.
        if let Err(error) = ended {
            return anyhow::Error::from(error);
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        answer = answer => answer,
        error = drive => Err(error),
    }
}

/// A value of a query: everything but letters, digits and `-._~` becomes `%XX` (RFC 3986 2.3).
pub fn encode(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(byte.into());
            }
            byte => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_query_value_is_encoded() {
        assert_eq!(
            super::encode("access=debug,h2=warn &x"),
            "access%3Ddebug%2Ch2%3Dwarn%20%26x"
        );
    }
}
