//! `adit waypoint generate|apply`.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use adit_local::Labels;
use anyhow::{Context as _, bail};

use super::gateway::{self, CLASS, gateway, is_programmed};
use super::nodes::Nodes;
use super::{Common, TrafficType, done, warn};
use crate::cluster::{Cluster, label_of};
use crate::output::{self, Outcome, Output};

const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

#[derive(Debug, clap::Args)]
struct GatewayArgs {
    /// Traffic that the waypoint takes: that to services, to workloads, or to both [default:
    /// as its class says, service]
    #[arg(long = "for", value_enum, value_name = "TYPE")]
    traffic: Option<TrafficType>,
    /// Control plane revision that runs it
    #[arg(short, long)]
    revision: Option<String>,
}

/// Print the Gateway of a waypoint
#[derive(Debug, clap::Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    gateway: GatewayArgs,
}

/// Make a waypoint, or change it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Label the namespace, so that everything in it uses the waypoint
    #[arg(long)]
    enroll_namespace: bool,
    /// Also where the namespace uses another waypoint
    #[arg(long)]
    overwrite: bool,
    /// Wait until traffic can take it
    #[arg(short, long)]
    wait: bool,
    /// How long
    #[arg(long, value_name = "DURATION", default_value = "90s", value_parser = humantime::parse_duration)]
    waypoint_timeout: Duration,
}

pub(super) fn generate(
    args: &GenerateArgs,
    common: &Common,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    let object = gateway(
        common.checked_name()?,
        common.cluster.namespace.as_deref(),
        args.gateway.traffic,
        args.gateway.revision.as_deref(),
    );
    out.write_all(output::yaml(&object)?.as_bytes())?;
    Ok(Outcome::Well)
}

pub(super) fn run(args: &Args, common: &Common, out: &mut Output) -> anyhow::Result<Outcome> {
    let name = common.checked_name()?;
    let cluster = common.cluster.open()?;
    let namespace = common.namespace(&cluster);
    let found = cluster
        .get("namespace", namespace, namespace)?
        .with_context(|| format!("there is no namespace {namespace}"))?;
    if label_of(&found, DATAPLANE_MODE) != Some("ambient") {
        let advice = format!("{DATAPLANE_MODE}=ambient");
        output::complain(format_args!(
            "Warning: namespace is not enrolled in ambient. Consider running\t\n\"{}\"",
            cluster.label_command("namespace", namespace, &advice)
        ));
    }
    let taken = label_of(&found, USE_WAYPOINT).filter(|other| *other != name);
    if args.enroll_namespace && taken.is_some() && !args.overwrite {
        warn(format_args!(
            "namespace ({namespace}) already has an enrolled Waypoint. Consider adding the \
             --overwrite flag to your apply command."
        ));
        return Ok(Outcome::Findings);
    }
    let object = gateway(
        name,
        Some(namespace),
        args.gateway.traffic,
        args.gateway.revision.as_deref(),
    );
    cluster.apply(vec![object])?;
    if let Some(control_plane) = missing_control_plane(&cluster) {
        warn(format_args!("{control_plane}"));
    }
    done(out, format_args!("waypoint {namespace}/{name} applied"))?;
    let until = Instant::now() + args.waypoint_timeout;
    let nodes = Nodes::of(&cluster);
    // First the waypoint, then those who use it: until it is ready they are refused.
    if args.wait {
        wait(&cluster, namespace, name, until)?;
        nodes.wait(namespace, name, &BTreeSet::new(), until)?;
        done(out, format_args!("waypoint {namespace}/{name} is ready!"))?;
    }
    if args.enroll_namespace {
        let labels = Labels::from([(USE_WAYPOINT.into(), Some(name.into()))]);
        cluster.label("namespace", "", namespace, labels, args.overwrite)?;
        let for_services = !matches!(
            args.gateway.traffic,
            Some(TrafficType::Workload | TrafficType::None)
        );
        if args.wait && for_services {
            let services = services(&cluster, namespace, name)?;
            nodes.wait(namespace, name, &services, until)?;
        }
        done(
            out,
            format_args!("namespace {namespace} labeled with \"{USE_WAYPOINT}: {name}\""),
        )?;
    }
    Ok(Outcome::Well)
}

/// Why nobody will carry the waypoint out, if that is so. A class that may not be looked at
/// is taken for granted.
fn missing_control_plane(cluster: &Cluster) -> Option<String> {
    const KIND: &str = "gatewayclass.gateway.networking.k8s.io";
    match cluster {
        Cluster::Kubernetes(_) if matches!(cluster.get(KIND, "", CLASS), Ok(None)) => {
            Some(format!(
                "{} has no GatewayClass {CLASS}, so nobody makes the waypoint run: `adit install` \
                 installs the control plane.",
                cluster.name()
            ))
        }
        _ => None,
    }
}

/// The services that use what their namespace does.
fn services(cluster: &Cluster, namespace: &str, name: &str) -> anyhow::Result<BTreeSet<String>> {
    let all = cluster.list("service", Some(namespace))?;
    let follows = all.iter().filter(|service| {
        label_of(service, USE_WAYPOINT).is_none()
            && service["metadata"]["name"] != name
            && service["spec"]["type"] != "ExternalName"
    });
    let names = follows.filter_map(|service| service["metadata"]["name"].as_str());
    Ok(names.map(ToOwned::to_owned).collect())
}

fn wait(cluster: &Cluster, namespace: &str, name: &str, until: Instant) -> anyhow::Result<()> {
    loop {
        let found = cluster.get("gateway.gateway.networking.k8s.io", namespace, name)?;
        let found = found.with_context(|| format!("waypoint {namespace}/{name} is gone"))?;
        if is_programmed(&found) {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!(
                "timed out while waiting for waypoint {namespace}/{name} to be ready: {}",
                gateway::why_not(&found)
            );
        }
        sleep(cluster.poll_interval());
    }
}
