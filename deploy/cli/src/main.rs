//! `adit`, the command line of the mesh.
//!
//! One file per subcommand. Each has an `Args` (what clap reads) and a `run` that writes to
//! an [`Output`] and says by an [`Outcome`] whether all is well.

#![forbid(unsafe_code)]

mod analyze;
mod check;
mod cluster;
mod completion;
mod install;
mod kubernetes;
mod local;
mod output;
mod proxy;
mod proxy_config;
mod proxy_status;
mod table;
mod tap;
mod version;
mod waypoint;
mod why;
mod ztunnel;
mod ztunnel_config;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::output::{Outcome, Output, UsageError};

/// The command line of Adit, an ambient service mesh.
#[derive(Debug, Parser)]
#[command(name = "adit", version, propagate_version = true)]
#[command(after_help = "\
Exit status: 0 all is well, 1 something was found or failed, 2 the command line is wrong.")]
struct Cli {
    #[command(flatten)]
    _anywhere: Anywhere,
    #[command(subcommand)]
    command: Command,
}

/// Flags that istioctl and kubectl take before the subcommand too. Commands have them by the
/// same names, and get their values from here as well.
#[derive(Debug, clap::Args)]
struct Anywhere {
    // Its short form, -c, is a container to `adit local logs`.
    #[arg(long = "kubeconfig", id = "kubeconfig", global = true, hide = true)]
    _kubeconfig: Option<PathBuf>,
    #[arg(long = "context", id = "context", global = true, hide = true)]
    _context: Option<String>,
    #[arg(
        short = 'n',
        long = "namespace",
        id = "namespace",
        global = true,
        hide = true
    )]
    _namespace: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Analyze(analyze::Args),
    Check(check::Args),
    Completion(completion::Args),
    Install(install::apply::Args),
    Local(local::Args),
    Manifest(install::manifest::Args),
    #[command(visible_alias = "pc")]
    ProxyConfig(proxy_config::Args),
    #[command(visible_alias = "ps")]
    ProxyStatus(proxy_status::Args),
    Tap(tap::Args),
    Uninstall(install::uninstall::Args),
    Upgrade(install::apply::UpgradeArgs),
    VerifyInstall(install::verify::Args),
    Version(version::Args),
    Waypoint(waypoint::Args),
    Why(why::Args),
    #[command(visible_alias = "zc")]
    ZtunnelConfig(ztunnel_config::Args),
}

impl Command {
    fn run(self, out: &mut Output) -> anyhow::Result<Outcome> {
        match self {
            Self::Analyze(args) => analyze::run(args, out),
            Self::Check(args) => check::run(args, out),
            Self::Completion(args) => completion::run(args, out),
            Self::Install(args) => install::apply::run(args, out),
            Self::Local(args) => local::run(args, out),
            Self::Manifest(args) => install::manifest::run(args, out),
            Self::ProxyConfig(args) => proxy_config::run(args, out),
            Self::ProxyStatus(args) => proxy_status::run(&args, out),
            Self::Tap(args) => tap::run(&args, out),
            Self::Uninstall(args) => install::uninstall::run(args, out),
            Self::Upgrade(args) => install::apply::run_upgrade(args, out),
            Self::VerifyInstall(args) => install::verify::run(args, out),
            Self::Version(args) => version::run(args, out),
            Self::Waypoint(args) => waypoint::run(args, out),
            Self::Why(args) => why::run(&args, out),
            Self::ZtunnelConfig(args) => ztunnel_config::run(args, out),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = Output::stdout();
    let done = cli.command.run(&mut out).and_then(|outcome| {
        out.flush()?;
        Ok(outcome)
    });
    match done {
        Ok(Outcome::Well) => ExitCode::SUCCESS,
        Ok(Outcome::Findings) => ExitCode::FAILURE,
        // The reader (`head`, a pager) has seen enough.
        Err(_) if out.is_closed() => ExitCode::SUCCESS,
        Err(error) => {
            output::complain_of(&error);
            match error.is::<UsageError>() {
                true => ExitCode::from(2),
                false => ExitCode::FAILURE,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
