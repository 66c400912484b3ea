//! Fuzzes what a CONNECT says: `:authority` and the headers that inform.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "authority/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
