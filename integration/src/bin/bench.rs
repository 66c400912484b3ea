//! `make bench`: what the mesh costs, measured on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use adit_integration::bench::{self, Options};
use anyhow::Context;
use clap::{Parser, ValueEnum};

/// Two nodes, a client and a server pod, with a mesh and without: throughput, latency, CPU
/// time and memory of the proxies.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    /// Rounds; the figures are medians over them
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: Option<u64>,
    /// Seconds of a load in the mesh; without a mesh half of it
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: Option<u64>,
    /// One short round: shows that everything works
    #[arg(long)]
    quick: bool,
    /// Only what has this in its name ("bulk", "round", "connections", "HTTP", "memory", "burst")
    #[arg(long)]
    only: Option<String>,
    /// Whether the proxies write access logs, as they are shipped
    #[arg(long, default_value = "on")]
    access_log: Switch,
    /// A missed limit is an error
    #[arg(long)]
    check: bool,
    /// Where the report goes as JSON
    #[arg(long, default_value = "target/bench/report.json")]
    report: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let mut options = if cli.quick {
        Options::quick()
    } else {
        Options::default()
    };
    if let Some(rounds) = cli.rounds {
        options.rounds = usize::try_from(rounds)?;
    }
    options.seconds = cli.seconds.unwrap_or(options.seconds);
    options.only = cli.only;
    options.access_log = cli.access_log == Switch::On;
    let report = bench::run(&options)?;
    print!("{}", report.table());
    if let Some(directory) = cli.report.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make {}", directory.display()))?;
    }
    std::fs::write(&cli.report, serde_json::to_vec_pretty(&report.json())?)
        .with_context(|| format!("write {}", cli.report.display()))?;
    println!("report: {}", cli.report.display());
    Ok(match cli.check && !report.passed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}
