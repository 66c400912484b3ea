//! `adit waypoint delete`.

use std::io::Write as _;

use anyhow::bail;

use super::Common;
use super::gateway::{CLASS, waypoints};
use crate::cluster::{Cluster, name_of};
use crate::output::{self, Outcome, Output};

/// Remove waypoints
///
/// Whoever is labelled to use one stays labelled, and is refused until it is back or the
/// label is gone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Names [default: that of --name]
    waypoints: Vec<String>,
    /// Every waypoint of the namespace
    #[arg(long, conflicts_with = "waypoints")]
    all: bool,
    /// Only those of this control plane revision
    #[arg(short, long)]
    revision: Option<String>,
}

pub(super) fn run(args: &Args, common: &Common, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = common.cluster.open()?;
    let namespace = common.namespace(&cluster);
    let names: Vec<String> = match (args.all, args.waypoints.is_empty()) {
        (true, _) => {
            let gateways = cluster.list("gateway.gateway.networking.k8s.io", Some(namespace))?;
            let all = waypoints(gateways, args.revision.as_deref());
            all.iter()
                .map(|gateway| name_of(gateway).to_owned())
                .collect()
        }
        (false, true) => vec![common.name.clone()],
        (false, false) => args.waypoints.clone(),
    };
    if names.is_empty() {
        writeln!(out, "No waypoints found.")?;
    }
    let mut failed = 0;
    for name in &names {
        match delete(&cluster, namespace, name) {
            Ok(()) => writeln!(out, "waypoint {namespace}/{name} deleted")?,
            // The others are deleted all the same.
            Err(error) => {
                output::complain_of(&error);
                failed += 1;
            }
        }
    }
    match failed {
        0 => Ok(Outcome::Well),
        failed => bail!("{failed} of {} waypoints are not deleted", names.len()),
    }
}

fn delete(cluster: &Cluster, namespace: &str, name: &str) -> anyhow::Result<()> {
    const KIND: &str = "gateway.gateway.networking.k8s.io";
    match cluster.get(KIND, namespace, name)? {
        None => bail!("gateways.gateway.networking.k8s.io {name:?} not found"),
        Some(gateway) if gateway["spec"]["gatewayClassName"] != CLASS => {
            bail!("gateway {namespace}/{name} is no waypoint")
        }
        Some(_) => cluster.delete(KIND, namespace, name),
    }
}
