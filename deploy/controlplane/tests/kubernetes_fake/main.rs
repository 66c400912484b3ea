//! What the API server may do to us, against a small one that does it on demand.

mod api_server;
mod reviews;
mod source;
