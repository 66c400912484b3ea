//! What both sides announce in HTTP/2, and how long they wait. The values on the wire are
//! Istio's ztunnel's.

use std::time::Duration;

/// The settings of one HBONE connection, client or server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Bytes that a peer may send on one stream before we have consumed any.
    pub stream_window: u32,
    /// The same for all streams of a connection. Four times the stream window on purpose: with
    /// equal windows an app that reads its second connection before its first one dead-locks.
    pub connection_window: u32,
    /// Payload bytes of a DATA frame that we accept; we send up to what the peer accepts.
    pub max_frame: u32,
    /// Streams that a server accepts at once on a connection.
    pub max_concurrent_streams: u32,
    /// Streams that a client opens before it knows the peer's limit.
    pub initial_streams: u32,
    /// Bytes of response headers that a client accepts.
    pub client_header_list: u32,
    /// Bytes of request headers that a server accepts.
    pub server_header_list: u32,
    /// Bytes that may wait in one stream for the connection to take them: several full turns,
    /// so that a reader need not wait for every one to be sealed.
    pub send_buffer: usize,
    /// The same for all streams of a connection: a peer that opens many and stops reading has
    /// us hold this much and not more.
    pub connection_send_buffer: usize,
    /// Time between the answer to a PING and the next PING.
    pub ping_interval: Duration,
    /// A connection that neither answers a PING nor delivers anything for this long is dead.
    pub ping_timeout: Duration,
    /// A server's deadline for the client's preface.
    pub preface_timeout: Duration,
    /// A server closes a connection on which this long no first stream appears.
    pub first_stream_timeout: Duration,
    /// A server closes a connection that had no stream for this long (up to twice this long).
    /// Longer than the five minutes after which clients release theirs.
    pub idle_timeout: Duration,
    /// How long the last frames may take when a connection is closed without waiting.
    pub close_timeout: Duration,
}

impl Settings {
    /// The values that Istio's ztunnel uses, and our own where it has none.
    pub const DEFAULT: Self = Self {
        stream_window: 4 << 20,
        connection_window: 16 << 20,
        max_frame: 1 << 20,
        max_concurrent_streams: 200,
        initial_streams: 100,
        client_header_list: 16 << 10,
        server_header_list: 64 << 10,
        send_buffer: 4 << 20,
        connection_send_buffer: 8 << 20,
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        preface_timeout: Duration::from_secs(10),
        first_stream_timeout: Duration::from_secs(60),
        idle_timeout: Duration::from_secs(600),
        close_timeout: Duration::from_secs(1),
    };

    pub(super) fn client(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame)
            .max_header_list_size(self.client_header_list)
            .initial_max_send_streams(self.initial_streams as usize)
            .max_send_buffer_size(self.send_buffer)
            .enable_push(false);
        builder
    }

    pub(super) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame)
            .max_header_list_size(self.server_header_list)
            .max_concurrent_streams(self.max_concurrent_streams)
            .max_send_buffer_size(self.send_buffer);
        builder
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}
