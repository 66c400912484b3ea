//! The data path, over real HBONE connections and sockets.

#![allow(missing_docs, clippy::unwrap_used)]

mod consumers;
mod decide;
mod external;
mod external_auth;
mod http1;
mod http2;
mod interim;
mod limits;
mod observed;
mod policies;
mod recheck;
mod routes;
mod sessions;
mod streams;
mod support;
mod tcp;
mod tls;
mod websocket;
mod workers;
