//! The administration endpoint.
