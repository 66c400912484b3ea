//! Replays the corpus of the fuzz target `record`, and mutations of it, without a fuzzer.

#[path = "../../integration/fuzz/fuzz_targets/record/check.rs"]
mod check;

use std::path::Path;

fn corpus() -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fuzz/corpus/record");
    let mut corpus: Vec<_> = std::fs::read_dir(directory)
        .expect("the corpus is there")
        .map(|entry| {
            let path = entry.expect("readable").path();
            let content = std::fs::read(&path).expect("readable");
            (path.display().to_string(), content)
        })
        .collect();
    corpus.sort();
    assert!(corpus.len() >= 10, "the corpus is complete");
    corpus
}

#[test]
fn the_corpus_keeps_the_parsers_promises() {
    for (name, script) in corpus() {
        println!("{name}");
        check::check(&script);
    }
}

#[test]
fn mutations_of_the_corpus_do_too() {
    let corpus = corpus();
    // Repeatable: a failure is to be found again.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut draw = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 16).unwrap_or(0) % bound.max(1)
    };
    for _ in 0..20_000 {
        let mut script = corpus[draw(corpus.len())].1.clone();
        for _ in 0..1 + draw(4) {
            let at = draw(script.len());
            match draw(5) {
                0 if !script.is_empty() => script[at] ^= 1 << draw(8),
                1 if !script.is_empty() => script[at] = u8::try_from(draw(256)).unwrap_or(0),
                2 => script.insert(at, u8::try_from(draw(256)).unwrap_or(0)),
                3 => script.truncate(at),
                _ => {
                    let other = &corpus[draw(corpus.len())].1;
                    script.extend_from_slice(&other[draw(other.len()).min(other.len())..]);
                }
            }
        }
        script.truncate(600);
        if std::panic::catch_unwind(|| check::check(&script)).is_err() {
            panic!("broken by {script:?}");
        }
    }
}
