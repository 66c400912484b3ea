//! `adit local exec`.

use std::os::unix::process::CommandExt as _;

use adit_local::{Place, Running};

use super::{NameArg, pod};
use crate::output::Outcome;

/// Run a command in a pod, on a node, or outside
///
/// In a pod the command has the pod's network, names, PATH and place in the mesh. Exit
/// status is the command's.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `pod`, `namespace/pod`, `node:<name>`, or `outside` for the network between nodes
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    mesh: NameArg,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let running = args.mesh.mesh()?;
    let place = place(&running, &args.target, args.namespace.as_deref())?;
    let (program, rest) = match args.command.split_first() {
        Some(split) => split,
        None => return Ok(Outcome::Well),
    };
    let mut command = running.command(&place, program)?;
    // This process becomes the command: terminal, signals and exit status are its own.
    let error = command.args(rest).exec();
    Err(anyhow::Error::from(error).context(format!("cannot run {program}")))
}

fn place(running: &Running, target: &str, namespace: Option<&str>) -> anyhow::Result<Place> {
    if let Some(node) = target.strip_prefix("node:") {
        return Ok(Place::Node(node.into()));
    }
    if target == "outside" {
        return Ok(Place::Fabric);
    }
    let (namespace, name) = pod(&running.status()?, target, namespace)?;
    Ok(Place::Pod { namespace, name })
}
