//! TLS 1.3 streams with a record layer of our own.
//!
//! rustls does the handshake and keeps the key schedule; records are sealed and opened here,
//! because the buffered layers of rustls never read more than 18 KiB nor write more than
//! 64 KiB at a time, and copy every byte twice more on the way.
//!
//! What trips it: anything in RFC 8446 section 5 and 6 that a peer does wrong. The stream then
//! fails for good: the peer is told by the alert that the RFC names, every later read and write
//! returns the same error, and whoever owns the stream drops it. There is no recovery within a
//! stream.
//!
//! * `open` and `seal` are pure: bytes in, bytes out; `key` makes every nonce.
//! * `handshake` drives rustls over a socket until both keys are there; `schedule` is what it
//!   leaves with us of the key schedule.
//! * `stream` joins them to a socket; its two directions are `read` and `write`, which borrow
//!   from the recycled buffers of [`buffer`](super::buffer).

#![forbid(unsafe_code)]

mod error;
mod handshake;
mod key;
mod open;
mod read;
mod schedule;
mod seal;
mod stream;
mod write;

#[cfg(test)]
mod tests;

pub use error::{RecordError, TlsError};
pub use key::AES_GCM_RECORD_LIMIT;
pub use open::{Content, MAX_IDLE_RECORDS, Message, Opener, inner_len, record_len};
pub use seal::Sealer;
pub use stream::TlsStream;

/// `TLSCiphertext` up to its payload: type, version, length (RFC 8446 5.2).
const HEADER_LEN: usize = 5;
/// Bytes of authentication tag, for all suites of TLS 1.3.
const TAG_LEN: usize = 16;
/// Content of a record (RFC 8446 5.1).
const MAX_PLAINTEXT: usize = 1 << 14;
/// Payload of a protected record (RFC 8446 5.2).
const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;

/// `ContentType` (RFC 8446 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
