//! Replays the corpora of the fuzz targets `head`, `route` and `token`, and mutations of them,
//! without a fuzzer.

#[path = "../../integration/fuzz/fuzz_targets/head/check.rs"]
mod head;
#[path = "../../integration/fuzz/fuzz_targets/replay.rs"]
mod replay;
#[path = "../../integration/fuzz/fuzz_targets/route/check.rs"]
mod route;
#[path = "../../integration/fuzz/fuzz_targets/token/check.rs"]
mod token;

#[test]
fn heads_are_brought_into_form_as_promised() {
    replay::replay("head", head::check);
}

#[test]
fn routes_are_compiled_as_promised() {
    replay::replay("route", route::check);
}

#[test]
fn tokens_are_believed_as_promised() {
    let issued = include_bytes!("../../integration/fuzz/corpus/token/00");
    assert!(token::is_believed(issued), "the issuer's own is believed");
    replay::replay("token", token::check);
}
