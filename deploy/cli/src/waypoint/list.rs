//! `adit waypoint list`.

use std::io::Write as _;

use super::Common;
use super::gateway::{condition, revision_of, traffic_of, waypoints};
use crate::cluster::{name_of, namespace_of};
use crate::output::{self, Format, Outcome, Output};
use crate::table::Table;

/// List waypoints
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// In every namespace
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only those of this control plane revision
    #[arg(short, long)]
    revision: Option<String>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(super) fn run(args: &Args, common: &Common, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = common.cluster.open()?;
    let namespace = (!args.all_namespaces).then(|| common.namespace(&cluster));
    let gateways = cluster.list("gateway.gateway.networking.k8s.io", namespace)?;
    let all = waypoints(gateways, args.revision.as_deref());
    if all.is_empty() && args.output == Format::Short {
        writeln!(out, "No waypoints found.")?;
        return Ok(Outcome::Well);
    }
    let classes = cluster.list("gatewayclass", None)?;
    output::print(out, args.output, &all, || {
        let mut table = match args.all_namespaces {
            true => Table::new([
                "NAMESPACE",
                "NAME",
                "REVISION",
                "TRAFFIC TYPE",
                "PROGRAMMED",
            ]),
            false => Table::new(["NAME", "REVISION", "TRAFFIC TYPE", "PROGRAMMED"]),
        };
        for gateway in &all {
            let programmed = condition(gateway, "Programmed");
            let programmed = programmed.and_then(|c| c["status"].as_str());
            let rest = [
                name_of(gateway),
                revision_of(gateway),
                traffic_of(gateway, &classes),
                programmed.unwrap_or("Unknown"),
            ];
            match args.all_namespaces {
                true => {
                    let [name, revision, traffic, programmed] = rest;
                    let namespace = namespace_of(gateway);
                    table.row([namespace, name, revision, traffic, programmed]);
                }
                false => table.row(rest),
            }
        }
        table.render()
    })?;
    Ok(Outcome::Well)
}
