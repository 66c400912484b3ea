//! RequestAuthentications: which tokens requests may carry.

use adit_shared::proto::waypoint as wire;
use http::{HeaderName, Uri};
use serde::Deserialize;
use serde_json::Value;

use super::authorization::{PolicyScope, scope};
use super::authorization_raw::{Target, salvage_scope};
use super::duration::duration;
use super::field::{At, FieldError};
use super::meta::Meta;
use super::raw::{Map, Selector, nullable, read_spec};

/// Most rules that one may have.
const MAX_RULES: usize = 64;

/// A RequestAuthentication.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// Whom it covers; with errors, as far as that could be read.
    pub scope: PolicyScope,
    /// Issuers of tokens.
    pub rules: Vec<wire::JwtRule>,
    /// What is wrong with it. Every token is refused then.
    pub errors: Vec<FieldError>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSpec {
    selector: Option<Map<Selector>>,
    target_ref: Option<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    target_refs: Vec<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    jwt_rules: Vec<Map<RawRule>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRule {
    #[serde(deserialize_with = "nullable")]
    issuer: String,
    #[serde(deserialize_with = "nullable")]
    audiences: Vec<String>,
    // Istio reads the older spelling as well.
    #[serde(alias = "jwks_uri", deserialize_with = "nullable")]
    jwks_uri: String,
    #[serde(deserialize_with = "nullable")]
    jwks: String,
    #[serde(deserialize_with = "nullable")]
    from_headers: Vec<Map<RawHeader>>,
    #[serde(deserialize_with = "nullable")]
    from_params: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    from_cookies: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    output_payload_to_header: String,
    #[serde(deserialize_with = "nullable")]
    forward_original_token: bool,
    #[serde(deserialize_with = "nullable")]
    output_claim_to_headers: Vec<Map<RawOutput>>,
    timeout: Option<String>,
    #[serde(deserialize_with = "nullable")]
    space_delimited_claims: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawHeader {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    prefix: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawOutput {
    #[serde(deserialize_with = "nullable")]
    header: String,
    #[serde(deserialize_with = "nullable")]
    claim: String,
}

impl RequestAuthentication {
    /// Reads `spec`. One with errors is one too.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw: RawSpec = match spec {
            Value::Null => RawSpec::default(),
            spec => read_spec(spec).unwrap_or_else(|error| {
                errors.push(error);
                RawSpec::default()
            }),
        };
        let at = At::ROOT.key("spec");
        let mut covered = scope(
            raw.selector.as_deref(),
            raw.target_ref.as_deref(),
            &raw.target_refs,
            at,
            &mut errors,
        );
        let list = at.key("jwtRules");
        if raw.jwt_rules.len() > MAX_RULES {
            errors.push(list.error(format!("has more than {MAX_RULES} entries")));
        }
        let rules = raw.jwt_rules.iter().take(MAX_RULES).enumerate();
        let rules = rules
            .map(|(index, raw)| rule(raw, list.index(index), &mut errors))
            .collect();
        if !errors.is_empty() {
            covered = salvage_scope(spec);
        }
        Self {
            meta,
            scope: covered,
            rules,
            errors,
        }
    }
}

fn rule(raw: &RawRule, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::JwtRule {
    if raw.issuer.is_empty() {
        errors.push(at.key("issuer").error("is required"));
    }
    keys(raw, at, errors);
    let list = at.key("fromHeaders");
    for (index, from) in raw.from_headers.iter().enumerate() {
        let at = list.index(index);
        header(&from.name, at.key("name"), errors);
    }
    for (key, list) in [
        ("audiences", &raw.audiences),
        ("fromParams", &raw.from_params),
        ("fromCookies", &raw.from_cookies),
        ("spaceDelimitedClaims", &raw.space_delimited_claims),
    ] {
        if let Some(index) = list.iter().position(String::is_empty) {
            errors.push(at.key(key).index(index).error("is empty"));
        }
    }
    if !raw.output_payload_to_header.is_empty() {
        let at = at.key("outputPayloadToHeader");
        header(&raw.output_payload_to_header, at, errors);
    }
    let list = at.key("outputClaimToHeaders");
    for (index, output) in raw.output_claim_to_headers.iter().enumerate() {
        let at = list.index(index);
        header(&output.header, at.key("header"), errors);
        if output.claim.is_empty() {
            errors.push(at.key("claim").error("is required"));
        }
    }
    let timeout = raw.timeout.as_deref();
    let timeout = timeout.and_then(|text| duration(text, at.key("timeout"), errors));
    let from_headers = raw.from_headers.iter().map(|from| wire::JwtHeader {
        name: from.name.clone(),
        prefix: from.prefix.clone(),
    });
    let outputs = raw.output_claim_to_headers.iter();
    let outputs = outputs.map(|output| wire::ClaimToHeader {
        header: output.header.clone(),
        claim: output.claim.clone(),
    });
    wire::JwtRule {
        issuer: raw.issuer.clone(),
        audiences: raw.audiences.clone(),
        jwks_uri: raw.jwks_uri.clone(),
        jwks: raw.jwks.clone(),
        from_headers: from_headers.collect(),
        from_params: raw.from_params.clone(),
        from_cookies: raw.from_cookies.clone(),
        output_payload_to_header: raw.output_payload_to_header.clone(),
        forward_original_token: raw.forward_original_token,
        output_claim_to_headers: outputs.collect(),
        timeout,
        space_delimited_claims: raw.space_delimited_claims.clone(),
    }
}

/// With neither, the issuer is asked for its keys (OpenID Connect discovery).
fn keys(raw: &RawRule, at: At<'_>, errors: &mut Vec<FieldError>) {
    if !raw.jwks.is_empty() && !raw.jwks_uri.is_empty() {
        errors.push(
            at.key("jwks")
                .error("only one of jwks and jwksUri may be set"),
        );
    }
    if !raw.jwks_uri.is_empty() {
        let uri: Result<Uri, _> = raw.jwks_uri.parse();
        let usable = uri.is_ok_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()
        });
        if !usable {
            let message = format!("{:?} is not an http or https URL", raw.jwks_uri);
            errors.push(at.key("jwksUri").error(message));
        }
    }
    if !raw.jwks.is_empty() {
        let document: Result<Value, _> = serde_json::from_str(&raw.jwks);
        let keys = document.ok().and_then(|of| of.get("keys").cloned());
        if !keys.is_some_and(|keys| keys.is_array()) {
            errors.push(
                at.key("jwks")
                    .error("is not a JSON Web Key Set: {\"keys\": [...]}"),
            );
        }
    }
}

fn header(name: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    if HeaderName::try_from(name).is_err() {
        errors.push(at.error(format!("{name:?} is not the name of a header")));
    }
}
