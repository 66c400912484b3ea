//! Certificates in the dumps of admin endpoints, with the keys that `istioctl` reads.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};

use super::{CertificateFacts, CertificateState, CertificateStatus};

/// All certificates, each with its identity.
pub fn dump_certificates(all: &[CertificateStatus]) -> Value {
    all.iter()
        .map(|status| {
            let state = match &status.state {
                CertificateState::Available => json!("Available"),
                CertificateState::Initializing => json!("Initializing"),
                CertificateState::Unavailable(error) => json!({ "Unavailable": error.to_string() }),
            };
            let (chain, roots) = status
                .certificate
                .as_ref()
                .map_or_else(Default::default, |c| {
                    (
                        c.chain().iter().map(certificate).collect::<Vec<_>>(),
                        c.roots().iter().map(certificate).collect::<Vec<_>>(),
                    )
                });
            json!({
                "identity": status.identity.to_string(),
                "state": state,
                "certChain": chain,
                "rootCerts": roots,
            })
        })
        .collect()
}

fn certificate(der: &CertificateDer<'static>) -> Value {
    // One of ours was readable when it was accepted.
    let facts = CertificateFacts::read(der).ok();
    json!({
        "pem": facts.as_ref().map(|f| STANDARD.encode(&f.pem)),
        "serialNumber": facts.as_ref().map(|f| decimal(&f.serial)),
        "validFrom": facts.as_ref().map(|f| rfc3339(f.not_before)),
        "expirationTime": facts.as_ref().map(|f| rfc3339(f.not_after)),
    })
}

/// Serial numbers are decimal in the dump: `istioctl` reads them as such.
fn decimal(hex: &str) -> String {
    // Least significant digit first.
    let mut digits = vec![0u32];
    for nibble in hex.chars().filter_map(|c| c.to_digit(16)) {
        let mut carry = nibble;
        for digit in &mut digits {
            let value = *digit * 16 + carry;
            *digit = value % 10;
            carry = value / 10;
        }
        while carry > 0 {
            digits.push(carry % 10);
            carry /= 10;
        }
    }
    let ordered = digits.iter().rev();
    ordered.filter_map(|&d| char::from_digit(d, 10)).collect()
}

fn rfc3339(time: SystemTime) -> String {
    // Certificates do not reach back before 1970.
    let time = time.max(UNIX_EPOCH);
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::decimal;

    #[test]
    fn serial_numbers_are_decimal() {
        for (hex, expected) in [
            ("", "0"),
            ("00", "0"),
            ("0a", "10"),
            ("00ff", "255"),
            (
                "2f96602a12c1e5a2b06ad9dd3251a705e7f004b8",
                "271676055104741785552467469040731750696653685944",
            ),
        ] {
            assert_eq!(decimal(hex), expected, "{hex}");
        }
    }
}
