//! What a client or an endpoint may try, and what it gets: request smuggling, limits, floods,
//! stalled streams; and that neither a drain nor a change of configuration loses a request.
//! Over real HBONE connections, with bytes and frames that no library would send.

#![allow(missing_docs, clippy::unwrap_used)]

mod downgrade;
mod drain;
mod floods;
mod limits;
mod raw;
mod smuggling;
mod spread;
#[allow(dead_code, reason = "shared with the tests of the data path")]
#[path = "../proxy/support.rs"]
mod support;
