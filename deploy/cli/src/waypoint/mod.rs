//! `adit waypoint`: Gateways of class `istio-waypoint`, and the namespaces that use them.
//! Flags, columns and messages are those of `istioctl waypoint`.

mod apply;
mod delete;
mod gateway;
mod list;
mod nodes;
mod status;

use std::io::Write as _;

use clap::{Subcommand, ValueEnum};

use crate::cluster::{Cluster, ClusterArgs};
use crate::output::{self, Outcome, Output, UsageError};

/// Make, look at and remove waypoints
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # a waypoint for a namespace, used by all that is in it
  adit waypoint apply -n shop --enroll-namespace --wait

  # the Gateway as YAML
  adit waypoint generate -n shop --for service

  adit waypoint list -A
  adit waypoint status -n shop
  adit waypoint delete -n shop waypoint")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Name of the waypoint
    #[arg(long, default_value = "waypoint", global = true)]
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(apply::GenerateArgs),
    Apply(apply::Args),
    List(list::Args),
    Status(status::Args),
    Delete(delete::Args),
}

/// Which traffic a waypoint takes (`istio.io/waypoint-for`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TrafficType {
    Service,
    Workload,
    All,
    None,
}

impl TrafficType {
    fn text(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Workload => "workload",
            Self::All => "all",
            Self::None => "none",
        }
    }
}

impl Common {
    /// The namespace of the waypoint.
    fn namespace<'a>(&'a self, cluster: &'a Cluster) -> &'a str {
        let named = self.cluster.namespace.as_deref();
        named.unwrap_or_else(|| cluster.default_namespace())
    }

    /// `istio.io/use-waypoint: none` means no waypoint.
    fn checked_name(&self) -> anyhow::Result<&str> {
        match self.name.as_str() {
            "none" => Err(UsageError(
                "invalid name provided for waypoint, 'none' is a reserved value".into(),
            )
            .into()),
            name => Ok(name),
        }
    }
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let common = &args.common;
    match args.command {
        Command::Generate(args) => apply::generate(&args, common, out),
        Command::Apply(args) => apply::run(&args, common, out),
        Command::List(args) => list::run(&args, common, out),
        Command::Status(args) => status::run(&args, common, out),
        Command::Delete(args) => delete::run(&args, common, out),
    }
}

fn done(out: &mut Output, text: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    writeln!(out, "✅ {text}")?;
    // What follows may take a while.
    Ok(out.flush()?)
}

fn warn(text: std::fmt::Arguments<'_>) {
    output::complain(format_args!("⚠️ Warning: {text}"));
}
