//! Serial numbers of certificates: decimal in a dump, hexadecimal for people (as openssl
//! and every log has them).

/// Longest serial number in decimal: 20 bytes (RFC 5280 4.1.2.2) and some more.
const MAX_DIGITS: usize = 80;

/// A decimal number in hexadecimal. What is no decimal number stays as it is.
pub fn hex(decimal: &str) -> String {
    let digits = decimal.bytes().all(|b| b.is_ascii_digit());
    if decimal.is_empty() || !digits || decimal.len() > MAX_DIGITS {
        return decimal.to_owned();
    }
    // Least significant byte first.
    let mut bytes: Vec<u8> = Vec::new();
    for digit in decimal.bytes() {
        let mut carry = u16::from(digit - b'0');
        for byte in &mut bytes {
            let value = u16::from(*byte) * 10 + carry;
            *byte = (value & 0xff) as u8;
            carry = value >> 8;
        }
        if carry > 0 {
            bytes.push(carry as u8);
        }
    }
    let text: String = bytes.iter().rev().map(|b| format!("{b:02x}")).collect();
    match text.trim_start_matches('0') {
        "" => "0".to_owned(),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_becomes_hexadecimal() {
        for (decimal, expected) in [
            ("0", "0"),
            ("000", "0"),
            ("15", "f"),
            ("256", "100"),
            ("65535", "ffff"),
            (
                "340282366920938463463374607431768211456",
                "100000000000000000000000000000000",
            ),
            (
                "271676055104741785552467469040731750696653685944",
                "2f96602a12c1e5a2b06ad9dd3251a705e7f004b8",
            ),
            ("7e0f", "7e0f"),
            ("", ""),
        ] {
            assert_eq!(hex(decimal), expected, "{decimal}");
        }
    }
}
