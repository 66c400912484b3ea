//! `adit proxy-config cluster`.

use super::{Common, Filter, filtered_services};
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::{Dump, object_name, protocol_word};
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    filter: Filter,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    let value = filtered_services(&raw, &args.filter);
    output::print(out, args.common.output, &value, || {
        table(&dump, &args.filter)
    })?;
    Ok(Outcome::Well)
}

pub(super) fn table(dump: &Dump, filter: &Filter) -> String {
    let mut table = Table::new([
        "SERVICE FQDN",
        "PORT",
        "SUBSET",
        "DIRECTION",
        "TYPE",
        "DESTINATION RULE",
    ]);
    for service in &dump.services {
        let policy = dump.traffic_policy(&service.hostname);
        let rule = policy.map(object_name).unwrap_or_default();
        let subsets = policy.and_then(|policy| policy["subsets"].as_array());
        let subsets = subsets.into_iter().flatten();
        let subsets: Vec<&str> = subsets.filter_map(|s| s["name"].as_str()).collect();
        for port in &service.ports {
            if !filter.takes(&service.hostname, port.port) {
                continue;
            }
            let number = port.port.to_string();
            let protocol = protocol_word(&port.protocol);
            // As Istio's waypoints name them: the protocol, and then each subset.
            let named = subsets.iter().map(|subset| format!("{protocol}/{subset}"));
            for subset in std::iter::once(protocol.clone()).chain(named) {
                table.row([
                    &service.hostname,
                    &number,
                    &subset,
                    "inbound-vip",
                    "EDS",
                    &rule,
                ]);
            }
        }
    }
    table.render()
}
