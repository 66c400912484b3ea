//! Metrics, access log and traces of requests, from one typed event.
