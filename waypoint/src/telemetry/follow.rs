//! One request, followed through every stage (`POST /debug/trace`): what each of them decided,
//! and when.
//!
//! Somebody asks for the next request that matches a filter and waits for it; one at a time.
//! While nobody does, a request costs one load of a flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::HeaderMap;
use http::header::HOST;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;

/// Stages of one request that are kept. One with all its tries passes fewer.
const MAX_STEPS: usize = 256;

/// Which request is to be followed. What is not said matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Method, as HTTP writes it.
    pub method: Option<String>,
    /// How the path begins.
    pub path: Option<String>,
    /// The host, without regard to case and port.
    pub host: Option<String>,
    /// A header's name in lower case, and its value if that matters.
    pub header: Option<(String, Option<String>)>,
    /// The caller's SPIFFE id, with or without `spiffe://`.
    pub source: Option<String>,
}

/// What a filter looks at.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Method.
    pub method: &'a str,
    /// Path, without query.
    pub path: &'a str,
    /// `:authority`, if it is not in a header.
    pub authority: Option<&'a str>,
    /// Headers, with `host`.
    pub headers: &'a HeaderMap,
    /// The caller's SPIFFE id.
    pub source: &'a str,
}

impl Filter {
    fn matches(&self, request: &Candidate<'_>) -> bool {
        let Self {
            method,
            path,
            host,
            header,
            source,
        } = self;
        let wants = |wanted: &Option<String>, test: &dyn Fn(&str) -> bool| {
            wanted.as_deref().is_none_or(test)
        };
        let in_header = request
            .headers
            .get(HOST)
            .and_then(|host| host.to_str().ok());
        let named = request.authority.or(in_header).unwrap_or_default();
        let without_port = match named.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => named,
        };
        wants(method, &|method| request.method == method)
            && wants(path, &|path| request.path.starts_with(path))
            && wants(host, &|host| {
                named.eq_ignore_ascii_case(host) || without_port.eq_ignore_ascii_case(host)
            })
            && wants(source, &|source| {
                let bare = |id: &str| id.strip_prefix("spiffe://").unwrap_or(id).to_owned();
                bare(source) == bare(request.source)
            })
            && header.as_ref().is_none_or(|(name, value)| {
                let mut values = request.headers.get_all(name.as_str()).iter();
                values.any(|found| {
                    value
                        .as_ref()
                        .is_none_or(|value| found.as_bytes() == value.as_bytes())
                })
            })
    }
}

/// Where somebody waits for a request.
#[derive(Debug, Default)]
pub struct Following {
    wanted: AtomicBool,
    slot: Mutex<Option<Wanted>>,
}

#[derive(Debug)]
struct Wanted {
    filter: Filter,
    record: Arc<Record>,
    /// It has been found.
    taken: bool,
}

#[derive(Debug, Default)]
struct Record {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    steps: Vec<Value>,
    begun: bool,
    ended: bool,
}

/// Why no request was followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotFollowed {
    /// Somebody else waits.
    #[error("somebody else follows a request at the moment")]
    Busy,
    /// None has come.
    #[error("no request has matched in that time")]
    Nothing,
}

impl Following {
    /// Waits for the next request that matches, and for its end. One that does not end in time
    /// is told as far as it has come.
    ///
    /// # Errors
    /// [`NotFollowed`].
    pub async fn next(&self, filter: Filter, wait: Duration) -> Result<Value, NotFollowed> {
        let record = Arc::<Record>::default();
        {
            let mut slot = self.slot.lock();
            if slot.is_some() {
                return Err(NotFollowed::Busy);
            }
            *slot = Some(Wanted {
                filter,
                record: record.clone(),
                taken: false,
            });
            self.wanted.store(true, Ordering::Relaxed);
        }
        // Also when whoever waits has gone.
        let _place = Place(self);
        let ended = async {
            loop {
                let changed = record.changed.notified();
                if record.state.lock().ended {
                    return;
                }
                changed.await;
            }
        };
        let _ = timeout(wait, ended).await;
        let mut state = record.state.lock();
        match state.begun {
            true => Ok(json!({
                "ended": state.ended,
                "steps": std::mem::take(&mut state.steps),
            })),
            false => Err(NotFollowed::Nothing),
        }
    }

    /// Whether somebody waits.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Follows this request, if somebody waits for one like it.
    pub fn begin(&self, request: &Candidate<'_>) -> Option<Box<Followed>> {
        if !self.is_wanted() {
            return None;
        }
        let mut slot = self.slot.lock();
        let wanted = slot.as_mut()?;
        if wanted.taken || !wanted.filter.matches(request) {
            return None;
        }
        wanted.taken = true;
        self.wanted.store(false, Ordering::Relaxed);
        let record = wanted.record.clone();
        record.state.lock().begun = true;
        Some(Box::new(Followed {
            begun: Instant::now(),
            record,
        }))
    }
}

struct Place<'a>(&'a Following);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.wanted.store(false, Ordering::Relaxed);
        self.0.slot.lock().take();
    }
}

/// A request that is followed. Dropped, it has ended.
#[derive(Debug)]
pub struct Followed {
    begun: Instant,
    record: Arc<Record>,
}

impl Followed {
    /// A stage has been passed, with what it has decided: the fields of an object.
    pub fn step(&self, stage: &'static str, decided: Value) {
        let mut step = Map::new();
        let at = self.begun.elapsed().as_micros();
        step.insert(
            "atMicros".into(),
            u64::try_from(at).unwrap_or(u64::MAX).into(),
        );
        step.insert("stage".into(), stage.into());
        if let Value::Object(fields) = decided {
            step.extend(fields.into_iter().filter(|(_, value)| !value.is_null()));
        }
        let mut state = self.record.state.lock();
        if state.steps.len() < MAX_STEPS {
            state.steps.push(Value::Object(step));
        }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.record.state.lock().ended = true;
        self.record.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        let value = http::HeaderValue::from_static;
        headers.insert(HOST, value("Reviews.shop:80"));
        headers.append("end-user", value("jason"));
        headers
    }

    fn candidate(headers: &HeaderMap) -> Candidate<'_> {
        Candidate {
            method: "GET",
            path: "/reviews/1",
            authority: None,
            headers,
            source: "spiffe://cluster.local/ns/shop/sa/client",
        }
    }

    #[test]
    fn a_filter_matches_what_it_names() {
        let some = |text: &str| Some(text.to_owned());
        let all = Filter::default;
        let header = |name: &str, value| Filter {
            header: Some((name.to_owned(), value)),
            ..all()
        };
        for (filter, expected) in [
            (all(), true),
            (
                Filter {
                    method: some("GET"),
                    ..all()
                },
                true,
            ),
            (
                Filter {
                    method: some("get"),
                    ..all()
                },
                false,
            ),
            (
                Filter {
                    path: some("/reviews"),
                    ..all()
                },
                true,
            ),
            (
                Filter {
                    path: some("/ratings"),
                    ..all()
                },
                false,
            ),
            (
                Filter {
                    host: some("reviews.shop"),
                    ..all()
                },
                true,
            ),
            (
                Filter {
                    host: some("reviews.shop:80"),
                    ..all()
                },
                true,
            ),
            (
                Filter {
                    host: some("reviews"),
                    ..all()
                },
                false,
            ),
            (
                Filter {
                    source: some("cluster.local/ns/shop/sa/client"),
                    ..all()
                },
                true,
            ),
            (
                Filter {
                    source: some("cluster.local/ns/shop/sa/other"),
                    ..all()
                },
                false,
            ),
            (header("end-user", None), true),
            (header("end-user", some("jason")), true),
            (header("end-user", some("ann")), false),
            (header("absent", None), false),
        ] {
            let headers = headers();
            assert_eq!(filter.matches(&candidate(&headers)), expected, "{filter:?}");
        }
    }

    #[tokio::test]
    async fn one_request_is_followed_for_one_who_waits() {
        let following = Following::default();
        let headers = headers();
        assert!(following.begin(&candidate(&headers)).is_none());
        let wait = Duration::from_secs(60);
        let waiting = following.next(Filter::default(), wait);
        let request = async {
            assert_eq!(
                following.next(Filter::default(), wait).await,
                Err(NotFollowed::Busy)
            );
            let followed = following.begin(&candidate(&headers)).expect("wanted");
            assert!(following.begin(&candidate(&headers)).is_none(), "only one");
            followed.step("route", json!({ "rule": "shop/r.0", "nothing": null }));
            drop(followed);
        };
        let (told, ()) = tokio::join!(biased; waiting, request);
        let told = told.expect("followed");
        assert_eq!(told["ended"], true);
        assert_eq!(told["steps"][0]["stage"], "route");
        assert_eq!(told["steps"][0]["rule"], "shop/r.0");
        assert!(told["steps"][0].get("nothing").is_none());
        // It is over: the next may ask.
        let nothing = following.next(Filter::default(), Duration::from_millis(1));
        assert_eq!(nothing.await, Err(NotFollowed::Nothing));
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_told_as_far_as_it_has_come() {
        let following = Following::default();
        let headers = headers();
        let waiting = following.next(Filter::default(), Duration::from_millis(50));
        let request = async {
            let followed = following.begin(&candidate(&headers)).expect("wanted");
            followed.step("endpoint", json!({}));
            followed
        };
        let (told, followed) = tokio::join!(biased; waiting, request);
        let told = told.expect("followed");
        assert_eq!(
            (&told["ended"], &told["steps"][0]["stage"]),
            (&json!(false), &json!("endpoint"))
        );
        followed.step("too late", json!({}));
    }
}
