//! Fuzzes the normalisation of paths.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "path/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
