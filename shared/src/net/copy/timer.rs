//! One timer for both idle limits. It is not touched when bytes move: a flag is set, and the
//! timer looks at the flag when it fires.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use super::{CopyEnd, CopySettings};

/// Without a limit there is no timer and no memory for one.
#[derive(Default)]
pub(super) struct IdleTimer {
    sleep: Option<Pin<Box<Sleep>>>,
    /// Bytes have moved since the timer was set.
    active: bool,
    started: bool,
    half_closed: bool,
}

impl IdleTimer {
    pub(super) fn moved(&mut self) {
        self.active = true;
    }

    pub(super) fn is_half_closed(&self) -> bool {
        self.half_closed
    }

    /// One direction has finished: from now on the other limit counts.
    pub(super) fn half_close(&mut self, settings: &CopySettings) {
        if !self.half_closed {
            self.half_closed = true;
            self.set(settings.half_closed_idle);
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>, settings: &CopySettings) -> Poll<CopyEnd> {
        if !self.started {
            self.started = true;
            if let (Some(idle), None) = (settings.idle, &self.sleep) {
                self.set(idle);
            }
        }
        loop {
            match &mut self.sleep {
                None => return Poll::Pending,
                Some(sleep) => ready!(sleep.as_mut().poll(cx)),
            }
            if !self.active {
                return Poll::Ready(if self.half_closed {
                    CopyEnd::HalfClosedIdle
                } else {
                    CopyEnd::Idle
                });
            }
            self.set(match settings.idle {
                Some(idle) if !self.half_closed => idle,
                _ => settings.half_closed_idle,
            });
        }
    }

    fn set(&mut self, after: Duration) {
        self.active = false;
        match &mut self.sleep {
            Some(timer) => timer.as_mut().reset(Instant::now() + after),
            None => self.sleep = Some(Box::pin(sleep(after))),
        }
    }
}
