//! `adit waypoint status`.

use std::io::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::Value;

use super::Common;
use super::gateway::{is_programmed, path, waypoints, why_not};
use crate::cluster::{Cluster, name_of, namespace_of};
use crate::output::{self, Format, Outcome, Output};
use crate::table::Table;

/// Show the conditions of waypoints
///
/// Exit status is 1 when one of them is not ready.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a waypoint [default: all of the namespace]
    waypoint: Option<String>,
    /// In every namespace
    #[arg(short = 'A', long, conflicts_with = "waypoint")]
    all_namespaces: bool,
    /// Wait until they are ready
    #[arg(short, long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    wait: bool,
    /// How long
    #[arg(long, value_name = "DURATION", default_value = "90s", value_parser = humantime::parse_duration)]
    waypoint_timeout: Duration,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(super) fn run(args: &Args, common: &Common, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = common.cluster.open()?;
    let until = Instant::now() + args.waypoint_timeout;
    let all = loop {
        let all = find(&cluster, args, common)?;
        let waiting = args.wait && Instant::now() < until;
        if !waiting || all.iter().all(is_programmed) {
            break all;
        }
        sleep(cluster.poll_interval());
    };
    if all.is_empty() {
        if let Some(name) = &args.waypoint {
            bail!("gateways.gateway.networking.k8s.io {name:?} not found");
        }
        writeln!(out, "No waypoints found.")?;
        return Ok(Outcome::Well);
    }
    output::print(out, args.output, &all, || table(&all, args.all_namespaces))?;
    let unready: Vec<&Value> = all
        .iter()
        .filter(|gateway| !is_programmed(gateway))
        .collect();
    for gateway in &unready {
        output::complain(format_args!(
            "waypoint {} is not ready: {}",
            path(gateway),
            why_not(gateway)
        ));
    }
    Ok(Outcome::of(unready.is_empty()))
}

fn find(cluster: &Cluster, args: &Args, common: &Common) -> anyhow::Result<Vec<Value>> {
    let namespace = (!args.all_namespaces).then(|| common.namespace(cluster));
    let gateways = cluster.list("gateway.gateway.networking.k8s.io", namespace)?;
    let mut all = waypoints(gateways, None);
    if let Some(name) = &args.waypoint {
        all.retain(|gateway| name_of(gateway) == name);
    }
    Ok(all)
}

fn table(all: &[Value], with_namespace: bool) -> String {
    let mut table = match with_namespace {
        true => Table::new(["NAMESPACE", "NAME", "STATUS", "TYPE", "REASON", "MESSAGE"]),
        false => Table::new(["NAME", "STATUS", "TYPE", "REASON", "MESSAGE"]),
    };
    for gateway in all {
        let conditions = gateway["status"]["conditions"].as_array();
        for condition in conditions.into_iter().flatten() {
            let text = |key: &str| condition[key].as_str().unwrap_or_default();
            let (namespace, name) = (namespace_of(gateway), name_of(gateway));
            let [status, kind, reason, message] = ["status", "type", "reason", "message"].map(text);
            match with_namespace {
                true => table.row([namespace, name, status, kind, reason, message]),
                false => table.row([name, status, kind, reason, message]),
            }
        }
    }
    table.render()
}
