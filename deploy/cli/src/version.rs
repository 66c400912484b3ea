//! `adit version`: of this program, and of what runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use adit_local::Running;
use anyhow::Context as _;
use clap::ArgAction;
use http::Method;
use serde::Serialize;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::kubernetes::{Kubernetes, PodView, Role};
use crate::output::{self, Format, Outcome, Output};
use crate::table::printable;
use crate::ztunnel::target::{TargetArgs, Ztunnel, targets, targets_in};

/// Where the control plane has its metrics.
const MONITORING_PORT: u16 = 15014;
/// Where proxies in a cluster have theirs. A dump says the version too, and is as large as
/// the mesh.
const METRICS_PORT: u16 = 15020;

/// Show the versions of this program, the control plane and the proxies
///
/// Control plane and proxies are asked where there are any: in the cluster, in the local mesh
/// that runs, or at --admin-address.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit version
  adit version --remote=false
  adit version -o json")]
pub struct Args {
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Only the number of this program's version, where nothing is asked
    #[arg(short, long)]
    short: bool,
    /// Ask what runs
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    remote: bool,
    #[command(flatten)]
    at: TargetArgs,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let mut versions = Versions {
        client_version: Build {
            version: env!("CARGO_PKG_VERSION").into(),
        },
        mesh_version: Vec::new(),
        data_plane_version: Vec::new(),
    };
    let outcome = match args.remote {
        true => versions.ask_what_runs(&args.at)?,
        false => Outcome::Well,
    };
    output::print(out, args.output, &versions, || match args.short {
        true if !args.remote => versions.client_version.version.clone() + "\n",
        _ => versions.text(),
    })?;
    Ok(outcome)
}

/// With the keys of `istioctl version -o json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client_version: Build,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mesh_version: Vec<Component>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    data_plane_version: Vec<Proxy>,
}

#[derive(Debug, Serialize)]
struct Build {
    version: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Component {
    component: &'static str,
    info: Build,
}

#[derive(Debug, Serialize)]
struct Proxy {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "IstioVersion")]
    version: String,
}

impl Versions {
    fn ask_what_runs(&mut self, at: &TargetArgs) -> anyhow::Result<Outcome> {
        if at.admin_address.is_some() {
            return Ok(self.ask_all(targets(at, None)?.ztunnels));
        }
        match at.cluster.find()? {
            Some(Cluster::Kubernetes(cluster)) => self.ask_cluster(&cluster),
            Some(cluster @ Cluster::Local(_)) => {
                let targets = targets_in(&cluster, at.wanted(None))?;
                let control_plane = match &cluster {
                    Cluster::Local(mesh) => self.ask_control_plane(mesh),
                    Cluster::Kubernetes(_) => Outcome::Well,
                };
                Ok(control_plane.and(self.ask_all(targets.ztunnels)))
            }
            None => match targets(at, None) {
                Ok(targets) => Ok(self.ask_all(targets.ztunnels)),
                // Nothing runs here, and nobody said that something should.
                Err(_) if at.node.is_none() => Ok(Outcome::Well),
                Err(error) => Err(error),
            },
        }
    }

    fn ask_all(&mut self, ztunnels: Vec<Ztunnel>) -> Outcome {
        let mut outcome = Outcome::Well;
        for ztunnel in ztunnels {
            if let Err(error) = self.ask(ztunnel) {
                output::complain_of(&error);
                outcome = Outcome::Findings;
            }
        }
        outcome
    }

    fn ask(&mut self, ztunnel: Ztunnel) -> anyhow::Result<()> {
        let text = ztunnel.request(&Method::GET, "/config_dump")?;
        let dump: Value = serde_json::from_slice(&text)
            .with_context(|| format!("the dump of {} is no JSON", ztunnel.name))?;
        let version = dump.pointer("/version/version").and_then(Value::as_str);
        self.data_plane_version.push(Proxy {
            id: ztunnel.name,
            version: version.unwrap_or("unknown").to_owned(),
        });
        Ok(())
    }

    fn ask_cluster(&mut self, cluster: &Kubernetes) -> anyhow::Result<Outcome> {
        let control_plane = cluster.mesh_pods(Role::ControlPlane)?;
        let mut proxies = cluster.mesh_pods(Role::Ztunnel)?;
        if control_plane.is_empty() && proxies.is_empty() {
            // No failure: nobody said that it should be there.
            output::complain(format_args!(
                "Adit is not in namespace {} of {}: `adit install` puts it there.",
                cluster.istio_namespace(),
                cluster.name()
            ));
            return Ok(Outcome::Well);
        }
        proxies.extend(cluster.waypoint_pods(None)?);
        let mut outcome = Outcome::Well;
        for (pod, tag) in build_tags(cluster, &control_plane, MONITORING_PORT) {
            match tag {
                Ok(version) => self.mesh_version.push(Component {
                    component: "aditd",
                    info: Build { version },
                }),
                Err(error) => outcome = not_told(pod, &error),
            }
        }
        for (pod, tag) in build_tags(cluster, &proxies, METRICS_PORT) {
            match tag {
                Ok(version) => self.data_plane_version.push(Proxy {
                    id: pod.full_name(),
                    version,
                }),
                Err(error) => outcome = not_told(pod, &error),
            }
        }
        Ok(outcome)
    }

    fn ask_control_plane(&mut self, mesh: &Running) -> Outcome {
        match mesh.get_control_plane(MONITORING_PORT, "/metrics") {
            Ok(answer) => {
                let version = build_tag(&answer.text()).unwrap_or_else(|| "unknown".into());
                self.mesh_version.push(Component {
                    component: "aditd",
                    info: Build { version },
                });
                Outcome::Well
            }
            Err(error) => {
                output::complain_of(&anyhow::Error::from(error).context("aditd does not answer"));
                Outcome::Findings
            }
        }
    }

    fn text(&self) -> String {
        let mut text = format!("client version: {}\n", self.client_version.version);
        for component in &self.mesh_version {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "control plane version: {}",
                printable(&component.info.version)
            );
        }
        let mut proxies: BTreeMap<&str, usize> = BTreeMap::new();
        for proxy in &self.data_plane_version {
            *proxies.entry(&proxy.version).or_default() += 1;
        }
        let described: Vec<String> = proxies
            .iter()
            .map(|(version, count)| {
                let noun = if *count == 1 { "proxy" } else { "proxies" };
                format!("{} ({count} {noun})", printable(version))
            })
            .collect();
        if !described.is_empty() {
            let _ = writeln!(text, "data plane version: {}", described.join(", "));
        }
        text
    }
}

/// What each pod says of its build.
fn build_tags<'a>(
    cluster: &Kubernetes,
    pods: &'a [PodView],
    port: u16,
) -> Vec<(&'a PodView, anyhow::Result<String>)> {
    let ports: Vec<_> = pods.iter().map(|pod| pod.port(port)).collect();
    let answers = cluster.http_to_all(&ports, &Method::GET, "/metrics");
    let tag = |answer: anyhow::Result<(_, bytes::Bytes)>| {
        let (_, body) = answer?;
        Ok(build_tag(&String::from_utf8_lossy(&body)).unwrap_or_else(|| "unknown".into()))
    };
    pods.iter().zip(answers.into_iter().map(tag)).collect()
}

fn not_told(pod: &PodView, error: &anyhow::Error) -> Outcome {
    let name = pod.full_name();
    match &pod.trouble {
        Some(trouble) => output::complain(format_args!("Error: {name} does not run: {trouble}")),
        None => output::complain(format_args!(
            "Error: {name} does not answer: {}",
            output::sentence(error)
        )),
    }
    Outcome::Findings
}

/// The version in a program's metric `istio_build`.
fn build_tag(metrics: &str) -> Option<String> {
    let line = metrics.lines().find(|l| l.starts_with("istio_build{"))?;
    let (_, rest) = line.split_once("tag=\"")?;
    Some(rest.split_once('"')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_planes_version_is_in_its_metrics() {
        let metrics =
            "# TYPE istio_build gauge\nistio_build{component=\"pilot\",tag=\"1.2.3\"} 1\n";
        assert_eq!(build_tag(metrics).as_deref(), Some("1.2.3"));
        assert_eq!(build_tag("pilot_xds 1\n"), None);
    }

    #[test]
    fn versions_are_counted() {
        let proxy = |id: &str, version: &str| Proxy {
            id: id.into(),
            version: version.into(),
        };
        let versions = Versions {
            client_version: Build {
                version: "2".into(),
            },
            mesh_version: vec![Component {
                component: "aditd",
                info: Build {
                    version: "2".into(),
                },
            }],
            data_plane_version: vec![proxy("a", "1"), proxy("b", "2"), proxy("c", "2")],
        };
        assert_eq!(
            versions.text(),
            "client version: 2\ncontrol plane version: 2\n\
             data plane version: 1 (1 proxy), 2 (2 proxies)\n"
        );
        let json = serde_json::to_value(&versions).expect("JSON");
        assert_eq!(json["dataPlaneVersion"][0]["ID"], "a");
        assert_eq!(json["meshVersion"][0]["Info"]["version"], "2");
    }
}
