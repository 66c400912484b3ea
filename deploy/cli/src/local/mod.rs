//! `adit local`: a mesh of network namespaces on this machine.

mod exec;
mod logs;
mod manage;
mod objects;
mod status;
mod up;

use adit_local::{MeshStatus, Running};
use anyhow::bail;
use clap::Subcommand;

use crate::output::{Outcome, Output, UsageError};

/// The mesh that is meant where none is named and there are several.
const DEFAULT_NAME: &str = "local";

/// Make, look at and remove a mesh of network namespaces on this machine
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit local up -f deploy/samples/mesh
  adit local exec client -- adit-sample call http://web/
  adit local logs ztunnel-node1 --follow
  adit local down")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Args),
    Status(status::Args),
    Exec(exec::Args),
    Logs(logs::Args),
    Restart(manage::RestartArgs),
    Stop(manage::StopArgs),
    Start(manage::StartArgs),
    Apply(objects::ApplyArgs),
    Delete(objects::DeleteArgs),
    Label(objects::LabelArgs),
    Get(objects::GetArgs),
    Down(manage::DownArgs),
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    match args.command {
        Command::Up(args) => up::run(args, out),
        Command::Status(args) => status::run(&args, out),
        Command::Exec(args) => exec::run(&args),
        Command::Logs(args) => logs::run(&args, out),
        Command::Restart(args) => manage::restart(args, out),
        Command::Stop(args) => manage::stop(args, out),
        Command::Start(args) => manage::start(args, out),
        Command::Apply(args) => objects::apply(&args, out),
        Command::Delete(args) => objects::delete(&args, out),
        Command::Label(args) => objects::label(&args, out),
        Command::Get(args) => objects::get(&args, out),
        Command::Down(args) => manage::down(&args, out),
    }
}

/// Which mesh.
#[derive(Debug, clap::Args)]
struct NameArg {
    /// Name of the mesh [default: the only one there is]
    #[arg(long, visible_alias = "mesh")]
    name: Option<String>,
}

impl NameArg {
    fn mesh(&self) -> anyhow::Result<Running> {
        the_mesh(self.name.as_deref())
    }
}

/// The mesh of that name, or the only one.
pub fn the_mesh(name: Option<&str>) -> anyhow::Result<Running> {
    if let Some(name) = name {
        return Ok(Running::open(name)?);
    }
    match only(&Running::list()?)? {
        Some(name) => Ok(Running::open(name)?),
        None => bail!("there is no local mesh; `adit local up -f DIR` makes one"),
    }
}

/// The one that is meant when none is named.
fn only(names: &[String]) -> anyhow::Result<Option<&str>> {
    match names {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several if several.iter().any(|name| name == DEFAULT_NAME) => Ok(Some(DEFAULT_NAME)),
        several => Err(UsageError(format!(
            "there are several meshes, say which: --name {}",
            several.join("|")
        ))
        .into()),
    }
}

/// `namespace/pod`, or a pod's name if it is the only one of that name.
fn pod(
    status: &MeshStatus,
    target: &str,
    namespace: Option<&str>,
) -> anyhow::Result<(String, String)> {
    if let Some((namespace, name)) = target.split_once('/') {
        return Ok((namespace.into(), name.into()));
    }
    if let Some(namespace) = namespace {
        return Ok((namespace.into(), target.into()));
    }
    let named = |pod: &&adit_local::PodStatus| pod.name == target && !pod.terminating;
    let found: Vec<&str> = status
        .pods
        .iter()
        .filter(named)
        .map(|pod| pod.namespace.as_str())
        .collect();
    match found.as_slice() {
        [one] => Ok(((*one).into(), target.into())),
        [] => bail!("mesh {} has no pod {target} in any namespace", status.name),
        several => Err(UsageError(format!(
            "pod {target} is in several namespaces, say which: -n {}",
            several.join("|")
        ))
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_mesh_that_is_meant() {
        let table: [(&[&str], Option<Option<&str>>); 4] = [
            (&[], Some(None)),
            (&["a"], Some(Some("a"))),
            (&["a", "local"], Some(Some("local"))),
            (&["a", "b"], None),
        ];
        for (all, expected) in table {
            let all = names(all);
            assert_eq!(only(&all).ok(), expected, "{all:?}");
        }
    }
}
