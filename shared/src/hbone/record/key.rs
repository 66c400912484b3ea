//! One direction's traffic key: the AEAD, its IV and the sequence number that makes every
//! nonce unique (RFC 8446 5.3).

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroize;

use super::error::RecordError;

/// Bytes of nonce and IV, for all suites of TLS 1.3.
const NONCE_LEN: usize = 12;

/// Records that one AES-GCM key may seal: 2^24.5 (RFC 8446 5.5).
pub const AES_GCM_RECORD_LIMIT: u64 = 23_726_566;

/// A traffic key with its sequence number.
///
/// The "TLS record" keys of aws-lc-rs would check once more that nonces ascend, but they take
/// the first nonce they see for sequence number 0, and rustls hands over a connection that has
/// sealed session tickets already. Hence the plain key; [`Self::next_nonce`] is the only place
/// that makes nonces.
pub(super) struct TrafficKey {
    aead: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    limit: u64,
}

impl TrafficKey {
    /// Takes over `secrets` at `sequence`, the number of records that rustls has protected.
    pub(super) fn new(
        secrets: ConnectionTrafficSecrets,
        sequence: u64,
    ) -> Result<Self, RecordError> {
        let (algorithm, limit, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                (&AES_128_GCM, AES_GCM_RECORD_LIMIT, key, iv)
            }
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
                (&AES_256_GCM, AES_GCM_RECORD_LIMIT, key, iv)
            }
            // RFC 8446 5.5: the sequence number wraps before this key is worn out.
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&CHACHA20_POLY1305, u64::MAX, key, iv)
            }
            _ => return Err(RecordError::Internal("unknown cipher suite")),
        };
        Self::from_parts(algorithm, key.as_ref(), iv.as_ref(), sequence, limit)
    }

    pub(super) fn from_parts(
        algorithm: &'static Algorithm,
        key: &[u8],
        iv: &[u8],
        sequence: u64,
        limit: u64,
    ) -> Result<Self, RecordError> {
        let unbound = UnboundKey::new(algorithm, key)
            .map_err(|_| RecordError::Internal("traffic key of the wrong length"))?;
        let iv = iv
            .try_into()
            .map_err(|_| RecordError::Internal("IV of the wrong length"))?;
        Ok(Self {
            aead: LessSafeKey::new(unbound),
            iv,
            sequence,
            limit,
        })
    }

    pub(super) fn aead(&self) -> &LessSafeKey {
        &self.aead
    }

    /// The nonce of the next record. Every call uses up one sequence number, whatever becomes
    /// of the record; the number never wraps (RFC 8446 5.3).
    pub(super) fn next_nonce(&mut self) -> Result<Nonce, RecordError> {
        let sequence = self.sequence;
        self.sequence = sequence
            .checked_add(1)
            .ok_or(RecordError::Internal("sequence numbers are used up"))?;
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..]
            .iter_mut()
            .zip(sequence.to_be_bytes())
        {
            *byte ^= number;
        }
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Records that may still be protected with this key.
    pub(super) fn remaining(&self) -> u64 {
        self.limit.min(u64::MAX - 1).saturating_sub(self.sequence)
    }

    /// Records that this key protects at most.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Lowers (never raises) the number of records after which this key is worn out.
    pub(super) fn lower_limit(&mut self, records: u64) {
        self.limit = self.limit.min(records);
    }
}

impl Drop for TrafficKey {
    fn drop(&mut self) {
        // AWS-LC cleanses the key itself when it frees the context.
        self.iv.zeroize();
    }
}
