//! `adit proxy-status`: every proxy that is connected to the control plane, and how far
//! along it is. Columns are those of `istioctl proxy-status`.

use anyhow::Context as _;
use http::Method;
use serde::Deserialize;
use serde_json::Value;

use crate::cluster::{Cluster, ClusterArgs};
use crate::kubernetes::{Kubernetes, Role};
use crate::output::{self, Format, Outcome, Output};
use crate::table::Table;

/// Port of the control plane's readiness, metrics and debug pages.
const MONITORING: u16 = 15014;
/// The cluster of a mesh that has only one.
const CLUSTER: &str = "Kubernetes";
/// Where a replica of the control plane is named.
const REPLICA: &str = "istiod";

/// Show the proxies that are connected to the control plane
///
/// Exit status is 1 when one of them lags behind or has rejected something.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this one, as NAME[.NAMESPACE]
    proxy: Option<String>,
    /// Every type with its state
    #[arg(short, long)]
    verbose: bool,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

#[derive(Debug, Deserialize)]
struct Proxy {
    proxy: String,
    id: String,
    #[serde(default)]
    istiod: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    types: Vec<Type>,
}

#[derive(Debug, Deserialize)]
struct Type {
    type_url: String,
    status: String,
    #[serde(default)]
    error: Option<String>,
}

pub fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (mut raw, heard) = match args.cluster.open()? {
        Cluster::Local(mesh) => {
            let answer = mesh
                .get_control_plane(MONITORING, "/debug/syncz")
                .context("aditd does not answer")?;
            (connected(&answer.body, "aditd")?, Outcome::Well)
        }
        Cluster::Kubernetes(cluster) => of_replicas(&cluster)?,
    };
    if let Some(wanted) = &args.proxy {
        raw.retain(|proxy| {
            let name = proxy["proxy"].as_str().unwrap_or_default();
            name == wanted || name.split_once('.').is_some_and(|(pod, _)| pod == wanted)
        });
        anyhow::ensure!(!raw.is_empty(), "no proxy {wanted} is connected to aditd");
    }
    let proxies: Vec<Proxy> =
        serde_json::from_value(Value::Array(raw.clone())).context("aditd's answer")?;
    output::print(out, args.output, &raw, || table(&proxies, args.verbose))?;
    let mut types = proxies.iter().flat_map(|proxy| &proxy.types);
    Ok(heard.and(Outcome::of(types.all(|kind| kind.status != "ERROR"))))
}

/// The proxies of every replica of the control plane; each knows its own.
fn of_replicas(cluster: &Kubernetes) -> anyhow::Result<(Vec<Value>, Outcome)> {
    let pods = cluster.running_mesh_pods(Role::ControlPlane)?;
    let ports: Vec<_> = pods.iter().map(|pod| pod.port(MONITORING)).collect();
    let answers = cluster.http_to_all(&ports, &Method::GET, "/debug/syncz");
    let (mut all, mut silent) = (Vec::new(), 0);
    for (pod, answer) in pods.iter().zip(answers) {
        match answer.and_then(|(_, body)| connected(&body, &pod.name)) {
            Ok(proxies) => all.extend(proxies),
            Err(error) => {
                let trouble = pod.trouble.clone();
                let why = trouble.unwrap_or_else(|| output::sentence(&error));
                output::complain(format_args!("Error: {} does not answer: {why}", pod.name));
                silent += 1;
            }
        }
    }
    anyhow::ensure!(
        silent < pods.len(),
        "no control plane of {} has answered",
        cluster.name()
    );
    Ok((all, Outcome::of(silent == 0)))
}

/// The proxies that are connected to a replica, with its name.
fn connected(answer: &[u8], replica: &str) -> anyhow::Result<Vec<Value>> {
    let answer: Vec<Value> =
        serde_json::from_slice(answer).with_context(|| format!("{replica}'s answer"))?;
    let named = |mut proxy: Value| {
        if let Some(proxy) = proxy.as_object_mut() {
            proxy.insert(REPLICA.into(), replica.into());
        }
        proxy
    };
    Ok(answer.into_iter().map(named).collect())
}

fn table(proxies: &[Proxy], verbose: bool) -> String {
    if verbose {
        let mut table = Table::new(["NAME", "TYPE", "STATE", "PROBLEM"]);
        for proxy in proxies {
            for kind in &proxy.types {
                let problem = kind.error.as_deref().unwrap_or_default();
                table.row([&proxy.proxy, short(&kind.type_url), &kind.status, problem]);
            }
        }
        return table.render();
    }
    let mut table = Table::new(["NAME", "CLUSTER", "ISTIOD", "VERSION", "SUBSCRIBED TYPES"]);
    for proxy in proxies {
        let unwell = |kind: &&Type| kind.status != "SYNCED";
        let lagging: Vec<String> = proxy
            .types
            .iter()
            .filter(unwell)
            .map(|kind| format!("{} {}", short(&kind.type_url), kind.status))
            .collect();
        let mut types = format!("{} ({})", proxy.types.len(), kinds(proxy));
        if !lagging.is_empty() {
            types += &format!("; {}", lagging.join(", "));
        }
        table.row([&proxy.proxy, CLUSTER, &proxy.istiod, &proxy.version, &types]);
    }
    table.render()
}

fn kinds(proxy: &Proxy) -> String {
    let waypoint = proxy.id.starts_with("waypoint~");
    let names: Vec<&str> = proxy
        .types
        .iter()
        .map(|kind| short(&kind.type_url))
        .collect();
    match waypoint {
        // Ten of its own.
        true => "waypoint".into(),
        false => names.join(","),
    }
}

/// The last word of a type URL.
fn short(type_url: &str) -> &str {
    type_url.rsplit('.').next().unwrap_or(type_url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lags_is_said() {
        let kind = |name: &str, status: &str| Type {
            type_url: format!("type.googleapis.com/istio.workload.{name}"),
            status: status.into(),
            error: (status == "ERROR").then(|| "bad".into()),
        };
        let proxies = [Proxy {
            proxy: "ztunnel-n1.istio-system".into(),
            id: "ztunnel~1".into(),
            istiod: "aditd".into(),
            version: "0.1.0".into(),
            types: vec![kind("Address", "SYNCED"), kind("Authorization", "ERROR")],
        }];
        let text = table(&proxies, false);
        assert!(
            text.contains("2 (Address,Authorization); Authorization ERROR"),
            "{text}"
        );
        let text = table(&proxies, true);
        assert!(text.contains("Authorization   ERROR    bad"), "{text}");
    }
}
