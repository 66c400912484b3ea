//! The resources as the control plane sent them, for the dump: what the request path reads
//! has been compiled from them and cannot be turned back.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::proto::waypoint as pb;
use adit_shared::xds::client::{Handler, Rejected, Resource};
use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// The last version of every resource of the waypoint's own types.
#[derive(Debug, Default)]
pub struct Received(Mutex<BTreeMap<&'static str, BTreeMap<String, Kept>>>);

#[derive(Debug)]
struct Kept {
    body: Bytes,
    /// Why it could not be used as it is.
    rejected: Option<String>,
}

impl Received {
    /// A handler that passes on to `inner` and keeps what it passes on.
    pub fn keep(
        self: &Arc<Self>,
        type_url: &'static str,
        inner: Arc<dyn Handler>,
    ) -> Arc<dyn Handler> {
        Arc::new(Keeping {
            type_url,
            inner,
            received: self.clone(),
        })
    }

    /// Everything, by type and name, in the order in which types are subscribed to.
    pub fn dump(&self) -> Value {
        let all = self.0.lock();
        let kinds = pb::TYPES.iter().filter_map(|type_url| {
            let kind = type_url.rsplit('.').next().unwrap_or(type_url);
            let resources = all.get(type_url)?;
            let shown = resources.iter().map(|(name, kept)| {
                let mut value = shown(type_url, &kept.body);
                value["resourceName"] = name.as_str().into();
                if let Some(reason) = &kept.rejected {
                    value["rejected"] = reason.as_str().into();
                }
                value
            });
            Some((kind.to_owned(), shown.collect()))
        });
        Value::Object(kinds.collect::<Map<_, _>>())
    }
}

struct Keeping {
    type_url: &'static str,
    inner: Arc<dyn Handler>,
    received: Arc<Received>,
}

impl Handler for Keeping {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let mut bodies: BTreeMap<String, Kept> = updates
            .iter()
            .map(|resource| {
                let kept = Kept {
                    // Of its own: a part of a response would hold all of it.
                    body: Bytes::copy_from_slice(&resource.body),
                    rejected: None,
                };
                (resource.name.clone(), kept)
            })
            .collect();
        let gone = removed.clone();
        let rejected = self.inner.apply(updates, removed);
        for problem in &rejected {
            if let Some(kept) = bodies.get_mut(&problem.name) {
                kept.rejected = Some(problem.reason.clone());
            }
        }
        let mut all = self.received.0.lock();
        let resources = all.entry(self.type_url).or_default();
        for name in &gone {
            resources.remove(name);
        }
        resources.extend(bodies);
        rejected
    }
}

fn shown(type_url: &str, body: &Bytes) -> Value {
    match type_url {
        pb::SETTINGS_TYPE => decoded::<pb::Settings>(body),
        pb::WAYPOINT_TYPE => decoded::<pb::Waypoint>(body),
        pb::PROVIDER_TYPE => decoded::<pb::Provider>(body),
        pb::REQUEST_AUTHENTICATION_TYPE => decoded::<pb::RequestAuthentication>(body),
        pb::AUTHORIZATION_POLICY_TYPE => decoded::<pb::AuthorizationPolicy>(body),
        pb::TELEMETRY_TYPE => decoded::<pb::Telemetry>(body),
        pb::SERVICE_TYPE => decoded::<pb::Service>(body),
        pb::TRAFFIC_POLICY_TYPE => decoded::<pb::TrafficPolicy>(body),
        pb::BACKEND_TLS_TYPE => decoded::<pb::BackendTls>(body),
        pb::ROUTE_TYPE => decoded::<pb::Route>(body),
        _ => json!({}),
    }
}

fn decoded<M: Message + Default + Serialize>(body: &Bytes) -> Value {
    match M::decode(body.clone()) {
        Ok(message) => match pruned(json!(message)) {
            Value::Object(fields) => Value::Object(fields),
            _ => json!({}),
        },
        Err(error) => json!({ "unreadable": error.to_string() }),
    }
}

/// Fields that say nothing are left out: a message has all of its own.
fn pruned(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields
                .into_iter()
                .map(|(name, value)| (name, pruned(value)));
            Value::Object(kept.filter(|(_, value)| says_something(value)).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(pruned).collect()),
        other => other,
    }
}

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Object(_) | Value::Bool(true) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Refusing;

    impl Handler for Refusing {
        fn apply(&self, updates: Vec<Resource>, _: Vec<String>) -> Vec<Rejected> {
            let bad = updates.into_iter().filter(|update| update.name == "bad");
            bad.map(|update| Rejected {
                name: update.name,
                reason: "no".into(),
            })
            .collect()
        }
    }

    fn resource(name: &str, route: &pb::Route) -> Resource {
        Resource {
            name: name.into(),
            version: String::new(),
            aliases: Vec::new(),
            body: route.encode_to_vec().into(),
        }
    }

    #[test]
    fn what_was_sent_is_shown_until_it_is_removed() {
        let received = Arc::new(Received::default());
        let handler = received.keep(pb::ROUTE_TYPE, Arc::new(Refusing));
        let rule = pb::HttpRule {
            request_timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 500_000_000,
            }),
            ..Default::default()
        };
        let rules = pb::HttpRules { rules: vec![rule] };
        let route = pb::Route {
            kind: Some(pb::route::Kind::Http(rules)),
            ..Default::default()
        };
        let updates = vec![resource("good", &route), resource("bad", &route)];
        assert_eq!(handler.apply(updates, Vec::new()).len(), 1);
        let kind = json!({"http": {"rules": [{"requestTimeout": "1.5s"}]}});
        let dump = received.dump();
        assert_eq!(
            dump["Route"],
            json!([
                {"kind": kind, "resourceName": "bad", "rejected": "no"},
                {"kind": kind, "resourceName": "good"},
            ])
        );
        handler.apply(Vec::new(), vec!["bad".into()]);
        assert_eq!(received.dump()["Route"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn enumerations_have_names() {
        let policy = pb::AuthorizationPolicy {
            action: pb::authorization_policy::Action::Deny.into(),
            ..Default::default()
        };
        let body = Bytes::from(policy.encode_to_vec());
        let shown = shown(pb::AUTHORIZATION_POLICY_TYPE, &body);
        assert_eq!(shown["action"], "DENY");
    }
}
