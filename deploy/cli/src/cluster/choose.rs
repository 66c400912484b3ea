//! Which cluster a command is about.
//!
//! What the user names decides: `--mesh`, or `--kubeconfig` and `--context`. Without a name
//! it is the one that there is: the kubeconfig's current context, or the local mesh that
//! runs. Where there are both, `KUBECONFIG` in the environment means the cluster; a
//! `~/.kube/config` may lie there for other reasons, and what `adit local up` has started on
//! this machine is nearer. Then a line on standard error says which, why, and how to have
//! the other.

use adit_local::Running;
use anyhow::Context as _;

use super::Cluster;
use crate::kubernetes::{Found, Kubernetes, KubernetesArgs, find, no_cluster};
use crate::output::{self, UsageError};

/// The mesh that is meant when none is named and there are several.
const DEFAULT_MESH: &str = "local";

/// Flags that choose the cluster.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which cluster")]
pub struct ClusterArgs {
    /// Local mesh [default: the only one that runs]
    #[arg(long, value_name = "NAME", global = true)]
    pub mesh: Option<String>,
    /// Namespace of what is named [default: that of the context, else default]
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
    #[command(flatten)]
    pub kubernetes: KubernetesArgs,
}

impl ClusterArgs {
    /// The cluster that the flags choose.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn open(&self) -> anyhow::Result<Cluster> {
        self.find()?.ok_or_else(no_cluster)
    }

    /// The cluster that the flags choose; `None` if they name none and there is none.
    ///
    /// # Errors
    /// When what they name cannot be used, or several local meshes run.
    pub fn find(&self) -> anyhow::Result<Option<Cluster>> {
        let named = self.kubernetes.connection.names_a_cluster();
        if let Some(name) = &self.mesh {
            if named {
                let text = "--mesh names a local mesh, --kubeconfig and --context a cluster: \
                            give one of them";
                return Err(UsageError(text.into()).into());
            }
            return Ok(Some(Cluster::Local(Running::open(name)?)));
        }
        if named {
            return self.kubernetes().map(Some);
        }
        let mut meshes = running_meshes()?;
        let names: Vec<&str> = meshes.iter().map(Running::name).collect();
        let (choice, note) = choose(&find()?, &names)?;
        if let Some(note) = note {
            output::complain(format_args!("Note: {note}"));
        }
        match choice {
            Choice::Nothing => Ok(None),
            Choice::Kubernetes => self.kubernetes().map(Some),
            Choice::Local(index) => Ok(Some(Cluster::Local(meshes.swap_remove(index)))),
        }
    }

    /// Whether the user named a cluster or a mesh.
    pub fn names_one(&self) -> bool {
        self.mesh.is_some() || self.kubernetes.connection.names_a_cluster()
    }

    fn kubernetes(&self) -> anyhow::Result<Cluster> {
        Ok(Cluster::Kubernetes(Kubernetes::open(&self.kubernetes)?))
    }
}

/// Every local mesh whose supervisor runs. Meshes of tests have to be named.
///
/// # Errors
/// When the meshes cannot be listed.
pub fn running_meshes() -> anyhow::Result<Vec<Running>> {
    let names = Running::list().context("cannot list the local meshes")?;
    // One that goes while we look is as good as gone.
    let open = names.iter().filter_map(|name| Running::open(name).ok());
    let kept = |mesh: &Running| mesh.status().is_ok_and(|status| !status.ephemeral);
    Ok(open.filter(Running::is_supervised).filter(kept).collect())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Nothing,
    Kubernetes,
    /// By index.
    Local(usize),
}

/// Which it is when the user has named none, and what to tell about it.
fn choose(found: &Found, meshes: &[&str]) -> Result<(Choice, Option<String>), UsageError> {
    let mesh = match meshes {
        [] => None,
        [_] => Some(0),
        several => several.iter().position(|name| *name == DEFAULT_MESH),
    };
    let name = mesh.and_then(|index| meshes.get(index)).copied();
    let other = name.or(meshes.first().copied());
    match (found, mesh, other) {
        (Found::Nothing | Found::InCluster, Some(index), _) => Ok((Choice::Local(index), None)),
        (Found::Nothing, None, None) => Ok((Choice::Nothing, None)),
        (Found::InCluster | Found::Home { .. } | Found::Environment { .. }, None, None) => {
            Ok((Choice::Kubernetes, None))
        }
        (Found::Environment { context }, _, Some(other)) => {
            let note = format!(
                "this is about context {context:?}, for KUBECONFIG is set; --mesh {other} is the \
                 local mesh that also runs."
            );
            Ok((Choice::Kubernetes, Some(note)))
        }
        (Found::Home { context }, Some(index), Some(mesh)) => {
            let note = format!(
                "this is about the local mesh {mesh}, which runs on this machine; --context \
                 {context} is the cluster of ~/.kube/config."
            );
            Ok((Choice::Local(index), Some(note)))
        }
        (_, _, Some(_)) => Err(UsageError(format!(
            "{} local meshes run ({}): choose one with --mesh",
            meshes.len(),
            meshes.join(", ")
        ))),
        // A mesh that was chosen is one of them.
        (_, Some(index), None) => Ok((Choice::Local(index), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What there is; which is chosen, and whether something is told about it.
    type Row<'a> = (&'a Found, &'a [&'a str], Option<(Choice, bool)>);

    #[test]
    fn the_cluster_that_is_meant() {
        let context = || "kind".to_owned();
        let environment = Found::Environment { context: context() };
        let home = Found::Home { context: context() };
        let local = Choice::Local;
        let table: [Row<'_>; 12] = [
            (&Found::Nothing, &[], Some((Choice::Nothing, false))),
            (&Found::Nothing, &["a"], Some((local(0), false))),
            (&Found::Nothing, &["a", "local"], Some((local(1), false))),
            (&Found::Nothing, &["a", "b"], None),
            (&Found::InCluster, &[], Some((Choice::Kubernetes, false))),
            (&environment, &[], Some((Choice::Kubernetes, false))),
            (&environment, &["a"], Some((Choice::Kubernetes, true))),
            (&environment, &["a", "b"], Some((Choice::Kubernetes, true))),
            (&home, &[], Some((Choice::Kubernetes, false))),
            (&home, &["a"], Some((local(0), true))),
            (&home, &["a", "local"], Some((local(1), true))),
            (&home, &["a", "b"], None),
        ];
        for (found, meshes, expected) in table {
            let chosen = choose(found, meshes).ok();
            let chosen = chosen.map(|(choice, note)| (choice, note.is_some()));
            assert_eq!(chosen, expected, "{found:?} {meshes:?}");
        }
    }
}
