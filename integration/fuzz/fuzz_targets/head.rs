//! Fuzzes what a waypoint makes of the heads of requests and of trailers.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "head/check.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
