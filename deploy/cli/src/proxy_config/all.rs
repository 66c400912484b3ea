//! `adit proxy-config all`.

use std::time::SystemTime;

use super::{Common, Filter, clusters, endpoints, listeners, policies, routes, secrets};
use crate::output::{self, Outcome, Output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    let filter = Filter::default();
    output::print(out, args.common.output, &raw, || {
        let parts = [
            clusters::table(&dump, &filter),
            listeners::table(&dump, &filter),
            routes::table(&dump, &filter, None),
            endpoints::table(&dump, &filter, None),
            policies::table(&dump),
            secrets::table(&dump, SystemTime::now()),
        ];
        parts.join("\n")
    })?;
    Ok(Outcome::Well)
}
