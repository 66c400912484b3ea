//! `adit ztunnel-config all`.

use std::time::SystemTime;

use crate::output::{self, Outcome, Output};

use super::{Common, Loaded, certificates, connections, policies, services, workloads};

/// All of the above, except the log level
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config all --with-headers

  # the whole dump of a node, to be read later with -f
  adit zc all --node node1 -o json > dump.json")]
pub struct Args {
    /// A headline above each table
    #[arg(long)]
    with_headers: bool,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded {
        mut dump,
        names,
        outcome,
    } = args.common.load()?;
    workloads::sort(&mut dump);
    services::sort(&mut dump);
    policies::sort(&mut dump);
    connections::sort(&mut dump);
    output::print(out, args.common.output, &dump.to_value(), || {
        let tables = [
            ("WORKLOAD", workloads::table(&dump, &names)),
            ("SERVICE", services::table(&dump, &names)),
            ("POLICY", policies::table(&dump)),
            ("CERTIFICATE", certificates::table(&dump, SystemTime::now())),
            ("CONNECTIONS", connections::table(&dump, Some(&names))),
        ];
        let mut text = String::new();
        for (index, (title, table)) in tables.iter().enumerate() {
            if index > 0 {
                text.push('\n');
            }
            if args.with_headers {
                text += &format!("------ {title} INFO ------\n\n");
            }
            text += table;
        }
        text
    })?;
    Ok(outcome)
}
