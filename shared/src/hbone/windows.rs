//! Streams that nobody reads, or hardly, hold what their peer has sent them, and with it a part
//! of the window that all streams of the connection share. A few of them would stop all others.
//!
//! The windows are large, for bulk; so the connection's cannot have room for every stream's. As
//! long as all are read this does not matter. What is held by streams that would take long to
//! take it is looked at now and then while bytes arrive: once it is half of the connection's
//! window, the peer is told of smaller windows for streams, and of a larger one for the
//! connection, in which all that are open have room, and some more: it grows with them, so that
//! one slow stream costs the memory of a few and not of as many as there could be. What a
//! connection can have us hold is bounded all the time. When those streams have gone on, or are
//! gone, everything is as before.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use slab::Slab;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep};

use super::settings::Settings;

/// How often it is looked what streams hold, while bytes arrive or some is slow.
const INTERVAL: Duration = Duration::from_millis(100);
/// A stream is slow if it would take so many intervals for what it holds.
const SLOW: usize = 10;
/// So many intervals without trouble end the small windows.
const CALM: u32 = 20;
/// The window of a stream while others are slow: enough for a busy one, and small enough that
/// all streams that a connection may have hold less than one worker's share of memory.
const SMALL_WINDOW: u32 = 256 << 10;
/// Streams that may be opened until it is looked again, and find room.
const SPARE: u32 = 16;

/// What the streams of a connection hold.
#[derive(Default)]
pub(super) struct Windows(RefCell<Slab<Stream>>);

struct Stream {
    flow: h2::FlowControl,
    /// Given back to the peer since it was last looked at.
    released: usize,
}

impl Windows {
    /// Looks after a stream until the guard is dropped.
    pub(super) fn enter(self: &Rc<Self>, recv: &mut h2::RecvStream) -> Watched {
        let key = self.0.borrow_mut().insert(Stream {
            flow: recv.flow_control().clone(),
            released: 0,
        });
        Watched {
            windows: self.clone(),
            key,
        }
    }

    fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    fn open(&self) -> u32 {
        u32::try_from(self.0.borrow().len()).unwrap_or(u32::MAX)
    }

    /// Bytes that slow streams hold, and whether any stream holds some.
    fn held(&self) -> (usize, bool) {
        let (mut slow, mut any) = (0, false);
        for (_, stream) in self.0.borrow_mut().iter_mut() {
            let used = stream.flow.used_capacity();
            let released = std::mem::take(&mut stream.released);
            any |= used > 0;
            if released.saturating_mul(SLOW) < used {
                slow += used;
            }
        }
        (slow, any)
    }
}

/// Keeps a stream among those that are looked after. Has to be dropped before the stream's own
/// handles, which reset it when the last of them goes.
pub(super) struct Watched {
    windows: Rc<Windows>,
    key: usize,
}

impl Watched {
    /// The stream has given so much back.
    pub(super) fn released(&self, bytes: usize) {
        if let Some(stream) = self.windows.0.borrow_mut().get_mut(self.key) {
            stream.released = stream.released.saturating_add(bytes);
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Dropped after the borrow, for it calls into the connection.
        let stream = self.windows.0.borrow_mut().try_remove(self.key);
        drop(stream);
    }
}

/// A connection that can be told its windows.
pub(super) trait Announce {
    /// All streams together.
    fn connection_window(&mut self, bytes: u32);
    /// Each of them. Fails while an earlier announcement is on its way.
    fn stream_window(&mut self, bytes: u32) -> Result<(), h2::Error>;
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Announce for h2::client::Connection<IO, Bytes> {
    fn connection_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn stream_window(&mut self, bytes: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(bytes)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Announce for h2::server::Connection<IO, Bytes> {
    fn connection_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn stream_window(&mut self, bytes: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(bytes)
    }
}

/// Watches over a connection's windows.
pub(super) struct Keeper {
    windows: Rc<Windows>,
    timer: Option<Pin<Box<Sleep>>>,
    /// The timer runs.
    armed: bool,
    /// Small windows have been announced.
    small: bool,
    /// Intervals since slow streams last held much.
    calm: u32,
    stream_window: u32,
    connection_window: u32,
    /// The connection's window in which all streams have room that there may be.
    roomy: u32,
    /// The connection's window as it was announced last.
    announced: u32,
}

impl Keeper {
    /// `None` where all streams have room anyway.
    pub(super) fn new(settings: &Settings) -> (Rc<Windows>, Option<Self>) {
        let windows = Rc::<Windows>::default();
        let all = |window: u32| window.saturating_mul(settings.max_concurrent_streams);
        let roomy = settings.connection_window.saturating_add(all(SMALL_WINDOW));
        let needed = settings.connection_window < all(settings.stream_window)
            && settings.stream_window > SMALL_WINDOW;
        let keeper = needed.then(|| Self {
            windows: windows.clone(),
            timer: None,
            armed: false,
            small: false,
            calm: 0,
            stream_window: settings.stream_window,
            connection_window: settings.connection_window,
            // The largest there is (RFC 9113 6.9.1).
            roomy: roomy.min((1 << 31) - 1),
            announced: settings.connection_window,
        });
        (windows, keeper)
    }

    /// To be called whenever the connection's task runs, before it polls the connection.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, connection: &mut impl Announce) {
        if !self.armed {
            if !self.windows.is_empty() {
                self.arm(cx);
            }
            return;
        }
        // Its waker is this task's, and stays so: it need not be polled each time.
        if !self.timer.as_ref().is_some_and(|timer| timer.is_elapsed()) {
            return;
        }
        self.armed = false;
        let (slow, any) = self.windows.held();
        self.adapt(slow, self.windows.open(), connection);
        if any || self.small {
            self.arm(cx);
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) {
        let at = Instant::now() + INTERVAL;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(INTERVAL)));
        timer.as_mut().reset(at);
        self.armed = true;
        if let Poll::Ready(()) = timer.as_mut().poll(cx) {
            cx.waker().wake_by_ref();
        }
    }

    fn adapt(&mut self, slow: usize, open: u32, connection: &mut impl Announce) {
        let window = self.connection_window as usize;
        let much = slow >= window / 2;
        if much {
            self.calm = 0;
            self.small |= !self.small && connection.stream_window(SMALL_WINDOW).is_ok();
        }
        if self.small {
            // Never less than before: what was announced may be used already.
            let streams = open.saturating_add(SPARE).saturating_mul(SMALL_WINDOW);
            let room = self.connection_window.saturating_add(streams);
            let room = room.min(self.roomy);
            if room > self.announced {
                self.announced = room;
                connection.connection_window(room);
            }
        }
        if self.small && !much && slow < window / 8 {
            self.calm += 1;
            if self.calm >= CALM && connection.stream_window(self.stream_window).is_ok() {
                self.small = false;
                self.announced = self.connection_window;
                connection.connection_window(self.connection_window);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told(Vec<u32>);

    impl Announce for Told {
        fn connection_window(&mut self, bytes: u32) {
            self.0.push(bytes);
        }

        fn stream_window(&mut self, bytes: u32) -> Result<(), h2::Error> {
            self.0.push(bytes);
            Ok(())
        }
    }

    #[test]
    fn small_windows_come_with_slow_streams_and_go_after_a_while() {
        let settings = Settings::DEFAULT;
        let (_, keeper) = Keeper::new(&settings);
        let mut keeper = keeper.expect("four streams fill the window");
        let mut told = Told::default();
        let much = settings.connection_window as usize / 2;
        keeper.adapt(much - 1, 4, &mut told);
        assert!(told.0.is_empty());
        // Room for those that are open and a few, as many as there are.
        keeper.adapt(much, 4, &mut told);
        let room = |streams| settings.connection_window + streams * SMALL_WINDOW;
        assert_eq!(std::mem::take(&mut told.0), [SMALL_WINDOW, room(4 + SPARE)]);
        keeper.adapt(much, 2, &mut told);
        assert!(told.0.is_empty(), "never less");
        keeper.adapt(much, 100, &mut told);
        assert_eq!(std::mem::take(&mut told.0), [room(100 + SPARE)]);
        keeper.adapt(much, 200, &mut told);
        assert_eq!(
            std::mem::take(&mut told.0),
            [room(200)],
            "as many as may be"
        );
        for _ in 0..CALM - 1 {
            keeper.adapt(0, 200, &mut told);
        }
        keeper.adapt(much, 200, &mut told);
        for _ in 0..CALM - 1 {
            keeper.adapt(0, 200, &mut told);
        }
        assert!(told.0.is_empty());
        keeper.adapt(0, 200, &mut told);
        let before = [settings.stream_window, settings.connection_window];
        assert_eq!(told.0, before);
    }

    #[test]
    fn where_all_have_room_nothing_is_watched() {
        let settings = Settings {
            stream_window: 256 << 10,
            connection_window: 4 << 20,
            max_concurrent_streams: 16,
            ..Settings::DEFAULT
        };
        assert!(Keeper::new(&settings).1.is_none());
    }
}
