//! From the accepted tunnel to the endpoint and back, one module for each stage:
//!
//! * [`tunnel`]: mutual TLS, CONNECT, who calls; [`destination`]: where to; [`sniff`]: what is
//!   spoken there.
//! * [`http`]: connections of HTTP on a tunnel ([`io`]), [`http2`]: those of HTTP/2, on both
//!   sides; [`incoming`]: bodies as they come; [`interim`]: what comes before a response;
//!   [`tcp`]: what is not HTTP ([`copy`]).
//! * [`request`]: one request: [`headers`], [`authorize`], [`routing`] (with [`consumer`]: what
//!   routes of callers may not do), then [`forward`], which
//!   [`pick`]s an endpoint and sends there by [`upstream`], again where that fails; [`mirror`]:
//!   copies; [`body`]: what flows meanwhile; [`upgrade`]: when it becomes something else
//!   ([`websocket`]: how that is asked for);
//!   [`recheck`]: when policies change meanwhile.
//! * [`reply`]: what we answer ourselves; [`exchange`]: the record of it all.

pub mod authorize;
pub mod body;
pub mod client_hello;
pub mod consumer;
pub mod copy;
pub mod destination;
pub mod dial;
pub mod exchange;
pub mod external;
pub mod forward;
pub mod headers;
pub mod http;
pub mod http2;
pub mod incoming;
pub mod interim;
pub mod io;
pub mod mirror;
pub mod pick;
pub mod recheck;
pub mod reply;
pub mod request;
pub mod routing;
pub mod sniff;
mod steps;
pub mod tcp;
pub mod tunnel;
pub mod upgrade;
pub mod upstream;
pub mod websocket;
