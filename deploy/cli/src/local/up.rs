//! `adit local up`.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_local::{DataPlane, Mesh, MeshConfig, MeshStatus};
use anyhow::{Context as _, bail};
use tracing_subscriber::EnvFilter;

use super::{DEFAULT_NAME, status};
use crate::output::{self, Outcome, Output, UsageError};

/// How long `up` waits for the pods before it says that they are not ready.
const POD_DEADLINE: Duration = Duration::from_secs(60);
/// Tells the process in the background that it is the one.
const DETACHED: &str = "ADIT_LOCAL_DETACHED";
/// The first words of a mesh that is up.
const IS_UP: &str = "is up after";

/// Make a mesh from manifests and follow their changes
///
/// Ordinary manifests: Namespace, Node, Pod, Deployment, Service, EndpointSlice, policies.
/// Every pod is a network namespace in which the containers' commands run as processes;
/// images are ignored, programs are found on the PATH. Runs until Ctrl-C or `adit local
/// down`, then removes everything.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of manifests
    #[arg(short = 'f', long = "filename", value_name = "DIR")]
    manifests: PathBuf,
    /// Name of the mesh
    #[arg(long, visible_alias = "mesh", default_value = DEFAULT_NAME)]
    name: String,
    /// Virtual nodes [default: the Node objects of the manifests, else node1,node2]
    #[arg(long, value_delimiter = ',')]
    nodes: Vec<String>,
    /// Only pods and services, without control plane and ztunnels
    #[arg(long)]
    no_mesh: bool,
    /// Return when the mesh is up; it goes on in the background
    #[arg(long, short)]
    detach: bool,
    /// Environment of the ztunnels; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    ztunnel_env: Vec<String>,
    /// Trust domain of every identity
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// Program to run as ztunnel
    #[arg(long, default_value = "ztunnel")]
    ztunnel: String,
    /// Program to run as control plane
    #[arg(long, default_value = "aditd")]
    aditd: String,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let detached = env::var_os(DETACHED).is_some();
    if args.detach && !detached {
        return detach(out);
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    let config = config(args)?;
    let begin = Instant::now();
    let mesh = Mesh::up(config)?;
    let pods = mesh.wait_pods_ready(POD_DEADLINE);
    let status = mesh.status()?;
    let mut text = format!(
        "Mesh {} {IS_UP} {:.1} s.\n\n{}",
        status.name,
        begin.elapsed().as_secs_f64(),
        status::text(&status)
    );
    if let Err(error) = pods {
        let _ = writeln!(text, "\nNot everything is well: {error}");
    }
    text += &how_to_go_on(&status, detached);
    out.write_all(text.as_bytes())?;
    out.flush()?;
    if detached {
        let log = mesh.file("logs/supervisor.log");
        let log = File::create(&log).with_context(|| log.display().to_string())?;
        nix::unistd::dup2_stdout(&log)?;
        nix::unistd::dup2_stderr(&log)?;
    }
    mesh.supervise()?;
    Ok(Outcome::Well)
}

fn config(args: Args) -> anyhow::Result<MeshConfig> {
    let manifests = args
        .manifests
        .canonicalize()
        .with_context(|| args.manifests.display().to_string())?;
    let mut config = MeshConfig::new(args.name, manifests);
    config.nodes = args.nodes;
    config.trust_domain = args.trust_domain;
    config.ztunnel = args.ztunnel;
    config.aditd = args.aditd;
    config.ztunnel_env = environment(&args.ztunnel_env)?;
    if args.no_mesh {
        config.data_plane = DataPlane::Off;
    }
    Ok(config)
}

fn environment(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let split = |pair: &String| {
        let text = format!("--ztunnel-env {pair}: NAME=VALUE is expected");
        let (name, value) = pair.split_once('=').ok_or(UsageError(text))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    pairs.iter().map(split).collect()
}

fn how_to_go_on(status: &MeshStatus, detached: bool) -> String {
    let name = &status.name;
    let client = status.pods.iter().find(|pod| pod.ready);
    let client = client.map_or("NAMESPACE/POD".to_owned(), |pod| {
        format!("{}/{}", pod.namespace, pod.name)
    });
    let node = status.nodes.first().map_or("NODE", |node| &node.name);
    let mut text = format!(
        "\nIt follows {}: edit the manifests and see.\n  \
         adit local status --name {name}\n  \
         adit local exec --name {name} {client} -- sh\n  \
         adit local logs --name {name} {client}\n",
        status.manifests.display()
    );
    if status.data_plane {
        let _ = write!(
            text,
            "  adit local logs --name {name} ztunnel-{node} --follow\n  \
             adit ztunnel-config all --mesh {name} --node {node}\n\
             Metrics of a node:\n  \
             adit local exec --name {name} node:{node} -- curl -s 127.0.0.1:15020/metrics\n"
        );
    }
    let end = if detached { "" } else { ", or Ctrl-C here" };
    let _ = writeln!(text, "To end it:\n  adit local down --name {name}{end}");
    text
}

/// Starts the same command in the background and passes on what it says until the mesh
/// is up, when it points its output elsewhere.
fn detach(out: &mut Output) -> anyhow::Result<Outcome> {
    let mut command = Command::new(env::current_exe().context("cannot find this program")?);
    command
        .args(env::args_os().skip(1))
        .env(DETACHED, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Ctrl-C here is not meant for it.
        .process_group(0);
    let mut child = command.spawn().context("cannot start the supervisor")?;
    let mut text = String::new();
    if let Some(stdout) = child.stdout.as_mut() {
        // Ends when the child has said everything, or has ended.
        stdout.read_to_string(&mut text)?;
    }
    out.write_all(text.as_bytes())?;
    if !text.contains(IS_UP) {
        let status = child.wait()?;
        output::complain(format_args!("The supervisor {status}"));
        bail!("the mesh is not up");
    }
    Ok(Outcome::Well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_pairs() {
        assert!(environment(&["A".into()]).is_err());
        let env = environment(&["A=b=c".into()]).unwrap_or_default();
        assert_eq!(env.get("A").map(String::as_str), Some("b=c"));
    }
}
