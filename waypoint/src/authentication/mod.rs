//! Who the end user is: JSON Web Tokens (Istio RequestAuthentication).
//!
//! A request without a token passes without a principal; to require one is what
//! AuthorizationPolicy is for. A token that is there must be good, wherever it stands: one
//! that is not is answered with 401 (a wrong audience with 403), even beside a good one.
//! What is good is taken out of the request unless its rule forwards it, and the headers
//! that a rule writes are taken from every caller first.
//!
//! [`fetch`] keeps issuers' keys fresh on the control runtime; an outage of an issuer
//! leaves its last keys in force. An [`Authenticator`] belongs to one worker.

mod cache;
mod client;
mod fetch;
mod keys;
mod location;
mod output;
mod rules;
#[cfg(test)]
mod tests;
mod token;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use adit_shared::policy::http::Claims;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, HOST, HeaderValue, ORIGIN};
use http::{HeaderName, Method, StatusCode, request};

pub use self::client::{FetchError, Fetcher, Resolve};
pub use self::fetch::{KeySource, KeySources, SourceStatus};
pub use self::keys::{KeySet, KeySetError};
pub use self::rules::{
    AuthenticationProblem, AuthenticationSet, RequestAuthentication, RequestAuthentications,
};

use self::cache::{TokenCache, Verified};
use self::keys::Verdict;
use self::location::Location;
use self::rules::{JwtRule, Keys};
use self::token::Token;
use crate::route;

/// More tokens in one request are refused: each costs a signature.
const MAX_TOKENS: usize = 4;

/// Checks the tokens of requests. One per worker: it remembers tokens that were good.
#[derive(Debug, Default)]
pub struct Authenticator {
    cache: TokenCache,
}

/// Why a request is refused, and with which answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unauthenticated {
    /// 401; 403 for a token that is meant for others.
    pub status: StatusCode,
    /// `WWW-Authenticate` of a 401 (RFC 6750 3).
    pub www_authenticate: Option<HeaderValue>,
    /// What is wrong; also the body of the answer, as Envoy words it.
    pub reason: Reason,
}

/// What is wrong with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reason {
    /// Not a token, or one with claims of the wrong type, or too long.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Malformed,
    /// Unsigned, or signed in a way that is not accepted.
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    /// No rule that looks at this place knows the issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// `exp` has passed.
    #[error("Jwt is expired")]
    Expired,
    /// `nbf` has not come.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// The signature is not the issuer's.
    #[error("Jwt verification fails")]
    Signature,
    /// The issuer has no such key.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    UnknownKey,
    /// The issuer's keys have never been had.
    #[error("Jwks remote fetch is failed")]
    NoKeys,
    /// Meant for others.
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    /// More than four tokens.
    #[error("too many Jwt in one request")]
    TooMany,
    /// The RequestAuthentication is invalid and fails closed.
    #[error("Jwt cannot be verified: the configuration is invalid")]
    Configuration,
}

impl Authenticator {
    /// One that remembers nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks every token of a request that a rule of `set` looks for, and leaves in
    /// `parts` what the endpoint may see. `None`: no token, no principal.
    ///
    /// Waits only where an issuer's keys were never had or do not know a token's key, for
    /// one fetch and no longer than its timeout.
    ///
    /// # Errors
    /// [`Unauthenticated`].
    pub async fn authenticate(
        &self,
        set: &AuthenticationSet,
        parts: &mut request::Parts,
    ) -> Result<Option<Arc<Claims>>, Unauthenticated> {
        if set.is_empty() {
            return Ok(None);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0.0, |now| now.as_secs_f64());
        self.authenticate_at(set, parts, now).await
    }

    async fn authenticate_at(
        &self,
        set: &AuthenticationSet,
        parts: &mut request::Parts,
        now: f64,
    ) -> Result<Option<Arc<Claims>>, Unauthenticated> {
        // A preflight carries no credentials (Fetch 3.2.2) and is not stopped for it.
        let found = if is_preflight(parts) {
            Vec::new()
        } else {
            set.tokens(parts)
        };
        // Of rules that cannot be used, too: nobody else may write these either.
        for name in set.policies.iter().flat_map(|policy| &policy.written) {
            parts.headers.remove(name);
        }
        if found.len() > MAX_TOKENS {
            return Err(Unauthenticated::new(Reason::TooMany, parts));
        }
        let mut accepted = Vec::with_capacity(found.len());
        for (location, token) in found {
            match self.verify(set, location, &token, now).await {
                Ok((rule, verified)) => accepted.push((location, rule, verified)),
                Err(reason) => return Err(Unauthenticated::new(reason, parts)),
            }
        }
        for (location, rule, _) in &accepted {
            if !rule.forward {
                location.remove(parts);
            }
        }
        let Some((_, rule, identity)) = accepted.into_iter().next() else {
            return Ok(None);
        };
        rule.output.write(
            &identity.payload_text,
            identity.claims.payload(),
            &mut parts.headers,
        );
        Ok(Some(identity.claims))
    }

    async fn verify(
        &self,
        set: &AuthenticationSet,
        location: &Location,
        text: &str,
        now: f64,
    ) -> Result<(Arc<JwtRule>, Verified), Reason> {
        if set.is_invalid_at(location) {
            return Err(Reason::Configuration);
        }
        let looking = || set.rules().filter(|rule| rule.locations.contains(location));
        if let Some(known) = self.cache.get(text, |known| known.current(looking())) {
            known.1.lifetime.check(now)?;
            return Ok(known);
        }
        let token = Token::parse(text)?;
        let issuer = token.issuer().ok_or(Reason::UnknownIssuer)?;
        token.lifetime.check(now)?;
        let mut reason = Reason::UnknownIssuer;
        for rule in looking().filter(|rule| *rule.issuer == *issuer) {
            match rule.keys_for(&token).await {
                Err(found) => reason = found,
                Ok(_) if !rule.audiences.is_empty() && !token.has_audience(&rule.audiences) => {
                    reason = Reason::Audience;
                }
                Ok(keys) => {
                    let words = rule.space_delimited.iter().map(String::as_str);
                    let verified = Verified {
                        rule: Arc::downgrade(rule),
                        keys,
                        payload_text: token.payload_text.into(),
                        lifetime: token.lifetime,
                        claims: Arc::new(Claims::new(token.payload, words)),
                    };
                    self.cache.insert(text, verified.clone());
                    return Ok((rule.clone(), verified));
                }
            }
        }
        Err(reason)
    }
}

impl Unauthenticated {
    fn new(reason: Reason, parts: &request::Parts) -> Self {
        if reason == Reason::Audience {
            return Self {
                status: StatusCode::FORBIDDEN,
                www_authenticate: None,
                reason,
            };
        }
        let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
        let authority = parts.uri.authority().map(|authority| authority.as_str());
        let host = authority.or(host).unwrap_or_default();
        let realm = format!("http://{host}{}", parts.uri.path());
        // RFC 9110 5.6.4: what would end the quoted string.
        let realm = realm.replace(['"', '\\'], "");
        let value = format!("Bearer realm=\"{realm}\", error=\"invalid_token\"");
        Self {
            status: StatusCode::UNAUTHORIZED,
            www_authenticate: HeaderValue::from_str(&value)
                .or(Ok::<_, ()>(HeaderValue::from_static(
                    "Bearer error=\"invalid_token\"",
                )))
                .ok(),
            reason,
        }
    }
}

impl AuthenticationSet {
    fn rules(&self) -> impl Iterator<Item = &Arc<JwtRule>> {
        self.policies.iter().flat_map(|policy| &policy.rules)
    }

    /// Headers in which tokens stand, or that are written from what they say.
    pub fn header_names(&self) -> impl Iterator<Item = &HeaderName> {
        let written = self.policies.iter().flat_map(|policy| &policy.written);
        self.locations
            .iter()
            .filter_map(Location::header)
            .chain(written)
    }

    /// Every token in every place that is looked at.
    fn tokens(&self, parts: &request::Parts) -> Vec<(&Location, String)> {
        let mut found = Vec::new();
        for location in self.locations.iter() {
            let tokens = location.tokens(parts).into_iter();
            found.extend(tokens.map(|token| (location, token)));
        }
        found
    }

    fn is_invalid_at(&self, location: &Location) -> bool {
        let mut invalid = self.policies.iter().filter(|policy| policy.invalid);
        invalid.any(|policy| policy.locations.contains(location))
    }
}

impl JwtRule {
    fn current_keys(&self) -> Option<Arc<KeySet>> {
        match &self.keys {
            Keys::Inline(keys) => Some(keys.clone()),
            Keys::Remote(source) => source.current(),
        }
    }

    /// The keys by which the token is good. Asks the issuer for newer ones when those that
    /// are known do not have the token's key.
    async fn keys_for(&self, token: &Token<'_>) -> Result<Arc<KeySet>, Reason> {
        let mut keys = self.current_keys();
        let mut asked = false;
        loop {
            let verdict = keys.as_ref().map(|keys| token.verify(keys));
            match (keys, verdict, &self.keys) {
                (Some(keys), Some(Verdict::Good), _) => return Ok(keys),
                (_, Some(Verdict::Bad), _) => return Err(Reason::Signature),
                (known, verdict, Keys::Remote(source)) if !asked => {
                    asked = true;
                    keys = Box::pin(source.newer_than(known.as_ref())).await;
                    if keys.is_none() {
                        return Err(match verdict {
                            Some(_) => Reason::UnknownKey,
                            None => Reason::NoKeys,
                        });
                    }
                }
                (Some(_), _, _) => return Err(Reason::UnknownKey),
                (None, _, _) => return Err(Reason::NoKeys),
            }
        }
    }
}

impl Verified {
    /// The one of `rules` that would accept it again without looking.
    fn current<'a>(
        &self,
        mut rules: impl Iterator<Item = &'a Arc<JwtRule>>,
    ) -> Option<Arc<JwtRule>> {
        let rule = rules.find(|rule| std::ptr::eq(Arc::as_ptr(rule), self.rule.as_ptr()))?;
        let keys = rule.current_keys()?;
        Arc::ptr_eq(&keys, &self.keys).then(|| rule.clone())
    }
}

/// A token as routes see it: the words of a scope are values, as they are for policies.
impl route::Claims for Claims {
    fn any(&self, path: &[Box<str>], test: &mut dyn FnMut(&str) -> bool) -> bool {
        match self.words(path) {
            Some(words) => words.iter().any(|word| test(word)),
            None => {
                let value = self.at(path);
                value.is_some_and(|value| route::Claims::any(value, &[], test))
            }
        }
    }
}

/// Fetch 3.2.2; Envoy `bypass_cors_preflight`.
fn is_preflight(parts: &request::Parts) -> bool {
    let set = |name| {
        let value: Option<&HeaderValue> = parts.headers.get(name);
        value.is_some_and(|value| !value.is_empty())
    };
    parts.method == Method::OPTIONS && set(ORIGIN) && set(ACCESS_CONTROL_REQUEST_METHOD)
}
