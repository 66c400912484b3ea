//! Reads delta responses as they come, without keeping them: five hundred first responses of
//! a large mesh would not fit into memory.

use bytes::{Buf as _, BytesMut};

/// Resources of a response that is longer than this are counted, not looked at: a change is
/// a small one.
const LOOKED_AT: usize = 64 * 1024;
/// gRPC's compressed flag and length.
const FRAME_HEADER: usize = 5;
/// A tag and a length, at most.
const FIELD_HEADER: usize = 20;

/// What is wanted of a `DeltaDiscoveryResponse`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) type_url: String,
    pub(super) nonce: String,
    /// Encoded, with gRPC's header.
    pub(super) bytes: usize,
    pub(super) resources: usize,
    /// Of the resources, unless there is much of them.
    pub(super) names: Vec<String>,
}

/// What comes is not a delta response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a stream of delta responses")]
pub(super) struct Malformed;

/// The place in the stream.
#[derive(Default)]
pub(super) struct Reader {
    buffer: BytesMut,
    /// Bytes of the current message that are not dealt with.
    left: usize,
    /// Bytes that are of no interest.
    skip: usize,
    current: Response,
}

impl Reader {
    /// Takes the next bytes, and gives the responses that are complete with them.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Result<Vec<Response>, Malformed> {
        let mut complete = Vec::new();
        // Without a copy, for it is nearly everything.
        self.pass_over(&mut bytes, &mut complete);
        self.buffer.extend_from_slice(bytes);
        loop {
            let mut buffer = std::mem::take(&mut self.buffer);
            self.pass_over(&mut buffer, &mut complete);
            let more = self.next(&mut buffer, &mut complete);
            self.buffer = buffer;
            if !more? {
                return Ok(complete);
            }
        }
    }

    fn pass_over(&mut self, bytes: &mut impl bytes::Buf, complete: &mut Vec<Response>) {
        let over = self.skip.min(bytes.remaining());
        if over == 0 {
            return;
        }
        bytes.advance(over);
        self.skip -= over;
        self.dealt_with(over, complete);
    }

    fn dealt_with(&mut self, bytes: usize, complete: &mut Vec<Response>) {
        self.left -= bytes;
        if self.left == 0 {
            complete.push(std::mem::take(&mut self.current));
        }
    }

    /// One step; false: more bytes are needed.
    fn next(
        &mut self,
        buffer: &mut BytesMut,
        complete: &mut Vec<Response>,
    ) -> Result<bool, Malformed> {
        if self.left == 0 {
            let Some(header) = buffer.get(..FRAME_HEADER) else {
                return Ok(false);
            };
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
            if header[0] != 0 {
                return Err(Malformed);
            }
            buffer.advance(FRAME_HEADER);
            self.left = length as usize;
            self.current.bytes = self.left + FRAME_HEADER;
            if self.left == 0 {
                complete.push(std::mem::take(&mut self.current));
            }
            return Ok(true);
        }
        if self.skip > 0 {
            return Ok(false);
        }
        let mut rest = &buffer[..];
        let Some((field, length)) = header(&mut rest)? else {
            return match buffer.len() < FIELD_HEADER {
                true => Ok(false),
                false => Err(Malformed),
            };
        };
        let header_length = buffer.len() - rest.len();
        if header_length + length > self.left {
            return Err(Malformed);
        }
        // DeltaDiscoveryResponse: 2 resources, 4 type_url, 5 nonce.
        let wanted = match field {
            2 => {
                self.current.resources += 1;
                self.current.bytes <= LOOKED_AT
            }
            4 | 5 => true,
            _ => false,
        };
        if wanted {
            let Some(value) = rest.get(..length) else {
                if field == 2 {
                    self.current.resources -= 1;
                }
                return Ok(false);
            };
            match field {
                2 => self.current.names.push(name(value)?),
                4 => self.current.type_url = text(value)?,
                _ => self.current.nonce = text(value)?,
            }
            buffer.advance(header_length + length);
            self.dealt_with(header_length + length, complete);
        } else {
            buffer.advance(header_length);
            self.left -= header_length;
            self.skip = length;
            if self.left == 0 {
                complete.push(std::mem::take(&mut self.current));
            }
        }
        Ok(true)
    }
}

/// Number and length of a length-delimited field, as all of those that are met here are.
fn header(bytes: &mut &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    let (Some(tag), Some(length)) = (varint(bytes)?, varint(bytes)?) else {
        return Ok(None);
    };
    if tag & 7 != 2 {
        return Err(Malformed);
    }
    Ok(Some((
        tag >> 3,
        usize::try_from(length).map_err(|_| Malformed)?,
    )))
}

fn varint(bytes: &mut &[u8]) -> Result<Option<u64>, Malformed> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let Some((first, rest)) = bytes.split_first() else {
            return Ok(None);
        };
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(Some(value));
        }
    }
    Err(Malformed)
}

/// `Resource.name`, field 3.
fn name(mut resource: &[u8]) -> Result<String, Malformed> {
    while !resource.is_empty() {
        let (field, length) = header(&mut resource)?.ok_or(Malformed)?;
        let value = resource.get(..length).ok_or(Malformed)?;
        if field == 3 {
            return text(value);
        }
        resource = &resource[length..];
    }
    Err(Malformed)
}

fn text(bytes: &[u8]) -> Result<String, Malformed> {
    std::str::from_utf8(bytes)
        .map(ToOwned::to_owned)
        .map_err(|_| Malformed)
}

#[cfg(test)]
mod tests {
    use adit_shared::proto::xds::{DeltaDiscoveryResponse, Resource};
    use prost::Message as _;

    use super::*;

    fn message(names: &[&str], body: usize) -> DeltaDiscoveryResponse {
        let resource = |name: &&str| Resource {
            name: (*name).to_owned(),
            version: "v".into(),
            resource: Some(prost_types::Any {
                type_url: "t".into(),
                value: vec![1; body],
            }),
            ..Resource::default()
        };
        DeltaDiscoveryResponse {
            system_version_info: "7".into(),
            resources: names.iter().map(resource).collect(),
            type_url: "t".into(),
            nonce: format!("{}", names.len()),
            removed_resources: vec!["gone".into()],
        }
    }

    fn framed(message: &DeltaDiscoveryResponse) -> Vec<u8> {
        let body = message.encode_to_vec();
        let mut frame = vec![0];
        frame.extend((body.len() as u32).to_be_bytes());
        frame.extend(body);
        frame
    }

    #[test]
    fn responses_are_read_however_they_are_cut() {
        let small = framed(&message(&["a", "b"], 300));
        let large = framed(&message(&["c"; 50], 3000));
        let empty = framed(&message(&[], 0));
        let stream = [small.as_slice(), &large, &empty, &small].concat();
        for cut in [1, 2, 7, 100, 4096, stream.len()] {
            let mut reader = Reader::default();
            let mut found = Vec::new();
            for part in stream.chunks(cut) {
                found.extend(reader.feed(part).expect("well-formed"));
            }
            let names: Vec<_> = found.iter().map(|r| r.names.join(",")).collect();
            assert_eq!(names, ["a,b", "", "", "a,b"], "{cut}");
            let resources: Vec<_> = found.iter().map(|r| r.resources).collect();
            assert_eq!(resources, [2, 50, 0, 2], "{cut}");
            let bytes: Vec<_> = found.iter().map(|r| r.bytes).collect();
            let expected = [small.len(), large.len(), empty.len(), small.len()];
            assert_eq!(bytes, expected, "{cut}");
            assert_eq!((&*found[1].type_url, &*found[1].nonce), ("t", "50"));
        }
    }

    #[test]
    fn anything_else_is_malformed() {
        let mut compressed = framed(&message(&["a"], 3));
        compressed[0] = 1;
        let too_long = [0, 0, 0, 0, 2, 0x12, 0x70];
        let no_string = [0, 0, 0, 0, 2, 0x10, 0x01];
        for bytes in [&compressed[..], &too_long, &no_string] {
            assert_eq!(Reader::default().feed(bytes), Err(Malformed), "{bytes:?}");
        }
    }
}
