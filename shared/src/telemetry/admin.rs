//! What the admin endpoints of all proxies have in common.

use std::collections::HashMap;
use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, StatusCode};

use super::http::{HttpResponse, text};
use super::logging;

/// Loopback keeps others out, but not the browser of somebody who forwards the port: a page
/// from anywhere could have it POST here (with an `Origin`), or read answers under a name of
/// its own that it lets resolve to 127.0.0.1 (which is then the `Host`). Tools send neither.
///
/// # Errors
/// Why the request is not answered.
pub fn check_origin(headers: &HeaderMap) -> Result<(), &'static str> {
    if headers.contains_key(ORIGIN) {
        return Err("requests of web pages are not answered\n");
    }
    let Some(host) = headers.get(HOST) else {
        return Ok(());
    };
    let host = host.to_str().ok().and_then(|h| h.parse::<Authority>().ok());
    let local = host.is_some_and(|host| {
        let name = host.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    });
    if local {
        Ok(())
    } else {
        Err("the host must be localhost or an address\n")
    }
}

/// `?level=info` or `?level=access=debug,...`, `?reset`; no query: the filter as it is.
pub fn set_logging(query: &HashMap<String, String>) -> HttpResponse {
    let done = match query.get("level") {
        Some(level) => logging::set_filter(level),
        None if query.contains_key("reset") => logging::reset(),
        None => logging::current_filter(),
    };
    match done {
        Ok(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
        Err(error) => text(
            StatusCode::BAD_REQUEST,
            format!(
                "{error}\nusage: POST /logging, ?level=LEVEL or ?level=TARGET=LEVEL,..., ?reset\n"
            ),
        ),
    }
}

/// Pairs of a query; `%XX` and `+` are decoded.
pub fn parse_query(query: &str) -> HashMap<String, String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name.to_owned(), decode(value))
        })
        .collect()
}

fn decode(value: &str) -> String {
    let bytes = value.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tools_are_answered() {
        for (host, origin, answered) in [
            (Some("localhost:15000"), None, true),
            (Some("127.0.0.1:15000"), None, true),
            (Some("[::1]:15000"), None, true),
            (Some("10.0.0.7"), None, true),
            (None, None, true),
            (Some("rebound.example:15000"), None, false),
            (Some("localhost.example"), None, false),
            (Some(""), None, false),
            (Some("localhost:15000"), Some("https://page.example"), false),
            (Some("localhost:15000"), Some("null"), false),
        ] {
            let mut headers = HeaderMap::new();
            let value = http::HeaderValue::from_static;
            host.map(|h| headers.insert(HOST, value(h)));
            origin.map(|o| headers.insert(ORIGIN, value(o)));
            let done = check_origin(&headers);
            assert_eq!(done.is_ok(), answered, "{host:?} {origin:?}: {done:?}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = parse_query("level=access%3Ddebug,h2%3Dwarn&reset&x=a+b%2");
        assert_eq!(query["level"], "access=debug,h2=warn");
        assert_eq!(query["reset"], "");
        assert_eq!(query["x"], "a b%2");
    }
}
