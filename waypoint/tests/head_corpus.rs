//! Replays the corpus of the fuzz target `head`, and mutations of it, without a fuzzer.

#[path = "../../integration/fuzz/fuzz_targets/head/check.rs"]
mod head;
#[path = "../../integration/fuzz/fuzz_targets/replay.rs"]
mod replay;

#[test]
fn heads_are_brought_into_form_as_promised() {
    replay::replay("head", head::check);
}
