//! `adit version`: of this program, and of what runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use adit_local::Running;
use anyhow::Context as _;
use clap::ArgAction;
use http::Method;
use serde::Serialize;
use serde_json::Value;

use crate::output::{self, Format, Outcome, Output};
use crate::table::printable;
use crate::ztunnel::target::{self, TargetArgs, Ztunnel, targets};

/// Where the control plane has its metrics.
const MONITORING_PORT: u16 = 15014;

/// Show the version of this program, the control plane and the ztunnels
///
/// Control plane and ztunnels are asked where there are any: in the local mesh that runs, or
/// at --admin-address.
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
    let mut outcome = Outcome::Well;
    if args.remote {
        let named = args.at.mesh.is_some() || args.at.node.is_some();
        let named = named || args.at.admin_address.is_some();
        // Nothing runs here, and nobody said that something should.
        let quiet = !named && target::running_meshes()?.is_empty();
        match targets(&args.at, None) {
            Err(_) if quiet => {}
            Err(error) => return Err(error),
            Ok(targets) => {
                if args.at.admin_address.is_none()
                    && let Ok(mesh) = target::mesh(args.at.mesh.as_deref())
                {
                    outcome = versions.ask_control_plane(&mesh);
                }
                for ztunnel in targets.ztunnels {
                    if let Err(error) = versions.ask(ztunnel) {
                        output::complain_of(&error);
                        outcome = Outcome::Findings;
                    }
                }
            }
        }
    }
    output::print(out, args.output, &versions, || versions.text())?;
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

/// The version in the control plane's metric `istio_build`.
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
