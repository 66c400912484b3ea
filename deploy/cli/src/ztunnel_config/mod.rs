//! `adit ztunnel-config`: what ztunnels know and do, from their admin endpoint or from a
//! stored dump. Columns and flags are those of `istioctl ztunnel-config`.

mod all;
mod certificates;
mod connections;
mod log;
mod policies;
mod services;
mod workloads;

pub use certificates::rows as certificate_rows;
pub use log::filter as log_filter;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use http::Method;

use crate::output::{self, Format, Outcome, Output};
use crate::ztunnel::admin::MAX_ANSWER;
use crate::ztunnel::dump::Dump;
use crate::ztunnel::merge::merge;
use crate::ztunnel::names::Names;
use crate::ztunnel::target::{PodName, TargetArgs, Ztunnel, request_all, targets};

/// Disagreements of ztunnels that are told one by one.
const MAX_TOLD: usize = 5;
/// A change has reached every node by then.
const SETTLED: Duration = Duration::from_secs(1);

/// Show what ztunnels know, and set their log level
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # what the ztunnels know, merged
  adit ztunnel-config workloads
  adit zc services --service-namespace shop

  # what concerns one pod
  adit zc all web-a.shop

  # who talks to whom on a node, by address
  adit zc connections --node node1 --raw

  # a stored dump
  curl localhost:15000/config_dump > dump.json
  adit zc certificates -f dump.json")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(visible_aliases = ["workload", "w"])]
    Workloads(workloads::Args),
    #[command(visible_aliases = ["service", "svc", "s"])]
    Services(services::Args),
    #[command(visible_aliases = ["policy", "pol", "p"])]
    Policies(policies::Args),
    #[command(visible_aliases = ["certificate", "certs", "cert"])]
    Certificates(certificates::Args),
    #[command(visible_aliases = ["connection", "cons"])]
    Connections(connections::Args),
    #[command(visible_alias = "o")]
    Log(log::Args),
    All(all::Args),
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    match args.command {
        Command::Workloads(args) => workloads::run(args, out),
        Command::Services(args) => services::run(args, out),
        Command::Policies(args) => policies::run(args, out),
        Command::Certificates(args) => certificates::run(args, out),
        Command::Connections(args) => connections::run(args, out),
        Command::Log(args) => log::run(args, out),
        Command::All(args) => all::run(args, out),
    }
}

/// What every table takes.
#[derive(Debug, clap::Args)]
struct Common {
    /// A ztunnel (ztunnel-NODE) or a pod (NAME[.NAMESPACE]): its node's ztunnel is asked, and
    /// only what concerns the pod is shown
    #[arg(value_name = "ZTUNNEL|POD")]
    target: Option<String>,
    /// Read a stored dump (- is standard input)
    #[arg(short, long, value_name = "PATH", conflicts_with_all = ["target", "mesh", "node", "admin_address", "kubeconfig", "context"])]
    file: Option<PathBuf>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    at: TargetArgs,
}

/// What was read.
struct Loaded {
    dump: Dump,
    names: Names,
    /// Whether every ztunnel that was asked has answered.
    outcome: Outcome,
}

impl Common {
    fn load(&self) -> anyhow::Result<Loaded> {
        let (mut dump, pod, outcome) = match &self.file {
            Some(path) => (read(path)?, None, Outcome::Well),
            None => self.ask()?,
        };
        let names = Names::of(&dump);
        if let Some(pod) = pod {
            dump.confine(&pod)?;
        }
        Ok(Loaded {
            dump,
            names,
            outcome,
        })
    }

    fn ask(&self) -> anyhow::Result<(Dump, Option<PodName>, Outcome)> {
        let targets = targets(&self.at, self.target.as_deref())?;
        let (mut dump, mut told, mut outcome) = merged(&targets.ztunnels)?;
        if !told.is_empty() {
            // A change reaches them one after the other: who lags behind has it by now.
            sleep(SETTLED);
            let (again, still, ended) = merged(&targets.ztunnels)?;
            told.retain(|sentence| still.contains(sentence));
            (dump, outcome) = (again, ended);
        }
        for sentence in told.iter().take(MAX_TOLD) {
            output::complain(format_args!("Warning: {sentence}."));
        }
        let more = told.len().saturating_sub(MAX_TOLD);
        if more > 0 {
            output::complain(format_args!(
                "Warning: the ztunnels disagree in {more} more places."
            ));
        }
        Ok((dump, targets.pod, outcome))
    }
}

/// The dumps of all that answer as one, and sentences about where they disagree.
fn merged(ztunnels: &[Ztunnel]) -> anyhow::Result<(Dump, Vec<String>, Outcome)> {
    let mut dumps = Vec::new();
    let mut outcome = Outcome::Well;
    let answers = request_all(ztunnels, &Method::GET, "/config_dump");
    for (ztunnel, answer) in ztunnels.iter().zip(answers) {
        let dump = answer.and_then(|text| {
            Dump::parse(&text).with_context(|| format!("the dump of {} is of no use", ztunnel.name))
        });
        match dump {
            Ok(dump) => dumps.push((ztunnel.name.clone(), dump)),
            // The others still have something to say.
            Err(error) if ztunnels.len() > 1 => {
                output::complain_of(&error);
                outcome = Outcome::Findings;
            }
            Err(error) => return Err(error),
        }
    }
    if dumps.is_empty() {
        bail!("no ztunnel has answered");
    }
    let (dump, told) = merge(dumps);
    Ok((dump, told, outcome))
}

fn read(path: &Path) -> anyhow::Result<Dump> {
    let stdin = path == Path::new("-");
    let source: Box<dyn Read> = if stdin {
        Box::new(io::stdin())
    } else {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Box::new(file)
    };
    let mut text = Vec::new();
    source
        .take(MAX_ANSWER as u64 + 1)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if text.len() > MAX_ANSWER {
        bail!("{} is too long for a dump", path.display());
    }
    Dump::parse(&text).with_context(|| format!("{} is no ztunnel dump", path.display()))
}

/// Whether `wanted` is not given, or is `value`.
fn picks(wanted: Option<&str>, value: &str) -> bool {
    wanted.is_none_or(|wanted| wanted.eq_ignore_ascii_case(value))
}
