//! HBONE: CONNECT over HTTP/2 over mutual TLS, client and server.

pub mod buffer;
pub mod record;
