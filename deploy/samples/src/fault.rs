//! Faults that a request asks for: in the header `x-adit-fault` or the query, as
//! `status=503,delay=20,fail-first=2,only=v1` (or with `&`).

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, StatusCode};

/// The header, or the metadata of a gRPC call.
const HEADER: &str = "x-adit-fault";
/// Longest delay.
const MAX_DELAY: u64 = 600_000;
/// Counters of `fail-first` that are kept.
const MAX_COUNTERS: usize = 65_536;

/// What is wrong with this request on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Waits so long first.
    pub(crate) delay: Option<Duration>,
    /// Answers this in place of 200.
    pub(crate) status: Option<StatusCode>,
    /// Ends a gRPC call with this code.
    pub(crate) grpc_status: Option<u32>,
    /// Closes the connection in place of an answer.
    pub(crate) abort: bool,
    /// Only the first so many requests of an id fail, at this server.
    fail_first: Option<u64>,
    /// Whose requests are counted together.
    id: String,
    /// Only a server whose name begins so, or whose version is this.
    only: Option<String>,
}

/// How often each id was seen.
#[derive(Debug, Default)]
pub(crate) struct Counters(RefCell<HashMap<String, u64>>);

impl Fault {
    /// The fault of a request, if it is one of this server's.
    pub(crate) fn of(
        headers: &HeaderMap,
        query: Option<&str>,
        (name, version): (&str, &str),
        counters: &Counters,
    ) -> Self {
        let mut fault = Self::default();
        let values = headers.get_all(HEADER).iter();
        for value in values.filter_map(|value| value.to_str().ok()) {
            fault.read(value, ',');
        }
        fault.read(query.unwrap_or_default(), '&');
        if let Some(only) = &fault.only
            && !name.starts_with(only.as_str())
            && version != only
        {
            return Self::default();
        }
        if let Some(first) = fault.fail_first
            && counters.count(&fault.id) > first
        {
            return Self {
                delay: fault.delay,
                ..Self::default()
            };
        }
        fault
    }

    fn read(&mut self, text: &str, separator: char) {
        for part in text.split(separator) {
            let (key, value) = part.trim().split_once('=').unwrap_or((part.trim(), ""));
            match key {
                "status" => {
                    let status = value
                        .parse()
                        .ok()
                        .and_then(|n| StatusCode::from_u16(n).ok());
                    self.status = status.filter(|status| !status.is_informational());
                }
                "grpc-status" => self.grpc_status = value.parse().ok(),
                "delay" => {
                    let millis = value.parse().ok().map(|n: u64| n.min(MAX_DELAY));
                    self.delay = millis.map(Duration::from_millis);
                }
                "abort" => self.abort = true,
                "fail-first" => self.fail_first = value.parse().ok(),
                "id" => self.id = value.into(),
                "only" => self.only = Some(value.into()),
                // The rest of the query is not about faults.
                _ => {}
            }
        }
    }
}

impl Counters {
    fn count(&self, id: &str) -> u64 {
        let mut counters = self.0.borrow_mut();
        if counters.len() >= MAX_COUNTERS && !counters.contains_key(id) {
            // Those who count that many start again.
            counters.clear();
        }
        let count = counters.entry(id.into()).or_default();
        *count += 1;
        *count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(header: &str, query: &str, counters: &Counters) -> Fault {
        let mut headers = HeaderMap::new();
        if let Ok(value) = header.parse() {
            headers.insert(HEADER, value);
        }
        Fault::of(&headers, Some(query), ("reviews-v1-0", "v1"), counters)
    }

    #[test]
    fn faults_of_headers_and_queries() {
        let counters = Counters::default();
        let expected = Fault {
            status: StatusCode::from_u16(503).ok(),
            delay: Some(Duration::from_millis(20)),
            ..Fault::default()
        };
        assert_eq!(fault("status=503, delay=20", "", &counters), expected);
        assert_eq!(fault("", "status=503&x=y&delay=20", &counters), expected);
        assert_eq!(fault("", "status=100&page=2", &counters), Fault::default());
    }

    #[test]
    fn only_some_servers_fail_and_only_at_first() {
        let counters = Counters::default();
        let status = |header: &str| fault(header, "", &counters).status.is_some();
        assert!(status("status=503,only=v1"));
        assert!(status("status=503,only=reviews-v1"));
        assert!(!status("status=503,only=v2"));
        let seen: Vec<bool> = (0..4)
            .map(|_| status("status=503,fail-first=2,id=a"))
            .collect();
        assert_eq!(seen, [true, true, false, false]);
        assert!(status("status=503,fail-first=2,id=b"));
    }
}
