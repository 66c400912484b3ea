//! `adit ztunnel-config connections`.

use clap::ValueEnum;
use serde_json::Value;

use crate::output::{self, Outcome, Output};
use crate::table::Table;
use crate::ztunnel::dump::{Dump, Entry, list};
use crate::ztunnel::names::Names;

use super::{Common, Loaded, picks};

/// The connections that are open
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config connections
  adit zc connections --workload-namespace shop --direction inbound
  adit zc connections web-a.shop --raw")]
pub struct Args {
    /// Only connections that go this way
    #[arg(long, value_enum)]
    direction: Option<Direction>,
    /// Addresses in place of names
    #[arg(long)]
    raw: bool,
    /// Only connections of this namespace's pods
    #[arg(long, value_name = "NAMESPACE")]
    workload_namespace: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    Inbound,
    Outbound,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded {
        mut dump,
        names,
        outcome,
    } = args.common.load()?;
    dump.pods
        .retain(|pod| picks(args.workload_namespace.as_deref(), &pod.view.info.namespace));
    for pod in &mut dump.pods {
        let connections = &mut pod.view.connections;
        let gone = match args.direction {
            None => continue,
            Some(Direction::Inbound) => {
                connections.outbound.clear();
                "outbound"
            }
            Some(Direction::Outbound) => {
                connections.inbound.clear();
                "inbound"
            }
        };
        if let Some(list) = pod.raw.pointer_mut(&format!("/connections/{gone}")) {
            *list = Value::Array(Vec::new());
        }
    }
    sort(&mut dump);
    let names = (!args.raw).then_some(&names);
    output::print(out, args.common.output, &list(&dump.pods), || {
        table(&dump, names)
    })?;
    Ok(outcome)
}

pub(super) fn sort(dump: &mut Dump) {
    dump.pods.sort_by_cached_key(|Entry { view, key, .. }| {
        let info = &view.info;
        (info.namespace.clone(), info.name.clone(), key.clone())
    });
}

/// Without `names`: addresses.
pub(super) fn table(dump: &Dump, names: Option<&Names>) -> String {
    let mut table = Table::new([
        "WORKLOAD",
        "DIRECTION",
        "LOCAL",
        "REMOTE",
        "REMOTE TARGET",
        "PROTOCOL",
    ]);
    let peer = |address: &str| names.map_or_else(|| address.to_owned(), |n| n.peer(address));
    for Entry { view, .. } in &dump.pods {
        let pod = format!("{}.{}", view.info.name, view.info.namespace);
        for c in &view.connections.inbound {
            // What the client dialled, where that was not the pod itself.
            let target = match c.original_dst == c.actual_dst {
                true => String::new(),
                false => peer(&c.original_dst),
            };
            let (local, remote) = (peer(&c.actual_dst), peer(&c.src));
            table.row([&pod, "Inbound", &local, &remote, &target, &c.protocol]);
        }
        for c in &view.connections.outbound {
            let (local, remote) = (peer(&c.src), peer(&c.actual_dst));
            let target = peer(&c.original_dst);
            table.row([&pod, "Outbound", &local, &remote, &target, &c.protocol]);
        }
    }
    table.render()
}
