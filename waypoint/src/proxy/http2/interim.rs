//! Informational responses (1xx) on their way to a client of HTTP/2.
//!
//! They wait here until the task of their stream sends them, which it does before anything else
//! and only while its stream is open: h2 itself does not look.

use std::sync::Arc;
use std::task::{Context, Waker};

use bytes::Bytes;
use h2::server::SendResponse;
use http::header::{CONTENT_LENGTH, HeaderMap};
use http::{Response, StatusCode};
use parking_lot::Mutex;
use tracing::debug;

use super::remove_connection_headers;
use crate::proxy::headers::remove_hop_by_hop;

/// Bytes of them for one request. Nothing holds them back for a client that does not read, so
/// that they have to end somewhere; none of them has to arrive.
const MOST: usize = 32 << 10;

/// What goes before the response to one request.
///
/// Shared with hyper's client, which wants something that may be sent between threads; it never
/// is, and the lock is never held by two.
#[derive(Clone)]
pub struct Before(Arc<Mutex<State>>);

struct State {
    waiting: Vec<Response<()>>,
    /// Bytes that may yet come.
    room: usize,
    /// Who sends them; `None`: nobody waits.
    sender: Option<Waker>,
    /// The response has been sent.
    over: bool,
}

impl Default for Before {
    /// For a new request.
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            waiting: Vec::new(),
            room: MOST,
            sender: None,
            over: false,
        })))
    }
}

impl Before {
    /// Has one sent.
    pub fn push(&self, status: StatusCode, mut headers: HeaderMap) {
        let mut state = self.0.lock();
        if state.over {
            return;
        }
        remove_hop_by_hop(&mut headers);
        remove_connection_headers(&mut headers);
        // There is no body (RFC 9110 8.6).
        headers.remove(CONTENT_LENGTH);
        // As HPACK counts (RFC 7541 4.1).
        let size: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32)
            .sum();
        let Some(room) = state.room.checked_sub(size + 64) else {
            debug!("too much before a response: {status} is not passed on");
            return;
        };
        state.room = room;
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        state.waiting.push(response);
        if let Some(sender) = state.sender.take() {
            sender.wake();
        }
    }

    /// Whether any waits to be sent.
    pub fn is_waiting(&self) -> bool {
        !self.0.lock().waiting.is_empty()
    }

    /// Sends what waits on a stream that is open, and waits for more.
    pub fn send(&self, stream: &mut SendResponse<Bytes>, cx: &Context<'_>) {
        let mut state = self.0.lock();
        flush(&mut state, stream);
        match &state.sender {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => state.sender = Some(cx.waker().clone()),
        }
    }

    /// Sends what waits; nothing more is taken.
    pub fn finish(&self, stream: &mut SendResponse<Bytes>) {
        let mut state = self.0.lock();
        flush(&mut state, stream);
        state.over = true;
        state.sender = None;
    }
}

fn flush(state: &mut State, stream: &mut SendResponse<Bytes>) {
    for response in state.waiting.drain(..) {
        let status = response.status();
        if let Err(error) = stream.send_informational(response) {
            debug!("{status} is not passed on: {error}");
        }
    }
}
