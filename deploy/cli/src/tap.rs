//! `adit tap`: requests at waypoints as they end.

use std::io::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::Deserialize;
use serde_json::Value;

use crate::output::{self, Outcome, Output};
use crate::proxy::target::{TargetArgs, Waypoint, get_all, waypoint, waypoints};
use crate::table::printable;

/// Before waypoints that are all silent are asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Watch requests at waypoints as they end
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit tap
  adit tap waypoint.shop --service reviews.shop --status 5xx
  adit tap --from client.shop --path /api -o json

One request through every stage at its waypoint: adit why SRC DST --live")]
pub struct Args {
    /// A waypoint, as NAME[.NAMESPACE] or by its pod [default: all]
    #[arg(value_name = "WAYPOINT")]
    target: Option<String>,
    /// Only requests of this workload or account, as NAME[.NAMESPACE] or SPIFFE id
    #[arg(long, value_name = "SOURCE")]
    from: Option<String>,
    /// Only requests to this service, as NAME[.NAMESPACE] or host name
    #[arg(long)]
    service: Option<String>,
    /// Only requests with this method
    #[arg(long)]
    method: Option<String>,
    /// Only requests whose path begins so
    #[arg(long)]
    path: Option<String>,
    /// Only requests with this status, for example 503 or 5xx
    #[arg(long)]
    status: Option<String>,
    /// End after so many requests
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// End after so long
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// How requests are printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Shape,
    #[command(flatten)]
    at: TargetArgs,
}

/// How a request is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Shape {
    /// One line for people.
    #[default]
    Short,
    /// One line of JSON.
    Json,
}

#[derive(Debug, Deserialize)]
struct Tapped {
    next: u64,
    #[serde(default)]
    missed: u64,
    #[serde(default)]
    events: Vec<Value>,
}

/// A waypoint that is watched.
struct Watched {
    waypoint: Waypoint,
    /// The first event that has not been seen; `None`: from now on.
    since: Option<u64>,
    /// It did not answer, and that was told.
    silent: bool,
}

pub fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let mut watched = Vec::new();
    for waypoint in targets(args)? {
        watched.push(Watched {
            waypoint,
            since: None,
            silent: false,
        });
    }
    let until = args.duration.map(|duration| Instant::now() + duration);
    let several = watched.len() > 1;
    let mut seen = 0;
    loop {
        let asked: Vec<_> = watched
            .iter()
            .map(|watched| (&watched.waypoint, path(watched.since)))
            .collect();
        let answers = get_all(&asked);
        let mut all_silent = true;
        for (watched, answer) in watched.iter_mut().zip(answers) {
            let name = &watched.waypoint.name;
            let tapped = answer.and_then(|answer| {
                serde_json::from_slice::<Tapped>(&answer)
                    .with_context(|| format!("the answer of {name}"))
            });
            let tapped = match tapped {
                Ok(tapped) => tapped,
                // The others go on; it may come back.
                Err(error) if several => {
                    if !watched.silent {
                        output::complain_of(&error);
                    }
                    watched.silent = true;
                    watched.since = None;
                    continue;
                }
                Err(error) => return Err(error),
            };
            all_silent = false;
            watched.silent = false;
            // What was before the first answer is not shown.
            let begun = watched.since.is_some();
            watched.since = Some(tapped.next);
            if !begun {
                continue;
            }
            if tapped.missed > 0 {
                output::complain(format_args!(
                    "{name}: {} requests were too many to be shown",
                    tapped.missed
                ));
            }
            for event in tapped.events.iter().filter(|event| args.takes(event)) {
                let line = match args.output {
                    Shape::Json => event.to_string(),
                    Shape::Short => line(event),
                };
                writeln!(out, "{line}")?;
                seen += 1;
                if args.limit.is_some_and(|limit| seen >= limit) {
                    return Ok(Outcome::Well);
                }
            }
        }
        out.flush()?;
        if until.is_some_and(|until| Instant::now() >= until) {
            return Ok(Outcome::Well);
        }
        // Those that answer take their time for it.
        if all_silent {
            sleep(PAUSE);
        }
    }
}

fn path(since: Option<u64>) -> String {
    match since {
        Some(since) => format!("/debug/tap?since={since}"),
        None => "/debug/tap".to_owned(),
    }
}

fn targets(args: &Args) -> anyhow::Result<Vec<Waypoint>> {
    let at = &args.at;
    if args.target.is_some() || at.admin_address.is_some() {
        return Ok(vec![waypoint(at, args.target.as_deref())?]);
    }
    let cluster = at.cluster.open()?;
    let namespace = at.cluster.namespace.as_deref();
    let all = waypoints(&cluster, namespace, at.proxy_admin_port)?;
    if all.is_empty() {
        let place = namespace.map_or_else(String::new, |name| format!(" in namespace {name}"));
        bail!(
            "{} has no waypoint{place} that runs; `adit waypoint apply` makes one",
            cluster.name()
        );
    }
    Ok(all)
}

impl Args {
    fn takes(&self, event: &Value) -> bool {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is = |wanted: &Option<String>, holds: &dyn Fn(&str) -> bool| {
            wanted.as_deref().is_none_or(holds)
        };
        let source = &event["source"];
        is(&self.from, &|wanted| {
            let (workload, namespace) = (text(&source["workload"]), text(&source["namespace"]));
            wanted == workload
                || wanted == format!("{workload}.{namespace}")
                || wanted == text(&source["principal"])
        }) && is(&self.service, &|wanted| {
            let host = text(&event["service"]);
            host == wanted || host.starts_with(&format!("{wanted}."))
        }) && is(&self.method, &|wanted| text(&event["method"]) == wanted)
            && is(&self.path, &|wanted| {
                text(&event["path"]).starts_with(wanted)
            })
            && is(&self.status, &|wanted| status_is(&event["status"], wanted))
    }
}

fn status_is(status: &Value, wanted: &str) -> bool {
    let status = status.to_string();
    match wanted.strip_suffix("xx") {
        Some(class) => status.len() == 3 && status.starts_with(class),
        None => status == wanted,
    }
}

/// `TIME SOURCE -> DESTINATION SERVICE METHOD PATH STATUS LATENCY ...`.
fn line(event: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let peer = |peer: &Value| match text(&peer["workload"]) {
        name if name.is_empty() => "-".to_owned(),
        name => format!("{name}.{}", text(&peer["namespace"])),
    };
    let time = text(&event["time"]);
    let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time);
    let mut line = format!(
        "{time} {} -> {} {} {}{} {} {:.1}ms",
        peer(&event["source"]),
        peer(&event["destination"]),
        text(&event["method"]),
        text(&event["authority"]),
        text(&event["path"]),
        event["status"],
        event["durationMs"].as_f64().unwrap_or_default(),
    );
    if let Some(status) = event["grpcStatus"].as_u64() {
        line += &format!(" grpc={status}");
    }
    for (key, name) in [
        ("route", "route"),
        ("policy", "policy"),
        ("failure", "failure"),
    ] {
        let value = text(&event[key]);
        if !value.is_empty() {
            line += &format!(" {name}={value}");
        }
    }
    if let Some(retries) = event["retries"].as_u64().filter(|retries| *retries > 0) {
        line += &format!(" retries={retries}");
    }
    let flags = text(&event["flags"]);
    if !matches!(flags.as_str(), "" | "-") {
        line += &format!(" flags={flags} ({})", text(&event["details"]));
    }
    // Names and paths are the caller's.
    printable(&line)
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

    fn event() -> Value {
        json!({"time": "2026-01-01T10:20:30.123Z", "method": "GET", "authority": "reviews.shop",
            "path": "/a", "status": 503, "durationMs": 1.25, "flags": "UH",
            "details": "no_healthy_endpoints", "route": "shop/reviews.0", "retries": 2,
            "service": "reviews.shop.svc.cluster.local",
            "source": {"workload": "client", "namespace": "shop", "principal": "spiffe://x"}})
    }

    #[test]
    fn a_line_says_what_happened() {
        assert_eq!(
            line(&event()),
            "10:20:30.123Z client.shop -> - GET reviews.shop/a 503 1.2ms route=shop/reviews.0 \
             retries=2 flags=UH (no_healthy_endpoints)"
        );
    }

    #[test]
    fn filters() {
        for (flags, expected) in [
            (&["--status", "5xx"][..], true),
            (&["--status", "503"][..], true),
            (&["--status", "4xx"][..], false),
            (&["--from", "client.shop", "--method", "GET"][..], true),
            (&["--from", "spiffe://x"][..], true),
            (&["--from", "visitor"][..], false),
            (&["--service", "reviews"][..], true),
            (&["--service", "review"][..], false),
            (&["--path", "/b"][..], false),
        ] {
            let all = ["tap"].iter().chain(flags);
            let cli = Cli::try_parse_from(all).expect("a command line");
            assert_eq!(cli.args.takes(&event()), expected, "{flags:?}");
        }
    }
}
