//! The receiving half of the record layer, as a pure parser: bytes in, content out.
//!
//! It knows nothing of sockets and key schedules, so that a fuzzer can drive all of it. The
//! caller cuts the byte stream with [`record_len`], hands over one whole record at a time, and
//! after a KeyUpdate brings the next key before the next record.

use std::ops::Range;

use aws_lc_rs::aead::Aad;
use rustls::{AlertDescription, ConnectionTrafficSecrets};

use super::error::RecordError;
use super::key::TrafficKey;
use super::{
    ALERT, APPLICATION_DATA, CHANGE_CIPHER_SPEC, HANDSHAKE, HEADER_LEN, MAX_CIPHERTEXT,
    MAX_PLAINTEXT, TAG_LEN,
};

/// Records in a row that carry no application data: more are taken for an attempt to keep us
/// busy for nothing. OpenSSL and rustls draw the line at the same number.
pub const MAX_IDLE_RECORDS: u8 = 32;

/// The largest post-handshake message that is put together from fragments. A session ticket is
/// bounded by 64 KiB (RFC 8446 4.6.1); rustls accepts as much.
const MAX_MESSAGE: usize = 0xffff;
const MESSAGE_HEADER_LEN: usize = 4;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Length of the record at the front of `bytes`, header included; `None` if the header is not
/// all there. The record itself may not be all there either.
///
/// Fails on what cannot be a protected record, as early as the bytes show it.
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    match bytes.first() {
        None => return Ok(None),
        Some(&APPLICATION_DATA) => {}
        // RFC 8446 5: once the handshake is over, also a change_cipher_spec is a mistake.
        Some(&CHANGE_CIPHER_SPEC) => {
            return Err(RecordError::UnexpectedMessage(
                "change_cipher_spec after the handshake",
            ));
        }
        Some(_) => return Err(RecordError::UnexpectedMessage("record without protection")),
    }
    let Some(&[_, _, _, high, low]) = bytes.first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > MAX_CIPHERTEXT {
        return Err(RecordError::RecordOverflow);
    }
    if len < TAG_LEN {
        return Err(RecordError::BadRecordMac);
    }
    Ok(Some(HEADER_LEN + len))
}

/// What a record held.
#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// Application data, at this place: of the record for [`Opener::open`], of the output for
    /// [`Opener::open_into`].
    Data(Range<usize>),
    /// Handshake bytes; they are kept inside, ask [`Opener::next_message`].
    Handshake,
    /// The peer will send nothing more.
    CloseNotify,
    /// A record that says nothing: no data, or an alert that is to be ignored.
    Nothing,
}

/// A post-handshake message (RFC 8446 4.6).
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// The peer's next record is protected with its next key.
    KeyUpdate {
        /// It wants us to update ours, too.
        requested: bool,
    },
    /// A session ticket, without its message header.
    NewSessionTicket(Vec<u8>),
}

/// Opens records.
pub struct Opener {
    key: TrafficKey,
    /// Handshake bytes that are not a complete message yet. Empty almost always.
    fragment: Vec<u8>,
    idle_records: u8,
}

impl Opener {
    /// An opener that expects the record with number `sequence` next.
    pub fn new(secrets: ConnectionTrafficSecrets, sequence: u64) -> Result<Self, RecordError> {
        TrafficKey::new(secrets, sequence).map(Self::with_key)
    }

    pub(super) fn with_key(key: TrafficKey) -> Self {
        Self {
            key,
            fragment: Vec::new(),
            idle_records: 0,
        }
    }

    /// Changes to the peer's next key, after a [`Message::KeyUpdate`].
    pub fn rekey(&mut self, secrets: ConnectionTrafficSecrets) -> Result<(), RecordError> {
        self.key = TrafficKey::new(secrets, 0)?;
        Ok(())
    }

    /// Opens one whole record (as measured by [`record_len`]) in place.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Content, RecordError> {
        let (header, body) = record
            .split_first_chunk_mut::<HEADER_LEN>()
            .ok_or(RecordError::Decode("short record"))?;
        check_len(body.len())?;
        let nonce = self.key.next_nonce()?;
        // The header as it came is the additional data (RFC 8446 5.2): a peer whose version
        // bytes differ from what it authenticated fails here.
        let inner = self
            .key
            .aead()
            .open_in_place(nonce, Aad::from(*header), body)
            .map_err(|_| RecordError::BadRecordMac)?;
        let content = self.interpret(inner)?;
        Ok(match content {
            Content::Data(range) => Content::Data(range.start + HEADER_LEN..range.end + HEADER_LEN),
            other => other,
        })
    }

    /// Opens one whole record into `out`, which spares a copy if `out` is where the data is to
    /// go. `out` must be at least [`inner_len`] bytes long; its content is not to be used
    /// unless `Content::Data` is returned.
    pub fn open_into(&mut self, record: &[u8], out: &mut [u8]) -> Result<Content, RecordError> {
        let (header, body) = record
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(RecordError::Decode("short record"))?;
        check_len(body.len())?;
        let (ciphertext, tag) = body.split_at(body.len() - TAG_LEN);
        let out = out
            .get_mut(..ciphertext.len())
            .ok_or(RecordError::Internal("output too small for the record"))?;
        let nonce = self.key.next_nonce()?;
        self.key
            .aead()
            .open_separate_gather(nonce, Aad::from(*header), ciphertext, tag, out)
            .map_err(|_| RecordError::BadRecordMac)?;
        self.interpret(out)
    }

    /// The next complete post-handshake message, if there is one.
    pub fn next_message(&mut self) -> Result<Option<Message>, RecordError> {
        let Some(&[kind, a, b, c]) = self.fragment.first_chunk::<MESSAGE_HEADER_LEN>() else {
            return match self.fragment.first() {
                Some(&kind) if !is_known(kind) => Err(UNEXPECTED_HANDSHAKE),
                _ => Ok(None),
            };
        };
        if !is_known(kind) {
            return Err(UNEXPECTED_HANDSHAKE);
        }
        let len = usize::try_from(u32::from_be_bytes([0, a, b, c]))
            .map_err(|_| RecordError::Decode("handshake message too large"))?;
        if len > MAX_MESSAGE || (kind == KEY_UPDATE && len != 1) {
            return Err(RecordError::Decode("length of a handshake message"));
        }
        let end = MESSAGE_HEADER_LEN + len;
        let Some(body) = self.fragment.get(MESSAGE_HEADER_LEN..end) else {
            return Ok(None);
        };
        let message = if kind == KEY_UPDATE {
            let requested = match body {
                [0] => false,
                [1] => true,
                _ => return Err(RecordError::IllegalParameter("KeyUpdate.request_update")),
            };
            // RFC 8446 5.1: a message before a key change ends at a record boundary.
            if self.fragment.len() != end {
                return Err(RecordError::UnexpectedMessage(
                    "data after KeyUpdate in its record",
                ));
            }
            Message::KeyUpdate { requested }
        } else {
            Message::NewSessionTicket(body.to_vec())
        };
        if self.fragment.len() == end {
            // Gives the memory back as well.
            self.fragment = Vec::new();
        } else {
            self.fragment.drain(..end);
        }
        self.count_idle()?;
        Ok(Some(message))
    }

    /// Takes a TLSInnerPlaintext apart (RFC 8446 5.2, 5.4): content, type, zeros.
    fn interpret(&mut self, inner: &[u8]) -> Result<Content, RecordError> {
        if inner.len() > MAX_PLAINTEXT + 1 {
            return Err(RecordError::RecordOverflow);
        }
        let Some(end) = inner.iter().rposition(|byte| *byte != 0) else {
            return Err(RecordError::UnexpectedMessage(
                "record without a content type",
            ));
        };
        let content = &inner[..end];
        if inner[end] != HANDSHAKE && !self.fragment.is_empty() {
            return Err(RecordError::UnexpectedMessage(
                "record amid a handshake message",
            ));
        }
        match (inner[end], content) {
            (APPLICATION_DATA, []) => {
                self.count_idle()?;
                Ok(Content::Nothing)
            }
            (APPLICATION_DATA, _) => {
                self.idle_records = 0;
                Ok(Content::Data(0..end))
            }
            (ALERT | HANDSHAKE, []) => Err(RecordError::UnexpectedMessage(
                "empty alert or handshake record",
            )),
            (HANDSHAKE, content) => {
                self.fragment.extend_from_slice(content);
                Ok(Content::Handshake)
            }
            (ALERT, &[_, description]) => self.alert(AlertDescription::from(description)),
            (ALERT, _) => Err(RecordError::Decode("length of an alert")),
            _ => Err(RecordError::UnexpectedMessage("content type")),
        }
    }

    /// RFC 8446 6: the level is ignored; what does not close is an error.
    fn alert(&mut self, description: AlertDescription) -> Result<Content, RecordError> {
        match description {
            AlertDescription::CloseNotify => Ok(Content::CloseNotify),
            AlertDescription::UserCanceled => {
                self.count_idle()?;
                Ok(Content::Nothing)
            }
            other => Err(RecordError::AlertReceived(other)),
        }
    }

    fn count_idle(&mut self) -> Result<(), RecordError> {
        if self.idle_records >= MAX_IDLE_RECORDS {
            return Err(RecordError::UnexpectedMessage(
                "too many records without data",
            ));
        }
        self.idle_records += 1;
        Ok(())
    }
}

/// Bytes that [`Opener::open_into`] needs for a record of `record_len` bytes.
pub fn inner_len(record_len: usize) -> usize {
    record_len.saturating_sub(HEADER_LEN + TAG_LEN)
}

const UNEXPECTED_HANDSHAKE: RecordError =
    RecordError::UnexpectedMessage("handshake message after the handshake");

fn is_known(kind: u8) -> bool {
    matches!(kind, NEW_SESSION_TICKET | KEY_UPDATE)
}

fn check_len(len: usize) -> Result<(), RecordError> {
    match len {
        0..TAG_LEN => Err(RecordError::BadRecordMac),
        TAG_LEN..=MAX_CIPHERTEXT => Ok(()),
        _ => Err(RecordError::RecordOverflow),
    }
}
