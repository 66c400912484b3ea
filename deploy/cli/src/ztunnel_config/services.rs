//! `adit ztunnel-config services`.

use crate::output::{self, Outcome, Output};
use crate::table::Table;
use crate::ztunnel::dump::{Dump, Entry, is_healthy, list};
use crate::ztunnel::names::{Names, address};

use super::{Common, Loaded, picks};

/// The services that ztunnel knows, with how many of their endpoints are healthy
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config services
  adit zc service --service-namespace shop -o json")]
pub struct Args {
    /// Only services of this namespace
    #[arg(long, value_name = "NAMESPACE")]
    service_namespace: Option<String>,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded {
        mut dump,
        names,
        outcome,
    } = args.common.load()?;
    dump.services
        .retain(|Entry { view, .. }| picks(args.service_namespace.as_deref(), &view.namespace));
    sort(&mut dump);
    output::print(out, args.common.output, &list(&dump.services), || {
        table(&dump, &names)
    })?;
    Ok(outcome)
}

pub(super) fn sort(dump: &mut Dump) {
    dump.services.sort_by_cached_key(|Entry { view, .. }| {
        (
            view.namespace.clone(),
            view.name.clone(),
            view.hostname.clone(),
        )
    });
}

pub(super) fn table(dump: &Dump, names: &Names) -> String {
    let mut table = Table::new([
        "NAMESPACE",
        "SERVICE NAME",
        "SERVICE VIP",
        "WAYPOINT",
        "ENDPOINTS",
    ]);
    for service in dump.services.iter().map(|entry| &entry.view) {
        let vip = service.vips.first().map_or("None", |vip| address(vip));
        let all = service.endpoints.len();
        let healthy = service
            .endpoints
            .values()
            .filter(|endpoint| is_healthy(&endpoint.status))
            .count();
        table.row([
            &service.namespace,
            &service.name,
            vip,
            &names.waypoint(service.waypoint.as_ref()),
            &format!("{healthy}/{all}"),
        ]);
    }
    table.render()
}
