//! `adit`: the command line. Exit status 0: fine; 1: findings or an error; 2: usage.

#![forbid(unsafe_code)]

mod analyze;
mod check;
mod local;
mod output;
mod version;
mod zc;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Looks at and drives an Adit mesh.
#[derive(Debug, Parser)]
#[command(name = "adit", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A mesh of network namespaces on this machine
    #[command(subcommand)]
    Local(local::Command),
    /// What this machine's kernel lacks for a node tunnel, and since when kernels have it
    Check(check::Options),
    /// Versions of this program, of the control plane and of the node tunnels
    Version(version::Options),
    /// What a node tunnel knows
    #[command(alias = "zc")]
    ZtunnelConfig(zc::Options),
    /// What is wrong with manifests, or probably not what was meant
    Analyze(analyze::Options),
}

fn main() -> ExitCode {
    // A closed pipe (`| head`) ends the program without noise.
    output::end_quietly_on_closed_pipe();
    let outcome = match Cli::parse().command {
        Command::Local(command) => local::run(command),
        Command::Check(options) => check::run(&options),
        Command::Version(options) => version::run(&options),
        Command::ZtunnelConfig(options) => zc::run(&options),
        Command::Analyze(options) => analyze::run(options),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("adit: {error:#}");
            ExitCode::FAILURE
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

    #[test]
    fn usual_lines_are_understood() {
        for line in [
            "adit local up -f demo --nodes n1,n2 --detach",
            "adit local exec shop/web -- adit-sample call http://a/",
            "adit local logs ztunnel-n1 --follow",
            "adit zc workloads -o json --node n1 --workload-namespace shop",
            "adit zc log --level access=debug",
            "adit ztunnel-config all --with-headers -f dump.json",
            "adit check --pre",
            "adit version -o yaml",
            "adit analyze -f demo",
        ] {
            let parsed = Cli::try_parse_from(line.split(' '));
            assert!(parsed.is_ok(), "{line}: {:?}", parsed.err());
        }
        let wrong = Cli::try_parse_from(["adit", "nonsense"]);
        assert_eq!(wrong.err().map(|e| e.exit_code()), Some(2));
    }
}
