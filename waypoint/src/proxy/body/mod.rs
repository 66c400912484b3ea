//! Bodies on their way: counted, passed on frame by frame, never collected beyond what a
//! retry may need.

mod progress;
mod replay;
mod request;
mod response;

pub use progress::RequestProgress;
pub use replay::Replay;
pub use request::RequestBody;
pub use response::ResponseBody;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Its source failed (HTTP/1).
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// Its source failed (HTTP/2).
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// More of them than of headers.
    #[error("the trailers are too large")]
    Trailers,
    /// The client's side failed while it was looked at before.
    #[error("the client has not sent all of it")]
    Broken,
    /// Another try has taken its place.
    #[error("superseded by another attempt")]
    Superseded,
    /// The client sends nothing more of it.
    #[error("the client has stopped sending")]
    Stalled,
    /// The request's time is over.
    #[error("the request's time is over")]
    Timeout,
    /// A policy that has changed denies it.
    #[error("denied by a policy that has changed")]
    Denied,
}

impl BodyError {
    /// What it was on a stream of HTTP/2.
    pub fn reason(&self) -> Option<h2::Reason> {
        match self {
            Self::Http2(error) => error.reason(),
            _ => None,
        }
    }
}

/// Finds the beginnings of gRPC messages in a stream of bytes: five bytes of prefix, the last
/// four of which are the length.
#[derive(Debug, Default)]
pub struct MessageCounter {
    prefix: u8,
    length: u32,
    skip: u64,
}

impl MessageCounter {
    /// How many messages begin in `data`.
    pub fn count(&mut self, mut data: &[u8]) -> u64 {
        let mut messages = 0;
        while !data.is_empty() {
            if self.skip > 0 {
                let n = (self.skip).min(data.len() as u64);
                self.skip -= n;
                // At most the length of `data`.
                data = &data[n as usize..];
                continue;
            }
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(data[0]);
            }
            self.prefix += 1;
            data = &data[1..];
            if self.prefix == 5 {
                messages += 1;
                self.skip = u64::from(self.length);
                self.prefix = 0;
                self.length = 0;
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_wherever_they_are_cut() {
        let mut stream = Vec::new();
        for length in [0_u32, 3, 300] {
            stream.push(0);
            stream.extend_from_slice(&length.to_be_bytes());
            stream.extend(std::iter::repeat_n(7, length as usize));
        }
        for size in [1, 2, 4, 7, 1000] {
            let mut counter = MessageCounter::default();
            let messages: u64 = stream.chunks(size).map(|chunk| counter.count(chunk)).sum();
            assert_eq!(messages, 3, "in pieces of {size}");
        }
    }
}
