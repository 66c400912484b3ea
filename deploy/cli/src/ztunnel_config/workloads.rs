//! `adit ztunnel-config workloads`.

use crate::output::{self, Outcome, Output};
use crate::table::Table;
use crate::ztunnel::dump::{Dump, Entry, Workload, list};
use crate::ztunnel::names::Names;

use super::{Common, Loaded, picks};

/// The workloads that ztunnel knows
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config workloads
  adit zc workload --workload-namespace shop --workload-node node1
  adit zc w --address 10.244.1.7 -o yaml")]
pub struct Args {
    /// Only the workload with this address
    #[arg(long)]
    address: Option<String>,
    /// Only workloads of this namespace
    #[arg(long, value_name = "NAMESPACE")]
    workload_namespace: Option<String>,
    /// Only workloads on this node
    #[arg(long, value_name = "NODE")]
    workload_node: Option<String>,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded {
        mut dump,
        names,
        outcome,
    } = args.common.load()?;
    dump.workloads.retain(|Entry { view, .. }| {
        let mut ips = view.workload_ips.iter();
        picks(args.workload_namespace.as_deref(), &view.namespace)
            && picks(args.workload_node.as_deref(), &view.node)
            && (args.address.is_none() || ips.any(|ip| picks(args.address.as_deref(), ip)))
    });
    sort(&mut dump);
    output::print(out, args.common.output, &list(&dump.workloads), || {
        table(&dump, &names)
    })?;
    Ok(outcome)
}

pub(super) fn sort(dump: &mut Dump) {
    let key = |w: &Workload| (w.namespace.clone(), w.name.clone(), w.node.clone());
    dump.workloads.sort_by_cached_key(|entry| key(&entry.view));
}

pub(super) fn table(dump: &Dump, names: &Names) -> String {
    let mut table = Table::new([
        "NAMESPACE",
        "POD NAME",
        "ADDRESS",
        "NODE",
        "WAYPOINT",
        "PROTOCOL",
    ]);
    for workload in dump.workloads.iter().map(|entry| &entry.view) {
        // The first, as istioctl does; JSON has all.
        let address = workload.workload_ips.first().map_or("None", String::as_str);
        table.row([
            &workload.namespace,
            &workload.name,
            address,
            &workload.node,
            &names.waypoint(workload.waypoint.as_ref()),
            &workload.protocol,
        ]);
    }
    table.render()
}
