//! The head of an HTTP/1 message, read as fast as a load generator must.

/// A whole head at the beginning of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// With the empty line.
    pub(super) length: usize,
}

impl Head {
    /// Looks for the empty line.
    pub(super) fn find(buffer: &[u8]) -> Option<Self> {
        let end = buffer.windows(4).position(|four| four == b"\r\n\r\n")?;
        Some(Self { length: end + 4 })
    }

    /// A header; `name` in lower case.
    pub(super) fn value<'a>(&self, buffer: &'a [u8], name: &str) -> Option<&'a [u8]> {
        let lines = buffer[..self.length].split(|b| *b == b'\n').skip(1);
        lines
            .filter(|line| line.len() > name.len() && line[name.len()] == b':')
            .find(|line| line[..name.len()].eq_ignore_ascii_case(name.as_bytes()))
            .map(|line| line[name.len() + 1..].trim_ascii())
    }

    /// Bytes that follow; `None`: it does not say.
    pub(super) fn content_length(&self, buffer: &[u8]) -> Option<usize> {
        let value = self.value(buffer, "content-length")?;
        std::str::from_utf8(value).ok()?.parse().ok()
    }

    /// The status of a response.
    pub(super) fn status(buffer: &[u8]) -> Option<u16> {
        std::str::from_utf8(buffer.get(9..12)?).ok()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read() {
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nx-seen:  r7 \r\n\r\nbody";
        let head = Head::find(text).expect("whole");
        assert_eq!(&text[head.length..], b"body");
        assert_eq!(head.content_length(text), Some(12));
        assert_eq!(head.value(text, "x-seen"), Some(&b"r7"[..]));
        assert_eq!(head.value(text, "x-see"), None);
        assert_eq!(Head::status(text), Some(200));
        assert_eq!(Head::find(&text[..40]), None);
    }
}
