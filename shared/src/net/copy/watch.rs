//! Sees a socket fail after its FIN, when nothing is read from it any more: a reset then would
//! otherwise be noticed only when something is written to it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

/// Costs memory only while it watches.
#[derive(Default)]
pub(super) struct FailureWatch(Option<Pin<Box<dyn Future<Output = ()>>>>);

impl FailureWatch {
    /// Ready when `socket` has failed. Always called with the same socket.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, socket: &Rc<TcpStream>) -> Poll<io::Error> {
        let failed = self.0.get_or_insert_with(|| {
            let socket = socket.clone();
            Box::pin(async move {
                // It fails only when the runtime shuts down.
                let _ = socket.ready(Interest::ERROR).await;
            })
        });
        ready!(failed.as_mut().poll(cx));
        Poll::Ready(match socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        })
    }

    /// Lets go of the socket.
    pub(super) fn stop(&mut self) {
        self.0 = None;
    }
}
