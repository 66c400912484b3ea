//! `adit check --pre` for a cluster, and the look that `adit install` takes before it begins.

use anyhow::Context as _;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::ResourceExt as _;
use kube::api::{Api, PostParams};
use serde::Serialize;
use serde_json::Value;

use super::access::{Access, ask};
use super::object::ObjectId;
use super::owner::{self, Owner, Part};
use super::spec::Spec;

/// The oldest Kubernetes that the charts are for.
const MIN_KUBERNETES: (u32, u32) = (1, 30);
/// The oldest kernel that capture works on: `bpf_set_retval`, by which a connection is refused
/// while ztunnel is away, came with it (`adit check` on a machine tries each feature).
pub const MIN_KERNEL: (u32, u32) = (5, 18);
/// The oldest Gateway API that waypoints can be made of (GRPCRoute, HTTPRoute v1).
const MIN_GATEWAY_API: (u32, u32) = (1, 1);
/// Where the Gateway API's definitions say their version.
pub const BUNDLE_VERSION: &str = "gateway.networking.k8s.io/bundle-version";

/// What was found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Findings {
    /// The API server's version.
    pub kubernetes: String,
    /// The Gateway API's, if its definitions are there.
    pub gateway_api: Option<String>,
    /// Nodes that are looked at.
    pub nodes: usize,
    /// Sentences: with these the mesh does not work.
    pub problems: Vec<String>,
    /// Sentences: something does not work as well as it could.
    pub warnings: Vec<String>,
}

/// Looks at a cluster.
///
/// # Errors
/// Only if it cannot be reached.
pub async fn check(access: &Access, spec: &Spec, installs: bool) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    let version = ask(
        &access.name,
        "ask for the version of",
        access.client().apiserver_version(),
    )
    .await
    .context("the cluster cannot be reached")?;
    findings.kubernetes = version.git_version.clone();
    if version_of(&version.git_version).is_some_and(|found| found < MIN_KUBERNETES) {
        let (major, minor) = MIN_KUBERNETES;
        findings.problems.push(format!(
            "The API server is {}; {major}.{minor} or newer is needed.",
            version.git_version
        ));
    }
    if installs {
        permissions(access, spec, &mut findings).await?;
    }
    nodes(access, &mut findings).await?;
    gateway_api(access, &mut findings).await?;
    other_mesh(access, spec, &mut findings).await?;
    network(access, &mut findings).await?;
    pod_security(access, spec, &mut findings).await?;
    Ok(findings)
}

/// The kernel of a node, if capture does not work on it.
pub fn too_old_kernel(node: &Value) -> Option<&str> {
    let info = &node["status"]["nodeInfo"];
    let kernel = info["kernelVersion"].as_str()?;
    let old = version_of(kernel).is_some_and(|found| found < MIN_KERNEL);
    (old && info["operatingSystem"] != "windows").then_some(kernel)
}

/// What to say of the Gateway API that is installed; `None`: its definitions are not there.
pub fn gateway_api_warning(installed: Option<&str>) -> Option<String> {
    const INSTALL: &str = "kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/latest/download/standard-install.yaml";
    let Some(version) = installed else {
        return Some(format!(
            "The Gateway API is not installed: without it there are no waypoints, and so no HTTP routing and policies. What installs it: {INSTALL}"
        ));
    };
    if version_of(version).is_some_and(|found| found >= MIN_GATEWAY_API) {
        return None;
    }
    let (major, minor) = MIN_GATEWAY_API;
    let version = match version {
        "" => "of an unknown version",
        version => version,
    };
    Some(format!(
        "The Gateway API that is installed is {version}; waypoints need v{major}.{minor} or newer. What brings it up to date: {INSTALL}"
    ))
}

/// `v1.31.2-gke.1` is 1.31, `6.1.0-13-amd64` is 6.1.
pub fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit());
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    Some((major, minor))
}

async fn permissions(access: &Access, spec: &Spec, findings: &mut Findings) -> anyhow::Result<()> {
    let needed = [
        ("apiextensions.k8s.io", "customresourcedefinitions", ""),
        ("rbac.authorization.k8s.io", "clusterroles", ""),
        ("rbac.authorization.k8s.io", "clusterrolebindings", ""),
        (
            "admissionregistration.k8s.io",
            "validatingwebhookconfigurations",
            "",
        ),
        ("", "serviceaccounts", spec.namespace()),
        ("", "services", spec.namespace()),
        ("", "configmaps", spec.namespace()),
        ("apps", "deployments", spec.namespace()),
        ("apps", "daemonsets", spec.namespace()),
    ];
    let api: Api<SelfSubjectAccessReview> = Api::all(access.client().clone());
    let mut refused = Vec::new();
    for (group, resource, namespace) in needed {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(group.into()),
                    resource: Some(resource.into()),
                    namespace: (!namespace.is_empty()).then(|| namespace.into()),
                    verb: Some("create".into()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = ask(
            &resource,
            "ask about",
            api.create(&PostParams::default(), &review),
        )
        .await?;
        if !answer.status.is_some_and(|status| status.allowed) {
            refused.push(resource);
        }
    }
    if !refused.is_empty() {
        findings.problems.push(format!(
            "You may not create {} in {}: installing needs the rights of a cluster administrator.",
            refused.join(", "),
            access.name
        ));
    }
    Ok(())
}

async fn nodes(access: &Access, findings: &mut Findings) -> anyhow::Result<()> {
    for node in access.list("v1", "Node", "", "").await? {
        let info = &node.data["status"]["nodeInfo"];
        let text = |field: &str| info[field].as_str().unwrap_or_default();
        if text("operatingSystem") == "windows" {
            continue;
        }
        findings.nodes += 1;
        if let Some(kernel) = too_old_kernel(&node.data) {
            let (major, minor) = MIN_KERNEL;
            findings.problems.push(format!(
                "Node {} runs Linux {kernel}; capture needs {major}.{minor} or newer.",
                node.name_any()
            ));
        }
        if !matches!(text("architecture"), "amd64" | "arm64" | "") {
            findings.warnings.push(format!(
                "Node {} is {}, for which there may be no images.",
                node.name_any(),
                text("architecture")
            ));
        }
    }
    Ok(())
}

fn definition(name: &str) -> ObjectId {
    ObjectId {
        api_version: "apiextensions.k8s.io/v1".into(),
        kind: "CustomResourceDefinition".into(),
        namespace: String::new(),
        name: name.into(),
    }
}

async fn gateway_api(access: &Access, findings: &mut Findings) -> anyhow::Result<()> {
    let definition = definition("gateways.gateway.networking.k8s.io");
    let version = access.get(&definition).await?.map(|there| {
        let version = there.annotations().get(BUNDLE_VERSION);
        version.cloned().unwrap_or_default()
    });
    let warning = gateway_api_warning(version.as_deref());
    findings.warnings.extend(warning);
    findings.gateway_api = version;
    Ok(())
}

/// Parts of a mesh that go by Istio's names and that `adit install` has not put there.
async fn other_mesh(access: &Access, spec: &Spec, findings: &mut Findings) -> anyhow::Result<()> {
    for Part {
        id,
        owner,
        chart,
        revision,
    } in owner::parts(access).await?
    {
        let control_plane = id.kind == "Deployment";
        if control_plane && revision != super::state::revision_label(spec.revision()) {
            continue;
        }
        match owner {
            Owner::Installer => {}
            Owner::Elsewhere => {
                let with = match chart.as_str() {
                    "" => "not by `adit install`".to_owned(),
                    chart => format!("with Helm ({chart})"),
                };
                findings.warnings.push(format!(
                    "{id} was installed {with}; from now on two write the same objects."
                ));
            }
            Owner::Other if control_plane => findings.problems.push(format!(
                "{id} belongs to another mesh, whose place Adit would take. Remove that one first, or install beside it with --revision and another --istioNamespace."
            )),
            // What captures pods on a node is there once.
            Owner::Other => findings.problems.push(format!(
                "{id} belongs to another mesh, which captures the pods of the same nodes. Remove that one first."
            )),
        }
    }
    Ok(())
}

/// A CNI that rewrites service addresses before ztunnel sees them, or that removes other
/// plugins' configuration.
async fn network(access: &Access, findings: &mut Findings) -> anyhow::Result<()> {
    let id = ObjectId {
        api_version: "v1".into(),
        kind: "ConfigMap".into(),
        namespace: "kube-system".into(),
        name: "cilium-config".into(),
    };
    let Some(cilium) = access.get_json(&id).await? else {
        return Ok(());
    };
    let is = |key: &str, value: &str| cilium["data"][key] == *value;
    if is("cni-exclusive", "true") {
        findings.problems.push(
            "Cilium removes the CNI configuration of others from nodes: set cni.exclusive=false in Cilium's Helm values.".into(),
        );
    }
    let socket = is("bpf-lb-sock", "true") || is("kube-proxy-replacement", "true");
    if socket && !is("bpf-lb-sock-hostns-only", "true") {
        findings.problems.push(
            "Cilium's socket load balancer hides from ztunnel which service a pod asks for: set socketLB.hostNamespaceOnly=true in Cilium's Helm values.".into(),
        );
    }
    Ok(())
}

async fn pod_security(access: &Access, spec: &Spec, findings: &mut Findings) -> anyhow::Result<()> {
    let id = super::apply::namespace_id(spec.namespace());
    let Some(namespace) = access.get(&id).await? else {
        return Ok(());
    };
    let level = namespace.labels().get("pod-security.kubernetes.io/enforce");
    if let Some(level) = level.filter(|level| *level != "privileged") {
        findings.problems.push(format!(
            "{id} admits pods of the level {level} only, and the node's agents mount directories of the host: set its label pod-security.kubernetes.io/enforce=privileged."
        ));
    }
    if let Some(deleted) = &namespace.metadata.deletion_timestamp {
        findings
            .problems
            .push(format!("{id} is being deleted since {}.", deleted.0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for (kernel, system, old) in [
            ("5.9.1", "linux", true),
            ("5.17.15-generic", "linux", true),
            ("5.18.0-2-amd64", "linux", false),
            ("6.8", "linux", false),
            ("10.0.17763", "windows", false),
            ("4.19", "windows", false),
            ("unknown", "linux", false),
        ] {
            let node = serde_json::json!({"status": {"nodeInfo": {
                "kernelVersion": kernel, "operatingSystem": system}}});
            assert_eq!(too_old_kernel(&node), old.then_some(kernel), "{kernel}");
        }
    }

    #[test]
    fn an_old_gateway_api_is_told_of() {
        for (installed, told) in [
            (None, Some("is not installed")),
            (Some(""), Some("of an unknown version")),
            (Some("v1.0.0"), Some("is v1.0.0; waypoints need v1.1")),
            (Some("v1.1.0"), None),
            (Some("v1.7.0"), None),
        ] {
            let warning = gateway_api_warning(installed);
            match told {
                Some(told) => assert!(warning.is_some_and(|warning| warning.contains(told))),
                None => assert_eq!(warning, None),
            }
        }
    }

    #[test]
    fn versions_are_read_from_whatever_surrounds_them() {
        for (text, expected) in [
            ("v1.31.2-gke.1", Some((1, 31))),
            ("6.1.0-13-amd64", Some((6, 1))),
            ("5.15.0-1053-aws", Some((5, 15))),
            ("v1.7.0", Some((1, 7))),
            ("", None),
            ("main", None),
        ] {
            assert_eq!(version_of(text), expected, "{text}");
        }
    }
}
