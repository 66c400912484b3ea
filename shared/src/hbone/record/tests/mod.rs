//! Tests that reach into the record layer: known answers, malformed input, and peers that
//! break the rules. Interoperation with other implementations is in `tests/`.

mod bench;
mod chunky;
mod misbehaviour;
mod parser;
mod stream;
#[path = "../../../../tests/support/tls.rs"]
#[allow(dead_code)]
mod tls;
mod vectors;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305};

use super::key::TrafficKey;
use super::{HEADER_LEN, TAG_LEN};

const ALGORITHMS: [&Algorithm; 3] = [&AES_128_GCM, &AES_256_GCM, &CHACHA20_POLY1305];

/// A key as both ends of a test have it.
fn key(algorithm: &'static Algorithm, sequence: u64) -> TrafficKey {
    let bytes = [7; 32];
    let key = &bytes[..algorithm.key_len()];
    TrafficKey::from_parts(algorithm, key, &[9; 12], sequence, u64::MAX).expect("a key")
}

/// A record around any inner plaintext, also around one that no `Sealer` makes.
fn protect(key: &mut TrafficKey, inner: &[u8]) -> Vec<u8> {
    let len = u16::try_from(inner.len() + TAG_LEN).expect("a length");
    let [high, low] = len.to_be_bytes();
    let header: [u8; HEADER_LEN] = [23, 3, 3, high, low];
    let mut body = inner.to_vec();
    let nonce = key.next_nonce().expect("a nonce");
    key.aead()
        .seal_in_place_append_tag(nonce, Aad::from(header), &mut body)
        .expect("sealed");
    [&header[..], &body].concat()
}
