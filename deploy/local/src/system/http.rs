//! A GET (or POST) from inside a network namespace, without a program for it: for the
//! admin, metrics and readiness ports of the mesh's own components.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::netns;
use crate::error::LocalError;

/// A configuration dump of a large mesh is some megabytes.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

impl HttpAnswer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends a request without body from where this process is.
///
/// # Errors
/// [`LocalError::System`] when nobody answers in time, or not in HTTP.
pub fn http_request(
    address: SocketAddr,
    method: &str,
    path: &str,
    deadline: Duration,
) -> Result<HttpAnswer, LocalError> {
    let what = format!("{method} http://{address}{path}");
    exchange(address, &head(address, method, path), deadline).map_err(LocalError::system(what))
}

/// The same from the network namespace at `netns`.
///
/// # Errors
/// As [`http_request`], and when the namespace cannot be entered.
pub fn request(
    netns: &Path,
    address: SocketAddr,
    method: &str,
    path: &str,
    deadline: Duration,
) -> Result<HttpAnswer, LocalError> {
    let head = head(address, method, path);
    let what = format!("{method} http://{address}{path}");
    netns::within(netns, move || {
        exchange(address, &head, deadline).map_err(LocalError::system(what))
    })
}

fn head(address: SocketAddr, method: &str, path: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: \
         0\r\n\r\n"
    )
}

fn exchange(address: SocketAddr, head: &str, deadline: Duration) -> io::Result<HttpAnswer> {
    let until = Instant::now() + deadline;
    let mut stream = TcpStream::connect_timeout(&address, deadline)?;
    stream.set_write_timeout(Some(deadline))?;
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(_) if answer.len() > MAX_ANSWER => {
                return Err(io::Error::other("the answer is too long"));
            }
            Ok(read) => answer.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    understand(&answer).ok_or_else(|| io::Error::other("the answer is no HTTP"))
}

/// RFC 9112: status line, headers, and a body that is chunked, or of the length given,
/// or as long as the connection lasts.
fn understand(answer: &[u8]) -> Option<HttpAnswer> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let mut chunked = false;
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        match name.to_ascii_lowercase().as_str() {
            "transfer-encoding" => chunked = value.to_ascii_lowercase().contains("chunked"),
            "content-length" => length = Some(value.trim().parse::<usize>().ok()?),
            _ => {}
        }
    }
    let body = &answer[end + 4..];
    let body = match length {
        _ if chunked => unchunk(body)?,
        Some(length) => body.get(..length)?.to_vec(),
        None => body.to_vec(),
    };
    Some(HttpAnswer { status, body })
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let line = std::str::from_utf8(&rest[..end]).ok()?;
        let size = usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()?;
        rest = rest.get(end + 2..)?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size.checked_add(2)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(answer: &str) -> Option<(u16, String)> {
        understand(answer.as_bytes()).map(|a| (a.status, a.text()))
    }

    #[test]
    fn bodies_of_every_kind() {
        let table = [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhixx",
                Some((200, "hi")),
            ),
            ("HTTP/1.1 503 No\r\n\r\nrest", Some((503, "rest"))),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1;x=y\r\n!\r\n0\r\n\r\n",
                Some((200, "hi!")),
            ),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", None),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhi",
                None,
            ),
            ("SSH-2.0\r\n\r\n", None),
        ];
        for (answer, expected) in table {
            let expected = expected.map(|(status, body): (u16, &str)| (status, body.to_owned()));
            assert_eq!(text(answer), expected, "{answer}");
        }
    }
}
