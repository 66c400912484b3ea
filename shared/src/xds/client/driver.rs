//! Keeps a [`DeltaState`] connected.
//!
//! One task: connect, open the stream with the requests that the state asks for, hand each
//! response to its handler, acknowledge, and when the stream ends start again: at once if the
//! server ended it in good order (it recycles connections), otherwise after 10 ms, doubling
//! to 15 s, with jitter. What was received stays in force meanwhile.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryFutureExt as _};
use http::{HeaderName, HeaderValue};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tracing::{debug, info, warn};

use super::transport::{ConnectError, TransportConfig};
use super::{
    DeltaState, Handler, NodeMetadata, Observer, ResponseError, Subscription, Termination,
};
use crate::identity::TokenSource;
use crate::proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

const MAX_MESSAGE: usize = 200 << 20;
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// A stream that ended sooner than this is not one that the server recycled, however
/// politely it ended: without this a server that closes at once would be asked in a
/// loop.
const RECYCLED_AFTER: Duration = Duration::from_secs(1);
/// How long the server may leave our requests unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests that may wait for the server to read them.
const REQUEST_QUEUE: usize = 64;
/// Calls of [`Subscriber`] that may wait for the task.
const COMMAND_QUEUE: usize = 1024;

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Where and how to connect.
    pub transport: TransportConfig,
    /// The bearer token, read at every connect.
    pub token: Option<TokenSource>,
    /// More headers (`XDS_HEADER_*`), and Istio's `clusterid`.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Who asks.
    pub node: NodeMetadata,
}

/// How the client is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientStatus {
    /// Whether a stream is open and has been answered.
    pub connected: bool,
    /// Whether every type has been received and acknowledged once. Stays so when the
    /// connection is lost.
    pub ready: bool,
    /// Why the last connection ended or did not come about.
    pub last_error: Option<String>,
}

/// A delta ADS client. [`Self::run`] is its task.
pub struct Client {
    config: ClientConfig,
    state: DeltaState,
    handlers: Vec<(String, Arc<dyn Handler>)>,
    observer: Arc<dyn Observer>,
    status: watch::Sender<ClientStatus>,
    commands: mpsc::Receiver<Command>,
}

/// Asks a running client for more or fewer names, and sees how it is doing.
#[derive(Debug, Clone)]
pub struct Subscriber {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<ClientStatus>,
}

#[derive(Debug)]
enum Command {
    Subscribe(String, Vec<String>),
    Unsubscribe(String, Vec<String>),
}

/// The client has ended, or has more than a thousand calls to work off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the xDS client takes no more subscriptions now")]
pub struct SubscribeError;

impl Subscriber {
    /// Asks for these names of a type that is watched on demand.
    ///
    /// # Errors
    /// [`SubscribeError`]; a retry helps unless the client has been stopped.
    pub fn subscribe(&self, type_url: &str, names: Vec<String>) -> Result<(), SubscribeError> {
        self.send(Command::Subscribe(type_url.to_owned(), names))
    }

    /// Asks for them no more.
    ///
    /// # Errors
    /// As [`Self::subscribe`].
    pub fn unsubscribe(&self, type_url: &str, names: Vec<String>) -> Result<(), SubscribeError> {
        self.send(Command::Unsubscribe(type_url.to_owned(), names))
    }

    /// The status now and every change of it.
    pub fn status(&self) -> watch::Receiver<ClientStatus> {
        self.status.clone()
    }

    fn send(&self, command: Command) -> Result<(), SubscribeError> {
        self.commands.try_send(command).map_err(|_| SubscribeError)
    }
}

/// Why a stream ended.
enum End {
    Complete,
    Failed(Termination, String),
    Stopped,
}

impl Client {
    /// A client that asks for these types in this order. Policies should stand before what
    /// refers to them.
    ///
    /// # Errors
    /// [`ConnectError`] if the address can never work.
    pub fn new(
        config: ClientConfig,
        types: Vec<(&str, Subscription, Arc<dyn Handler>)>,
        observer: Arc<dyn Observer>,
    ) -> Result<(Self, Subscriber), ConnectError> {
        config.transport.validate()?;
        let subscriptions = types
            .iter()
            .map(|(url, subscription, _)| ((*url).to_owned(), subscription.clone()));
        let state = DeltaState::new(config.node.to_node(), subscriptions);
        let handlers = types
            .into_iter()
            .map(|(url, _, handler)| (url.to_owned(), handler))
            .collect();
        let (status, status_reader) = watch::channel(ClientStatus::default());
        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let client = Self {
            config,
            state,
            handlers,
            observer,
            status,
            commands,
        };
        let subscriber = Subscriber {
            commands: sender,
            status: status_reader,
        };
        Ok((client, subscriber))
    }

    /// Runs until `stop` completes. It may be dropped at any time.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let mut backoff = Backoff::default();
        loop {
            let started = Instant::now();
            let end = tokio::select! {
                end = self.session() => end,
                () = &mut stop => End::Stopped,
            };
            self.state.disconnect();
            let (reason, error) = match end {
                End::Stopped => break,
                End::Complete => (Termination::Complete, None),
                End::Failed(reason, error) => (reason, Some(error)),
            };
            self.observer.connection_terminated(reason);
            // A server that has nothing new for us may never have answered (istiod).
            let answered = self.status.borrow().connected;
            if answered || started.elapsed() > BACKOFF_MAX {
                backoff.reset();
            }
            let wait = match reason {
                Termination::Complete if started.elapsed() >= RECYCLED_AFTER => Duration::ZERO,
                _ => backoff.next(&mut rand::rng()),
            };
            match &error {
                None => debug!(?wait, "the control plane closed the xDS stream"),
                Some(error) => warn!(
                    address = %self.config.transport.address,
                    error, ?wait, "xDS connection lost; trying again, what is known stays in force"
                ),
            }
            self.status.send_modify(|status| {
                status.connected = false;
                status.last_error = error;
            });
            tokio::select! {
                () = self.wait(wait) => {}
                () = &mut stop => break,
            }
        }
        debug!("xDS client stopped");
    }

    /// Sleeps, and takes commands meanwhile so that their queue does not fill while there is
    /// no control plane.
    async fn wait(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        while let Ok(Some(command)) = tokio::time::timeout_at(until, self.commands.recv()).await {
            self.command(command);
        }
        tokio::time::sleep_until(until).await;
    }

    fn command(&mut self, command: Command) -> Option<DeltaDiscoveryRequest> {
        match command {
            Command::Subscribe(url, names) => self.state.subscribe(&url, names),
            Command::Unsubscribe(url, names) => self
                .state
                .unsubscribe(&url, names.iter().map(String::as_str)),
        }
    }

    async fn session(&mut self) -> End {
        let unconnected = |error: String| End::Failed(Termination::ConnectionError, error);
        let headers = match self.headers() {
            Ok(headers) => headers,
            Err(error) => return unconnected(error),
        };
        let channel = match self.config.transport.connect().await {
            Ok(channel) => channel,
            Err(error) => return unconnected(with_sources(&error)),
        };
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);

        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        for request in self.state.connect() {
            if requests.try_send(request).is_err() {
                return unconnected("more types than fit into one go".to_owned());
            }
        }
        let mut call = tonic::Request::new(ReceiverStream::new(queue));
        *call.metadata_mut() = headers;
        // A server may answer the call only with its first response, which may be long in
        // coming if we have everything: HTTP/2 keepalive (30 s, 10 s) is the deadline here.
        let responses = client
            .delta_aggregated_resources(call)
            .map_ok(tonic::Response::into_inner)
            .try_flatten_stream();
        let mut responses = std::pin::pin!(responses);
        let mut closed = false;
        loop {
            let request = tokio::select! {
                response = responses.next() => match response {
                    None => return End::Complete,
                    Some(Err(status)) => return ended_by(&status),
                    Some(Ok(response)) => match self.apply(response) {
                        Ok(request) => Some(request),
                        Err(error) => return End::Failed(Termination::Error, error.to_string()),
                    },
                },
                command = self.commands.recv(), if !closed => match command {
                    Some(command) => self.command(command),
                    None => { closed = true; None }
                },
            };
            if let Some(request) = request {
                match timeout(SEND_TIMEOUT, requests.send(request)).await {
                    Ok(Ok(())) => {}
                    // The stream is gone; the next response says how.
                    Ok(Err(_)) => {}
                    Err(_) => {
                        let error = format!("the server reads no requests for {SEND_TIMEOUT:?}");
                        return End::Failed(Termination::Reconnect, error);
                    }
                }
            }
        }
    }

    fn apply(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<DeltaDiscoveryRequest, ResponseError> {
        let url = response.type_url.clone();
        self.observer.message(&url, response.encoded_len());
        let handler = self.handlers.iter().find(|(known, _)| *known == url);
        let applied = self
            .state
            .response(response, |updates, removed| match handler {
                Some((_, handler)) => handler.apply(updates, removed),
                None => vec![],
            })?;
        debug!(
            type_url = url,
            updates = applied.updates,
            removed = applied.removed,
            rejected = applied.rejected.len(),
            "xDS response"
        );
        if !applied.rejected.is_empty() {
            self.observer.rejected(&url, applied.rejected.len());
            for rejected in &applied.rejected {
                warn!(
                    type_url = url,
                    name = rejected.name,
                    reason = rejected.reason,
                    "resource rejected"
                );
            }
        }
        let ready = self.state.is_ready();
        self.status.send_if_modified(|status| {
            let new = ClientStatus {
                connected: true,
                ready,
                last_error: None,
            };
            if *status == new {
                return false;
            }
            if !status.connected {
                info!(ready, "receiving configuration");
            }
            *status = new;
            true
        });
        Ok(applied.request)
    }

    fn headers(&self) -> Result<MetadataMap, String> {
        let mut headers = http::HeaderMap::new();
        for (name, value) in &self.config.headers {
            headers.append(name.clone(), value.clone());
        }
        let mut metadata = MetadataMap::from_headers(headers);
        if let Some(token) = &self.config.token {
            let value = token.authorization().map_err(|error| error.to_string())?;
            metadata.insert("authorization", value);
        }
        Ok(metadata)
    }
}

/// tonic's own text of a status is long, and hides "connection refused" in its sources.
fn ended_by(status: &tonic::Status) -> End {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    if let Some(source) = std::error::Error::source(status) {
        text = format!("{text}: {}", with_sources(source));
    }
    End::Failed(Termination::Error, text)
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

/// Doubling waits, each between half of its length and all of it.
struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: BACKOFF_MIN }
    }
}

impl Backoff {
    fn reset(&mut self) {
        *self = Self::default();
    }

    fn next(&mut self, random: &mut impl rand::Rng) -> Duration {
        let wait = self.next.mul_f64(random.random_range(0.5..=1.0));
        self.next = (self.next * 2).min(BACKOFF_MAX);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound_and_start_again() {
        let mut random = rand::rng();
        let mut backoff = Backoff::default();
        let mut bound = BACKOFF_MIN;
        for _ in 0..20 {
            let wait = backoff.next(&mut random);
            assert!(wait <= bound && wait >= bound / 2, "{wait:?} of {bound:?}");
            bound = (bound * 2).min(BACKOFF_MAX);
        }
        assert_eq!(bound, BACKOFF_MAX);
        backoff.reset();
        assert!(backoff.next(&mut random) <= BACKOFF_MIN);
    }
}
