//! `make bench`: what the mesh costs, measured on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use adit_integration::bench::l7::{self, LoadSpec, UpstreamSpec};
use adit_integration::bench::{self, Options, scale};
use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

/// Two nodes, a client and a server pod, with a mesh and without: throughput, latency, CPU
/// time and memory of the proxies.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    /// What is measured: tunnels between nodes, waypoints, the control plane, or all
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
    /// The control plane in the cluster of 100,000 pods too, which takes minutes to make
    #[arg(long)]
    scale_large: bool,
    /// The control plane is measured on the API server of this name, which is started and
    /// filled if need be and kept for the next run (`integration/cluster/api-server`)
    #[arg(long)]
    api_server: Option<String>,
    /// The control plane that is measured, if not the one that is built beside this
    #[arg(long, env = "ADIT_BENCH_ADITD")]
    aditd: Option<PathBuf>,
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
    Scale,
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
    let mut of_scale = if cli.quick {
        scale::Options::quick()
    } else {
        scale::Options::default()
    };
    of_scale.aditd = cli.aditd;
    of_scale.api_server = cli.api_server;
    if cli.scale_large {
        of_scale = of_scale.with_large();
    }
    let mut json = serde_json::json!({});
    let mut passed = true;
    if matches!(cli.layer, Layer::All | Layer::L4) {
        let report = bench::run(&options)?;
        print!("{}", report.table());
        json = report.json();
        passed &= report.passed();
    }
    if matches!(cli.layer, Layer::All | Layer::L7) {
        let report = l7::run(&options)?;
        print!("{}", report.table());
        json["l7"] = report.json();
        passed &= report.passed();
    }
    if matches!(cli.layer, Layer::All | Layer::Scale) {
        let report = scale::run(&of_scale)?;
        print!("{}", report.table());
        json["scale"] = report.json();
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
