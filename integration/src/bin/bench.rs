//! `make bench`: what the mesh costs, measured on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use adit_integration::bench::l7::{self, LoadSpec, UpstreamSpec};
use adit_integration::bench::{self, Options};
use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

/// Two nodes, a client and a server pod, with a mesh and without: throughput, latency, CPU
/// time and memory of the proxies.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    /// What is measured: tunnels between nodes, waypoints, or both
    #[arg(long, default_value = "all")]
    layer: Layer,
    /// Rounds; the figures are medians over them
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: Option<u64>,
    /// Seconds of a load in the mesh; without a mesh half of it
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: Option<u64>,
    /// One short round: shows that everything works
    #[arg(long)]
    quick: bool,
    /// Only what has this in its name ("bulk", "round", "connections", "HTTP", "memory",
    /// "burst"; "L7", "gRPC", "routes", "policies", "changes", "rate", "KiB")
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layer {
    All,
    L4,
    L7,
}

/// Parts of the bench that it starts itself.
#[derive(Subcommand)]
enum Part {
    #[command(hide = true)]
    L7Load { spec: String },
    #[command(hide = true)]
    L7Upstream { spec: String },
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::L7Load { spec }) => {
            l7::generate(&serde_json::from_str::<LoadSpec>(&spec)?)?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Part::L7Upstream { spec }) => {
            l7::answer(&serde_json::from_str::<UpstreamSpec>(&spec)?)?;
            return Ok(ExitCode::SUCCESS);
        }
        None => {}
    }
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
    let mut json = serde_json::json!({});
    let mut passed = true;
    if cli.layer != Layer::L7 {
        let report = bench::run(&options)?;
        print!("{}", report.table());
        json = report.json();
        passed &= report.passed();
    }
    if cli.layer != Layer::L4 {
        let report = l7::run(&options)?;
        print!("{}", report.table());
        json["l7"] = report.json();
        passed &= report.passed();
    }
    if let Some(directory) = cli.report.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make {}", directory.display()))?;
    }
    std::fs::write(&cli.report, serde_json::to_vec_pretty(&json)?)
        .with_context(|| format!("write {}", cli.report.display()))?;
    println!("report: {}", cli.report.display());
    Ok(match cli.check && !passed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}
