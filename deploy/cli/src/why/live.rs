//! `adit why --live`: what becomes of the next real request, as the waypoint tells it stage by
//! stage (`POST /debug/trace`).

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http::Method;
use serde_json::Value;

use super::{ADMIN, Args, Asked, Found, identity};
use crate::cluster::Cluster;
use crate::output::UsageError;
use crate::proxy::target::{first_answer, replicas_of};
use crate::ztunnel::admin::encode;

/// A waypoint waits no longer for a request (`MAX_FOLLOW_SECONDS` there).
const LONGEST: Duration = Duration::from_secs(300);

/// Fields of a step that say when and what it is, not what was decided.
const FRAME: [&str; 2] = ["atMicros", "stage"];

/// A request that was followed.
pub(super) struct Followed {
    /// The replica that it came to.
    pub(super) waypoint: String,
    /// As the waypoint tells it.
    pub(super) told: Value,
}

/// Waits for the next request from the client to the destination at whichever replica of the
/// waypoint it comes to.
pub(super) fn follow(
    args: &Args,
    cluster: &Cluster,
    asked: &Asked,
    name: &str,
) -> anyhow::Result<Followed> {
    let replicas = replicas_of(cluster, name, ADMIN)?;
    if replicas.is_empty() {
        bail!("waypoint {name} has no pod that runs: nothing can be followed there");
    }
    let filter = filter(args, &identity(&asked.source))?;
    let until = Instant::now() + args.wait.min(LONGEST);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // The endpoint counts whole seconds.
        let seconds = left.as_secs().max(1);
        let path = format!("/debug/trace?timeout={seconds}{filter}");
        let (waypoint, answer) = first_answer(&replicas, &Method::POST, &path, left)
            .with_context(|| format!("no request of {} was followed", asked.source.name))?;
        let told: Value = serde_json::from_slice(&answer)
            .with_context(|| format!("the answer of waypoint {waypoint}"))?;
        // The caller may ask for something else that this waypoint stands before.
        if leads_to(&told, &asked.destination, asked.port) {
            return Ok(Followed { waypoint, told });
        }
        if Instant::now() >= until {
            bail!("no request to {} has come in that time", args.destination);
        }
    }
}

/// What the waypoint is to look for, as the rest of a query.
fn filter(args: &Args, source: &str) -> anyhow::Result<String> {
    let mut filter = format!("&source={}", encode(source));
    let mut add = |name: &str, value: &str| {
        filter += &format!("&{name}={}", encode(value));
    };
    if let Some(method) = &args.method {
        add("method", method.as_str());
    }
    if let Some(path) = &args.path {
        add("path", path.split('?').next().unwrap_or_default());
    }
    let mut other = None;
    for header in &args.headers {
        match header.split_once(':') {
            Some((name, host)) if name.trim().eq_ignore_ascii_case("host") => {
                add("host", host.trim());
            }
            _ if other.is_some() => {
                let text = "with --live one header besides host can be asked for";
                return Err(UsageError(text.into()).into());
            }
            _ => other = Some(header),
        }
    }
    if let Some(header) = other {
        add("header", header);
    }
    Ok(filter)
}

fn steps(told: &Value) -> impl DoubleEndedIterator<Item = &Value> {
    told["steps"].as_array().into_iter().flatten()
}

fn leads_to(told: &Value, destination: &Found, port: u16) -> bool {
    let Some(step) = steps(told).find(|step| step["stage"] == "destination") else {
        // It was refused before that: by its head, which says enough.
        return true;
    };
    match destination {
        Found::Service(service, _) => {
            let key = step["service"].as_str().unwrap_or_default();
            let hostname = key.rsplit('/').next().unwrap_or_default();
            hostname == service.hostname && step["port"] == port
        }
        Found::Workload(workload, _) => step["workload"] == workload.uid.as_str(),
        Found::Unknown(_) => true,
    }
}

/// What each stage has decided, a line each: `+0.4 ms route: rule=shop/reviews.0 ...`.
pub(super) fn lines(told: &Value) -> Vec<String> {
    steps(told).map(line).collect()
}

fn line(step: &Value) -> String {
    let at = step["atMicros"].as_f64().unwrap_or_default() / 1000.0;
    let mut line = format!(
        "+{at:.1} ms {}:",
        step["stage"].as_str().unwrap_or("unknown")
    );
    for (key, value) in step.as_object().into_iter().flatten() {
        if FRAME.contains(&key.as_str()) {
            continue;
        }
        let value = match value {
            Value::Null => continue,
            Value::Array(list) if list.is_empty() => continue,
            Value::String(text) if text.is_empty() => continue,
            Value::String(text) => text.clone(),
            Value::Array(list) => {
                let texts = list.iter().map(|one| match one.as_str() {
                    Some(text) => text.to_owned(),
                    None => one.to_string(),
                });
                texts.collect::<Vec<_>>().join(",")
            }
            other => other.to_string(),
        };
        line += &format!(" {key}={value}");
    }
    line
}

/// Whether the destination has answered, and in what words.
pub(super) fn verdict(told: &Value) -> (bool, String) {
    let Some(end) = steps(told).rfind(|step| step["stage"] == "end") else {
        return (false, "it has not ended in that time".into());
    };
    let status = end["status"].as_u64();
    let details = end["details"].as_str().unwrap_or_default();
    let text = match (status, details) {
        (Some(status), "" | "via_upstream") => format!("{status} from the destination"),
        (Some(status), details) => format!("{status}: {details}"),
        (None, details) => format!("no answer: {details}"),
    };
    let answered = status.is_some() && matches!(details, "" | "via_upstream");
    (answered, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(flags: &[&str]) -> Args {
        let all = ["why", "client.shop", "reviews.shop"].iter().chain(flags);
        Cli::try_parse_from(all).expect("a command line").args
    }

    #[test]
    fn only_what_was_named_is_looked_for() {
        let of = |flags: &[&str]| filter(&args(flags), "spiffe://a").map_err(|e| e.to_string());
        let source = "&source=spiffe%3A%2F%2Fa";
        assert_eq!(of(&["--live"]), Ok(source.into()));
        assert_eq!(
            of(&["POST", "/a?b=c", "-H", "Host: x", "-H", "end-user: j"]),
            Ok(format!(
                "{source}&method=POST&path=%2Fa&host=x&header=end-user%3A%20j"
            ))
        );
        assert!(of(&["-H", "a: 1", "-H", "b: 2"]).is_err());
    }

    #[test]
    fn stages_are_told_in_lines() {
        let told = json!({"ended": true, "steps": [
            {"atMicros": 12, "stage": "received", "method": "GET", "path": "/a"},
            {"atMicros": 430, "stage": "endpoint", "workload": "u", "tried": [], "way": "HBONE"},
            {"atMicros": 1900, "stage": "end", "status": 200, "details": "via_upstream",
                "policy": null},
        ]});
        assert_eq!(
            lines(&told),
            [
                "+0.0 ms received: method=GET path=/a",
                "+0.4 ms endpoint: way=HBONE workload=u",
                "+1.9 ms end: details=via_upstream status=200",
            ]
        );
        assert_eq!(verdict(&told), (true, "200 from the destination".into()));
        let denied = json!({"steps": [{"stage": "end", "status": 403, "details": "rbac"}]});
        assert_eq!(verdict(&denied), (false, "403: rbac".into()));
        assert!(!verdict(&json!({"ended": false, "steps": []})).0);
    }
}
