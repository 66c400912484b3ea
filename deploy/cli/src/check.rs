//! `adit check`: whether this machine can run a node tunnel.

use std::process::ExitCode;

use adit_ebpf::{NodeConfig, capabilities};
use anyhow::Context;
use clap::Args;
use serde_json::json;

use crate::output::{Format, Table, print_value};

/// Options of `check`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Before an installation: only the machine (all there is to check today)
    #[arg(long)]
    pre: bool,
    /// How to print
    #[arg(short, long, default_value = "short")]
    output: Format,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    // Without `--pre` more may follow; the machine always comes first.
    let Options { pre: _, output } = options;
    let config = NodeConfig::detect("adit-check").context("cannot look at this machine")?;
    let found = capabilities(&config);
    let missing = found.iter().filter(|c| c.required && !c.present).count();
    if *output == Format::Short {
        let mut table = Table::new(&["", "FEATURE", "NEEDED FOR", "SINCE", "FOUND"]);
        for capability in &found {
            let mark = match (capability.present, capability.required) {
                (true, _) => "ok",
                (false, true) => "MISSING",
                (false, false) => "absent",
            };
            table.rows.push(
                [
                    mark,
                    capability.feature,
                    capability.needed_for,
                    capability.since,
                    &capability.detail,
                ]
                .map(String::from)
                .to_vec(),
            );
        }
        print!("{}", table.render()?);
        match missing {
            0 => println!("\nThis machine can run an Adit node tunnel."),
            _ => println!("\nThis machine cannot run an Adit node tunnel."),
        }
    } else {
        let list: Vec<_> = found
            .iter()
            .map(|c| {
                json!({"feature": c.feature, "neededFor": c.needed_for, "since": c.since,
                    "required": c.required, "present": c.present, "detail": c.detail})
            })
            .collect();
        print_value(&list, *output)?;
    }
    Ok(match missing {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
