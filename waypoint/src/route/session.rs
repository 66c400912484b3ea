//! Session persistence: the token that brings the requests of one session back to one endpoint
//! (GEP-1619 in its form of Gateway API v1.7).
//!
//! The token says which endpoint, when the session began and when it was used last. It is
//! sealed (AES-256-GCM-SIV): a client can neither read which endpoints there are nor make a
//! token that leads to another one, and a token of one service or session name opens nothing
//! under another. Whatever is wrong with a token, the request is spread as without one and gets
//! a new token.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::waypoint as proto;
use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue};

use super::convert::read_duration;
use super::problem::Problems;

/// Of the token's layout.
const VERSION: u8 = 1;
/// Version, beginning, last use.
const FIXED: usize = 1 + 8 + 8;
/// Length of an endpoint's uid, and of what a client may make us decode.
const MAX_UID: usize = 1024;
const MAX_TOKEN: usize = 2048;
/// Of a cookie's path.
const MAX_PATH: usize = 1024;
/// The cookie's name where the user gives none.
const DEFAULT_COOKIE: &str = "adit-session";
/// Expiry is counted in seconds; a token from a replica whose clock runs ahead is still good.
const CLOCK_SKEW: u64 = 60;

/// How a rule keeps sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionPersistence {
    name: Box<str>,
    carrier: Carrier,
    absolute_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
}

/// Where the token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionType {
    /// In a cookie.
    Cookie,
    /// In a header of requests and responses, which the client has to copy.
    Header,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Carrier {
    /// `permanent`: the cookie says how long it lives. `path`: where browsers send it.
    Cookie {
        permanent: bool,
        path: Box<str>,
    },
    Header(HeaderName),
}

/// Seals tokens. All replicas of a waypoint need the same.
#[derive(Debug)]
pub struct SessionKey(LessSafeKey);

/// A session as its token tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The endpoint's uid.
    pub endpoint: Box<str>,
    /// When it began, seconds since 1970.
    pub began: u64,
    /// When it was used last, as far as the client was told, seconds since 1970.
    pub used: u64,
}

/// Why a token brings nobody anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// not a token of this session
    #[error("not a token of this session")]
    Invalid,
    /// the session is older than its absolute timeout
    #[error("the session is older than its absolute timeout")]
    Expired,
    /// the session has not been used for longer than its idle timeout
    #[error("the session has not been used for longer than its idle timeout")]
    Idle,
    /// the endpoint's uid is too long
    #[error("the endpoint's uid is too long")]
    TooLong,
}

impl SessionKey {
    /// A key from 32 secret bytes.
    pub fn new(secret: &[u8; 32]) -> Result<Self, SessionError> {
        let key = UnboundKey::new(&AES_256_GCM_SIV, secret).map_err(|_| SessionError::Invalid)?;
        Ok(Self(LessSafeKey::new(key)))
    }
}

impl SessionPersistence {
    pub(super) fn read(
        persistence: &proto::SessionPersistence,
        problems: &mut Problems,
    ) -> Result<Self, Arc<str>> {
        use proto::session_persistence::Type;
        let absolute = persistence.absolute_timeout.as_ref();
        let absolute = problems.within("absolute_timeout", |p| read_duration(absolute, p))?;
        let absolute = absolute.filter(|timeout| !timeout.is_zero());
        let idle = persistence.idle_timeout.as_ref();
        let idle = problems.within("idle_timeout", |p| read_duration(idle, p))?;
        let name = persistence.name.as_str();
        let (name, carrier) = match Type::try_from(persistence.r#type) {
            Ok(Type::Cookie) => {
                let name = if name.is_empty() {
                    DEFAULT_COOKIE
                } else {
                    name
                };
                // A cookie's name is a token (RFC 6265 4.1.1), as a header's is.
                if name.parse::<HeaderName>().is_err() {
                    return Err(problems.within("name", |p| p.add("is no name of a cookie")));
                }
                // "absoluteTimeout must be specified when cookie lifetimeType is Permanent":
                // without one there is nothing that the cookie could say.
                let permanent = !persistence.session_cookie && absolute.is_some();
                let path = match persistence.path.as_str() {
                    "" => "/",
                    path if is_cookie_path(path) => path,
                    _ => return Err(problems.within("path", |p| p.add("is no path of a cookie"))),
                };
                let path = path.into();
                (name, Carrier::Cookie { permanent, path })
            }
            Ok(Type::Header) => match name.parse() {
                Ok(header) => (name, Carrier::Header(header)),
                Err(_) => return Err(problems.within("name", |p| p.add("is no header name"))),
            },
            Err(_) => return Err(problems.within("type", |p| p.add("not known"))),
        };
        Ok(Self {
            name: name.into(),
            carrier,
            absolute_timeout: absolute,
            idle_timeout: idle.filter(|timeout| !timeout.is_zero()),
        })
    }

    /// Where the token stands.
    pub fn session_type(&self) -> SessionType {
        match self.carrier {
            Carrier::Cookie { .. } => SessionType::Cookie,
            Carrier::Header(_) => SessionType::Header,
        }
    }

    /// Name of the cookie or header.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The session of a request; `None`: it carries no token. `scope` is what the token must
    /// have been made for (the service), `now` in seconds since 1970.
    pub fn find(
        &self,
        headers: &HeaderMap,
        key: &SessionKey,
        scope: &str,
        now: u64,
    ) -> Option<Result<Session, SessionError>> {
        let token = match &self.carrier {
            Carrier::Header(name) => headers.get(name)?.to_str().ok()?,
            Carrier::Cookie { .. } => cookie(headers, &self.name)?,
        };
        Some(self.open(token, key, scope, now))
    }

    /// The header that makes the client's next requests go to the same endpoint. `session` is
    /// the one it had, if it stays at its endpoint; `nonce` is random; `secure` says that the
    /// client came by HTTPS.
    ///
    /// # Errors
    ///
    /// The endpoint's uid is too long.
    pub fn header(
        &self,
        session: &Session,
        key: &SessionKey,
        scope: &str,
        nonce: [u8; NONCE_LEN],
        secure: bool,
    ) -> Result<(HeaderName, HeaderValue), SessionError> {
        let token = self.seal(session, key, scope, nonce)?;
        let (name, text) = match &self.carrier {
            Carrier::Header(name) => (name.clone(), token),
            Carrier::Cookie { permanent, path } => {
                let name = &self.name;
                let mut text = format!("{name}={token}; Path={path}; HttpOnly; SameSite=Lax");
                if secure {
                    text.push_str("; Secure");
                }
                if let Some(timeout) = self.absolute_timeout.filter(|_| *permanent) {
                    // What is left: a new token does not make the session longer.
                    let left = timeout
                        .as_secs()
                        .saturating_sub(session.used.saturating_sub(session.began));
                    text.push_str("; Max-Age=");
                    text.push_str(itoa::Buffer::new().format(left));
                }
                (http::header::SET_COOKIE, text)
            }
        };
        let value = HeaderValue::try_from(text).map_err(|_| SessionError::Invalid)?;
        Ok((name, value))
    }

    /// Whether the client should get a new token for a session that goes on: its last use is
    /// told again when a tenth of the idle timeout has passed.
    pub fn is_stale(&self, session: &Session, now: u64) -> bool {
        let idle = self.idle_timeout.map(|timeout| timeout.as_secs() / 10);
        idle.is_some_and(|tenth| now.saturating_sub(session.used) >= tenth.max(1))
    }

    fn open(
        &self,
        token: &str,
        key: &SessionKey,
        scope: &str,
        now: u64,
    ) -> Result<Session, SessionError> {
        if token.len() > MAX_TOKEN {
            return Err(SessionError::Invalid);
        }
        let mut bytes = URL_SAFE_NO_PAD
            .decode(token)
            .map_err(|_| SessionError::Invalid)?;
        let (nonce, sealed) = bytes
            .split_first_chunk_mut::<NONCE_LEN>()
            .ok_or(SessionError::Invalid)?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = key
            .0
            .open_in_place(nonce, Aad::from(self.context(scope)), sealed)
            .map_err(|_| SessionError::Invalid)?;
        let session = Session::decode(opened).ok_or(SessionError::Invalid)?;
        if session.began > session.used || session.used > now.saturating_add(CLOCK_SKEW) {
            return Err(SessionError::Invalid);
        }
        let over = |timeout: Option<Duration>, since: u64| {
            timeout.is_some_and(|timeout| now.saturating_sub(since) >= timeout.as_secs().max(1))
        };
        if over(self.absolute_timeout, session.began) {
            return Err(SessionError::Expired);
        }
        if over(self.idle_timeout, session.used) {
            return Err(SessionError::Idle);
        }
        Ok(session)
    }

    fn seal(
        &self,
        session: &Session,
        key: &SessionKey,
        scope: &str,
        nonce: [u8; NONCE_LEN],
    ) -> Result<String, SessionError> {
        if session.endpoint.len() > MAX_UID {
            return Err(SessionError::TooLong);
        }
        let mut sealed = session.encode();
        let aad = Aad::from(self.context(scope));
        key.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .map_err(|_| SessionError::Invalid)?;
        let mut bytes = nonce.to_vec();
        bytes.append(&mut sealed);
        Ok(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// What a token belongs to; a name holds no zero byte.
    fn context(&self, scope: &str) -> Vec<u8> {
        [self.name.as_bytes(), b"\0", scope.as_bytes()].concat()
    }
}

impl Session {
    /// A session that begins now.
    pub fn begin(endpoint: &str, now: u64) -> Self {
        Self {
            endpoint: endpoint.into(),
            began: now,
            used: now,
        }
    }

    /// The same session, used now.
    pub fn used_at(&self, now: u64) -> Self {
        Self {
            used: now.max(self.began),
            ..self.clone()
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.endpoint.len() + 16);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.began.to_be_bytes());
        bytes.extend_from_slice(&self.used.to_be_bytes());
        bytes.extend_from_slice(self.endpoint.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&version, rest) = bytes.split_first()?;
        let (began, rest) = rest.split_first_chunk()?;
        let (used, uid) = rest.split_first_chunk()?;
        (version == VERSION).then_some(())?;
        Some(Self {
            endpoint: std::str::from_utf8(uid).ok()?.into(),
            began: u64::from_be_bytes(*began),
            used: u64::from_be_bytes(*used),
        })
    }
}

/// RFC 6265 4.1.1 and 5.2.4: absolute, and nothing that would end it early.
fn is_cookie_path(path: &str) -> bool {
    let legal = |b: u8| (b' '..=b'~').contains(&b) && b != b';';
    path.starts_with('/') && path.len() <= MAX_PATH && path.bytes().all(legal)
}

/// The first cookie of this name (RFC 6265 4.2). HTTP/2 may spread cookies over several lines.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let lines = headers.get_all(COOKIE).iter();
    let mut pairs = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(';'));
    pairs.find_map(|pair| {
        let (found, value) = pair.trim().split_once('=')?;
        let value = value
            .strip_prefix('"')
            .and_then(|v| v.strip_suffix('"'))
            .unwrap_or(value);
        (found == name).then_some(value)
    })
}
