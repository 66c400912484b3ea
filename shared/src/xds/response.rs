//! A response as the server holds it: the resources are those of the set, not copies.
//!
//! The first response to a node of a large mesh is tens of megabytes, and all nodes may ask at
//! once; so it is never encoded in one piece, but as the transport takes it.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{encode_varint, encoded_len_varint};

use super::resources::VersionedResource;
use crate::proto::xds::{DeltaDiscoveryResponse, Resource};

/// A resource and its name.
pub type NamedResource = (Arc<str>, Arc<VersionedResource>);

/// A `DeltaDiscoveryResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedResponse {
    /// `system_version_info`.
    pub version: String,
    /// The type of all resources.
    pub type_url: String,
    /// Returned by the acknowledgement.
    pub nonce: String,
    /// New and changed.
    pub resources: Vec<NamedResource>,
    /// Names that are gone.
    pub removed: Vec<String>,
}

impl SharedResponse {
    /// The message.
    pub fn into_message(self) -> DeltaDiscoveryResponse {
        let resource = |(name, resource): &NamedResource| Resource {
            version: resource.version().to_owned(),
            resource: Some(prost_types::Any {
                type_url: self.type_url.clone(),
                value: resource.body().to_vec(),
            }),
            name: name.to_string(),
            aliases: vec![],
        };
        DeltaDiscoveryResponse {
            system_version_info: self.version,
            resources: self.resources.iter().map(resource).collect(),
            type_url: self.type_url,
            nonce: self.nonce,
            removed_resources: self.removed,
        }
    }

    /// Its length as a message.
    pub fn encoded_len(&self) -> usize {
        let resources = self.resources.iter().map(|resource| {
            let length = self.resource_len(resource);
            1 + encoded_len_varint(length as u64) + length
        });
        // A name that is empty is one all the same: it stands in a list.
        let removed = self
            .removed
            .iter()
            .map(|name| 1 + encoded_len_varint(name.len() as u64) + name.len());
        field_len(&self.version)
            + resources.sum::<usize>()
            + field_len(&self.type_url)
            + field_len(&self.nonce)
            + removed.sum::<usize>()
    }

    fn any_len(&self, resource: &VersionedResource) -> usize {
        field_len(&self.type_url) + field_len(resource.body())
    }

    fn resource_len(&self, (name, resource): &NamedResource) -> usize {
        let any = self.any_len(resource);
        let any = 1 + encoded_len_varint(any as u64) + any;
        field_len(resource.version()) + any + field_len(&**name)
    }

    fn put_resource(&self, named: &NamedResource, out: &mut BytesMut) {
        let (name, resource) = named;
        // DeltaDiscoveryResponse.resources
        put_head(2, self.resource_len(named), out);
        // Resource: version, resource (Any: type_url, value), name.
        put_field(1, resource.version(), out);
        put_head(2, self.any_len(resource), out);
        put_field(1, &self.type_url, out);
        put_field(2, resource.body(), out);
        put_field(3, &**name, out);
    }
}

/// A response as gRPC frames it, in pieces.
#[derive(Debug)]
pub struct Pieces {
    response: SharedResponse,
    begun: bool,
    /// Resources that are written.
    written: usize,
    done: bool,
}

/// A message is longer than gRPC can frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a response of more than 4 GiB")]
pub struct TooLong;

impl Pieces {
    /// Nothing is encoded yet.
    pub fn new(response: SharedResponse) -> Self {
        Self {
            response,
            begun: false,
            written: 0,
            done: false,
        }
    }

    /// The next piece: about `bytes`, and more only for what cannot be divided, a single
    /// resource and the names that are gone. `None`: that was all.
    ///
    /// # Errors
    /// [`TooLong`], before anything was given.
    pub fn next(&mut self, bytes: usize) -> Result<Option<Bytes>, TooLong> {
        if self.done {
            return Ok(None);
        }
        let response = &self.response;
        let mut out = BytesMut::new();
        if !self.begun {
            let length = response.encoded_len();
            out.reserve(bytes.min(length + 5));
            out.put_u8(0);
            out.put_u32(u32::try_from(length).map_err(|_| TooLong)?);
            put_field(1, &response.version, &mut out);
            self.begun = true;
        } else {
            out.reserve(bytes);
        }
        while let Some(named) = response.resources.get(self.written) {
            let (name, resource) = named;
            let estimate = name.len() + resource.body().len() + response.type_url.len() + 48;
            if !out.is_empty() && out.len() + estimate > bytes {
                return Ok(Some(out.freeze()));
            }
            response.put_resource(named, &mut out);
            self.written += 1;
        }
        put_field(4, &response.type_url, &mut out);
        put_field(5, &response.nonce, &mut out);
        for name in &response.removed {
            put_head(6, name.len(), &mut out);
            out.put_slice(name.as_bytes());
        }
        self.done = true;
        Ok(Some(out.freeze()))
    }
}

/// Of a string or bytes, which proto3 leaves out if it is empty; all tags here are one byte.
fn field_len(value: impl AsRef<[u8]>) -> usize {
    match value.as_ref().len() {
        0 => 0,
        length => 1 + encoded_len_varint(length as u64) + length,
    }
}

fn put_field(tag: u8, value: impl AsRef<[u8]>, out: &mut BytesMut) {
    let value = value.as_ref();
    if !value.is_empty() {
        put_head(tag, value.len(), out);
        out.put_slice(value);
    }
}

fn put_head(tag: u8, length: usize, out: &mut BytesMut) {
    const LENGTH_DELIMITED: u8 = 2;
    out.put_u8(tag << 3 | LENGTH_DELIMITED);
    encode_varint(length as u64, out);
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn response(bodies: &[usize], removed: &[&str]) -> SharedResponse {
        let resource = |(index, length): (usize, &usize)| {
            let body = VersionedResource::new(vec![index as u8; *length]);
            (format!("name-{index}").into(), Arc::new(body))
        };
        SharedResponse {
            version: "12".into(),
            type_url: "type.googleapis.com/x".into(),
            nonce: "7".into(),
            resources: bodies.iter().enumerate().map(resource).collect(),
            removed: removed.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn pieces_make_the_message() {
        for (bodies, removed) in [
            (&[][..], &[][..]),
            (&[0, 1, 127, 128, 300, 70_000], &["gone", ""]),
            (&[200; 1000], &[]),
        ] {
            let response = response(bodies, removed);
            let message = response.clone().into_message();
            assert_eq!(response.encoded_len(), message.encoded_len());
            for bytes in [1, 1000, 16_384, usize::MAX >> 1] {
                let mut pieces = Pieces::new(response.clone());
                let mut all = Vec::new();
                while let Some(piece) = pieces.next(bytes.min(1 << 20)).expect("short") {
                    assert!(!piece.is_empty());
                    all.extend_from_slice(&piece);
                }
                let length = u32::try_from(message.encoded_len()).expect("short");
                assert_eq!(all[0], 0);
                assert_eq!(all[1..5], length.to_be_bytes());
                assert_eq!(all[5..], message.encode_to_vec(), "{bytes}");
            }
        }
    }

    #[test]
    fn pieces_are_small() {
        let mut pieces = Pieces::new(response(&[200; 1000], &[]));
        while let Some(piece) = pieces.next(4096).expect("short") {
            assert!(piece.len() <= 4096 + 64, "{}", piece.len());
        }
    }
}
