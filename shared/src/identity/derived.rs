//! Secrets that are made from another one and so need not be kept: whoever has the first can
//! make them again, and nobody finds the first from them.

use std::fmt;

use aws_lc_rs::hmac;

/// 32 secret bytes. It is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct DerivedSecret([u8; 32]);

impl DerivedSecret {
    /// The secret for `purpose` from `secret` (HMAC-SHA-256). Different purposes give secrets
    /// of which none says anything of another.
    pub fn of(secret: &[u8], purpose: &str) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let tag = hmac::sign(&key, purpose.as_bytes());
        let mut bytes = [0; 32];
        // SHA-256 has as many.
        bytes.copy_from_slice(&tag.as_ref()[..32]);
        Self(bytes)
    }

    /// A further one for a narrower purpose.
    #[must_use]
    pub fn derive(&self, purpose: &str) -> Self {
        Self::of(&self.0, purpose)
    }

    /// The secret itself.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for DerivedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DerivedSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_depends_on_its_purpose_alone_and_is_not_shown() {
        let a = DerivedSecret::of(b"secret", "a");
        assert_eq!(a, DerivedSecret::of(b"secret", "a"));
        assert_ne!(a, DerivedSecret::of(b"secret", "b"));
        assert_ne!(a, DerivedSecret::of(b"other", "a"));
        assert_ne!(a.derive("x"), a.derive("y"));
        assert_eq!(format!("{a:?}"), "DerivedSecret(..)");
    }
}
