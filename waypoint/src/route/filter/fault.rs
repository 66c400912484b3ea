//! Injected faults: Istio's HTTPFaultInjection.

use std::time::Duration;

use http::StatusCode;

use super::{Answer, AnswerReason, hit};

/// A delay, an answer in place of the backend's, or both, for shares of the requests that are
/// drawn independently.
#[derive(Debug, Clone, Default)]
pub struct Fault {
    pub(in crate::route) delay: Duration,
    pub(in crate::route) delay_per_million: u32,
    pub(in crate::route) abort: Option<Abort>,
    pub(in crate::route) abort_per_million: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::route) enum Abort {
    Http(StatusCode),
    Grpc(u32),
}

/// What befalls one request.
pub(super) struct Injected {
    pub(super) delay: Option<Duration>,
    pub(super) answer: Option<Answer>,
}

impl Fault {
    pub(super) fn draw(&self, mut random: impl FnMut() -> u64) -> Injected {
        let delay = hit(self.delay_per_million, random()).then_some(self.delay);
        let abort = self.abort.filter(|_| hit(self.abort_per_million, random()));
        Injected {
            delay: delay.filter(|delay| !delay.is_zero()),
            answer: abort.map(|abort| match abort {
                Abort::Http(status) => Answer::new(status, AnswerReason::Fault),
                Abort::Grpc(status) => Answer {
                    grpc_status: Some(status),
                    ..Answer::new(StatusCode::OK, AnswerReason::Fault)
                },
            }),
        }
    }
}
