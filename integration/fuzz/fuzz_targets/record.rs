//! Fuzzes the receiving half of the TLS record layer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "record/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
