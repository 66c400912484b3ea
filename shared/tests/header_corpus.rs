//! Replays the corpora of the fuzz targets `path` and `authority`, and mutations of them,
//! without a fuzzer.

#[path = "../../integration/fuzz/fuzz_targets/authority/check.rs"]
mod authority;
#[path = "../../integration/fuzz/fuzz_targets/path/check.rs"]
mod path;
#[path = "../../integration/fuzz/fuzz_targets/replay.rs"]
mod replay;

#[test]
fn paths_are_normalised_as_promised() {
    replay::replay("path", path::check);
}

#[test]
fn connects_are_read_as_promised() {
    replay::replay("authority", authority::check);
}
