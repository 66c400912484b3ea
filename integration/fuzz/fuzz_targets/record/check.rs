//! What the record parser promises for any input. The fuzz target and the replay of its corpus
//! in plain tests both call [`check`].
//!
//! The input is a script for a peer that has the right keys: which records it sends, with which
//! content, what it puts in between and what it damages. Random bytes alone would not pass the
//! authentication and so reach nothing.

use adit_shared::hbone::record::{Content, Message, Opener, RecordError, inner_len, record_len};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;
use rustls::crypto::cipher::{AeadKey, Iv};

/// Runs one script. Panics if the parser breaks a promise.
pub fn check(script: &[u8]) {
    let (stream, sent, damaged) = Peer::default().play(script);
    let in_place = parse(&stream, false);
    let apart = parse(&stream, true);
    assert_eq!(in_place, apart, "both ways of opening agree");
    let (received, error) = in_place;
    // Nothing is invented and nothing reordered.
    assert!(sent.starts_with(&received), "received what was not sent");
    assert!(
        damaged || error.is_some() || received == sent,
        "lost without an error"
    );
}

fn secrets(generation: u8) -> ConnectionTrafficSecrets {
    ConnectionTrafficSecrets::Aes256Gcm {
        key: AeadKey::from([generation; 32]),
        iv: Iv::from([generation ^ 0xa5; 12]),
    }
}

/// Parses the stream to its end, the first error or close_notify; returns the data.
fn parse(stream: &[u8], apart: bool) -> (Vec<u8>, Option<RecordError>) {
    let mut received = Vec::new();
    let outcome = parse_into(stream.to_vec(), apart, &mut received);
    (received, outcome.err())
}

fn parse_into(mut stream: Vec<u8>, apart: bool, received: &mut Vec<u8>) -> Result<(), RecordError> {
    let mut opener = Opener::new(secrets(0), 0)?;
    let mut generation = 0u8;
    let mut rest = &mut stream[..];
    loop {
        let len = match record_len(rest)? {
            Some(len) if len <= rest.len() => len,
            _ => return Ok(()),
        };
        let (record, later) = std::mem::take(&mut rest).split_at_mut(len);
        rest = later;
        let mut out = vec![0; inner_len(len)];
        let content = if apart {
            opener.open_into(record, &mut out)?
        } else {
            opener.open(record)?
        };
        match content {
            Content::Data(range) if apart => received.extend_from_slice(&out[range]),
            Content::Data(range) => received.extend_from_slice(&record[range]),
            Content::Handshake => {
                while let Some(message) = opener.next_message()? {
                    if let Message::KeyUpdate { .. } = message {
                        generation = generation.wrapping_add(1);
                        opener.rekey(secrets(generation))?;
                    }
                }
            }
            Content::CloseNotify => return Ok(()),
            Content::Nothing => {}
        }
    }
}

/// The sending side of a script.
#[derive(Default)]
struct Peer {
    stream: Vec<u8>,
    sent: Vec<u8>,
    generation: u8,
    sequence: u64,
    /// Something stands in the stream that need not lead to an error: half a record, say.
    damaged: bool,
    closed: bool,
}

impl Peer {
    fn play(mut self, mut script: &[u8]) -> (Vec<u8>, Vec<u8>, bool) {
        while let Some((&[op, len], rest)) = script.split_first_chunk::<2>() {
            let (argument, rest) = rest.split_at(usize::from(len).min(rest.len()));
            script = rest;
            match op % 8 {
                0 => self.send(23, argument, argument.len() & 3),
                // A long record, around and beyond the limit.
                1 => self.send(23, &vec![len; (usize::from(len) << 6) + argument.len()], 0),
                2 => {
                    self.send(22, &[24, 0, 0, 1, len & 1], 0);
                    self.generation = self.generation.wrapping_add(1);
                    self.sequence = 0;
                }
                3 => self.send(22, argument, usize::from(len & 7)),
                4 => self.send(21, argument, 0),
                5 => self.send(len, argument, 0),
                6 => {
                    self.damaged = true;
                    self.stream.extend_from_slice(argument);
                }
                _ => self.damage(argument),
            }
        }
        (self.stream, self.sent, self.damaged)
    }

    /// A record of any type, with padding.
    fn send(&mut self, content_type: u8, content: &[u8], padding: usize) {
        let mut body = [content, &[content_type], &vec![0; padding]].concat();
        // With a type of zero the content ends in the type.
        match body
            .iter()
            .rposition(|byte| *byte != 0)
            .map(|end| body[..=end].split_last())
        {
            Some(Some((23, data))) if !self.closed => self.sent.extend_from_slice(data),
            Some(Some((21, [_, 0]))) => self.closed = true,
            // What is not data may legally stop or divert the stream.
            _ => self.damaged = true,
        }
        let ConnectionTrafficSecrets::Aes256Gcm { key, iv } = secrets(self.generation) else {
            return;
        };
        let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).expect("a key of 32 bytes");
        let mut nonce: [u8; 12] = iv.as_ref().try_into().expect("an IV of 12 bytes");
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        let [high, low] = u16::try_from(body.len() + 16)
            .unwrap_or(u16::MAX)
            .to_be_bytes();
        let header = [23, 3, 3, high, low];
        LessSafeKey::new(key)
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(header),
                &mut body,
            )
            .expect("sealed");
        self.stream.extend_from_slice(&header);
        self.stream.extend_from_slice(&body);
    }

    /// Flips bits, or cuts the end off.
    fn damage(&mut self, argument: &[u8]) {
        self.damaged = true;
        match *argument {
            [a, b, bits] if !self.stream.is_empty() => {
                let at = usize::from(u16::from_be_bytes([a, b])) % self.stream.len();
                self.stream[at] ^= bits;
            }
            [a, ..] => {
                let len = self.stream.len().saturating_sub(usize::from(a));
                self.stream.truncate(len);
            }
            [] => {}
        }
    }
}
