//! The data path, over real HBONE connections and sockets.

#![allow(missing_docs, clippy::unwrap_used)]

mod external;
mod http1;
mod http2;
mod limits;
mod observed;
mod policies;
mod routes;
mod support;
mod tcp;
mod workers;
