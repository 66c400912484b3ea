//! Hand-written exchanges, as data in `tests/xds_transcripts/`: what istiod says to our client,
//! and what Istio's ztunnel says to our server.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use adit_shared::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::xds::client::{DeltaState, Rejected, Subscription};
use adit_shared::xds::server::{Outcome, ResourceSource, ServerState};
use adit_shared::xds::{ResourceSet, VersionedResource};
use serde::Deserialize;

fn url(short: &str) -> String {
    match short {
        "Address" => ADDRESS_TYPE.into(),
        "Authorization" => AUTHORIZATION_TYPE.into(),
        "Enrolment" => ENROLMENT_TYPE.into(),
        other => format!("type.googleapis.com/{other}"),
    }
}

#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields, default)]
struct Request {
    r#type: String,
    node: bool,
    nonce: String,
    error: Option<String>,
    subscribe: Vec<String>,
    unsubscribe: Vec<String>,
    /// Name to version at the client, name to body at the server.
    has: BTreeMap<String, Option<String>>,
}

impl Request {
    fn message(&self, version: impl Fn(&str) -> String) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: self.node.then(Node::default),
            type_url: url(&self.r#type),
            resource_names_subscribe: self.subscribe.clone(),
            resource_names_unsubscribe: self.unsubscribe.clone(),
            initial_resource_versions: self
                .has
                .iter()
                .map(|(name, has)| {
                    let version = has.as_deref().map(&version).unwrap_or_default();
                    (name.clone(), version)
                })
                .collect(),
            response_nonce: self.nonce.clone(),
            error_detail: self.error.as_ref().map(|message| Status {
                code: 3,
                message: message.clone(),
                details: vec![],
            }),
        }
    }
}

#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields, default)]
struct Response {
    r#type: String,
    nonce: String,
    /// Name to version; what the server said.
    resources: BTreeMap<String, String>,
    /// Names; what our server is to say.
    updates: Vec<String>,
    removed: Vec<String>,
    body_type: Option<String>,
}

#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields, default)]
struct Applied {
    updates: Vec<String>,
    removed: Vec<String>,
}

#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields, default)]
struct Step {
    note: String,
    connect: Option<Vec<Request>>,
    response: Option<Response>,
    reject: BTreeSet<String>,
    applied: Applied,
    request: Option<Request>,
    fails: bool,
    ready: Option<bool>,
    publish: Option<BTreeMap<String, BTreeMap<String, String>>>,
    outcome: Option<String>,
    responses: Option<Vec<Response>>,
}

fn transcript(name: &str) -> Vec<Step> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/xds_transcripts");
    let text = std::fs::read_to_string(path.join(name)).expect("the transcript");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn client_wildcard() {
    let mut client = DeltaState::new(
        Node::default(),
        [AUTHORIZATION_TYPE, ADDRESS_TYPE].map(|url| (url.to_owned(), Subscription::Wildcard)),
    );
    for (number, step) in transcript("client_wildcard.json").into_iter().enumerate() {
        let at = format!("step {number} {}", step.note);
        if let Some(expected) = &step.connect {
            let expected: Vec<_> = expected
                .iter()
                .map(|request| request.message(str::to_owned))
                .collect();
            client.disconnect();
            assert_eq!(client.connect(), expected, "{at}");
        }
        if let Some(response) = step.response {
            let body_type = response.body_type.as_ref().unwrap_or(&response.r#type);
            let message = DeltaDiscoveryResponse {
                system_version_info: String::new(),
                type_url: url(&response.r#type),
                nonce: response.nonce,
                resources: response
                    .resources
                    .iter()
                    .map(|(name, version)| adit_shared::proto::xds::Resource {
                        name: name.clone(),
                        version: version.clone(),
                        aliases: vec![],
                        resource: Some(prost_types::Any {
                            type_url: url(body_type),
                            value: vec![],
                        }),
                    })
                    .collect(),
                removed_resources: response.removed,
            };
            let mut applied = Applied::default();
            let answer = client.response(message, |updates, removed| {
                applied.updates = updates.into_iter().map(|r| r.name).collect();
                applied.removed = removed;
                step.reject
                    .iter()
                    .map(|name| Rejected {
                        name: name.clone(),
                        reason: "rejected".into(),
                    })
                    .collect()
            });
            assert_eq!(answer.is_err(), step.fails, "{at}");
            assert_eq!(applied.updates, step.applied.updates, "{at}");
            assert_eq!(applied.removed, step.applied.removed, "{at}");
            if let (Ok(answer), Some(expected)) = (answer, &step.request) {
                assert_eq!(answer.request, expected.message(str::to_owned), "{at}");
            }
        }
        if let Some(ready) = step.ready {
            assert_eq!(client.is_ready(), ready, "{at}");
        }
    }
}

#[derive(Clone, Default)]
struct Source(u64, BTreeMap<String, ResourceSet>);

impl ResourceSource for Source {
    fn resources(&self, type_url: &str) -> Option<&ResourceSet> {
        self.1.get(type_url)
    }

    fn version(&self) -> String {
        self.0.to_string()
    }
}

fn server(name: &str) {
    let version = |body: &str| VersionedResource::new(body.to_owned()).version().to_owned();
    let mut source = Source::default();
    let mut server = ServerState::new(Arc::new(source.clone()));
    for (number, step) in transcript(name).into_iter().enumerate() {
        let at = format!("{name} step {number} {}", step.note);
        if let Some(types) = step.publish {
            source.0 += 1;
            for (kind, bodies) in types {
                let set = source.1.entry(url(&kind)).or_default();
                set.replace(
                    bodies
                        .into_iter()
                        .map(|(name, body)| (name, VersionedResource::new(body))),
                );
            }
            server.update(Arc::new(source.clone()));
        }
        if let Some(request) = step.request {
            let outcome = match server.request(request.message(version)).expect("legal") {
                Outcome::Rejected(message) => format!("Rejected: {message}"),
                outcome => format!("{outcome:?}"),
            };
            assert_eq!(Some(outcome), step.outcome, "{at}");
        }
        let mut sent = vec![];
        while let Some(response) = server.next_response() {
            assert_eq!(response.system_version_info, source.0.to_string());
            let updates: Vec<_> = response.resources.iter().map(|r| r.name.clone()).collect();
            sent.push((
                response.type_url,
                response.nonce,
                updates,
                response.removed_resources,
            ));
        }
        if let Some(expected) = step.responses {
            let expected: Vec<_> = expected
                .into_iter()
                .map(|r| (url(&r.r#type), r.nonce, r.updates, r.removed))
                .collect();
            assert_eq!(sent, expected, "{at}");
        }
    }
}

#[test]
fn server_for_istios_ztunnel() {
    server("server_ztunnel.json");
}

#[test]
fn server_for_a_client_that_comes_back() {
    server("server_reconnect.json");
}

#[test]
fn server_for_a_client_on_demand() {
    server("server_on_demand.json");
}
