//! `adit proxy-config`: what a waypoint knows, from its admin endpoint or from a stored
//! dump. Columns and flags are those of `istioctl proxy-config`.

mod all;
mod clusters;
mod connections;
mod endpoints;
mod listeners;
mod log;
mod policies;
mod routes;
mod secrets;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use http::Method;
use serde_json::Value;

use crate::output::{Format, Outcome, Output};
use crate::proxy::dump::Dump;
use crate::proxy::target::{TargetArgs, waypoint};
use crate::ztunnel::admin::MAX_ANSWER;

/// Show what a waypoint knows, and set its log level
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit proxy-config all waypoint.shop
  adit pc routes -n shop
  adit pc endpoints --fqdn reviews.shop.svc.cluster.local
  adit pc routes -o json
  adit pc connections waypoint.shop --direction inbound
  adit pc log waypoint.shop --level debug")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything
    All(all::Args),
    /// What is dialled, and where it leads
    #[command(visible_aliases = ["listeners", "l"])]
    Listener(listeners::Args),
    /// Routes, match by match
    #[command(visible_aliases = ["routes", "r"])]
    Route(routes::Args),
    /// Services and how they are balanced
    #[command(visible_aliases = ["clusters", "c"])]
    Cluster(clusters::Args),
    /// What is open: clients' tunnels, what they carry, connections to endpoints
    #[command(visible_aliases = ["connections", "conn"])]
    Connection(connections::Args),
    /// Endpoints of services
    #[command(visible_aliases = ["endpoints", "ep"])]
    Endpoint(endpoints::Args),
    /// Authorization and authentication policies
    #[command(visible_aliases = ["policies", "p"])]
    Policy(policies::Args),
    /// Certificates
    #[command(visible_aliases = ["secrets", "s"])]
    Secret(secrets::Args),
    /// Show or set the log level
    #[command(visible_alias = "o")]
    Log(log::Args),
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    match args.command {
        Command::All(args) => all::run(&args, out),
        Command::Listener(args) => listeners::run(&args, out),
        Command::Route(args) => routes::run(&args, out),
        Command::Cluster(args) => clusters::run(&args, out),
        Command::Connection(args) => connections::run(&args, out),
        Command::Endpoint(args) => endpoints::run(&args, out),
        Command::Policy(args) => policies::run(&args, out),
        Command::Secret(args) => secrets::run(&args, out),
        Command::Log(args) => log::run(&args, out),
    }
}

/// What every table takes.
#[derive(Debug, clap::Args)]
struct Common {
    /// The waypoint, as NAME[.NAMESPACE] or by its pod [default: the only one]
    #[arg(value_name = "WAYPOINT")]
    target: Option<String>,
    /// Read a stored dump (- is standard input)
    #[arg(short, long, value_name = "PATH", conflicts_with_all = ["target", "mesh", "namespace", "admin_address", "kubeconfig", "context"])]
    file: Option<PathBuf>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    at: TargetArgs,
}

/// Which services.
#[derive(Debug, Default, clap::Args)]
struct Filter {
    /// Only this service, by its host name
    #[arg(long)]
    fqdn: Option<String>,
    /// Only this port
    #[arg(long)]
    port: Option<u16>,
}

impl Filter {
    fn takes(&self, hostname: &str, port: u16) -> bool {
        self.fqdn.as_deref().is_none_or(|wanted| wanted == hostname)
            && self.port.is_none_or(|wanted| wanted == port)
    }
}

impl Common {
    /// The dump, and all that it came with.
    fn load(&self) -> anyhow::Result<(Dump, Value)> {
        match &self.file {
            Some(path) => {
                let text = read(path)?;
                Dump::parse(&text).with_context(|| path.display().to_string())
            }
            None => {
                let waypoint = waypoint(&self.at, self.target.as_deref())?;
                let text = waypoint.request(&Method::GET, "/config_dump")?;
                Dump::parse(&text).with_context(|| format!("waypoint {}", waypoint.name))
            }
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let source: Box<dyn Read> = if path == Path::new("-") {
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
    Ok(text)
}

/// Services as they are in the dump, for JSON: those that the filter takes.
fn filtered_services(raw: &Value, filter: &Filter) -> Value {
    let services = raw["services"].as_array().into_iter().flatten();
    let kept = services.filter(|service| {
        let hostname = service["hostname"].as_str().unwrap_or_default();
        filter
            .fqdn
            .as_deref()
            .is_none_or(|wanted| wanted == hostname)
    });
    kept.cloned().collect()
}
