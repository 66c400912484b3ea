//! `adit ztunnel-config policies`.

use crate::output::{self, Outcome, Output};
use crate::table::Table;
use crate::ztunnel::dump::{Dump, Entry, list};

use super::{Common, Loaded, picks};

/// The authorization policies that ztunnel enforces
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config policies
  adit zc policy --policy-namespace shop -o yaml

  # those that hold for one pod
  adit zc policies web-a.shop")]
pub struct Args {
    /// Only policies of this namespace
    #[arg(long, value_name = "NAMESPACE")]
    policy_namespace: Option<String>,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded {
        mut dump, outcome, ..
    } = args.common.load()?;
    dump.policies
        .retain(|Entry { view, .. }| picks(args.policy_namespace.as_deref(), &view.namespace));
    sort(&mut dump);
    output::print(out, args.common.output, &list(&dump.policies), || {
        table(&dump)
    })?;
    Ok(outcome)
}

pub(super) fn sort(dump: &mut Dump) {
    dump.policies
        .sort_by_cached_key(|Entry { view, .. }| (view.namespace.clone(), view.name.clone()));
}

pub(super) fn table(dump: &Dump) -> String {
    let mut table = Table::new(["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"]);
    for policy in dump.policies.iter().map(|entry| &entry.view) {
        table.row([
            &policy.namespace,
            &policy.name,
            &policy.action,
            &policy.scope,
        ]);
    }
    table.render()
}
