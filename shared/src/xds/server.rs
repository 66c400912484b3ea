//! The server's side of one delta ADS connection. No sockets, no clock.
//!
//! For each type the server remembers the last set it looked at and what of it is still to
//! be sent. A new snapshot is compared with that set (cheap: see [`super::resources`]) and the
//! differences are folded into what is pending, so that a client which is slow to
//! acknowledge gets one response with the newest state, however much happened meanwhile.
//! Per type one response is outstanding at a time, so what a connection holds is bounded by
//! the number of names.
//!
//! Order matters between types. A workload that names a policy which the client does not
//! have denies everything, so policies are sent before workloads, and taken away after them:
//! see [`Phase`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::resources::{Change, ResourceSet, VersionedResource};
use super::response::{NamedResource, SharedResponse};
use crate::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE, waypoint};

/// The most types that one connection may watch.
const MAX_TYPES: usize = 32;
/// The most names that one connection may ask for, per type.
const MAX_NAMES: usize = 1_000_000;
/// Past so many bytes a response is cut and the rest follows when it is acknowledged. Clients
/// take messages of up to 200 MiB; below that a response is never cut, because a client calls
/// itself ready after the first one.
const MAX_RESPONSE_BYTES: usize = 128 << 20;
/// A NACK's message is kept up to this many bytes.
const MAX_ERROR_BYTES: usize = 4096;
const WILDCARD: &str = "*";

/// Where a connection finds its resources: one consistent snapshot.
pub trait ResourceSource: Send + Sync {
    /// The resources of a type that this client may see; none if the type is unknown.
    fn resources(&self, type_url: &str) -> Option<&ResourceSet>;

    /// What to call this snapshot in `system_version_info`.
    fn version(&self) -> String;
}

/// Which half of a type's changes a [`Phase`] sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// New and changed resources.
    Updates,
    /// Names that are gone.
    Removals,
    /// Both in one response.
    All,
}

/// A step of a push. A later step waits until an earlier one has nothing left to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The type.
    pub type_url: &'static str,
    /// Which part of its changes.
    pub part: Part,
}

/// Policies come before the workloads that name them and go after them.
pub const PUSH_ORDER: &[Phase] = &[
    updates(AUTHORIZATION_TYPE),
    all(ADDRESS_TYPE),
    removals(AUTHORIZATION_TYPE),
    all(ENROLMENT_TYPE),
];

/// For waypoints: what is referred to comes before what refers to it, and goes after it. So
/// a route that is moved from one service to another never leads nowhere, though the first
/// is deleted at the same moment.
pub const WAYPOINT_PUSH_ORDER: &[Phase] = &[
    updates(AUTHORIZATION_TYPE),
    updates(waypoint::SETTINGS_TYPE),
    updates(waypoint::WAYPOINT_TYPE),
    updates(waypoint::SECRET_TYPE),
    updates(waypoint::PROVIDER_TYPE),
    updates(waypoint::REQUEST_AUTHENTICATION_TYPE),
    updates(waypoint::AUTHORIZATION_POLICY_TYPE),
    updates(waypoint::TELEMETRY_TYPE),
    updates(ADDRESS_TYPE),
    updates(waypoint::TRAFFIC_POLICY_TYPE),
    updates(waypoint::BACKEND_TLS_TYPE),
    updates(waypoint::ROUTE_TYPE),
    updates(waypoint::SERVICE_TYPE),
    removals(waypoint::SERVICE_TYPE),
    removals(waypoint::ROUTE_TYPE),
    removals(waypoint::BACKEND_TLS_TYPE),
    removals(waypoint::TRAFFIC_POLICY_TYPE),
    removals(ADDRESS_TYPE),
    removals(waypoint::TELEMETRY_TYPE),
    removals(waypoint::AUTHORIZATION_POLICY_TYPE),
    removals(waypoint::REQUEST_AUTHENTICATION_TYPE),
    removals(waypoint::PROVIDER_TYPE),
    removals(waypoint::SECRET_TYPE),
    removals(waypoint::WAYPOINT_TYPE),
    removals(waypoint::SETTINGS_TYPE),
    removals(AUTHORIZATION_TYPE),
];

const fn updates(type_url: &'static str) -> Phase {
    Phase {
        type_url,
        part: Part::Updates,
    }
}

const fn removals(type_url: &'static str) -> Phase {
    Phase {
        type_url,
        part: Part::Removals,
    }
}

const fn all(type_url: &'static str) -> Phase {
    Phase {
        type_url,
        part: Part::All,
    }
}

/// What a request meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The first request for a type, or a change of what is asked for.
    Subscribed,
    /// The outstanding response was taken.
    Acknowledged,
    /// The outstanding response was taken in part; the client's words. Nothing is sent again.
    Rejected(String),
    /// An answer to a response that is not outstanding; ignored.
    Stale,
}

/// A request that the connection cannot go on after.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No type.
    #[error("the request names no type_url")]
    NoType,
    /// Too many types.
    #[error("more than {MAX_TYPES} types on one connection")]
    TooManyTypes,
    /// Too many names.
    #[error("more than {MAX_NAMES} names of type {0:?} on one connection")]
    TooManyNames(String),
}

/// How one type of a connection is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeStatus {
    /// The type.
    pub type_url: String,
    /// Whether all of it is asked for.
    pub wildcard: bool,
    /// How many names are asked for.
    pub names: usize,
    /// The snapshot last sent, if any.
    pub sent: Option<String>,
    /// The snapshot last acknowledged in full or in part, if any.
    pub acknowledged: Option<String>,
    /// Whether a response waits to be acknowledged.
    pub outstanding: bool,
    /// Changes that wait to be sent.
    pub pending: usize,
    /// How many responses were sent.
    pub responses: u64,
    /// How many of them were rejected in part.
    pub rejections: u64,
    /// What the client said at the last rejection, until it takes a response in full.
    pub last_error: Option<String>,
}

/// The state of one connection.
pub struct ServerState {
    source: Arc<dyn ResourceSource>,
    order: &'static [Phase],
    types: BTreeMap<String, Watch>,
    last_nonce: u64,
    max_response_bytes: usize,
}

#[derive(Default)]
struct Watch {
    /// What was last compared; the client has it, or it is pending.
    set: ResourceSet,
    wildcard: bool,
    names: BTreeSet<String>,
    /// All of `set` waits to be sent. Written out, that would be megabytes for each client of
    /// a large mesh that has connected and waits for its turn.
    everything: bool,
    /// What else waits; nothing if `everything` does.
    updates: BTreeMap<Arc<str>, Arc<VersionedResource>>,
    removals: BTreeSet<Arc<str>>,
    /// The subscription is to be answered, even if there is nothing to say.
    unanswered: bool,
    outstanding: Option<Outstanding>,
    sent: Option<String>,
    acknowledged: Option<String>,
    responses: u64,
    rejections: u64,
    last_error: Option<String>,
}

struct Outstanding {
    nonce: String,
    version: String,
}

impl ServerState {
    /// A new connection, which pushes in [`PUSH_ORDER`]. `source` is already filtered for the
    /// client.
    pub fn new(source: Arc<dyn ResourceSource>) -> Self {
        Self {
            source,
            order: PUSH_ORDER,
            types: BTreeMap::new(),
            last_nonce: 0,
            max_response_bytes: MAX_RESPONSE_BYTES,
        }
    }

    /// Pushes in `order` instead. Types that it does not know depend on nothing.
    #[must_use]
    pub fn with_order(mut self, order: &'static [Phase]) -> Self {
        self.order = order;
        self
    }

    /// Responses are cut past this many bytes of names and bodies.
    #[must_use]
    pub fn with_max_response_bytes(mut self, bytes: usize) -> Self {
        self.max_response_bytes = bytes;
        self
    }

    /// There is a newer snapshot: folds what is different into what is to be sent.
    pub fn update(&mut self, source: Arc<dyn ResourceSource>) {
        let empty = ResourceSet::default();
        for (type_url, watch) in &mut self.types {
            watch.fold(source.resources(type_url).unwrap_or(&empty));
        }
        self.source = source;
    }

    /// Takes a request. Afterwards [`Self::next_response`] may have something to send.
    ///
    /// # Errors
    /// [`RequestError`]; the connection is then to be closed.
    pub fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Outcome, RequestError> {
        let type_url = request.type_url.as_str();
        if type_url.is_empty() {
            return Err(RequestError::NoType);
        }
        let set = self.source.resources(type_url).cloned().unwrap_or_default();
        let Some(watch) = self.types.get_mut(type_url) else {
            if self.types.len() >= MAX_TYPES {
                return Err(RequestError::TooManyTypes);
            }
            let mut watch = Watch {
                set,
                ..Watch::default()
            };
            watch.begin(&request)?;
            self.types.insert(request.type_url, watch);
            return Ok(Outcome::Subscribed);
        };
        let changed = watch.change(&request)?;
        if request.response_nonce.is_empty() {
            return Ok(if changed {
                Outcome::Subscribed
            } else {
                Outcome::Stale
            });
        }
        match watch
            .outstanding
            .take_if(|sent| sent.nonce == request.response_nonce)
        {
            None => Ok(Outcome::Stale),
            Some(sent) => {
                watch.acknowledged = Some(sent.version);
                watch.last_error = request
                    .error_detail
                    .map(|status| truncated(status.message, MAX_ERROR_BYTES));
                Ok(match &watch.last_error {
                    None => Outcome::Acknowledged,
                    Some(message) => {
                        watch.rejections += 1;
                        Outcome::Rejected(message.clone())
                    }
                })
            }
        }
    }

    /// The next response to send, if one may be sent now. To be called until there is none,
    /// after each request and each update.
    pub fn next_response(&mut self) -> Option<DeltaDiscoveryResponse> {
        self.next_shared().map(SharedResponse::into_message)
    }

    /// As [`Self::next_response`], without copies of the resources.
    pub fn next_shared(&mut self) -> Option<SharedResponse> {
        let (type_url, part) = self.next_phase()?;
        self.last_nonce += 1;
        let nonce = self.last_nonce.to_string();
        let version = self.source.version();
        let watch = self.types.get_mut(&type_url)?;
        let (resources, removed) = watch.take(part, &type_url, self.max_response_bytes);
        watch.outstanding = Some(Outstanding {
            nonce: nonce.clone(),
            version: version.clone(),
        });
        watch.sent = Some(version.clone());
        watch.responses += 1;
        Some(SharedResponse {
            version,
            type_url,
            nonce,
            resources,
            removed,
        })
    }

    /// How many resources and names [`Self::next_response`] would carry, if it may send now.
    pub fn next_size(&self) -> Option<usize> {
        let (type_url, part) = self.next_phase()?;
        Some(self.types.get(&type_url)?.size(part))
    }

    /// Whether the client has acknowledged everything that it is to know.
    pub fn is_synced(&self) -> bool {
        self.types
            .values()
            .all(|watch| watch.outstanding.is_none() && !watch.has(Part::All))
    }

    /// Whether a response waits to be acknowledged.
    pub fn awaits_acknowledgement(&self) -> bool {
        self.types.values().any(|watch| watch.outstanding.is_some())
    }

    /// How each type is doing.
    pub fn status(&self) -> Vec<TypeStatus> {
        self.types
            .iter()
            .map(|(type_url, watch)| TypeStatus {
                type_url: type_url.clone(),
                wildcard: watch.wildcard,
                names: watch.names.len(),
                sent: watch.sent.clone(),
                acknowledged: watch.acknowledged.clone(),
                outstanding: watch.outstanding.is_some(),
                pending: watch.size(Part::All),
                responses: watch.responses,
                rejections: watch.rejections,
                last_error: watch.last_error.clone(),
            })
            .collect()
    }

    /// The first phase with something to send, unless its type has a response outstanding:
    /// later phases wait for that too.
    fn next_phase(&self) -> Option<(String, Part)> {
        for Phase { type_url, part } in self.order {
            if let Some(watch) = self.types.get(*type_url)
                && watch.has(*part)
            {
                let free = watch.outstanding.is_none();
                return free.then(|| ((*type_url).to_owned(), *part));
            }
        }
        // Types that the order does not know depend on nothing.
        self.types
            .iter()
            .filter(|(type_url, _)| self.order.iter().all(|phase| phase.type_url != *type_url))
            .find(|(_, watch)| watch.outstanding.is_none() && watch.has(Part::All))
            .map(|(type_url, _)| (type_url.clone(), Part::All))
    }
}

impl Watch {
    /// The first request for this type on this connection. A nonce in it comes from an earlier
    /// connection and says nothing.
    fn begin(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), RequestError> {
        self.unanswered = true;
        // An empty first request asks for all (xDS, wildcard subscriptions).
        if request.resource_names_subscribe.is_empty() {
            self.wildcard = true;
            self.send_all();
        }
        // Subscribing to and unsubscribing from `*` at once is how Istio's on-demand clients
        // ask for nothing yet.
        self.change(request)?;
        let claimed = &request.initial_resource_versions;
        if self.everything && !claimed.is_empty() {
            self.everything = false;
            let of_set = self.set.iter().filter(|(name, resource)| {
                claimed.get(&***name).map(String::as_str) != Some(resource.version())
            });
            self.updates = of_set
                .map(|(name, resource)| (name.clone(), resource.clone()))
                .collect();
        }
        for (name, version) in claimed {
            match self.set.get(name) {
                Some(resource) if resource.version() == version => {
                    self.updates.remove(&**name);
                }
                Some(_) => {}
                None => {
                    self.removals.insert(name.as_str().into());
                }
            }
        }
        Ok(())
    }

    /// A later request. Returns whether it changes what is asked for.
    fn change(&mut self, request: &DeltaDiscoveryRequest) -> Result<bool, RequestError> {
        for name in &request.resource_names_subscribe {
            self.subscribe(name, &request.type_url)?;
        }
        for name in &request.resource_names_unsubscribe {
            self.unsubscribe(name);
        }
        Ok(!request.resource_names_subscribe.is_empty()
            || !request.resource_names_unsubscribe.is_empty())
    }

    fn subscribe(&mut self, name: &str, type_url: &str) -> Result<(), RequestError> {
        if name == WILDCARD {
            if !self.wildcard {
                self.wildcard = true;
                self.send_all();
            }
            self.unanswered = true;
            return Ok(());
        }
        if self.names.len() >= MAX_NAMES {
            return Err(RequestError::TooManyNames(type_url.to_owned()));
        }
        self.names.insert(name.to_owned());
        // Answered even if the client has it: it may have dropped it (xDS, incremental).
        self.send(name);
        Ok(())
    }

    fn unsubscribe(&mut self, name: &str) {
        if name == WILDCARD {
            self.wildcard = false;
            self.retain_asked_for();
            return;
        }
        self.names.remove(name);
        if self.wildcard {
            // It is still asked for by the wildcard, but the client may have dropped it.
            self.send(name);
        } else {
            self.updates.remove(name);
            self.removals.remove(name);
        }
    }

    fn send(&mut self, name: &str) {
        match self.set.get_key_value(name) {
            Some((name, resource)) => {
                self.removals.remove(name);
                if !self.everything {
                    self.updates.insert(name.clone(), resource.clone());
                }
            }
            None => {
                self.updates.remove(name);
                self.removals.insert(name.into());
            }
        }
    }

    fn send_all(&mut self) {
        let set = &self.set;
        self.removals.retain(|name| set.get(name).is_none());
        self.updates.clear();
        self.everything = true;
    }

    fn retain_asked_for(&mut self) {
        let names = &self.names;
        if std::mem::take(&mut self.everything) {
            let of_set = names.iter().filter_map(|name| self.set.get_key_value(name));
            self.updates = of_set
                .map(|(name, resource)| (name.clone(), resource.clone()))
                .collect();
        }
        self.updates.retain(|name, _| names.contains(&**name));
        self.removals.retain(|name| names.contains(&**name));
    }

    fn fold(&mut self, new: &ResourceSet) {
        if new.ptr_eq(&self.set) {
            return;
        }
        let base = std::mem::replace(&mut self.set, new.clone());
        for change in new.changes_since(&base) {
            let name = match &change {
                Change::Updated(name, _) | Change::Removed(name) => name,
            };
            if !self.wildcard && !self.names.contains(&**name) {
                continue;
            }
            match change {
                Change::Updated(name, resource) => {
                    self.removals.remove(&name);
                    if !self.everything {
                        self.updates.insert(name, resource);
                    }
                }
                Change::Removed(name) => {
                    self.updates.remove(&name);
                    self.removals.insert(name);
                }
            }
        }
    }

    fn has(&self, part: Part) -> bool {
        (part != Part::Removals && self.unanswered) || self.size(part) > 0
    }

    /// How much is pending.
    fn size(&self, part: Part) -> usize {
        let updates = match self.everything {
            true => self.set.len(),
            false => self.updates.len(),
        };
        match part {
            Part::Updates => updates,
            Part::Removals => self.removals.len(),
            Part::All => updates + self.removals.len(),
        }
    }

    /// Takes what one response may hold out of what is pending.
    fn take(
        &mut self,
        part: Part,
        type_url: &str,
        max_bytes: usize,
    ) -> (Vec<NamedResource>, Vec<String>) {
        let mut bytes = 0;
        let mut resources = Vec::new();
        let mut removed = Vec::new();
        if part != Part::Removals {
            self.unanswered = false;
            let cost = |name: &str, resource: &VersionedResource| {
                name.len() + resource.body().len() + type_url.len() + 48
            };
            if std::mem::take(&mut self.everything) {
                resources.reserve(self.set.len());
                let mut rest = self.set.iter().peekable();
                while let Some(&(name, resource)) = rest.peek() {
                    let cost = cost(name, resource);
                    if bytes > 0 && bytes + cost > max_bytes {
                        self.updates = rest
                            .map(|(name, resource)| (name.clone(), resource.clone()))
                            .collect();
                        return (resources, removed);
                    }
                    bytes += cost;
                    resources.push((name.clone(), resource.clone()));
                    rest.next();
                }
            }
            while let Some(next) = self.updates.first_entry() {
                let cost = cost(next.key(), next.get());
                if bytes > 0 && bytes + cost > max_bytes {
                    return (resources, removed);
                }
                bytes += cost;
                resources.push(next.remove_entry());
            }
        }
        if part != Part::Updates {
            while let Some(name) = self.removals.first() {
                let cost = name.len() + 4;
                if bytes > 0 && bytes + cost > max_bytes {
                    break;
                }
                bytes += cost;
                removed.extend(self.removals.pop_first().map(|name| name.to_string()));
            }
        }
        (resources, removed)
    }
}

fn truncated(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
    }
    text
}
