//! What happened to a connection, told once: one typed event feeds the metrics, the
//! access log and, later, traces.
