//! `adit manifest generate` with an IstioOperator file.

use std::fmt::Write as _;
use std::process::Command;

const TESTDATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata");

fn generate(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(["manifest", "generate"])
        .args(args)
        .output()
        .expect("adit runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).expect("text")
}

/// Lines that are only in one of two texts, in order (the longest common subsequence stays).
fn difference(before: &[&str], after: &[&str]) -> String {
    let mut common = vec![vec![0usize; after.len() + 1]; before.len() + 1];
    for (i, line) in before.iter().enumerate().rev() {
        for (j, other) in after.iter().enumerate().rev() {
            common[i][j] = match line == other {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == after.len() || i < before.len() && common[i + 1][j] >= common[i][j + 1] {
            writeln!(text, "-{}", before[i]).expect("written");
            i += 1;
        } else {
            writeln!(text, "+{}", after[j]).expect("written");
            j += 1;
        }
    }
    text
}

/// What the file changes, object by object, is what is written down.
#[test]
fn settings_and_overlays_change_what_they_name_and_nothing_else() {
    let file = format!("{TESTDATA}/overlays.yaml");
    let (before, after) = (generate(&[]), generate(&["-f", &file]));
    let before: Vec<_> = before.split("---\n").collect();
    let after: Vec<_> = after.split("---\n").collect();
    assert_eq!(before.len(), after.len(), "objects");
    let mut found = String::new();
    for (before, after) in before.iter().zip(&after) {
        let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
        if before == after {
            continue;
        }
        let value = |key: &str| {
            let line = after.iter().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_default().trim().to_owned()
        };
        writeln!(found, "{} {}", value("kind:"), value("  name:")).expect("written");
        found += &difference(&before, &after);
    }
    let path = format!("{TESTDATA}/overlays.golden");
    if std::env::var_os("ADIT_UPDATE").is_some() {
        std::fs::write(&path, &found).expect("written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, golden, "ADIT_UPDATE=1 writes it anew");
}
