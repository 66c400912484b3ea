//! Fuzzes the compiler of routes.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "route/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
