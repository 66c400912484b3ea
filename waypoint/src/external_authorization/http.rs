//! By HTTP: the request's head goes to the service, 200 lets it pass.

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::Full;

use super::provider::{HttpSettings, Matcher};
use super::{
    Changes, CheckError, CheckInput, Decision, Denial, HeaderChange, Settings, is_protected,
};
use crate::client::{Answer, Dial, ServiceClient};
use crate::proxy::headers::CLIENT_CERTIFICATE;

pub(super) async fn check<D: Dial>(
    client: &ServiceClient<D>,
    of: &HttpSettings,
    settings: &Settings,
    input: &CheckInput<'_>,
) -> Result<Decision, CheckError> {
    let answer = client.http1(request(of, settings, input)?).await?;
    decide(of, answer)
}

fn request(
    of: &HttpSettings,
    settings: &Settings,
    input: &CheckInput<'_>,
) -> Result<Request<Full<Bytes>>, CheckError> {
    let parts = input.request;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let body = match settings.body_limit {
        0 => Bytes::new(),
        _ => input.body.clone(),
    };
    let mut request = Request::builder()
        .method(parts.method.clone())
        .uri(format!("{}{path}", of.path_prefix))
        .header(HOST, input.host)
        .body(Full::new(body.clone()))?;
    let headers = request.headers_mut();
    for (name, value) in &parts.headers {
        // Envoy always sends Authorization; the rest is by choice.
        let included = *name == AUTHORIZATION || of.include.iter().any(|m| m.matches(name));
        // Who calls is said by us here, and a client's word for it has been replaced.
        if included && (!is_protected(name) || *name == CLIENT_CERTIFICATE) {
            headers.append(name, value.clone());
        }
    }
    for (name, value) in &of.additional {
        headers.insert(name, value.clone());
    }
    if !input.body_is_whole {
        let partial = HeaderValue::from_static("true");
        headers.insert("x-envoy-auth-partial-body", partial);
    }
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    Ok(request)
}

fn decide(of: &HttpSettings, answer: Answer) -> Result<Decision, CheckError> {
    let status = answer.head.status;
    // An error of the service is no decision.
    if status.is_server_error() {
        return Err(CheckError::Status(status));
    }
    let chosen = |matchers: &[Matcher]| {
        let mut changes = Vec::new();
        let headers = &answer.head.headers;
        let chosen = headers.keys().filter(|name| {
            let mut matchers = matchers.iter();
            matchers.any(|m| m.matches(name)) && !is_protected(name)
        });
        for name in chosen {
            // In place of what is there; all lines of it, as of several cookies.
            for (line, value) in headers.get_all(name).iter().enumerate() {
                let (name, value) = (name.clone(), value.clone());
                changes.push(match line {
                    0 => HeaderChange::Set(name, value),
                    _ => HeaderChange::Append(name, value),
                });
            }
        }
        changes
    };
    if status == StatusCode::OK {
        return Ok(Decision::Allowed(Box::new(Changes {
            request: chosen(&of.upstream_on_allow),
            response: chosen(&of.downstream_on_allow),
            ..Changes::default()
        })));
    }
    // Without a choice all headers go to the client, as with Envoy.
    let all = [Matcher::Any];
    let headers = match of.downstream_on_deny.is_empty() {
        true => chosen(&all),
        false => chosen(&of.downstream_on_deny),
    };
    Ok(Decision::Denied(Box::new(Denial {
        status,
        headers,
        body: answer.body,
        error: None,
    })))
}
