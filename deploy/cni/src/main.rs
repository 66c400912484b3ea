//! `adit-cni`: the plugin when a container runtime calls it, else the node agent.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use adit_cni::{agent, install, plugin};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "adit-cni",
    version,
    about = "Adit's CNI plugin and its node agent"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the node agent: installs the plugin, decides which pods join the mesh.
    Agent(Box<agent::Options>),
    /// Takes the plugin out of this node's CNI configuration and removes it.
    Uninstall {
        /// The runtime's directory of plugins.
        #[arg(long, env = "ADIT_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
        bin_dir: PathBuf,
        /// The runtime's directory of configurations.
        #[arg(long, env = "ADIT_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
        conf_dir: PathBuf,
    },
}

fn main() -> ExitCode {
    // Before anything else: a runtime waits for each sandbox.
    if plugin::is_called() {
        return plugin::main();
    }
    let done = match Arguments::parse().command {
        Command::Agent(options) => agent::main(*options),
        Command::Uninstall { bin_dir, conf_dir } => {
            install::uninstall(&bin_dir, &conf_dir).map_err(Into::into)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error: anyhow::Error = error;
            eprintln!("adit-cni: {error:#}");
            ExitCode::FAILURE
        }
    }
}
