//! `adit ztunnel-config`: what a node tunnel knows, with `istioctl`'s columns and flags.

mod tables;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use adit_local::Running;
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::tables::Filter;
use crate::output::{Format, print_value};

const DEADLINE: Duration = Duration::from_secs(10);

/// Options of `ztunnel-config`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
    /// Node whose tunnel is asked; in a local mesh by default the first
    #[arg(long, global = true)]
    node: Option<String>,
    /// Local mesh to ask; by default the only one there is
    #[arg(long, global = true)]
    mesh: Option<String>,
    /// Ask this admin address in place of a local mesh
    #[arg(long, global = true, id = "admin", value_name = "HOST:PORT")]
    admin_address: Option<String>,
    /// Read a dump from a file in place of asking anybody
    #[arg(short, long, global = true)]
    file: Option<PathBuf>,
    /// Admin port of the tunnel
    #[arg(long, global = true, default_value_t = 15000)]
    proxy_admin_port: u16,
    /// How to print
    #[arg(short, long, global = true, default_value = "short")]
    output: Format,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Workloads
    #[command(aliases = ["workload", "w"])]
    Workloads {
        /// Only the one with this address
        #[arg(long)]
        address: Option<String>,
        /// Only of this namespace
        #[arg(long)]
        workload_namespace: Option<String>,
        /// Only on this node
        #[arg(long)]
        workload_node: Option<String>,
    },
    /// Services
    #[command(aliases = ["service", "s", "svc"])]
    Services {
        /// Only of this namespace
        #[arg(long)]
        service_namespace: Option<String>,
    },
    /// Authorization policies
    #[command(aliases = ["policy", "p", "pol"])]
    Policies {
        /// Only of this namespace
        #[arg(long)]
        policy_namespace: Option<String>,
    },
    /// Certificates
    #[command(aliases = ["certificate", "certs", "cert"])]
    Certificates,
    /// Open connections
    #[command(aliases = ["connection", "cons"])]
    Connections {
        /// Only `inbound` or `outbound`
        #[arg(long, value_parser = ["inbound", "outbound"])]
        direction: Option<String>,
        /// Addresses in place of names
        #[arg(long)]
        raw: bool,
        /// Only of workloads of this namespace
        #[arg(long)]
        workload_namespace: Option<String>,
    },
    /// Show or change what the tunnel logs
    Log {
        /// `info`, or `access=debug,xds=trace`
        #[arg(long)]
        level: Option<String>,
        /// Back to what it was at the start
        #[arg(short, long, conflicts_with = "level")]
        reset: bool,
    },
    /// All of it
    All {
        /// A title over each table
        #[arg(long)]
        with_headers: bool,
    },
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let What::Log { level, reset } = &options.what {
        return log(options, level.as_deref(), *reset);
    }
    let dump = dump(options)?;
    if options.output != Format::Short {
        print_value(&select(&dump, &options.what), options.output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let filter = Filter::default();
    let text = match &options.what {
        What::Workloads {
            address,
            workload_namespace,
            workload_node,
        } => tables::workloads(
            &dump,
            &Filter {
                address: address.as_deref(),
                namespace: workload_namespace.as_deref(),
                node: workload_node.as_deref(),
                ..filter
            },
        )
        .render()?,
        What::Services { service_namespace } => tables::services(
            &dump,
            &Filter {
                namespace: service_namespace.as_deref(),
                ..filter
            },
        )
        .render()?,
        What::Policies { policy_namespace } => tables::policies(
            &dump,
            &Filter {
                namespace: policy_namespace.as_deref(),
                ..filter
            },
        )
        .render()?,
        What::Certificates => tables::certificates(&dump).render()?,
        What::Connections {
            direction,
            raw,
            workload_namespace,
        } => tables::connections(
            &dump,
            &Filter {
                namespace: workload_namespace.as_deref(),
                direction: direction.as_deref(),
                raw: *raw,
                ..filter
            },
        )
        .render()?,
        What::All { with_headers } => all(&dump, *with_headers)?,
        // Answered above.
        What::Log { .. } => String::new(),
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn all(dump: &Value, titles: bool) -> anyhow::Result<String> {
    let filter = Filter::default();
    let tables = [
        ("Workloads", tables::workloads(dump, &filter)),
        ("Services", tables::services(dump, &filter)),
        ("Policies", tables::policies(dump, &filter)),
        ("Certificates", tables::certificates(dump)),
        ("Connections", tables::connections(dump, &filter)),
    ];
    let mut text = String::new();
    for (title, table) in tables {
        if !text.is_empty() {
            text.push('\n');
        }
        if titles {
            text += &format!("# {title}\n");
        }
        text += &table.render()?;
    }
    Ok(text)
}

/// The part of the dump that a table is made of, unfiltered, as `istioctl` prints it.
fn select(dump: &Value, what: &What) -> Value {
    match what {
        What::Workloads { .. } => dump["workloads"].clone(),
        What::Services { .. } => dump["services"].clone(),
        What::Policies { .. } => dump["policies"].clone(),
        What::Certificates => dump["certificates"].clone(),
        What::Connections { .. } => json!(dump["workloadState"]),
        What::All { .. } | What::Log { .. } => dump.clone(),
    }
}

fn dump(options: &Options) -> anyhow::Result<Value> {
    let (text, from) = match &options.file {
        Some(file) => {
            let text = std::fs::read(file).with_context(|| file.display().to_string())?;
            (text, file.display().to_string())
        }
        None => ask(options, "GET", "/config_dump")?,
    };
    serde_json::from_slice(&text).with_context(|| format!("{from} is no dump of a node tunnel"))
}

fn log(options: &Options, level: Option<&str>, reset: bool) -> anyhow::Result<ExitCode> {
    let path = match (level, reset) {
        (Some(level), _) => {
            let legal = |c: char| c.is_ascii_alphanumeric() || "=,:_-./".contains(c);
            ensure!(
                level.chars().all(legal),
                "--level {level}: letters, digits and =,:_- only"
            );
            format!("/logging?level={level}")
        }
        (None, true) => "/logging?reset".to_owned(),
        (None, false) => "/logging".to_owned(),
    };
    let (text, _) = ask(options, "POST", &path)?;
    print!("{}", String::from_utf8_lossy(&text));
    Ok(ExitCode::SUCCESS)
}

/// The body of the tunnel's answer, and who it was.
fn ask(options: &Options, method: &str, path: &str) -> anyhow::Result<(Vec<u8>, String)> {
    let port = options.proxy_admin_port;
    let (answer, from) = match &options.admin_address {
        Some(address) => {
            let from = address.clone();
            let mut found = address
                .to_socket_addrs()
                .with_context(|| format!("--admin-address {address}"))?;
            let socket: SocketAddr = found
                .next()
                .with_context(|| format!("{address} has no address"))?;
            let answer = adit_local::http_request(socket, method, path, DEADLINE);
            (answer.with_context(|| from.clone())?, from)
        }
        None => {
            let running: Running = crate::local::find(options.mesh.as_deref())?;
            let status = running.status()?;
            let node = match &options.node {
                Some(node) => node.clone(),
                None => match status.nodes.first() {
                    Some(node) => node.name.clone(),
                    None => bail!("mesh {} has no nodes", status.name),
                },
            };
            let from = format!("the ztunnel of node {node} in mesh {}", status.name);
            let answer = running.http(&node, method, port, path);
            (answer.with_context(|| from.clone())?, from)
        }
    };
    ensure!(
        (200..300).contains(&answer.status),
        "{from} answers {} to {method} {path}: {}",
        answer.status,
        answer.text().trim()
    );
    Ok((answer.body, from))
}
