//! The sending half of the record layer: the caller's slices in, sealed records out.

use std::io::IoSlice;

use aws_lc_rs::aead::Aad;
use rustls::{AlertDescription, ConnectionTrafficSecrets};

use super::error::RecordError;
use super::key::TrafficKey;
use super::{ALERT, APPLICATION_DATA, HANDSHAKE, HEADER_LEN, MAX_PLAINTEXT, TAG_LEN};

/// Bytes that a record adds to its content.
pub(super) const OVERHEAD: usize = HEADER_LEN + 1 + TAG_LEN;

/// Seals records.
pub struct Sealer {
    key: TrafficKey,
}

impl Sealer {
    /// A sealer whose next record has number `sequence`.
    pub fn new(secrets: ConnectionTrafficSecrets, sequence: u64) -> Result<Self, RecordError> {
        TrafficKey::new(secrets, sequence).map(Self::with_key)
    }

    pub(super) fn with_key(key: TrafficKey) -> Self {
        Self { key }
    }

    #[cfg(test)]
    pub(super) fn key(&mut self) -> &mut TrafficKey {
        &mut self.key
    }

    /// Changes to our next key, after a KeyUpdate was sealed.
    pub fn rekey(&mut self, secrets: ConnectionTrafficSecrets) -> Result<(), RecordError> {
        let mut key = TrafficKey::new(secrets, 0)?;
        key.lower_limit(self.key.limit());
        self.key = key;
        Ok(())
    }

    /// Records that may still be sealed with this key.
    pub fn remaining(&self) -> u64 {
        self.key.remaining()
    }

    /// Lowers (never raises) the number of records after which this key is worn out.
    pub fn lower_limit(&mut self, records: u64) {
        self.key.lower_limit(records);
    }

    /// Seals at most `limit` bytes of `slices`, as far as `out` has room, as records that are as
    /// full as possible. Returns (bytes taken, bytes written). Stops early when only one record
    /// is left to the key: that one is for the KeyUpdate.
    pub fn seal_data(
        &mut self,
        slices: &[IoSlice<'_>],
        limit: usize,
        out: &mut [u8],
    ) -> Result<(usize, usize), RecordError> {
        let mut source = Gather::new(slices);
        let (mut taken, mut written) = (0, 0);
        while source.remaining > 0 && self.remaining() > 1 {
            let room = (out.len() - written).saturating_sub(OVERHEAD);
            let len = source
                .remaining
                .min(limit - taken)
                .min(MAX_PLAINTEXT)
                .min(room);
            if len == 0 {
                break;
            }
            let slot = &mut out[written..written + len + OVERHEAD];
            match source.contiguous(len) {
                // Sealing from the caller's memory into the slot spares the copy.
                Some(plaintext) => self.seal(APPLICATION_DATA, plaintext, slot)?,
                None => {
                    source.copy_to(&mut slot[HEADER_LEN..HEADER_LEN + len]);
                    self.seal_in_place(APPLICATION_DATA, slot)?;
                }
            }
            taken += len;
            written += len + OVERHEAD;
        }
        Ok((taken, written))
    }

    /// Seals an alert; returns the bytes written to `out`.
    pub fn seal_alert(
        &mut self,
        alert: AlertDescription,
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        // RFC 8446 6: close_notify is a warning (1), everything else that we send is fatal (2).
        let level = if alert == AlertDescription::CloseNotify {
            1
        } else {
            2
        };
        self.seal_small(ALERT, &[level, u8::from(alert)], out)
    }

    /// Seals a KeyUpdate that does not ask for one in return; returns the bytes written to
    /// `out`. It is the last record of this key: [`Self::rekey`] must follow.
    pub fn seal_key_update(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        self.seal_small(HANDSHAKE, &[24, 0, 0, 1, 0], out)
    }

    fn seal_small(
        &mut self,
        content_type: u8,
        content: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let len = content.len() + OVERHEAD;
        let slot = out
            .get_mut(..len)
            .ok_or(RecordError::Internal("no room for a record"))?;
        self.seal(content_type, content, slot)?;
        Ok(len)
    }

    /// Seals `content` into `slot`, which is exactly [`OVERHEAD`] longer.
    fn seal(
        &mut self,
        content_type: u8,
        content: &[u8],
        slot: &mut [u8],
    ) -> Result<(), RecordError> {
        let nonce = self.key.next_nonce()?;
        let (header, body) = split_slot(slot)?;
        let (ciphertext, rest) = body.split_at_mut(content.len());
        self.key
            .aead()
            .seal_out_of_place_scatter(
                nonce,
                Aad::from(header),
                content,
                ciphertext,
                &[content_type],
                rest,
            )
            .map_err(|_| SEAL_FAILED)
    }

    /// Seals the content that already lies in `slot` behind the room for the header.
    fn seal_in_place(&mut self, content_type: u8, slot: &mut [u8]) -> Result<(), RecordError> {
        let nonce = self.key.next_nonce()?;
        let (header, body) = split_slot(slot)?;
        let (content, rest) = body.split_at_mut(body.len() - 1 - TAG_LEN);
        self.key
            .aead()
            .seal_in_place_scatter(nonce, Aad::from(header), content, &[content_type], rest)
            .map_err(|_| SEAL_FAILED)
    }
}

const SEAL_FAILED: RecordError = RecordError::Internal("sealing failed");

/// Writes the header of a record that fills `slot`; returns it and what is behind it.
fn split_slot(slot: &mut [u8]) -> Result<([u8; HEADER_LEN], &mut [u8]), RecordError> {
    let (header, body) = slot
        .split_first_chunk_mut::<HEADER_LEN>()
        .ok_or(RecordError::Internal("no room for a record"))?;
    let [high, low] = u16::try_from(body.len())
        .map_err(|_| RecordError::Internal("record too long"))?
        .to_be_bytes();
    *header = [APPLICATION_DATA, 3, 3, high, low];
    Ok((*header, body))
}

/// A cursor over the caller's slices.
struct Gather<'a, 'b> {
    slices: &'a [IoSlice<'b>],
    offset: usize,
    remaining: usize,
}

impl<'a, 'b> Gather<'a, 'b> {
    fn new(slices: &'a [IoSlice<'b>]) -> Self {
        Self {
            slices,
            offset: 0,
            remaining: slices
                .iter()
                .map(|slice| slice.len())
                .fold(0, usize::saturating_add),
        }
    }

    /// The next `len` bytes, if they lie in one slice; otherwise nothing is taken.
    fn contiguous(&mut self, len: usize) -> Option<&'a [u8]> {
        while self.offset == self.slices.first()?.len() {
            self.slices = &self.slices[1..];
            self.offset = 0;
        }
        let found = self.slices.first()?.get(self.offset..self.offset + len)?;
        self.offset += len;
        self.remaining -= len;
        Some(found)
    }

    /// Copies the next `out.len()` bytes, which must be there.
    fn copy_to(&mut self, mut out: &mut [u8]) {
        self.remaining -= out.len();
        while let (false, Some(slice)) = (out.is_empty(), self.slices.first()) {
            let rest = &slice[self.offset..];
            let len = rest.len().min(out.len());
            let (now, later) = out.split_at_mut(len);
            now.copy_from_slice(&rest[..len]);
            out = later;
            self.offset += len;
            if self.offset == slice.len() {
                self.slices = &self.slices[1..];
                self.offset = 0;
            }
        }
    }
}
