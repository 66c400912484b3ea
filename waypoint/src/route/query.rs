//! Query parameters, read where they stand: nothing is decoded into memory of its own unless a
//! regular expression has to see an encoded value.

use std::borrow::Cow;

use xxhash_rust::xxh64::Xxh64;

use super::text::TextMatch;

/// The pairs of a query in `application/x-www-form-urlencoded`: `a=1&b`, undecoded.
pub(super) fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// The value of the first parameter of this name (Gateway API HTTPQueryParamMatch leaves open
/// which of several counts), undecoded.
pub(super) fn first<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    let mut pairs = pairs(query);
    pairs.find_map(|(raw, value)| decoded_eq(raw, name.as_bytes()).then_some(value))
}

/// Whether the decoded `raw` passes `test`.
pub(super) fn decoded_matches(raw: &str, test: &TextMatch) -> bool {
    match test {
        TextMatch::Exact(text) => decoded_eq(raw, text.as_bytes()),
        TextMatch::Prefix(text) => {
            let mut bytes = decode(raw);
            text.bytes().all(|byte| bytes.next() == Some(byte))
        }
        test => test.matches(&decoded(raw)),
    }
}

/// Feeds the decoded text into a hash.
pub(super) fn hash_decoded(raw: &str, hash: &mut Xxh64) {
    if is_plain(raw) {
        hash.update(raw.as_bytes());
    } else {
        decode(raw).for_each(|byte| hash.update(&[byte]));
    }
}

fn decoded_eq(raw: &str, text: &[u8]) -> bool {
    if is_plain(raw) {
        raw.as_bytes() == text
    } else {
        decode(raw).eq(text.iter().copied())
    }
}

fn is_plain(raw: &str) -> bool {
    !raw.bytes().any(|byte| byte == b'%' || byte == b'+')
}

fn decoded(raw: &str) -> Cow<'_, [u8]> {
    if is_plain(raw) {
        Cow::Borrowed(raw.as_bytes())
    } else {
        Cow::Owned(decode(raw).collect())
    }
}

/// `+` is a space, `%41` a byte; a `%` that begins no code stands for itself, as browsers do.
fn decode(raw: &str) -> impl Iterator<Item = u8> {
    let mut rest = raw.as_bytes();
    std::iter::from_fn(move || {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        match byte {
            b'+' => Some(b' '),
            b'%' => match after {
                [high, low, after @ ..] => match (hex(*high), hex(*low)) {
                    (Some(high), Some(low)) => {
                        rest = after;
                        Some(high << 4 | low)
                    }
                    _ => Some(b'%'),
                },
                _ => Some(b'%'),
            },
            byte => Some(byte),
        }
    })
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding() {
        for (raw, text) in [
            ("plain", "plain"),
            ("a+b", "a b"),
            ("a%20b", "a b"),
            ("%C3%a4", "ä"),
            ("100%", "100%"),
            ("%zz%4", "%zz%4"),
            ("%25%2B", "%+"),
            ("", ""),
        ] {
            assert_eq!(&*decoded(raw), text.as_bytes(), "{raw}");
            assert!(decoded_eq(raw, text.as_bytes()), "{raw}");
            let mut hash = Xxh64::new(0);
            hash_decoded(raw, &mut hash);
            assert_eq!(
                hash.digest(),
                xxhash_rust::xxh64::xxh64(text.as_bytes(), 0),
                "{raw}"
            );
        }
    }

    #[test]
    fn the_first_of_several_counts() {
        assert_eq!(first("a=1&b=2&a=3", "a"), Some("1"));
        assert_eq!(first("&&x&a%62=1", "ab"), Some("1"));
        assert_eq!(first("x", "x"), Some(""));
        assert_eq!(first("a=b=c", "a"), Some("b=c"));
        assert_eq!(first("A=1", "a"), None);
        assert_eq!(first("", "a"), None);
    }
}
