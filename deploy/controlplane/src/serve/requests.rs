//! The requests of a stream, as they come.
//!
//! A client that comes back claims everything it has: megabytes in a large mesh, and all
//! clients come back when the control plane was restarted. So only some of them are read at a
//! time, one of each pod, the others are held back by HTTP/2's flow control; nothing of it is
//! kept, and a turn to be read is taken from a client that does not send.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::xds::DeltaDiscoveryRequest;
use bytes::{Buf as _, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Status;

use crate::auth::Caller;
use crate::quota::{Quota, Share};

/// A client that claims a hundred thousand resources when it comes back does so in one
/// message. That is what node proxies and waypoints do.
const MAX_REQUEST: usize = 64 << 20;
/// Of everybody else.
const MAX_STRANGERS_REQUEST: usize = 4 << 20;
/// Requests that are longer wait for a turn.
const LARGE: usize = 64 << 10;
/// For a turn to come: the proxies of a large mesh come back all at once.
const WAIT: Duration = Duration::from_secs(300);
/// For all of such a request to come.
const TURN: Duration = Duration::from_secs(30);
/// Of which so much comes
const PROGRESS: usize = 16 << 10;
/// in so long.
const PROGRESS_TIME: Duration = Duration::from_secs(2);
/// gRPC's compressed flag and length.
const HEADER: usize = 5;
/// The most names and versions in one request. Each takes many times its length in memory.
const MAX_NAMES: usize = 1_000_000;
/// The most bytes of all else: the node and what is wrong with resources.
const MAX_OTHERS: usize = 1 << 20;

/// A pod: namespace, name and uid.
pub(super) type Pod = (String, String, String);

/// The pod that calls.
pub(super) fn pod_of(caller: &Caller) -> Pod {
    let Caller {
        namespace,
        pod_name,
        pod_uid,
        ..
    } = caller;
    (namespace.clone(), pod_name.clone(), pod_uid.clone())
}

/// Who may send long requests now, over all streams. Cheap to clone.
#[derive(Clone)]
pub(super) struct Turns {
    all: Arc<Semaphore>,
    pods: Quota<Pod>,
}

impl Turns {
    pub(super) fn new(at_a_time: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(at_a_time.max(1))),
            pods: Quota::new(1),
        }
    }

    async fn take(self, pod: Pod) -> Turn {
        let own = self.pods.wait(pod).await;
        // The semaphore is never closed.
        let permit = self.all.acquire_owned().await.ok();
        let now = Instant::now();
        Turn {
            _held: (own, permit),
            until: now + TURN,
            progress_until: now + PROGRESS_TIME,
            progress_from: 0,
        }
    }
}

/// To read a long request, within a time: others wait.
struct Turn {
    _held: (Share<Pod>, Option<OwnedSemaphorePermit>),
    until: Instant,
    progress_until: Instant,
    progress_from: usize,
}

pub(super) struct Requests {
    body: Incoming,
    buffer: BytesMut,
    longest: usize,
    pod: Pod,
    turns: Turns,
    /// Kept from call to call: whoever is called anew does not wait anew.
    waiting: Option<Pin<Box<dyn Future<Output = Turn> + Send + Sync>>>,
    turn: Option<Turn>,
    /// For the first request, as long as it has not come or got its turn.
    first_until: Option<Instant>,
}

impl Requests {
    /// Requests of a pod, of which the first has to come in time. Only what is `known` to need
    /// it may send long ones.
    pub(super) fn new(
        body: Incoming,
        pod: Pod,
        known: bool,
        turns: Turns,
        first: Duration,
    ) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            longest: match known {
                true => MAX_REQUEST,
                false => MAX_STRANGERS_REQUEST,
            },
            pod,
            turns,
            waiting: None,
            turn: None,
            first_until: Some(Instant::now() + first),
        }
    }

    /// The next one; `None` if there are no more. Nothing is lost if this is dropped.
    ///
    /// # Errors
    /// `INTERNAL` or `OUT_OF_RANGE` for what is no request or too long, `DEADLINE_EXCEEDED` for
    /// what does not come in time, any other if the connection is gone.
    pub(super) async fn message(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        loop {
            if let Some(header) = self.buffer.get(..HEADER) {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
                let length = length as usize;
                if header[0] != 0 {
                    return Err(Status::internal("a compressed request"));
                }
                if length > self.longest {
                    return Err(Status::out_of_range("the request is too long"));
                }
                if let Some(message) = self.buffer.get(HEADER..HEADER + length) {
                    let decoded = decode(message);
                    self.buffer.advance(HEADER + length);
                    if self.buffer.is_empty() {
                        self.buffer = BytesMut::new();
                    }
                    self.turn = None;
                    self.first_until = None;
                    return decoded.map(Some);
                }
                if length > LARGE && self.turn.is_none() {
                    self.wait_for_turn().await?;
                    self.buffer
                        .reserve((HEADER + length).saturating_sub(self.buffer.len()));
                }
            }
            let frame = match self.until() {
                None => self.body.frame().await,
                Some(until) => timeout_at(until, self.body.frame())
                    .await
                    .map_err(|_| Status::deadline_exceeded("no request came"))?,
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    // Trailers: requests have none.
                    Err(_) => return Ok(None),
                },
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("half a request")),
                Some(Err(error)) => return Err(Status::cancelled(error.to_string())),
            }
        }
    }

    async fn wait_for_turn(&mut self) -> Result<(), Status> {
        let (turns, pod) = (&self.turns, &self.pod);
        let waiting = self
            .waiting
            .get_or_insert_with(|| Box::pin(turns.clone().take(pod.clone())));
        let turn = timeout(WAIT, waiting)
            .await
            .map_err(|_| Status::deadline_exceeded("too many long requests wait"))?;
        self.waiting = None;
        // From here on the turn's time counts, not the first request's.
        self.turn = Some(Turn {
            progress_from: self.buffer.len(),
            ..turn
        });
        Ok(())
    }

    /// Until when the next frame has to come.
    fn until(&mut self) -> Option<Instant> {
        let length = self.buffer.len();
        let Some(turn) = &mut self.turn else {
            return self.first_until;
        };
        if length >= turn.progress_from + PROGRESS {
            turn.progress_from = length;
            turn.progress_until = Instant::now() + PROGRESS_TIME;
        }
        Some(turn.until.min(turn.progress_until))
    }
}

fn decode(message: &[u8]) -> Result<DeltaDiscoveryRequest, Status> {
    measure(message)?;
    DeltaDiscoveryRequest::decode(message)
        .map_err(|error| Status::internal(format!("not a delta discovery request: {error}")))
}

/// Looks at the fields of a request without making anything of them: a name of no bytes costs
/// two to send and a hundred to hold.
fn measure(mut message: &[u8]) -> Result<(), Status> {
    let malformed = || Status::internal("not a delta discovery request");
    let varint = |message: &mut &[u8]| {
        prost::decode_length_delimiter(&mut *message).map_err(|_| malformed())
    };
    let (mut names, mut others) = (0_usize, 0_usize);
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let length = match key & 7 {
            0 => varint(&mut message).map(|_| 0)?,
            1 => 8,
            2 => varint(&mut message)?,
            5 => 4,
            _ => return Err(malformed()),
        };
        message = message.get(length..).ok_or_else(malformed)?;
        match key >> 3 {
            // resource_names_subscribe, resource_names_unsubscribe, initial_resource_versions
            3..=5 => names += 1,
            _ => others += length,
        }
    }
    match names > MAX_NAMES || others > MAX_OTHERS {
        true => Err(Status::out_of_range("the request has too much in it")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use adit_shared::proto::xds::{Node, Status as ErrorDetail};
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_pod_has_one_turn() {
        let turns = Turns::new(2);
        let pod = |name: &str| ("a".to_owned(), name.to_owned(), "u".to_owned());
        let take = |name| turns.clone().take(pod(name)).now_or_never();
        let first = take("p").expect("free");
        assert!(take("p").is_none(), "a second turn");
        let _other = take("q").expect("another's");
        assert!(take("r").is_none(), "more than there are");
        drop(first);
        assert!(take("p").is_some());
    }

    #[test]
    fn what_a_request_would_become_is_looked_at_first() {
        let versions = (0..50_000).map(|i| (format!("Kubernetes//Pod/a/{i}"), "v".to_owned()));
        let claim = DeltaDiscoveryRequest {
            node: Some(Node {
                id: "n".into(),
                ..Node::default()
            }),
            type_url: "t".into(),
            initial_resource_versions: versions.collect(),
            resource_names_subscribe: vec!["*".into()],
            error_detail: Some(ErrorDetail {
                message: "x".repeat(MAX_OTHERS / 2),
                ..ErrorDetail::default()
            }),
            ..DeltaDiscoveryRequest::default()
        };
        assert_eq!(decode(&claim.encode_to_vec()).expect("a request"), claim);
        let names = |count: usize| [0x1a, 0].repeat(count);
        assert!(decode(&names(MAX_NAMES)).is_ok());
        let node = [&[0x0a, 0x80, 0x80, 0x80, 0x01][..], &vec![0; 2 << 20]].concat();
        for (what, message, code) in [
            ("names", names(MAX_NAMES + 1), tonic::Code::OutOfRange),
            ("a node", node, tonic::Code::OutOfRange),
            ("half a field", vec![0x1a, 9, 1], tonic::Code::Internal),
            ("half a length", vec![0x1a, 0x80], tonic::Code::Internal),
            ("a group", vec![0x1b, 0x1c], tonic::Code::Internal),
        ] {
            let refused = decode(&message).expect_err(what);
            assert_eq!(refused.code(), code, "{what}");
        }
    }
}
