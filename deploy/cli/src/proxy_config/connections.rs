//! `adit proxy-config connection`: what a waypoint has open at this moment.

use anyhow::Context as _;
use clap::ValueEnum;
use http::Method;
use serde::Deserialize;
use serde_json::Value;

use crate::output::{self, Format, Outcome, Output};
use crate::proxy::target::{TargetArgs, waypoint};
use crate::table::Table;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Rows: a client's HBONE tunnel (Tunnel in), a connection inside of one (Inbound), one to an
endpoint (Outbound) and the HBONE tunnel that carries it (Tunnel out). ACTIVE counts requests
under way, of tunnels streams.")]
pub(super) struct Args {
    /// The waypoint, as NAME[.NAMESPACE] or by its pod [default: the only one]
    #[arg(value_name = "WAYPOINT")]
    target: Option<String>,
    /// Only connections that go this way
    #[arg(long, value_enum)]
    direction: Option<Direction>,
    /// Only connections of clients or endpoints with this SPIFFE id or a part of it
    #[arg(long, value_name = "TEXT")]
    identity: Option<String>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    at: TargetArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// From clients.
    Inbound,
    /// To endpoints.
    Outbound,
}

/// The lists of a worker, as `/connections` has them; which way each goes, and its name in
/// the table.
const LISTS: [(&str, Direction, &str); 4] = [
    ("tunnels", Direction::Inbound, "Tunnel in"),
    ("downstream", Direction::Inbound, "Inbound"),
    ("upstream", Direction::Outbound, "Outbound"),
    ("upstreamTunnels", Direction::Outbound, "Tunnel out"),
];

/// What the lists' entries have, each some of it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    src: String,
    dst: String,
    workload: String,
    identity: Option<String>,
    caller: Option<String>,
    protocol: String,
    way: String,
    active: Option<u64>,
    streams: Option<u64>,
    received: Option<u64>,
    sent: Option<u64>,
    age: Option<f64>,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let waypoint = waypoint(&args.at, args.target.as_deref())?;
    let answer = waypoint.request(&Method::GET, "/connections")?;
    let mut told: Value = serde_json::from_slice(&answer)
        .with_context(|| format!("the answer of waypoint {}", waypoint.name))?;
    args.keep(&mut told);
    let table =
        table(&told).with_context(|| format!("the answer of waypoint {}", waypoint.name))?;
    output::print(out, args.output, &told, || table)?;
    Ok(Outcome::Well)
}

impl Args {
    /// Takes away what was not asked for.
    fn keep(&self, told: &mut Value) {
        let workers = told["workers"].as_array_mut();
        for worker in workers.into_iter().flatten() {
            for (list, direction, _) in LISTS {
                let Some(entries) = worker[list].as_array_mut() else {
                    continue;
                };
                let other_way = self.direction.is_some_and(|wanted| wanted != direction);
                entries.retain(|entry| !other_way && self.is_of(entry));
            }
        }
    }

    fn is_of(&self, entry: &Value) -> bool {
        self.identity.as_deref().is_none_or(|wanted| {
            let mut ids = [&entry["identity"], &entry["caller"]].into_iter();
            ids.any(|id| id.as_str().is_some_and(|id| id.contains(wanted)))
        })
    }
}

fn table(told: &Value) -> anyhow::Result<String> {
    let mut table = Table::new([
        "DIRECTION",
        "PEER",
        "IDENTITY",
        "DESTINATION",
        "PROTOCOL",
        "ACTIVE",
        "RECEIVED",
        "SENT",
        "AGE",
    ]);
    for (list, _, name) in LISTS {
        for worker in told["workers"].as_array().into_iter().flatten() {
            for entry in worker[list].as_array().into_iter().flatten() {
                let entry = Entry::deserialize(entry)?;
                row(&mut table, name, &entry);
            }
        }
    }
    Ok(table.render())
}

fn row(table: &mut Table, name: &str, entry: &Entry) {
    let Entry {
        src, dst, workload, ..
    } = entry;
    // Towards endpoints the peer is where it goes, and the workload is what that is.
    let (peer, destination) = match src.as_str() {
        "" => (dst, workload),
        _ => (src, dst),
    };
    let identity = match (&entry.identity, &entry.caller) {
        (identity, Some(caller)) => {
            format!("{} for {caller}", identity.as_deref().unwrap_or("-"))
        }
        (Some(identity), None) => identity.clone(),
        (None, None) => "-".into(),
    };
    let protocol = match (entry.protocol.as_str(), entry.way.as_str()) {
        ("", _) => "HBONE".to_owned(),
        (protocol, "") => protocol.to_owned(),
        (protocol, way) => format!("{protocol} over {way}"),
    };
    let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let age = entry
        .age
        .map_or_else(|| "-".to_owned(), |age| format!("{age:.1}s"));
    table.row([
        name,
        peer,
        &identity,
        match destination.as_str() {
            "" => "-",
            destination => destination,
        },
        &protocol,
        &number(entry.active.or(entry.streams)),
        &number(entry.received),
        &number(entry.sent),
        &age,
    ]);
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

    fn told() -> Value {
        let client = "spiffe://cluster.local/ns/shop/sa/client";
        json!({"workers": [{
            "tunnels": [{"src": "10.244.1.2:4000", "identity": client, "streams": 3, "age": 2.04}],
            "downstream": [{"src": "10.244.1.2:5000", "identity": client,
                "dst": "10.96.1.1:80", "protocol": "HTTP/1", "active": 1, "received": 10,
                "sent": 20, "age": 1.0}],
            "upstream": [{"dst": "10.244.2.3:8080", "workload": "Kubernetes//Pod/shop/web",
                "identity": "spiffe://cluster.local/ns/shop/sa/web", "caller": client,
                "protocol": "HTTP/2", "way": "HBONE", "received": null, "sent": 5, "age": 0.5}],
            "upstreamTunnels": [{"dst": "10.244.2.3:15008", "workload": "Kubernetes//Pod/shop/web",
                "identity": "spiffe://cluster.local/ns/shop/sa/web", "streams": 1, "carried": 9}],
        }, {"tunnels": [], "downstream": [], "upstream": [], "upstreamTunnels": []}]})
    }

    #[test]
    fn every_kind_has_its_row() {
        let text = table(&told()).expect("a table");
        let rows: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                line.split("   ")
                    .map(str::trim)
                    .filter(|c| !c.is_empty())
                    .collect()
            })
            .collect();
        let client = "spiffe://cluster.local/ns/shop/sa/client";
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        let uid = "Kubernetes//Pod/shop/web";
        let of = format!("{web} for {client}");
        assert_eq!(
            rows[1..],
            [
                [
                    "Tunnel in",
                    "10.244.1.2:4000",
                    client,
                    "-",
                    "HBONE",
                    "3",
                    "-",
                    "-",
                    "2.0s"
                ],
                [
                    "Inbound",
                    "10.244.1.2:5000",
                    client,
                    "10.96.1.1:80",
                    "HTTP/1",
                    "1",
                    "10",
                    "20",
                    "1.0s"
                ],
                [
                    "Outbound",
                    "10.244.2.3:8080",
                    &of,
                    uid,
                    "HTTP/2 over HBONE",
                    "-",
                    "-",
                    "5",
                    "0.5s"
                ],
                [
                    "Tunnel out",
                    "10.244.2.3:15008",
                    web,
                    uid,
                    "HBONE",
                    "1",
                    "-",
                    "-",
                    "-"
                ],
            ]
        );
    }

    #[test]
    fn only_what_is_asked_for() {
        for (flags, count) in [
            (&[][..], 4),
            (&["--direction", "inbound"][..], 2),
            (
                &["--direction", "outbound", "--identity", "sa/client"][..],
                1,
            ),
            (&["--identity", "sa/web"][..], 2),
            (&["--identity", "nobody"][..], 0),
        ] {
            let all = ["pc"].iter().chain(flags);
            let args = Cli::try_parse_from(all).expect("a command line").args;
            let mut told = told();
            args.keep(&mut told);
            let text = table(&told).expect("a table");
            assert_eq!(text.lines().count(), 1 + count, "{flags:?}");
        }
    }
}
