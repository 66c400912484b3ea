//! Envoy's `Check`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use adit_shared::identity::SpiffeId;
use adit_shared::proto::ext_authz as proto;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::provider::GrpcSettings;
use super::{
    Changes, CheckError, CheckInput, Decision, Denial, HeaderChange, Settings, is_protected,
};
use crate::client::{Dial, ServiceClient};

const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

pub(super) async fn check<D: Dial>(
    client: &ServiceClient<D>,
    of: &GrpcSettings,
    settings: &Settings,
    input: &CheckInput<'_>,
) -> Result<Decision, CheckError> {
    let message = request(of, settings, input);
    let answer: proto::CheckResponse = client.unary(PATH, HeaderMap::new(), &message).await?;
    decide(answer)
}

fn request(of: &GrpcSettings, settings: &Settings, input: &CheckInput<'_>) -> proto::CheckRequest {
    let parts = input.request;
    let mut headers = BTreeMap::new();
    let included = |name: &HeaderName| {
        // That one is ours to say.
        *name != PARTIAL_BODY
            && (of.include.is_empty() || of.include.iter().any(|m| m.matches(name)))
    };
    for name in parts.headers.keys().filter(|name| included(name)) {
        let mut joined = String::new();
        for value in parts.headers.get_all(name) {
            if !joined.is_empty() {
                joined.push(',');
            }
            joined.push_str(&String::from_utf8_lossy(value.as_bytes()));
        }
        headers.insert(name.as_str().to_owned(), joined);
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    // As Envoy does: the pseudo-headers are there, too, unless there is a choice.
    if of.include.is_empty() {
        for (name, value) in [
            (":method", parts.method.as_str()),
            (":path", path),
            (":authority", input.host),
            (":scheme", "http"),
        ] {
            headers.insert(name.to_owned(), value.to_owned());
        }
    }
    if !input.body_is_whole {
        headers.insert(PARTIAL_BODY.as_str().to_owned(), "true".into());
    }
    let id = parts.headers.get("x-request-id");
    let id = id.and_then(|id| id.to_str().ok()).unwrap_or_default();
    let id = id.to_owned();
    let length = parts.headers.get(http::header::CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
    let (body, raw_body) = match settings.body_as_bytes {
        true => (String::new(), input.body.to_vec()),
        false => {
            let text = String::from_utf8_lossy(&input.body).into_owned();
            (text, Vec::new())
        }
    };
    let http = proto::attribute_context::HttpRequest {
        id,
        method: parts.method.to_string(),
        headers,
        path: path.to_owned(),
        host: input.host.to_owned(),
        scheme: "http".into(),
        query: String::new(),
        fragment: String::new(),
        size: length.unwrap_or(-1),
        protocol: match parts.version {
            http::Version::HTTP_2 => "HTTP/2",
            http::Version::HTTP_10 => "HTTP/1.0",
            _ => "HTTP/1.1",
        }
        .into(),
        body,
        raw_body,
    };
    proto::CheckRequest {
        attributes: Some(proto::AttributeContext {
            source: Some(peer(input.source, input.source_identity)),
            destination: Some(peer(input.destination, Some(input.destination_identity))),
            request: Some(proto::attribute_context::Request {
                time: Some(input.time.into()),
                http: Some(http),
            }),
            context_extensions: BTreeMap::new(),
        }),
    }
}

fn peer(address: SocketAddr, identity: Option<&SpiffeId>) -> proto::attribute_context::Peer {
    proto::attribute_context::Peer {
        address: Some(proto::Address {
            socket_address: Some(proto::SocketAddress {
                address: address.ip().to_string(),
                port_value: address.port().into(),
            }),
        }),
        principal: identity.map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    }
}

fn decide(answer: proto::CheckResponse) -> Result<Decision, CheckError> {
    use proto::check_response::HttpResponse;
    let code = answer.status.as_ref().map_or(0, |status| status.code);
    match (code, answer.http_response) {
        (0, None) => Ok(Decision::Allowed(Box::default())),
        (0, Some(HttpResponse::OkResponse(ok))) => {
            let mut request = changes(ok.headers)?;
            for name in ok.headers_to_remove {
                let name = HeaderName::try_from(name.to_ascii_lowercase())
                    .map_err(|_| CheckError::Malformed(format!("header name {name:?}")))?;
                if !is_protected(&name) {
                    request.push(HeaderChange::Remove(name));
                }
            }
            let query = ok.query_parameters_to_set.into_iter();
            Ok(Decision::Allowed(Box::new(Changes {
                request,
                response: changes(ok.response_headers_to_add)?,
                set_query: query.map(|of| (of.key, of.value)).collect(),
                remove_query: ok.query_parameters_to_remove,
                ..Changes::default()
            })))
        }
        // An answer that allows and denies does neither.
        (0, Some(HttpResponse::DeniedResponse(_))) => Err(CheckError::Malformed(
            "status OK with a denied_response".into(),
        )),
        (_, Some(HttpResponse::DeniedResponse(denied))) => {
            let code = denied.status.map_or(0, |status| status.code);
            let status = match code {
                0 => StatusCode::FORBIDDEN,
                code => u16::try_from(code)
                    .ok()
                    .and_then(|code| StatusCode::from_u16(code).ok())
                    .ok_or_else(|| CheckError::Malformed(format!("HTTP status {code}")))?,
            };
            Ok(Decision::Denied(Box::new(Denial {
                status,
                headers: changes(denied.headers)?,
                body: Bytes::from(denied.body),
                error: None,
            })))
        }
        (_, _) => Ok(Decision::Denied(Box::new(Denial {
            status: StatusCode::FORBIDDEN,
            headers: Vec::new(),
            body: Bytes::new(),
            error: None,
        }))),
    }
}

fn changes(options: Vec<proto::HeaderValueOption>) -> Result<Vec<HeaderChange>, CheckError> {
    use proto::header_value_option::HeaderAppendAction as Action;
    let mut changes = Vec::with_capacity(options.len());
    for option in options {
        let action = option.append_action();
        let Some(header) = option.header else {
            continue;
        };
        let malformed = || CheckError::Malformed(format!("header {:?}", header.key));
        let name = HeaderName::try_from(header.key.to_ascii_lowercase());
        let name = name.map_err(|_| malformed())?;
        let value = match header.raw_value.is_empty() {
            true => HeaderValue::try_from(&header.value),
            false => HeaderValue::try_from(header.raw_value),
        }
        .map_err(|_| malformed())?;
        if is_protected(&name) {
            continue;
        }
        // `append` is older than `append_action`; false, its default here, replaces.
        changes.push(match (option.append, action) {
            (Some(true), _) => HeaderChange::Append(name, value),
            (_, Action::AddIfAbsent) => HeaderChange::SetIfAbsent(name, value),
            (_, Action::OverwriteIfExists) => HeaderChange::Replace(name, value),
            (_, Action::AppendIfExistsOrAdd | Action::OverwriteIfExistsOrAdd) => {
                HeaderChange::Set(name, value)
            }
        });
    }
    Ok(changes)
}
