//! Fuzzes tokens and sets of keys.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "token/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
