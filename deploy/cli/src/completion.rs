//! `adit completion`: the command line as a shell's completion script.

use std::io::Write;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::Cli;
use crate::output::{Outcome, Output};

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # bash, for this session
  source <(adit completion bash)

  # zsh, for every session
  adit completion zsh > \"${fpath[1]}/_adit\"

  # fish
  adit completion fish > ~/.config/fish/completions/adit.fish")]
pub struct Args {
    /// The shell that is to understand it
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    // clap panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "adit", &mut script);
    out.write_all(&script).context("cannot write the script")?;
    Ok(Outcome::Well)
}
