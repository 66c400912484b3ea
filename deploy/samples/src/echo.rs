//! The gRPC Echo service of `echo.proto`: messages, methods and frames, without generated
//! code.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// `/package.Service/`.
pub(crate) const SERVICE: &str = "/adit.samples.v1.Echo/";
/// What kubelets ask (`grpc.health.v1`); this server is always well.
pub(crate) const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
/// Longest message of a frame.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// `EchoRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EchoRequest {
    #[prost(string, tag = "1")]
    pub(crate) message: String,
    /// Answers of `Repeat`.
    #[prost(uint32, tag = "2")]
    pub(crate) count: u32,
    /// Milliseconds between them.
    #[prost(uint32, tag = "3")]
    pub(crate) interval_ms: u32,
}

/// `EchoResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EchoResponse {
    #[prost(string, tag = "1")]
    pub(crate) message: String,
    #[prost(string, tag = "2")]
    pub(crate) server: String,
    #[prost(string, tag = "3")]
    pub(crate) version: String,
    #[prost(string, tag = "4")]
    pub(crate) peer: String,
    /// The call's metadata, as it came.
    #[prost(btree_map = "string, string", tag = "5")]
    pub(crate) metadata: BTreeMap<String, String>,
    /// Messages of the caller so far.
    #[prost(uint32, tag = "6")]
    pub(crate) received: u32,
}

/// A method of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Method {
    /// `Echo`: one message each way
    Unary,
    /// `Collect`: many messages, one answer
    Client,
    /// `Repeat`: one message, many answers
    Server,
    /// `Chat`: an answer for each message
    Bidi,
}

impl Method {
    pub(crate) fn path(self) -> String {
        let name = match self {
            Self::Unary => "Echo",
            Self::Client => "Collect",
            Self::Server => "Repeat",
            Self::Bidi => "Chat",
        };
        format!("{SERVICE}{name}")
    }

    pub(crate) fn of(path: &str) -> Option<Self> {
        let all = [Self::Unary, Self::Client, Self::Server, Self::Bidi];
        all.into_iter().find(|method| method.path() == path)
    }
}

/// A length-prefixed message (gRPC PROTOCOL-HTTP2.md).
pub(crate) fn frame(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes.freeze()
}

/// `grpc.health.v1.HealthCheckRequest`; its service does not matter here.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct HealthCheckRequest {}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct HealthCheckResponse {
    /// 1 is SERVING.
    #[prost(int32, tag = "1")]
    pub(crate) status: i32,
}

impl HealthCheckResponse {
    pub(crate) const SERVING: Self = Self { status: 1 };
}

/// Takes the next message out of what has come; `None` until it is complete.
///
/// # Errors
/// A gRPC status code and its text.
pub(crate) fn take<M: Message + Default>(
    buffer: &mut BytesMut,
) -> Result<Option<M>, (u32, String)> {
    let Some(prefix) = buffer.first_chunk::<5>() else {
        return Ok(None);
    };
    if prefix[0] != 0 {
        return Err((12, "compressed messages are not understood".into()));
    }
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if length > MAX_MESSAGE {
        return Err((8, format!("a message of {length} bytes is too long")));
    }
    if buffer.len() < 5 + length {
        return Ok(None);
    }
    buffer.advance(5);
    let message = M::decode(buffer.split_to(length)).map_err(|error| (3, error.to_string()))?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_its_length_in_front() {
        let response = EchoResponse {
            message: "hi".into(),
            ..Default::default()
        };
        assert_eq!(&frame(&response)[..], b"\0\0\0\0\x04\x0a\x02hi");
    }

    #[test]
    fn frames_come_in_pieces() {
        let request = EchoRequest {
            message: "hello".into(),
            count: 3,
            interval_ms: 0,
        };
        let two = [frame(&request), frame(&request)].concat();
        let mut buffer = BytesMut::new();
        let mut seen = 0;
        for byte in two {
            buffer.put_u8(byte);
            while let Ok(Some(message)) = take::<EchoRequest>(&mut buffer) {
                assert_eq!(message, request);
                seen += 1;
            }
        }
        assert_eq!((seen, buffer.len()), (2, 0));
        assert!(take::<EchoRequest>(&mut BytesMut::from(&b"\x01\0\0\0\0"[..])).is_err());
        assert!(take::<EchoRequest>(&mut BytesMut::from(&b"\0\xff\0\0\0"[..])).is_err());
    }

    #[test]
    fn methods_have_their_paths() {
        assert_eq!(Method::of("/adit.samples.v1.Echo/Chat"), Some(Method::Bidi));
        assert_eq!(Method::of("/adit.samples.v1.Echo/Other"), None);
    }
}
