//! `adit check`: whether a cluster or this machine can carry the mesh, and whether the mesh
//! in it is well.

mod cluster;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;

use adit_ebpf::{Capability, ForeignProgram, NodeConfig, capabilities, foreign_programs};
use adit_local::Running;
use anyhow::Context as _;
use serde::Serialize;

use crate::cluster::{Cluster, ClusterArgs, running_meshes};
use crate::kubernetes::{self, Found};
use crate::output::{self, Format, Outcome, Output, UsageError};
use crate::table::{Table, printable};

/// Capability that stands for [`foreign_programs`], which get a table of their own.
const NO_FOREIGN_PROGRAMS: &str = "no other socket load balancer";

/// Check that the mesh can run, and that it is well
///
/// Of a Kubernetes cluster: versions, kernels of the nodes, rights (--pre), the parts of the
/// mesh. Of this machine, where there is no kubeconfig or --machine says so: every kernel
/// feature is tried, not guessed from a version, by programs that let everything pass and are
/// attached for a moment; run it as root.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # before anything is installed
  adit check --pre

  # the mesh in a cluster
  adit check --context production

  # the machine, and the local mesh that runs on it
  adit check --machine

  # on a Kubernetes node, whose pods run below the kubepods slice
  adit check --pre --cgroup /sys/fs/cgroup/kubepods.slice

Exit status: 1 if something that is needed is missing.")]
pub struct Args {
    /// Only what the mesh needs, not the mesh that may run
    #[arg(long)]
    pre: bool,
    /// This machine, also where there is a kubeconfig
    #[arg(long, conflicts_with_all = ["kubeconfig", "context"])]
    machine: bool,
    /// The cgroup v2 directory below which the pods of this machine run
    #[arg(long, value_name = "PATH", conflicts_with_all = ["kubeconfig", "context"])]
    cgroup: Option<PathBuf>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    at: ClusterArgs,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    if args.pre && args.at.mesh.is_some() {
        let text = "--pre is about what a mesh needs: give --mesh or --pre";
        return Err(UsageError(text.into()).into());
    }
    let named = args.at.names_one();
    let machine = args.machine || args.cgroup.is_some();
    let nearby = !named && (machine || kubernetes::find()? == Found::Nothing);
    let meshes = match nearby {
        // Several may run.
        true if args.pre => Vec::new(),
        true => running_meshes()?,
        false => match args.at.open()? {
            Cluster::Kubernetes(found) if args.pre => {
                return cluster::before(&found, args.output, out);
            }
            Cluster::Kubernetes(found) => return cluster::run(&found, args.output, out),
            Cluster::Local(mesh) => vec![mesh],
        },
    };
    let config = node_config(args.cgroup)?;
    let report = Report::new(
        capabilities(&config),
        // A cgroup that cannot be asked is a finding of the capabilities already.
        foreign_programs(&config.cgroup).unwrap_or_default(),
        &meshes,
    );
    output::print(out, args.output, &report, || report.text())?;
    Ok(Outcome::of(report.problems.is_empty()))
}

fn node_config(cgroup: Option<PathBuf>) -> anyhow::Result<NodeConfig> {
    let config = match NodeConfig::detect("adit-check") {
        Ok(config) => config,
        // Not there: the first capability says so.
        Err(error) if error.kind() == io::ErrorKind::NotFound => NodeConfig {
            node: "adit-check".into(),
            cgroup: "/sys/fs/cgroup".into(),
            bpffs: "/sys/fs/bpf".into(),
            kubelet_cgroup: None,
            kubelet_netns: None,
        },
        Err(error) => return Err(error).context("cannot read this machine's mounts"),
    };
    Ok(NodeConfig {
        cgroup: cgroup.unwrap_or(config.cgroup),
        ..config
    })
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    kernel: String,
    capabilities: Vec<CapabilityView>,
    foreign_programs: Vec<ForeignView>,
    components: Vec<ComponentView>,
    /// Sentences; empty: all is well.
    problems: Vec<String>,
    /// Sentences about what works, but not as well as it could.
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CapabilityView {
    feature: &'static str,
    needed_for: &'static str,
    since: &'static str,
    required: bool,
    present: bool,
    detail: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ForeignView {
    name: String,
    id: u32,
    owner: Option<&'static str>,
    cgroup: String,
    remedy: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ComponentView {
    mesh: String,
    component: String,
    ready: bool,
    detail: String,
}

impl Report {
    fn new(found: Vec<Capability>, foreign: Vec<ForeignProgram>, meshes: &[Running]) -> Self {
        let mut report = Self {
            kernel: kernel_release(),
            capabilities: Vec::new(),
            foreign_programs: Vec::new(),
            components: Vec::new(),
            problems: Vec::new(),
            warnings: Vec::new(),
        };
        for capability in found {
            report.add_capability(capability, foreign.len());
        }
        if !report.problems.is_empty() && !nix::unistd::geteuid().is_root() {
            report
                .problems
                .push("This was not run as root: what is missing may only be a permission.".into());
        }
        for program in foreign {
            report.warnings.push(format!(
                "The program {} (id {}) at {} may hide from ztunnel which service a pod asks for: {}.",
                program.name, program.id, program.cgroup, program.remedy
            ));
            report.foreign_programs.push(ForeignView {
                name: program.name,
                id: program.id,
                owner: program.owner,
                cgroup: program.cgroup,
                remedy: program.remedy,
            });
        }
        for mesh in meshes {
            report.add_mesh(mesh);
        }
        report
    }

    fn add_capability(&mut self, capability: Capability, foreign: usize) {
        let Capability {
            feature,
            needed_for,
            since,
            required,
            present,
            mut detail,
        } = capability;
        if feature == NO_FOREIGN_PROGRAMS && foreign > 0 {
            detail = format!("{foreign} found, see below");
        } else if !present {
            let sentences = if required {
                &mut self.problems
            } else {
                &mut self.warnings
            };
            sentences.push(missing(feature, needed_for, since, &detail));
        }
        self.capabilities.push(CapabilityView {
            feature,
            needed_for,
            since,
            required,
            present,
            detail,
        });
    }

    fn add_mesh(&mut self, mesh: &Running) {
        let name = mesh.name();
        let status = match mesh.status() {
            Ok(status) => status,
            Err(error) => {
                self.problems
                    .push(format!("Mesh {name} cannot be looked at: {error}."));
                return;
            }
        };
        if !mesh.is_supervised() {
            self.problems.push(format!(
                "The supervisor of mesh {name} is gone: `adit local down` cleans up."
            ));
        }
        for component in status.components {
            if !component.ready {
                let reason = match component.message.as_str() {
                    "" => String::new(),
                    message => format!(" ({message})"),
                };
                self.problems.push(format!(
                    "{} of mesh {name} is not ready{reason}; its log is {}.",
                    component.name,
                    component.log.display()
                ));
            }
            self.components.push(ComponentView {
                mesh: name.to_owned(),
                component: component.name,
                ready: component.ready,
                detail: component.message,
            });
        }
        let sentences = status.problems.into_iter();
        self.problems
            .extend(sentences.map(|problem| format!("Mesh {name}: {problem}")));
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut table = Table::new(["FEATURE", "NEEDED FOR", "SINCE", "STATUS", "DETAIL"]);
        for c in &self.capabilities {
            let status = match (c.present, c.required) {
                (true, _) => "ok",
                (false, true) => "missing",
                (false, false) => "warning",
            };
            table.row([c.feature, c.needed_for, c.since, status, &c.detail]);
        }
        text += &table.render();
        if !self.foreign_programs.is_empty() {
            let mut table = Table::new(["PROGRAM", "ID", "OWNER", "CGROUP", "REMEDY"]);
            for p in &self.foreign_programs {
                let owner = p.owner.unwrap_or("unknown");
                table.row([&p.name, &p.id.to_string(), owner, &p.cgroup, p.remedy]);
            }
            text.push('\n');
            text += &table.render();
        }
        if !self.components.is_empty() {
            let mut table = Table::new(["MESH", "COMPONENT", "STATUS", "DETAIL"]);
            for c in &self.components {
                let status = if c.ready { "ok" } else { "not ready" };
                table.row([&c.mesh, &c.component, status, &c.detail]);
            }
            text.push('\n');
            text += &table.render();
        }
        text.push('\n');
        for problem in &self.problems {
            text += &printable(problem);
            text.push('\n');
        }
        for warning in &self.warnings {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "Warning: {}", printable(warning));
        }
        if self.problems.is_empty() {
            let also = match self.components.is_empty() {
                true => "",
                false => ", and the mesh on it is well",
            };
            let _ = writeln!(
                text,
                "Linux {} has everything that capture needs{also}.",
                self.kernel
            );
        }
        text
    }
}

fn missing(feature: &str, needed_for: &str, since: &str, detail: &str) -> String {
    let since = match since.starts_with(|c: char| c.is_ascii_digit()) {
        true => format!("Linux {since}"),
        false => since.to_owned(),
    };
    let detail = match detail {
        "" => String::new(),
        detail => format!(" ({detail})"),
    };
    format!("{feature} is missing{detail}. It is needed for {needed_for}; what gives it: {since}.")
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match release.trim() {
        "" => "(unknown release)".into(),
        release => release.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(feature: &'static str, required: bool, present: bool) -> Capability {
        Capability {
            feature,
            needed_for: "handing connections to ztunnel",
            since: "5.9",
            required,
            present,
            detail: if present { "" } else { "Invalid argument" }.into(),
        }
    }

    #[test]
    fn what_is_missing_gets_a_sentence_and_what_is_optional_a_warning() {
        let found = vec![
            capability("sk_lookup", true, false),
            capability("sockops", false, false),
            capability("cgroup links", true, true),
        ];
        let report = Report::new(found, Vec::new(), &[]);
        let expected = "sk_lookup is missing (Invalid argument). It is needed for handing connections \
                        to ztunnel; what gives it: Linux 5.9.";
        assert_eq!(report.problems[0], expected);
        assert!(report.warnings[0].starts_with("sockops is missing"));
        let text = report.text();
        assert!(text.starts_with("FEATURE"), "{text}");
        assert!(
            text.contains("5.9     missing   Invalid argument\n"),
            "{text}"
        );
        assert!(
            text.contains("5.9     warning   Invalid argument\n"),
            "{text}"
        );
        assert!(text.contains("Warning: sockops is missing"), "{text}");
        assert!(!text.contains("everything that capture needs"), "{text}");
    }

    #[test]
    fn foreign_programs_are_listed_with_their_remedy() {
        let foreign = vec![ForeignProgram {
            name: "cil_sock4_conne".into(),
            id: 7,
            cgroup: "/sys/fs/cgroup".into(),
            owner: Some("Cilium"),
            remedy: "set socketLB.hostNamespaceOnly=true in Cilium's Helm values",
        }];
        let found = vec![capability(NO_FOREIGN_PROGRAMS, false, false)];
        let report = Report::new(found, foreign, &[]);
        assert!(report.problems.is_empty());
        let text = report.text();
        assert!(text.contains("1 found, see below"), "{text}");
        assert!(text.contains("PROGRAM           ID   OWNER"), "{text}");
        assert!(text.contains("socketLB.hostNamespaceOnly=true"), "{text}");
    }

    #[test]
    fn the_capability_for_foreign_programs_exists() {
        let config = node_config(None).expect("mounts can be read");
        let found = capabilities(&config);
        assert!(found.iter().any(|c| c.feature == NO_FOREIGN_PROGRAMS));
    }
}
