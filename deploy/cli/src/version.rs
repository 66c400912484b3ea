//! `adit version`.

use std::process::ExitCode;

use adit_local::Running;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::output::{Format, print_value};

/// Options of `version`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The local mesh to ask; by default the only one there is
    #[arg(long)]
    mesh: Option<String>,
    /// Only this program's
    #[arg(long)]
    client: bool,
    /// How to print
    #[arg(short, long, default_value = "short")]
    output: Format,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mesh: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    control_plane: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    data_plane: Vec<Proxy>,
}

#[derive(Debug, Serialize)]
struct Proxy {
    node: String,
    version: String,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut versions = Versions {
        client_version: env!("CARGO_PKG_VERSION").into(),
        mesh: None,
        control_plane: None,
        data_plane: Vec::new(),
    };
    let running = match (&options.mesh, options.client) {
        (_, true) => None,
        (Some(name), _) => Some(Running::open(name)?),
        // Without a mesh to ask, its own version is all there is to say.
        (None, _) => crate::local::find(None).ok(),
    };
    if let Some(running) = &running {
        versions.mesh = Some(running.name().into());
        ask(running, &mut versions)?;
    }
    if options.output != Format::Short {
        print_value(&versions, options.output)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("client version: {}", versions.client_version);
    if versions.mesh.is_some() {
        let control_plane = versions.control_plane.as_deref();
        println!(
            "control plane version: {}",
            control_plane.unwrap_or("unreachable")
        );
        let mut counts = std::collections::BTreeMap::<&str, usize>::new();
        for proxy in &versions.data_plane {
            *counts.entry(&proxy.version).or_default() += 1;
        }
        let each = counts.iter().map(|(v, n)| format!("{v} ({n} proxies)"));
        let each: Vec<String> = each.collect();
        println!("data plane version: {}", each.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(running: &Running, versions: &mut Versions) -> anyhow::Result<()> {
    let status = running.status()?;
    if !status.data_plane {
        return Ok(());
    }
    versions.control_plane = running
        .get_control_plane(15014, "/metrics")
        .ok()
        .and_then(|answer| build_tag(&answer.text()));
    for node in &status.nodes {
        let dump = running.get(&node.name, 15000, "/config_dump").ok();
        let dump: Option<Value> = dump.and_then(|a| serde_json::from_slice(&a.body).ok());
        let version = dump.and_then(|d| d["version"]["version"].as_str().map(String::from));
        versions.data_plane.push(Proxy {
            node: node.name.clone(),
            version: version.unwrap_or_else(|| "unreachable".into()),
        });
    }
    Ok(())
}

/// `istio_build{component="…",tag="…"} 1`.
fn build_tag(metrics: &str) -> Option<String> {
    let line = metrics
        .lines()
        .find(|line| line.starts_with("istio_build{"))?;
    let (_, rest) = line.split_once("tag=\"")?;
    Some(rest.split_once('"')?.0.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_is_found() {
        let text = "# TYPE istio_build gauge\nistio_build{component=\"pilot\",tag=\"0.1.0\"} 1\n";
        assert_eq!(build_tag(text).as_deref(), Some("0.1.0"));
        assert_eq!(build_tag("other 1\n"), None);
    }
}
