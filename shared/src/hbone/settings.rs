//! What both ends of an HBONE connection announce and allow themselves.

use std::time::Duration;

/// HTTP/2 settings, defaults as Istio's ztunnel sends them, so that either end may be its.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Flow-control window of one stream, bytes. Default 4 MiB.
    pub stream_window: u32,
    /// Flow-control window of the connection, bytes. Default 16 MiB: four streams' worth, so
    /// that an app that reads stream B first cannot be starved by stream A.
    pub connection_window: u32,
    /// Largest frame that is accepted, bytes, 16 KiB to 16 MiB. Default 1 MiB: one bulk turn.
    pub max_frame_size: u32,
    /// Streams that a server allows on one connection. Default 200.
    pub max_concurrent_streams: u32,
    /// Largest header list that a client accepts, bytes. Default 16 KiB.
    pub client_header_list: u32,
    /// Largest header list that a server accepts, bytes. Default 64 KiB.
    pub server_header_list: u32,
    /// Bytes of one stream that may wait to be sent. Default 4 MiB.
    pub send_buffer: usize,
    /// A PING goes out so often. Default 10 s.
    pub ping_interval: Duration,
    /// A connection whose PING is not answered for so long is dead. Default 20 s.
    pub ping_timeout: Duration,
    /// How long the HTTP/2 preface and SETTINGS of the peer may take. Default 10 s.
    pub handshake_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame_size: 1 << 20,
            max_concurrent_streams: 200,
            client_header_list: 16 << 10,
            server_header_list: 64 << 10,
            send_buffer: 4 << 20,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// The frame size within the limits of RFC 9113 4.2.
    pub(super) fn frame_size(&self) -> u32 {
        self.max_frame_size.clamp(1 << 14, (1 << 24) - 1)
    }
}
