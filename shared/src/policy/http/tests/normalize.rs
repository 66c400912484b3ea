//! Istio's documented examples, and what holds of every path.

use proptest::prelude::*;

use crate::policy::http::{PathNormalization, Rejected, normalize};
use PathNormalization::*;

#[test]
fn by_mode() {
    // Istio, security best practices, "Customize your system on path normalization".
    for (raw, mode, expected) in [
        ("/a/../b", Base, "/b"),
        ("/\\da", MergeSlashes, "/da"),
        ("\\da", Base, "/da"),
        ("/a//b", Base, "/a//b"),
        ("/a//b", MergeSlashes, "/a/b"),
        ("/a%2fb", MergeSlashes, "/a%2fb"),
        ("/a%2fb", DecodeAndMergeSlashes, "/a/b"),
        ("/a%5Cb", DecodeAndMergeSlashes, "/a/b"),
        ("/a%5Cb", MergeSlashes, "/a%5Cb"),
        ("/a/../b", None, "/a/../b"),
        ("\\da", None, ""),
        // RFC 3986 5.2.4, 5.4.
        ("/a/b/c/./../../g", Base, "/a/g"),
        ("/a/..", Base, "/"),
        ("/a/.", Base, "/a/"),
        ("/a/b/..", Base, "/a/"),
        ("/..", Base, "/"),
        ("/../../g", Base, "/g"),
        ("/.hidden/..x/...", Base, "/.hidden/..x/..."),
        // An empty segment is one until slashes are merged, which is after.
        ("/a//../b", Base, "/a/b"),
        ("/a//../b", MergeSlashes, "/a/b"),
        ("/a%2f..%2fb", DecodeAndMergeSlashes, "/b"),
        ("/%2f%2fa", DecodeAndMergeSlashes, "/a"),
        // 6.2.2.2
        ("/%7Eme/%2D%5f", Base, "/~me/-_"),
        ("/%252e%252e/a", Base, "/%252e%252e/a"),
        ("/%3B%20%2B", Base, "/%3B%20%2B"),
        ("/", Base, "/"),
        ("", Base, "/"),
        ("*", Base, "*"),
    ] {
        let path = normalize(raw, mode);
        match &path {
            Ok(path) => assert_eq!(path.as_str(), expected, "{raw} {mode:?}"),
            Err(_) => assert_eq!(expected, "", "{raw} {mode:?}"),
        }
    }
}

#[test]
fn refusals() {
    for (raw, reason) in [
        ("a", Rejected::NotAbsolute),
        ("http://a/b", Rejected::NotAbsolute),
        ("/a?b", Rejected::NotOnlyPath),
        ("/a#b", Rejected::NotOnlyPath),
        ("/%", Rejected::BrokenEscape),
        ("/%2", Rejected::BrokenEscape),
        ("/%zz", Rejected::BrokenEscape),
        ("/%+1", Rejected::BrokenEscape),
        ("/%00", Rejected::ControlCharacter),
        ("/%7f", Rejected::ControlCharacter),
        ("/\n", Rejected::ControlCharacter),
        ("/%c0%af", Rejected::OverlongUtf8),
        ("/%C1%9c", Rejected::OverlongUtf8),
        ("/%e0%9f%bf", Rejected::OverlongUtf8),
        ("/%f0%8f%bf%bf", Rejected::OverlongUtf8),
    ] {
        for mode in [Base, MergeSlashes, DecodeAndMergeSlashes] {
            assert_eq!(normalize(raw, mode).err(), Some(reason), "{raw:?}");
        }
    }
}

fn any_path() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => Just("/"),
        2 => Just("."),
        1 => Just(".."),
        1 => prop::sample::select(&[
            "a", "B", ";", "%2e", "%2E", "%2f", "%5c", "%5C", "\\", "%25", "%", "2e", "%61",
            "%3b", "%c3%a9", "%c0", "é", "~", "%zz", "%00", "=", "?", "#",
        ][..]),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()))
}

fn modes() -> impl Strategy<Value = PathNormalization> {
    prop::sample::select(&[None, Base, MergeSlashes, DecodeAndMergeSlashes][..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn twice_is_once(raw in any_path(), mode in modes()) {
        if let Ok(once) = normalize(&raw, mode) {
            let twice = normalize(once.as_str(), mode).expect("still a path");
            prop_assert_eq!(once.as_str(), twice.as_str());
            prop_assert_eq!(once.other_reading(), twice.other_reading());
            prop_assert!(!twice.is_changed());
        }
    }

    #[test]
    fn nothing_is_left_that_the_mode_removes(raw in any_path(), mode in modes()) {
        if mode != None && let Ok(path) = normalize(&raw, mode) {
            let text = path.as_str();
            prop_assert!(text.starts_with('/'));
            prop_assert!(!text.contains('\\'));
            prop_assert!(text.split('/').all(|segment| segment != "." && segment != ".."));
            prop_assert!(mode < MergeSlashes || !text.contains("//"));
            let lower = text.to_ascii_lowercase();
            prop_assert!(!lower.contains("%2e"));
            if mode == DecodeAndMergeSlashes {
                prop_assert!(!lower.contains("%2f") && !lower.contains("%5c"));
            }
            if let Some(other) = path.other_reading() {
                prop_assert!(other.starts_with(b"/"));
                prop_assert!(!other.windows(2).any(|two| two == b"//"));
                prop_assert!(other.split(|b| *b == b'/').all(|s| s != b"." && s != b".."));
            }
        }
    }

    #[test]
    fn never_panics(raw in any::<String>(), mode in modes()) {
        let _ = normalize(&raw, mode);
    }
}
