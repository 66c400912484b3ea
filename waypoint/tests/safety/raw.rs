//! Both ends of a connection by hand: an endpoint that keeps every byte it gets, a client of
//! HTTP/1 that sends any bytes, and one of HTTP/2 that sends any frames.

use std::cell::RefCell;
use std::rc::Rc;

use adit_shared::hbone::Tunnel;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::support::{App, Client, DEADLINE, Raw, Vip};

/// What an endpoint has got, one entry for each request, in order. What its connection's end
/// has cut off begins with `CUT `.
pub type Got = Rc<RefCell<Vec<String>>>;

/// Headers that the waypoint adds to each request, and that tables would only repeat.
const ADDED: [&str; 3] = [
    "x-request-id: ",
    "x-forwarded-client-cert: ",
    "x-forwarded-proto: ",
];

/// An endpoint of HTTP/1 that keeps all bytes and answers with the target of each request.
/// It reads as the standard says and no more leniently: what it cannot read it keeps.
pub fn recorder() -> (impl App, Got) {
    let got = Got::default();
    let kept = got.clone();
    let app = Raw(move |tunnel: Tunnel| {
        let kept = kept.clone();
        async move {
            let mut io = tunnel.into_io();
            let mut buffer = Vec::new();
            loop {
                while let Some(length) = request_length(&buffer) {
                    let request: Vec<u8> = buffer.drain(..length).collect();
                    let request = String::from_utf8_lossy(&request).into_owned();
                    let target = request.split(' ').nth(1).unwrap_or("").to_owned();
                    let method = request.split(' ').next().unwrap_or("").to_owned();
                    kept.borrow_mut().push(plain(&request));
                    let length = target.len();
                    let text = if method == "HEAD" { "" } else { &target };
                    let answer =
                        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{text}");
                    if io.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
                let mut more = [0; 4096];
                match io.read(&mut more).await {
                    Ok(n) if n > 0 => buffer.extend_from_slice(&more[..n]),
                    _ => break,
                }
            }
            if !buffer.is_empty() {
                let cut = String::from_utf8_lossy(&buffer).into_owned();
                kept.borrow_mut().push(format!("CUT {}", plain(&cut)));
            }
        }
    });
    (app, got)
}

/// Without the lines that the waypoint adds.
fn plain(request: &str) -> String {
    let (head, rest) = match request.split_once("\r\n\r\n") {
        Some((head, rest)) => (head, rest),
        None => (request, ""),
    };
    let mut text = String::new();
    for line in head.split("\r\n") {
        if !ADDED.iter().any(|added| line.starts_with(added)) {
            text.push_str(line);
            text.push_str("\r\n");
        }
    }
    text + "\r\n" + rest
}

/// Length of the first request in `bytes`, if all of it is there.
fn request_length(bytes: &[u8]) -> Option<usize> {
    let head = find(bytes, b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    let header = |name: &str| {
        let line = text.split("\r\n").find(|line| line.starts_with(name))?;
        Some(line[name.len()..].trim().to_owned())
    };
    if header("transfer-encoding:").is_some() {
        let mut at = head;
        loop {
            let line = find(&bytes[at..], b"\r\n")?;
            let size = std::str::from_utf8(&bytes[at..at + line]).ok()?;
            let size = usize::from_str_radix(size, 16).ok()?;
            at += line + 2;
            if size == 0 {
                break;
            }
            at += size + 2;
            bytes.get(..at)?;
        }
        loop {
            let line = find(&bytes[at..], b"\r\n")?;
            at += line + 2;
            if line == 0 {
                return Some(at);
            }
        }
    }
    let length = match header("content-length:") {
        Some(length) => length.parse().ok()?,
        None => 0,
    };
    (bytes.len() >= head + length).then_some(head + length)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// What bytes flow over.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<IO: AsyncRead + AsyncWrite + Unpin> Stream for IO {}

/// A client that sends bytes as they are.
pub struct RawHttp1 {
    pub io: Box<dyn Stream>,
    buffer: Vec<u8>,
}

/// One answer of a [`RawHttp1`].
#[derive(Debug, PartialEq, Eq)]
pub struct RawAnswer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl RawHttp1 {
    /// On a tunnel of its own.
    pub async fn new(client: &Client, to: &Vip) -> Self {
        let tunnel = client.tunnel(to.address).await.expect("accepted");
        Self {
            io: Box::new(tunnel.into_io()),
            buffer: Vec::new(),
        }
    }

    /// Sends all of it. That the other side closes meanwhile is no error.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = timeout(DEADLINE, self.io.write_all(bytes))
            .await
            .expect("in time");
    }

    /// The next answer; `None`: the connection has ended.
    pub async fn answer(&mut self) -> Option<RawAnswer> {
        loop {
            if let Some(answer) = self.take() {
                return Some(answer);
            }
            let mut more = [0; 16 << 10];
            let read = timeout(DEADLINE, self.io.read(&mut more)).await;
            match read.expect("an answer or the end in time") {
                Ok(n) if n > 0 => self.buffer.extend_from_slice(&more[..n]),
                _ => return None,
            }
        }
    }

    fn take(&mut self) -> Option<RawAnswer> {
        let end = find(&self.buffer, b"\r\n\r\n")? + 4;
        let head = String::from_utf8(self.buffer[..end].to_vec()).expect("ASCII");
        let lower = head.to_ascii_lowercase();
        let length = lower
            .split("\r\n")
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().expect("a length"));
        if self.buffer.len() < end + length {
            return None;
        }
        let body = String::from_utf8_lossy(&self.buffer[end..end + length]).into_owned();
        self.buffer.drain(..end + length);
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        Some(RawAnswer {
            status: status.expect("a status"),
            head,
            body,
        })
    }
}

/// Frame types of HTTP/2 (RFC 9113 6).
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flag {
    pub const ACK: u8 = 1;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;
}

/// A frame that came.
#[derive(Debug, Clone)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == kind::GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// Bytes of one frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A header block of literals that nothing is remembered of (RFC 7541 6.2.2), so that any
/// bytes can be sent.
pub fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in headers {
        bytes.push(0);
        for text in [name, value] {
            integer(&mut bytes, text.len());
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    bytes
}

/// RFC 7541 5.1, with a prefix of 7 bits.
fn integer(bytes: &mut Vec<u8>, mut n: usize) {
    if n < 127 {
        bytes.push(n as u8);
        return;
    }
    bytes.push(127);
    n -= 127;
    while n >= 128 {
        bytes.push((n % 128) as u8 | 128);
        n /= 128;
    }
    bytes.push(n as u8);
}

/// How a stream of HTTP/2 ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// With a response of this status, when its first frame has come.
    Status(u16),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY with this code.
    GoAway(u32),
    /// The connection has ended without a word.
    Closed,
}

/// A client that sends frames as they are.
pub struct RawHttp2<IO> {
    pub io: IO,
    buffer: Vec<u8>,
}

impl<IO: Stream> RawHttp2<IO> {
    /// Has sent the preface and empty SETTINGS.
    pub async fn new(io: IO) -> Self {
        let mut this = Self {
            io,
            buffer: Vec::new(),
        };
        this.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        this.send(&frame(kind::SETTINGS, 0, 0, &[])).await;
        this
    }

    /// Sends; that the other side closes meanwhile is no error. `false`: it has.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        let sent = timeout(DEADLINE, async {
            self.io.write_all(bytes).await?;
            self.io.flush().await
        });
        sent.await.expect("in time").is_ok()
    }

    /// Sends without a deadline.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    /// Sends while it reads, and waits until the connection ends.
    pub async fn send_and_end(&mut self, mut bytes: &[u8]) -> End {
        let mut more = [0; 16 << 10];
        while !bytes.is_empty() {
            let (mut reader, mut writer) = tokio::io::split(&mut self.io);
            tokio::select! {
                biased;
                read = reader.read(&mut more) => match read {
                    Ok(n) if n > 0 => self.buffer.extend_from_slice(&more[..n]),
                    _ => break,
                },
                written = writer.write(bytes) => match written {
                    Ok(n) if n > 0 => bytes = &bytes[n..],
                    _ => break,
                },
            }
        }
        let _ = self.io.flush().await;
        self.end().await
    }

    /// The next frame; `None`: the connection has ended.
    pub async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<9>() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                let (kind, flags) = (head[3], head[4]);
                if self.buffer.len() >= 9 + length {
                    let payload = self.buffer[9..9 + length].to_vec();
                    self.buffer.drain(..9 + length);
                    return Some(Frame {
                        kind,
                        flags,
                        stream,
                        payload,
                    });
                }
            }
            let mut more = [0; 16 << 10];
            let read = timeout(DEADLINE, self.io.read(&mut more)).await;
            match read.expect("a frame or the end in time") {
                Ok(n) if n > 0 => self.buffer.extend_from_slice(&more[..n]),
                _ => return None,
            }
        }
    }

    /// Waits for the answer on `stream`, or for what ends it.
    pub async fn end_of(&mut self, stream: u32) -> End {
        while let Some(frame) = self.frame().await {
            match frame.kind {
                kind::HEADERS if frame.stream == stream => {
                    return End::Status(status(&frame.payload));
                }
                kind::RST_STREAM if frame.stream == stream => return End::Reset(frame.code()),
                // With NO_ERROR it only says that the connection will not last.
                kind::GOAWAY if frame.code() != 0 => return End::GoAway(frame.code()),
                kind::SETTINGS if frame.flags & flag::ACK == 0 => {
                    self.send(&self::frame(kind::SETTINGS, flag::ACK, 0, &[]))
                        .await;
                }
                _ => {}
            }
        }
        End::Closed
    }

    /// Waits until the connection ends, and how.
    pub async fn end(&mut self) -> End {
        self.end_of(0).await
    }
}

/// `:status`, which comes first in a block: in the static table, or written out. Enough for the
/// first response of a connection, when the dynamic table is empty.
fn status(block: &[u8]) -> u16 {
    // A change of the table's size may come before it.
    let start = block.iter().position(|b| b & 0xe0 != 0x20).unwrap();
    let block = &block[start..];
    match block[0] {
        0x88 => 200,
        0x89 => 204,
        0x8a => 206,
        0x8b => 304,
        0x8c => 400,
        0x8d => 404,
        0x8e => 500,
        _ => {
            let length = usize::from(block[1] & 0x7f);
            let text = &block[2..2 + length];
            match block[1] & 0x80 {
                0 => std::str::from_utf8(text).unwrap().parse().unwrap(),
                _ => huffman_digits(text),
            }
        }
    }
}

/// Digits in HPACK's Huffman code (RFC 7541 B).
fn huffman_digits(bytes: &[u8]) -> u16 {
    let bits: Vec<u8> = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1))
        .collect();
    let mut at = 0;
    let mut number = 0;
    let value = |bits: &[u8]| {
        bits.iter()
            .fold(0_u16, |value, bit| value << 1 | u16::from(*bit))
    };
    for _ in 0..3 {
        let five = value(&bits[at..at + 5]);
        let digit = if five < 3 {
            at += 5;
            five
        } else {
            let six = value(&bits[at..at + 6]);
            at += 6;
            six - 0b01_1001 + 3
        };
        number = number * 10 + digit;
    }
    number
}
