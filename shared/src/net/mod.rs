//! Sockets: options, network namespaces, the copy loop, draining.
