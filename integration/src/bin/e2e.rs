//! `make e2e`: end-to-end tests on a Kubernetes cluster.

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use adit_integration::e2e::{Environment, Flavour, Report, Wanted, own_kubeconfig, run, tests};
use clap::{Parser, ValueEnum};
use tokio::signal::ctrl_c;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

/// Brings up what is missing (a cluster, this tree's images, Adit), runs the tests, prints
/// a table, takes away what it brought up.
#[derive(Parser)]
#[command(name = "e2e")]
struct Cli {
    /// Only tests with one of these in their names
    filter: Vec<String>,
    /// What to run on when there is no KUBECONFIG
    #[arg(long, env = "CLUSTER", default_value = "namespaces")]
    cluster: ClusterKind,
    /// A cluster that is there
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Where a given cluster pulls images from; with --tag
    #[arg(long, env = "HUB", requires = "tag")]
    hub: Option<String>,
    #[arg(long, env = "TAG", requires = "hub")]
    tag: Option<String>,
    /// Build the images with optimizations
    #[arg(long)]
    optimized: bool,
    /// Take the images that a former run has loaded
    #[arg(long)]
    loaded: bool,
    /// Adit is installed already, and stays
    #[arg(long)]
    installed: bool,
    /// Leave the cluster and Adit in place
    #[arg(long, env = "KEEP")]
    keep: bool,
    /// Tests at the same time, of those that may
    #[arg(long, default_value_t = 3)]
    parallel: usize,
    /// Run what fails once more: on a machine that others use, chance is a reason too. What
    /// passes then is shown as flaky, with its reason, and is no failure
    #[arg(long, env = "E2E_AGAIN")]
    again: bool,
    /// In place of the tests: run this program with KUBECONFIG set and Adit installed
    #[arg(long, conflicts_with = "filter")]
    exec: Option<PathBuf>,
    /// Names of the tests
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ClusterKind {
    /// Nodes are namespaces of this machine
    Namespaces,
    /// Nodes are containers, by kind and Docker
    Kind,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let cases: Vec<_> = tests::all()
        .into_iter()
        .filter(|case| cli.filter.is_empty() || cli.filter.iter().any(|f| case.name.contains(f)))
        .collect();
    if cli.list {
        cases.iter().for_each(|case| println!("{}", case.name));
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::ensure!(!cases.is_empty(), "no test is called {:?}", cli.filter);
    let kubeconfig = cli.kubeconfig.filter(|path| *path != own_kubeconfig());
    let flavour = match (&kubeconfig, cli.cluster) {
        (Some(_), _) => Flavour::Given,
        (None, ClusterKind::Namespaces) => Flavour::Namespaces,
        (None, ClusterKind::Kind) => Flavour::Kind,
    };
    let wanted = Wanted {
        flavour,
        kubeconfig,
        images: cli.hub.zip(cli.tag),
        optimized: cli.optimized,
        loaded: cli.loaded,
        installed: cli.installed,
        keep: cli.keep,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let environment = Rc::new(Environment::up(wanted).await?);
        let mut terminate = signal(SignalKind::terminate())?;
        let interrupted = async {
            tokio::select! { _ = terminate.recv() => {}, _ = ctrl_c() => {} }
        };
        if let Some(program) = &cli.exec {
            let done = environment.exec(program, interrupted).await;
            environment.down().await?;
            return Ok(match done? {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            });
        }
        let reports = tokio::select! {
            reports = run(environment.clone(), &cases, cli.parallel, cli.again) => reports,
            () = interrupted => {
                println!("interrupted: taking away what was brought up");
                Vec::new()
            }
        };
        let down = environment.down().await;
        print!("{}", Report::table(&reports));
        down?;
        anyhow::Ok(match Report::passed(&reports) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    })
}
