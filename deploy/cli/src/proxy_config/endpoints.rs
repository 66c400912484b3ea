//! `adit proxy-config endpoint`.

use super::{Common, Filter, filtered_services};
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::Dump;
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    filter: Filter,
    /// Only endpoints with this address
    #[arg(long)]
    address: Option<String>,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    let value = filtered_services(&raw, &args.filter);
    output::print(out, args.common.output, &value, || {
        table(&dump, &args.filter, args.address.as_deref())
    })?;
    Ok(Outcome::Well)
}

pub(super) fn table(dump: &Dump, filter: &Filter, address: Option<&str>) -> String {
    let mut table = Table::new(["NAME", "STATUS", "LOCALITY", "CLUSTER"]);
    for service in &dump.services {
        for port in &service.ports {
            if !filter.takes(&service.hostname, port.port) {
                continue;
            }
            for endpoint in &port.endpoints {
                let ip = endpoint.address.rsplit_once(':').map(|(ip, _)| ip);
                if address.is_some_and(|wanted| wanted != endpoint.address && Some(wanted) != ip) {
                    continue;
                }
                let status = match endpoint.status.as_str() {
                    "" => "HEALTHY",
                    status => status,
                };
                let cluster = service.cluster(port);
                table.row([&endpoint.address, status, &endpoint.locality, &cluster]);
            }
        }
    }
    table.render()
}
