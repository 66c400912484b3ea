//! What a client says and remembers. No sockets, no clock.
//!
//! The client remembers the version of every resource it has accepted, through losses of the
//! connection, and claims them when it comes back; so the server sends what has changed and
//! names what has gone. A resource that was rejected is claimed with an empty version,
//! which no resource has: the server will send it again, or say that it is gone. (Istio's
//! ztunnel does not claim it at all, and never hears of its removal.)

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

use super::{Rejected, Resource};
use crate::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};

/// google.rpc.Code INVALID_ARGUMENT, which a NACK carries.
const INVALID_ARGUMENT: i32 = 3;
/// At most so many rejections are spelled out in a NACK; the count of all is always there.
const MAX_REASONS: usize = 20;
/// A version that no resource has.
const REJECTED_VERSION: &str = "";
const WILDCARD: &str = "*";

/// Which resources of a type are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subscription {
    /// All.
    Wildcard,
    /// These, and whatever [`DeltaState::subscribe`] adds.
    OnDemand(BTreeSet<String>),
}

/// The state of a client across connections.
#[derive(Debug)]
pub struct DeltaState {
    node: Node,
    /// In the order in which they are asked for.
    types: Vec<TypeState>,
    connected: bool,
}

#[derive(Debug)]
struct TypeState {
    url: String,
    subscription: Subscription,
    /// Name to version of all that the handler holds or has rejected.
    known: HashMap<Box<str>, Box<str>>,
    acknowledged: bool,
}

/// What came of a response.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// The answer to send: an ACK or a NACK.
    pub request: DeltaDiscoveryRequest,
    /// What was rejected; empty for an ACK.
    pub rejected: Vec<Rejected>,
    /// How many resources came.
    pub updates: usize,
    /// How many names were removed.
    pub removed: usize,
}

/// A response that breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// A type that was never asked for.
    #[error("the server sent resources of type {0:?}, which was never asked for")]
    UnknownType(String),
}

impl DeltaState {
    /// A client of these types, asked for in this order. Of several entries of one type the
    /// first counts.
    pub fn new(node: Node, types: impl IntoIterator<Item = (String, Subscription)>) -> Self {
        let mut list: Vec<TypeState> = Vec::new();
        for (url, subscription) in types {
            if !list.iter().any(|known| known.url == url) {
                list.push(TypeState {
                    url,
                    subscription,
                    known: HashMap::new(),
                    acknowledged: false,
                });
            }
        }
        Self {
            node,
            types: list,
            connected: false,
        }
    }

    /// A new connection: the requests that open it. The first carries the node.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.connected = true;
        let mut node = Some(self.node.clone());
        self.types
            .iter()
            .map(|state| DeltaDiscoveryRequest {
                node: node.take(),
                ..state.initial_request()
            })
            .collect()
    }

    /// The connection is gone.
    pub fn disconnect(&mut self) {
        self.connected = false;
    }

    /// Whether every type has been answered and acknowledged once, on this connection or an
    /// earlier one.
    pub fn is_ready(&self) -> bool {
        self.types.iter().all(|state| state.acknowledged)
    }

    /// Takes a response, has `apply` use the well-formed resources in it, and says what to
    /// answer. A response in part unusable is a NACK, of which the good part is kept.
    ///
    /// # Errors
    /// [`ResponseError`] if the server does not speak the protocol; the connection is then of
    /// no use.
    pub fn response(
        &mut self,
        response: DeltaDiscoveryResponse,
        apply: impl FnOnce(Vec<Resource>, Vec<String>) -> Vec<Rejected>,
    ) -> Result<Applied, ResponseError> {
        let DeltaDiscoveryResponse {
            resources,
            type_url,
            nonce,
            removed_resources,
            ..
        } = response;
        let state = self
            .types
            .iter_mut()
            .find(|state| state.url == type_url)
            .ok_or(ResponseError::UnknownType(type_url))?;
        let (updates, mut rejected) = well_formed(resources, &state.url);
        let counts = (updates.len() + rejected.len(), removed_resources.len());

        for resource in &updates {
            state.known.insert(
                resource.name.as_str().into(),
                resource.version.as_str().into(),
            );
        }
        for name in &removed_resources {
            state.known.remove(name.as_str());
        }
        rejected.extend(apply(updates, removed_resources));
        for Rejected { name, .. } in &rejected {
            if !name.is_empty() {
                state
                    .known
                    .insert(name.as_str().into(), REJECTED_VERSION.into());
            }
        }
        state.acknowledged = true;
        Ok(Applied {
            request: DeltaDiscoveryRequest {
                type_url: state.url.clone(),
                response_nonce: nonce,
                error_detail: error_detail(&rejected),
                ..DeltaDiscoveryRequest::default()
            },
            rejected,
            updates: counts.0,
            removed: counts.1,
        })
    }

    /// Asks for more names of a type that is watched on demand. Returns what to send, if
    /// there is a connection and anything is new; without one the names are asked for when
    /// there is.
    pub fn subscribe(
        &mut self,
        type_url: &str,
        names: impl IntoIterator<Item = String>,
    ) -> Option<DeltaDiscoveryRequest> {
        let connected = self.connected;
        let (state, wanted) = self.on_demand(type_url)?;
        let new: Vec<String> = names
            .into_iter()
            .filter(|name| name != WILDCARD && wanted.insert(name.clone()))
            .collect();
        (connected && !new.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: state,
            resource_names_subscribe: new,
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Asks no more for these names. The server does not answer that; the caller forgets
    /// the resources itself.
    pub fn unsubscribe<'n>(
        &mut self,
        type_url: &str,
        names: impl IntoIterator<Item = &'n str>,
    ) -> Option<DeltaDiscoveryRequest> {
        let connected = self.connected;
        let state = self.types.iter_mut().find(|state| state.url == type_url)?;
        let Subscription::OnDemand(wanted) = &mut state.subscription else {
            return None;
        };
        let mut gone = Vec::new();
        for name in names {
            // Even if it is not asked for: an answer that was under way may have brought it after
            // an earlier call.
            state.known.remove(name);
            if wanted.remove(name) {
                gone.push(name.to_owned());
            }
        }
        (connected && !gone.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: state.url.clone(),
            resource_names_unsubscribe: gone,
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// The names and versions that the client would claim for a type.
    pub fn claims(&self, type_url: &str) -> Vec<(String, String)> {
        let mut claims: Vec<_> = self
            .types
            .iter()
            .filter(|state| state.url == type_url)
            .flat_map(|state| &state.known)
            .map(|(name, version)| (name.to_string(), version.to_string()))
            .collect();
        claims.sort();
        claims
    }

    fn on_demand(&mut self, type_url: &str) -> Option<(String, &mut BTreeSet<String>)> {
        let state = self.types.iter_mut().find(|state| state.url == type_url)?;
        match &mut state.subscription {
            Subscription::Wildcard => None,
            Subscription::OnDemand(wanted) => Some((state.url.clone(), wanted)),
        }
    }
}

impl TypeState {
    fn initial_request(&self) -> DeltaDiscoveryRequest {
        let (subscribe, unsubscribe) = match &self.subscription {
            Subscription::Wildcard => (vec![], vec![]),
            // An empty first request would mean "all" (xDS, wildcard subscriptions).
            Subscription::OnDemand(names) if names.is_empty() => {
                (vec![WILDCARD.to_owned()], vec![WILDCARD.to_owned()])
            }
            Subscription::OnDemand(names) => (names.iter().cloned().collect(), vec![]),
        };
        DeltaDiscoveryRequest {
            type_url: self.url.clone(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: self
                .known
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// Splits what came into resources that can be handed on and those that cannot even be
/// that.
fn well_formed(
    resources: Vec<crate::proto::xds::Resource>,
    type_url: &str,
) -> (Vec<Resource>, Vec<Rejected>) {
    let mut good = Vec::with_capacity(resources.len());
    let mut bad = Vec::new();
    for resource in resources {
        let reason = match &resource.resource {
            _ if resource.name.is_empty() => "has no name".to_owned(),
            None => "has no body".to_owned(),
            Some(any) if any.type_url != type_url => {
                format!("has a body of type {:?}", any.type_url)
            }
            Some(_) => String::new(),
        };
        match resource.resource {
            Some(any) if reason.is_empty() => good.push(Resource {
                name: resource.name,
                version: resource.version,
                aliases: resource.aliases,
                body: Bytes::from(any.value),
            }),
            _ => bad.push(Rejected {
                name: resource.name,
                reason,
            }),
        }
    }
    (good, bad)
}

fn error_detail(rejected: &[Rejected]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let mut reasons: Vec<String> = rejected
        .iter()
        .take(MAX_REASONS)
        .map(|Rejected { name, reason }| format!("{name}: {reason}"))
        .collect();
    if rejected.len() > MAX_REASONS {
        reasons.push(format!("and {} more", rejected.len() - MAX_REASONS));
    }
    Some(Status {
        code: INVALID_ARGUMENT,
        message: reasons.join("; "),
        details: vec![],
    })
}
