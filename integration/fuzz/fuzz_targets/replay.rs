//! Replays a corpus, and mutations of it, without a fuzzer: what plain `cargo test` does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Mutations for each input of a corpus.
const MUTATIONS: usize = 2000;
/// Bytes that mean something to a parser.
const SPECIAL: &[u8] = b"/\\.%;?#:,=\r\n\t \0@[]*";
/// Longest input.
const MAX_LEN: usize = 600;

/// Gives everything in `corpus/<target>` and mutations of it to `check`.
pub fn replay(target: &str, check: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../integration/fuzz/corpus")
        .join(target);
    let mut corpus: Vec<_> = std::fs::read_dir(directory)
        .expect("the corpus is there")
        .map(|entry| {
            let path = entry.expect("readable").path();
            (
                path.display().to_string(),
                std::fs::read(&path).expect("readable"),
            )
        })
        .collect();
    corpus.sort();
    assert!(corpus.len() >= 10, "the corpus is complete");
    for (name, input) in &corpus {
        println!("{name}");
        check(input);
    }
    // Repeatable: a failure is to be found again.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 16).unwrap_or(0) % bound.max(1)
    };
    for _ in 0..corpus.len() * MUTATIONS {
        let mut input = corpus[draw(corpus.len())].1.clone();
        for _ in 0..1 + draw(4) {
            let at = draw(input.len());
            match draw(6) {
                0 if !input.is_empty() => input[at] ^= 1 << draw(8),
                1 if !input.is_empty() => input[at] = SPECIAL[draw(SPECIAL.len())],
                2 => input.insert(at, SPECIAL[draw(SPECIAL.len())]),
                3 => input.truncate(at),
                4 if !input.is_empty() => {
                    let piece = input[at..(at + draw(20)).min(input.len())].to_vec();
                    input.splice(at..at, piece);
                }
                _ => {
                    let other = &corpus[draw(corpus.len())].1;
                    input.extend_from_slice(&other[draw(other.len())..]);
                }
            }
        }
        input.truncate(MAX_LEN);
        if catch_unwind(AssertUnwindSafe(|| check(&input))).is_err() {
            panic!("broken by {:?}", String::from_utf8_lossy(&input));
        }
    }
}
