//! An `AdmissionReview` (admission.k8s.io/v1) and the answer to it. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::{FieldError, Finding, Object, Origin};
use crate::source::decode::{Decoded, decode};

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Errors that are told; an author mends one after the other anyway.
const MAX_ERRORS: usize = 10;
/// The API server cuts longer warnings off.
const MAX_WARNING_BYTES: usize = 512;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    request: Option<Request>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
}

/// What the API server asks.
pub(super) struct Question {
    request: Request,
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Request {
            operation,
            namespace,
            name,
            object,
            ..
        } = &self.request;
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or("-");
        write!(f, "{operation} {kind} {namespace}/{name}")
    }
}

impl Question {
    pub(super) fn parse(body: &[u8]) -> Result<Self, String> {
        let review: Review =
            serde_json::from_slice(body).map_err(|error| format!("not an {KIND}: {error}"))?;
        if review.api_version != API_VERSION || review.kind != KIND {
            return Err(format!("not an {KIND} of {API_VERSION}"));
        }
        let request = review.request.ok_or(format!("an {KIND} without request"))?;
        Ok(Self { request })
    }

    /// Whether the object may be stored, by itself; with it, where it could be read.
    pub(super) fn judge(&self) -> (Answer, Option<Object>) {
        let Request {
            operation,
            namespace,
            object,
            old_object,
            ..
        } = &self.request;
        // What ends has to be able to: its finalizers are removed by updates.
        let ends = object.pointer("/metadata/deletionTimestamp").is_some();
        if object.is_null() || ends || !matches!(operation.as_str(), "CREATE" | "UPDATE") {
            return (Answer::default(), None);
        }
        let document = named(object.clone(), namespace);
        let Some((_, decoded)) = decode(&document, &Origin::NONE).pop() else {
            return (Answer::default(), None);
        };
        let (object_read, errors) = match decoded {
            Decoded::Object { object, errors } => (Some(object), errors),
            Decoded::Invalid { errors, .. } => (None, errors),
            Decoded::NotOurs | Decoded::Unknown { .. } => return (Answer::default(), None),
        };
        let mut answer = Answer::default();
        if errors.is_empty() {
            return (answer, object_read);
        }
        // An object that was stored before we were asked can still be labelled and owned.
        if operation == "UPDATE" && old_object.get("spec") == object.get("spec") {
            for error in &errors {
                answer.push_warning(in_words(error));
            }
            return (answer, None);
        }
        let told: Vec<_> = errors.iter().take(MAX_ERRORS).map(in_words).collect();
        answer.refused = Some(told.join("; "));
        (answer, None)
    }
}

fn in_words(error: &FieldError) -> String {
    match error.path.to_string() {
        path if path.is_empty() => error.message.clone(),
        path => format!("{path}: {}", error.message),
    }
}

/// An object that is being created need not have its name yet, nor say its namespace.
fn named(mut object: Value, namespace: &str) -> Value {
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return object;
    };
    let is_set = |value: Option<&Value>| {
        value
            .and_then(Value::as_str)
            .is_some_and(|text| !text.is_empty())
    };
    if !is_set(metadata.get("name"))
        && let Some(prefix) = metadata.get("generateName").and_then(Value::as_str)
    {
        let name = format!("{prefix}x");
        metadata.insert("name".into(), name.into());
    }
    if !is_set(metadata.get("namespace")) && !namespace.is_empty() {
        metadata.insert("namespace".into(), namespace.into());
    }
    object
}

/// What we answer.
#[derive(Debug, Default)]
pub(super) struct Answer {
    refused: Option<String>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Envelope<'a> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'a>,
}

#[derive(Serialize)]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [String],
}

#[derive(Serialize)]
struct Status<'a> {
    code: u16,
    reason: &'static str,
    message: &'a str,
}

impl Answer {
    pub(super) fn allowed(&self) -> bool {
        self.refused.is_none()
    }

    pub(super) fn warn(&mut self, finding: &Finding) {
        let code = finding.code.as_str();
        self.push_warning(match finding.field.as_str() {
            "" => format!("[{code}] {}", finding.message),
            field => format!("[{code}] {field}: {}", finding.message),
        });
    }

    fn push_warning(&mut self, mut text: String) {
        if text.len() > MAX_WARNING_BYTES {
            let end = (0..=MAX_WARNING_BYTES)
                .rev()
                .find(|at| text.is_char_boundary(*at))
                .unwrap_or_default();
            text.truncate(end);
        }
        self.warnings.push(text);
    }

    pub(super) fn encode(&self, question: &Question) -> Result<Vec<u8>, String> {
        let status = self.refused.as_deref().map(|message| Status {
            code: 422,
            reason: "Invalid",
            message,
        });
        let envelope = Envelope {
            api_version: API_VERSION,
            kind: KIND,
            response: Response {
                uid: &question.request.uid,
                allowed: self.allowed(),
                status,
                warnings: &self.warnings,
            },
        };
        serde_json::to_vec(&envelope).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn question(operation: &str, object: Value, old: Value) -> Question {
        let review = json!({
            "apiVersion": API_VERSION, "kind": KIND,
            "request": {
                "uid": "u-1", "operation": operation, "namespace": "n", "name": "p",
                "object": object, "oldObject": old,
            },
        });
        Question::parse(review.to_string().as_bytes()).expect("a review")
    }

    fn policy(ports: Value, more: Value) -> Value {
        let mut object = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {"rules": [{"to": [{"operation": {"ports": ports}}]}]},
        });
        let metadata = object["metadata"].as_object_mut().expect("a map");
        for (key, value) in more.as_object().expect("a map") {
            metadata.insert(key.clone(), value.clone());
        }
        object
    }

    fn answer(question: &Question) -> Value {
        let (answer, _) = question.judge();
        serde_json::from_slice(&answer.encode(question).expect("JSON")).expect("JSON")
    }

    #[test]
    fn what_could_not_be_in_force_is_refused_by_field() {
        let asked = question("CREATE", policy(json!(["99999"]), json!({})), Value::Null);
        let answer = answer(&asked);
        assert_eq!(answer["apiVersion"], API_VERSION);
        let response = &answer["response"];
        assert_eq!(
            (&response["uid"], &response["allowed"]),
            (&json!("u-1"), &json!(false))
        );
        let message = response["status"]["message"].as_str().expect("text");
        assert!(
            message.contains("spec.rules[0].to[0].operation.ports[0]"),
            "{message}"
        );
    }

    #[test]
    fn everything_else_passes() {
        let good = || policy(json!(["80"]), json!({}));
        let bad = || policy(json!(["x"]), json!({}));
        let without_name = json!({"name": null, "namespace": null, "generateName": "p-"});
        let ending = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        let foreign = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}});
        for (what, operation, object, old) in [
            ("good", "CREATE", good(), Value::Null),
            (
                "generated name",
                "CREATE",
                policy(json!(["80"]), without_name),
                Value::Null,
            ),
            ("ends", "UPDATE", policy(json!(["x"]), ending), good()),
            ("delete", "DELETE", Value::Null, bad()),
            ("connect", "CONNECT", bad(), Value::Null),
            (
                "label",
                "UPDATE",
                policy(json!(["x"]), json!({"labels": {"a": "b"}})),
                bad(),
            ),
            ("foreign", "CREATE", foreign, Value::Null),
        ] {
            let answer = answer(&question(operation, object, old));
            assert_eq!(answer["response"]["allowed"], true, "{what}: {answer}");
        }
        let changed = question("UPDATE", bad(), good());
        assert_eq!(answer(&changed)["response"]["allowed"], false);
    }

    #[test]
    fn what_is_no_review_is_said_so() {
        for body in [
            "",
            "{}",
            r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}"#,
            r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{"uid":"1"}}"#,
        ] {
            assert!(Question::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn a_long_warning_is_cut_between_characters() {
        let mut answer = Answer::default();
        answer.push_warning("ä".repeat(MAX_WARNING_BYTES));
        assert_eq!(answer.warnings[0].len(), MAX_WARNING_BYTES);
        answer.push_warning(format!("a{}", "ä".repeat(MAX_WARNING_BYTES)));
        assert_eq!(answer.warnings[1].len(), MAX_WARNING_BYTES - 1);
    }
}
