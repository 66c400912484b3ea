//! Whether a Kubernetes cluster can carry the mesh, and whether the mesh in it is well.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;

use crate::cluster::{name_of, namespace_of};
use crate::install::access::Access;
use crate::install::precheck::{
    self, BUNDLE_VERSION, Findings, MIN_KERNEL, gateway_api_warning, too_old_kernel,
};
use crate::install::spec::Spec;
use crate::kubernetes::{Kubernetes, Role};
use crate::output::{self, Format, Outcome, Output};
use crate::table::{Table, printable};

/// Names of nodes or pods in one sentence.
const MAX_NAMED: usize = 5;

/// Whether the mesh can be installed: what `adit install` looks at before it begins.
pub(super) fn before(
    cluster: &Kubernetes,
    format: Format,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    // An API server that does not answer is told of in one sentence.
    cluster.server_version()?;
    let mut spec = Spec::default();
    spec.lay(&["namespace".to_owned()], cluster.istio_namespace().into());
    let access = Access::new(cluster.client().clone(), cluster.name().to_owned());
    let findings = cluster.block_on(precheck::check(&access, &spec, true))?;
    output::print(out, format, &findings, || text_before(cluster, &findings))?;
    Ok(Outcome::of(findings.problems.is_empty()))
}

fn text_before(cluster: &Kubernetes, findings: &Findings) -> String {
    let gateway_api = findings.gateway_api.as_deref().unwrap_or("not there");
    let mut table = Table::new(["KUBERNETES", "NODES", "GATEWAY API"]);
    table.row([
        &findings.kubernetes,
        &findings.nodes.to_string(),
        gateway_api,
    ]);
    let mut text = table.render();
    text.push('\n');
    text += &sentences(&findings.problems, &findings.warnings);
    if findings.problems.is_empty() {
        let _ = writeln!(
            text,
            "Adit can be installed in {}: adit install --set profile=ambient",
            cluster.name()
        );
    }
    text
}

fn sentences(problems: &[String], warnings: &[String]) -> String {
    let mut text = String::new();
    for problem in problems {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", printable(problem));
    }
    for warning in warnings {
        let _ = writeln!(text, "Warning: {}", printable(warning));
    }
    text
}

/// Whether the mesh is well.
pub(super) fn run(
    cluster: &Kubernetes,
    format: Format,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    let mut report = Report {
        cluster: cluster.name().to_owned(),
        checks: Vec::new(),
        problems: Vec::new(),
        warnings: Vec::new(),
    };
    // Nothing can be told of a cluster that does not answer.
    report.add("Kubernetes", Found::Well(cluster.server_version()?));
    let nodes = cluster.list("nodes", None);
    report.try_to("nodes", nodes.map(|nodes| kernels(&nodes)));
    let definition = cluster.get(
        "customresourcedefinitions.apiextensions.k8s.io",
        "",
        "gateways.gateway.networking.k8s.io",
    );
    report.try_to(
        "Gateway API",
        definition.map(|found| gateway_api(found.as_ref())),
    );
    for (role, kind, name) in [
        (Role::ControlPlane, "deployments.apps", "istiod"),
        (Role::Ztunnel, "daemonsets.apps", "ztunnel"),
        (Role::Cni, "daemonsets.apps", "istio-cni-node"),
    ] {
        report.try_to(role.name(), ask_component(cluster, role, kind, name));
    }
    if let Ok(gateways) = cluster.list("gateways.gateway.networking.k8s.io", None) {
        report.add("waypoints", waypoints(&gateways));
    }
    output::print(out, format, &report, || report.text())?;
    Ok(Outcome::of(report.problems.is_empty()))
}

/// What was found: well or not, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    Well(String),
    /// It works, but not as well as it could.
    Warning(String, String),
    /// What, and a sentence.
    Problem(String, String),
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    cluster: String,
    checks: Vec<Check>,
    /// Sentences; empty: all is well.
    problems: Vec<String>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Check {
    check: String,
    status: &'static str,
    detail: String,
}

impl Report {
    fn add(&mut self, check: &str, found: Found) {
        let (status, detail) = match found {
            Found::Well(detail) => ("ok", detail),
            Found::Warning(detail, sentence) => {
                self.warnings.push(sentence);
                ("warning", detail)
            }
            Found::Problem(detail, sentence) => {
                self.problems.push(sentence);
                ("failed", detail)
            }
        };
        self.checks.push(Check {
            check: check.to_owned(),
            status,
            detail,
        });
    }

    /// What may not be looked at keeps nobody from the rest.
    fn try_to(&mut self, check: &str, found: anyhow::Result<Found>) {
        let found = found.unwrap_or_else(|error| {
            Found::Warning(
                "cannot be told".into(),
                format!("{check}: {}.", output::sentence(&error)),
            )
        });
        self.add(check, found);
    }

    fn text(&self) -> String {
        let mut table = Table::new(["CHECK", "STATUS", "DETAIL"]);
        for check in &self.checks {
            table.row([&check.check, check.status, &check.detail]);
        }
        let mut text = table.render();
        text.push('\n');
        text += &sentences(&self.problems, &self.warnings);
        if self.problems.is_empty() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "The mesh in {} is well.", self.cluster);
        }
        text
    }
}

fn kernels(nodes: &[Value]) -> Found {
    let info = |node: &Value, key: &str| -> String {
        let value = &node["status"]["nodeInfo"][key];
        value.as_str().unwrap_or_default().to_owned()
    };
    let linux = || {
        nodes
            .iter()
            .filter(|n| info(n, "operatingSystem") != "windows")
    };
    let old: Vec<String> = nodes
        .iter()
        .filter_map(|node| Some(format!("{} ({})", name_of(node), too_old_kernel(node)?)))
        .collect();
    if !old.is_empty() {
        return Found::Problem(
            format!("{} of {} have too old a kernel", old.len(), nodes.len()),
            format!(
                "These nodes need Linux {}.{} or newer: {}.",
                MIN_KERNEL.0,
                MIN_KERNEL.1,
                some_of(&old)
            ),
        );
    }
    let mut kernels: Vec<String> = linux().map(|node| info(node, "kernelVersion")).collect();
    kernels.sort();
    kernels.dedup();
    Found::Well(format!("{}: Linux {}", nodes.len(), some_of(&kernels)))
}

fn gateway_api(definition: Option<&Value>) -> Found {
    let annotations = definition.map(|definition| &definition["metadata"]["annotations"]);
    let text = |key: &str| annotations.and_then(|annotations| annotations[key].as_str());
    let version = annotations.map(|_| text(BUNDLE_VERSION).unwrap_or_default());
    let detail = match version {
        None => "not there".into(),
        Some(version) => format!(
            "{}, {} channel",
            if version.is_empty() {
                "unknown"
            } else {
                version
            },
            text("gateway.networking.k8s.io/channel").unwrap_or("unknown")
        ),
    };
    match gateway_api_warning(version) {
        None => Found::Well(detail),
        Some(warning) => Found::Warning(detail, warning),
    }
}

fn ask_component(
    cluster: &Kubernetes,
    role: Role,
    kind: &str,
    name: &str,
) -> anyhow::Result<Found> {
    let found = cluster.get(kind, cluster.istio_namespace(), name)?;
    let pods = cluster.mesh_pods(role)?;
    let troubles = pods.iter().filter_map(|pod| {
        let trouble = match &pod.trouble {
            Some(trouble) => trouble.as_str(),
            None if pod.ready => return None,
            None => "it is not ready",
        };
        Some(format!("pod {} on node {}: {trouble}", pod.name, pod.node))
    });
    let troubles: Vec<String> = troubles.collect();
    let place = (cluster.istio_namespace(), name);
    Ok(component(role, place, found.as_ref(), &troubles))
}

fn component(
    role: Role,
    (namespace, name): (&str, &str),
    object: Option<&Value>,
    troubles: &[String],
) -> Found {
    let Some(object) = object else {
        return Found::Problem(
            "not there".into(),
            format!(
                "The {} ({name}) is not in namespace {namespace}: `adit install` puts it there.",
                role.name()
            ),
        );
    };
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let status = &object["status"];
    let (ready, wanted) = match object["kind"].as_str() {
        Some("DaemonSet") => (
            number(&status["numberReady"]),
            number(&status["desiredNumberScheduled"]),
        ),
        _ => (
            number(&status["readyReplicas"]),
            object["spec"]["replicas"].as_u64().unwrap_or(1),
        ),
    };
    let detail = format!("{ready} of {wanted} ready");
    if ready >= wanted && wanted > 0 {
        return Found::Well(detail);
    }
    let reasons = match troubles {
        [] => "no pod was made yet".to_owned(),
        troubles => some_of(troubles),
    };
    let sentence = format!(
        "Of the {} ({namespace}/{name}) {ready} of {wanted} are ready: {reasons}.",
        role.name()
    );
    Found::Problem(detail, sentence)
}

fn waypoints(gateways: &[Value]) -> Found {
    let all: Vec<&Value> = gateways
        .iter()
        .filter(|gateway| gateway["spec"]["gatewayClassName"] == "istio-waypoint")
        .collect();
    let programmed = |gateway: &&&Value| {
        let conditions = gateway["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|c| c["type"] == "Programmed" && c["status"] == "True")
    };
    let unready: Vec<String> = all
        .iter()
        .filter(|gateway| !programmed(gateway))
        .map(|gateway| format!("{}/{}", namespace_of(gateway), name_of(gateway)))
        .collect();
    let detail = format!("{} of {} programmed", all.len() - unready.len(), all.len());
    match unready.is_empty() {
        true => Found::Well(detail),
        false => Found::Problem(
            detail,
            format!(
                "These waypoints are not ready, and what is bound to them is refused: {}; \
                 `adit waypoint status -A` says why.",
                some_of(&unready)
            ),
        ),
    }
}

/// The first of a list.
fn some_of(all: &[String]) -> String {
    let shown = all.get(..MAX_NAMED).unwrap_or(all).join(", ");
    match all.len().saturating_sub(MAX_NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn problem(found: Found) -> Option<String> {
        match found {
            Found::Well(_) => None,
            Found::Warning(_, sentence) | Found::Problem(_, sentence) => Some(sentence),
        }
    }

    #[test]
    fn nodes_with_too_old_a_kernel_are_named() {
        let node = |name: &str, kernel: &str| json!({"metadata": {"name": name}, "status": {"nodeInfo": {"kernelVersion": kernel}}});
        let nodes = [
            node("a", "5.9.1"),
            node("b", "5.18.0-2-amd64"),
            node("c", "6.8"),
        ];
        assert_eq!(
            problem(kernels(&nodes)).as_deref(),
            Some("These nodes need Linux 5.18 or newer: a (5.9.1).")
        );
        assert_eq!(problem(kernels(&nodes[1..])), None);
    }

    #[test]
    fn a_component_that_is_not_ready_says_why() {
        let place = ("istio-system", "ztunnel");
        let set = |ready: u32| {
            json!({"kind": "DaemonSet",
                "status": {"numberReady": ready, "desiredNumberScheduled": 2}})
        };
        let judge = |object: Option<&Value>, troubles: &[String]| {
            problem(component(Role::Ztunnel, place, object, troubles))
        };
        assert_eq!(judge(Some(&set(2)), &[]), None);
        let trouble = ["pod ztunnel-x on node n2: Pending".to_owned()];
        assert_eq!(
            judge(Some(&set(1)), &trouble).as_deref(),
            Some(
                "Of the ztunnel (istio-system/ztunnel) 1 of 2 are ready: pod ztunnel-x on node \
                 n2: Pending."
            )
        );
        assert!(judge(None, &[]).is_some_and(|told| told.contains("`adit install`")));
    }

    #[test]
    fn waypoints_that_are_not_ready_are_named() {
        let gateway = |name: &str, class: &str, status: &str| {
            json!({"metadata": {"name": name, "namespace": "shop"},
                "spec": {"gatewayClassName": class},
                "status": {"conditions": [{"type": "Programmed", "status": status}]}})
        };
        let all = [
            gateway("a", "istio-waypoint", "True"),
            gateway("b", "istio-waypoint", "False"),
            gateway("c", "nginx", "False"),
        ];
        let told = problem(waypoints(&all));
        assert!(told.is_some_and(|told| told.contains(": shop/b;")));
        assert_eq!(problem(waypoints(&all[..1])), None);
    }
}
