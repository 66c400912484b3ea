//! `adit proxy-config secret`.

use std::time::SystemTime;

use super::Common;
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::Dump;
use crate::table::Table;
use crate::ztunnel_config::certificate_rows;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    output::print(out, args.common.output, &raw["certificates"], || {
        table(&dump, SystemTime::now())
    })?;
    Ok(Outcome::Well)
}

/// `now` decides what is valid.
pub(super) fn table(dump: &Dump, now: SystemTime) -> String {
    let mut table = Table::new([
        "RESOURCE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    for row in certificate_rows(dump.certificates.iter(), now) {
        table.row(row.each_ref().map(String::as_str));
    }
    table.render()
}
