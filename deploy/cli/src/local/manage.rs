//! `adit local restart|stop|start|down`.

use std::io::Write as _;

use adit_local::{Request, Running};

use super::{NameArg, only, pod};
use crate::output::{Outcome, Output, UsageError};

/// Restart `aditd`, a ztunnel or a waypoint, or make a pod anew
#[derive(Debug, clap::Args)]
pub struct RestartArgs {
    /// `aditd`, `ztunnel-<node>`, `<gateway>.<namespace>`, `pod` or `namespace/pod`
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    /// Start the new instance first and then stop the old one, as a rolling update does
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    mesh: NameArg,
}

/// Stop `aditd`, a ztunnel or a waypoint, for a look at what happens without it
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// `aditd`, `ztunnel-<node>` or `<gateway>.<namespace>`
    component: String,
    /// End it with SIGKILL
    #[arg(long)]
    kill: bool,
    #[command(flatten)]
    mesh: NameArg,
}

/// Start a component that was stopped
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    /// `aditd`, `ztunnel-<node>` or `<gateway>.<namespace>`
    component: String,
    #[command(flatten)]
    mesh: NameArg,
}

/// Remove a mesh and everything that belongs to it
///
/// Works also after a crash, and twice in a row.
#[derive(Debug, clap::Args)]
pub struct DownArgs {
    #[command(flatten)]
    mesh: NameArg,
    /// Every mesh on this machine
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

pub fn restart(args: RestartArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = args.mesh.mesh()?;
    let status = running.status()?;
    let component = args.target.clone();
    let request = match (status.component(&args.target).is_some(), args.replace) {
        (true, true) => Request::Replace { component },
        (true, false) => Request::Restart { component },
        (false, true) => {
            let text = "--replace is for ztunnels".into();
            return Err(UsageError(text).into());
        }
        (false, false) => {
            let (namespace, name) = pod(&status, &args.target, args.namespace.as_deref())?;
            Request::RestartPod { namespace, name }
        }
    };
    running.request(&request)?;
    writeln!(out, "{} restarted", args.target)?;
    Ok(Outcome::Well)
}

pub fn stop(args: StopArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let component = args.component.clone();
    let request = match args.kill {
        true => Request::Kill { component },
        false => Request::Stop { component },
    };
    args.mesh.mesh()?.request(&request)?;
    writeln!(out, "{} stopped", args.component)?;
    Ok(Outcome::Well)
}

pub fn start(args: StartArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let component = args.component.clone();
    args.mesh.mesh()?.request(&Request::Start { component })?;
    writeln!(out, "{} started", args.component)?;
    Ok(Outcome::Well)
}

pub fn down(args: &DownArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let names = match (&args.mesh.name, args.all) {
        (Some(name), _) => vec![name.clone()],
        (None, true) => Running::list()?,
        (None, false) => only(&Running::list()?)?
            .into_iter()
            .map(String::from)
            .collect(),
    };
    if names.is_empty() {
        writeln!(out, "There is no local mesh.")?;
    }
    for name in names {
        match adit_local::down(&name)? {
            true => writeln!(out, "Mesh {name} is removed.")?,
            false => writeln!(out, "There is no local mesh {name}.")?,
        }
    }
    Ok(Outcome::Well)
}
