//! What normalising a path promises for any path that can come in a request. The fuzz target
//! and the replay of its corpus in plain tests both call [`check`].
//!
//! The first byte of the input chooses the mode, the rest is the path.

use adit_shared::policy::http::{PathNormalization, normalize};
use http::uri::PathAndQuery;

/// Normalises one path. Panics if a promise is broken.
pub fn check(input: &[u8]) {
    let Some((mode, raw)) = input.split_first() else {
        return;
    };
    let mode = match mode % 4 {
        0 => PathNormalization::None,
        1 => PathNormalization::Base,
        2 => PathNormalization::MergeSlashes,
        _ => PathNormalization::DecodeAndMergeSlashes,
    };
    // As it comes: after the parser of requests.
    let Ok(target) = PathAndQuery::try_from(raw) else {
        return;
    };
    let raw = target.path();
    let Ok(normal) = normalize(raw, mode) else {
        return;
    };
    let path = normal.as_str();
    assert!(path == "*" || path.starts_with(['/', '\\']), "a path");
    // What was judged can be sent, and is read again as what it was.
    let sent = PathAndQuery::try_from(path).expect("it can be sent");
    assert_eq!(sent.path(), path, "it is sent as it is");
    assert_eq!(sent.query(), None, "it makes no query");
    let again = normalize(path, mode).expect("what is normal is accepted");
    assert_eq!(again.as_str(), path, "what is normal stays as it is");
    assert_eq!(
        again.other_reading(),
        normal.other_reading(),
        "and means the same"
    );
    if mode == PathNormalization::None {
        assert_eq!(path, raw, "nothing is changed");
        return;
    }
    assert!(path.starts_with('/') || path == "*", "absolute");
    assert!(!path.contains('\\'), "one kind of slash");
    let dots = |segment: &str| matches!(segment, "." | "..");
    assert!(!path.split('/').any(dots), "no dot segments");
    assert!(
        !path.bytes().any(|b| b.is_ascii_control()),
        "no control characters"
    );
    let lower = path.to_ascii_lowercase();
    for unreserved in ["%2e", "%41", "%61", "%30", "%7e", "%5f", "%2d"] {
        assert!(!lower.contains(unreserved), "{unreserved} is plain");
    }
    if mode >= PathNormalization::MergeSlashes {
        assert!(!path.contains("//"), "slashes are merged");
    }
    if mode == PathNormalization::DecodeAndMergeSlashes {
        assert!(
            !lower.contains("%2f") && !lower.contains("%5c"),
            "slashes are plain"
        );
    }
    if let Some(other) = normal.other_reading() {
        assert_ne!(other, path.as_bytes(), "another reading is another one");
        let up = other
            .split(|b| *b == b'/')
            .any(|s| matches!(s, b"." | b".."));
        assert!(!up, "nor does it lead up");
    }
}
