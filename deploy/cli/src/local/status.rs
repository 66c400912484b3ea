//! `adit local status`.

use std::fmt::Write as _;

use adit_local::{FalseCondition, MeshStatus, PodStatus, ProcessId};

use super::NameArg;
use crate::output::{self, Format, Outcome, Output};
use crate::table::{Table, printable};

/// Show nodes, pods and components
///
/// Exit status is 1 when a manifest cannot be used or the supervisor is gone.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    mesh: NameArg,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = args.mesh.mesh()?;
    let status = running.status()?;
    // A mesh without a control plane has none.
    let conditions = running.false_conditions().unwrap_or_default();
    output::print(out, args.output, &status, || {
        text(&status) + &conditions_text(&conditions)
    })?;
    let supervised = running.is_supervised();
    if !supervised {
        output::complain(format_args!(
            "The supervisor of mesh {0} is gone; `adit local down --name {0}` cleans up.",
            status.name
        ));
    }
    Ok(Outcome::of(supervised && status.problems.is_empty()))
}

/// As tables.
pub(super) fn text(status: &MeshStatus) -> String {
    let mut text = String::new();
    if !status.components.is_empty() {
        let mut table = Table::new(["COMPONENT", "READY", "PID", "RESTARTS", "LOG"]);
        for component in &status.components {
            table.row([
                &component.name,
                yes(component.ready),
                &pid(component.process),
                &component.restarts.to_string(),
                &component.log.display().to_string(),
            ]);
        }
        text += &table.render();
        text.push('\n');
    }
    let mut table = Table::new([
        "NAMESPACE",
        "POD",
        "READY",
        "STATUS",
        "RESTARTS",
        "NODE",
        "ADDRESS",
    ]);
    for pod in &status.pods {
        let restarts: u32 = pod.containers.iter().map(|c| c.restarts).sum();
        table.row([
            &pod.namespace,
            &pod.name,
            yes(pod.ready),
            &state(pod),
            &restarts.to_string(),
            &pod.node,
            &pod.addresses.join(","),
        ]);
    }
    text += &table.render();
    if !status.applied.is_empty() {
        text += "\nApplied over the manifests:\n";
    }
    for applied in &status.applied {
        let _ = writeln!(text, "  {}", printable(applied));
    }
    for problem in &status.problems {
        let _ = writeln!(text, "\nProblem: {}", printable(problem));
    }
    text
}

fn conditions_text(conditions: &[FalseCondition]) -> String {
    let mut text = String::new();
    if !conditions.is_empty() {
        text += "\nWhat the control plane says:\n";
    }
    for of in conditions {
        let line = format!(
            "{}: {}=False ({}): {}",
            of.object, of.condition, of.reason, of.message
        );
        let _ = writeln!(text, "  {}", printable(&line));
    }
    text
}

fn state(pod: &PodStatus) -> String {
    let unwell = |c: &&adit_local::ContainerStatus| !c.ready && !c.message.is_empty();
    match pod.containers.iter().find(unwell) {
        _ if pod.terminating => "Terminating".into(),
        Some(container) => format!("{}: {}", pod.phase, container.message),
        None => pod.phase.clone(),
    }
}

fn yes(ready: bool) -> &'static str {
    if ready { "yes" } else { "no" }
}

fn pid(process: Option<ProcessId>) -> String {
    process.map_or_else(String::new, |process| process.pid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_say_why_they_are_not_ready() -> anyhow::Result<()> {
        let status: MeshStatus = serde_json::from_value(serde_json::json!({
            "name": "t", "supervisor": {"pid": 1, "start_time": 1}, "ephemeral": false,
            "data_plane": false, "manifests": "/m", "search_path": "/bin", "nodes": [],
            "components": [], "problems": ["a.yaml:1: no"],
            "pods": [{
                "namespace": "shop", "name": "a", "uid": "u", "node": "n1",
                "addresses": ["10.244.1.2"], "phase": "Running", "ready": false,
                "terminating": false, "netns": "/n", "cgroup": "/c",
                "containers": [{
                    "name": "c", "process": null, "ready": false, "restarts": 3,
                    "message": "ended with exit status: 3", "log": "/l",
                }],
            }],
        }))?;
        assert_eq!(
            text(&status),
            "NAMESPACE   POD   READY   STATUS                               RESTARTS   NODE   \
             ADDRESS\n\
             shop        a     no      Running: ended with exit status: 3   3          n1     \
             10.244.1.2\n\n\
             Problem: a.yaml:1: no\n"
        );
        Ok(())
    }
}
