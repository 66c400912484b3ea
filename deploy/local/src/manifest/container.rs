//! From a container of a pod to a command line, an environment and a probe.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// What is known about a pod when its containers start.
#[derive(Debug, Clone)]
pub struct PodFacts {
    /// The pod's uid.
    pub uid: String,
    /// The pod's addresses, IPv4 first.
    pub addresses: Vec<String>,
    /// The node's address.
    pub host_address: String,
    /// `PATH` in the mesh.
    pub search_path: String,
}

/// A program to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The whole environment: nothing is inherited from the machine.
    pub env: BTreeMap<String, String>,
    /// `workingDir`.
    pub directory: Option<String>,
}

/// A readiness probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePlan {
    /// What is asked.
    pub action: ProbeAction,
    /// `initialDelaySeconds`.
    pub initial_delay: Duration,
    /// `periodSeconds`.
    pub period: Duration,
    /// `timeoutSeconds`.
    pub timeout: Duration,
    /// `successThreshold`.
    pub successes: u32,
    /// `failureThreshold`.
    pub failures: u32,
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeAction {
    /// GET, ready on a status from 200 to 399.
    Http {
        /// Port of the pod.
        port: u16,
        /// Path and query.
        path: String,
        /// Additional headers.
        headers: Vec<(String, String)>,
    },
    /// Ready when the connection is accepted.
    Tcp {
        /// Port of the pod.
        port: u16,
    },
    /// Ready when the program ends with status 0; runs in the pod.
    Exec {
        /// The program and its arguments.
        argv: Vec<String>,
    },
}

/// The program of a container; `None` for one without a command, which only holds the
/// pod's namespaces, as the `pause` image does (images cannot be had here).
///
/// # Errors
/// A sentence that names the field.
pub fn launch(
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
) -> Result<Option<Launch>, String> {
    let Some(command) = container.command.as_ref().filter(|c| !c.is_empty()) else {
        return Ok(None);
    };
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), facts.search_path.clone()),
        ("HOME".to_owned(), "/".to_owned()),
        (
            "HOSTNAME".to_owned(),
            pod.metadata.name.clone().unwrap_or_default(),
        ),
    ]);
    for (index, variable) in container.env.iter().flatten().enumerate() {
        let value = value_of(variable, pod, facts, &env)
            .map_err(|error| format!("container {}: env[{index}]: {error}", container.name))?;
        env.insert(variable.name.clone(), value);
    }
    let words = command.iter().chain(container.args.iter().flatten());
    let argv = words.map(|word| substitute(word, &env)).collect();
    Ok(Some(Launch {
        argv,
        env,
        directory: container.working_dir.clone(),
    }))
}

fn value_of(
    variable: &EnvVar,
    pod: &Pod,
    facts: &PodFacts,
    env: &BTreeMap<String, String>,
) -> Result<String, String> {
    let Some(source) = &variable.value_from else {
        return Ok(substitute(variable.value.as_deref().unwrap_or(""), env));
    };
    let Some(field) = &source.field_ref else {
        return Err("valueFrom: only fieldRef is possible in a local mesh".into());
    };
    field_value(&field.field_path, pod, facts)
}

fn field_value(path: &str, pod: &Pod, facts: &PodFacts) -> Result<String, String> {
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = |value: Option<&String>| Ok(value.cloned().unwrap_or_default());
    let keyed = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
    if let Some(label) = keyed("metadata.labels['") {
        return text(metadata.labels.as_ref().and_then(|all| all.get(label)));
    }
    if let Some(annotation) = keyed("metadata.annotations['") {
        return text(
            metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(annotation)),
        );
    }
    match path {
        "metadata.name" => text(metadata.name.as_ref()),
        "metadata.namespace" => text(metadata.namespace.as_ref()),
        "metadata.uid" => Ok(facts.uid.clone()),
        "spec.nodeName" => text(spec.and_then(|s| s.node_name.as_ref())),
        "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_ref())),
        "status.podIP" => text(facts.addresses.first()),
        "status.podIPs" => Ok(facts.addresses.join(",")),
        "status.hostIP" => Ok(facts.host_address.clone()),
        _ => Err(format!("valueFrom.fieldRef.fieldPath {path} is unknown")),
    }
}

/// Kubernetes' `$(NAME)`; `$$` is a dollar sign, an unknown name stays as it is.
fn substitute(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
            continue;
        }
        let name = rest.strip_prefix("$(").and_then(|r| r.split_once(')'));
        match name.and_then(|(name, after)| Some((env.get(name)?, after))) {
            Some((value, after)) => {
                out.push_str(value);
                rest = after;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// The readiness probe of a container, if it has one.
///
/// # Errors
/// A sentence that names the field.
pub fn probe(container: &Container) -> Result<Option<ProbePlan>, String> {
    let Some(probe) = &container.readiness_probe else {
        return Ok(None);
    };
    let action = action(container, probe)
        .map_err(|error| format!("container {}: readinessProbe: {error}", container.name))?;
    let seconds = |value: Option<i32>, default: u64, least: u64| {
        let value = value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default);
        Duration::from_secs(value.max(least))
    };
    let count = |value: Option<i32>, default: u32| {
        let value = value.and_then(|v| u32::try_from(v).ok());
        value.unwrap_or(default).max(1)
    };
    Ok(Some(ProbePlan {
        action,
        initial_delay: seconds(probe.initial_delay_seconds, 0, 0),
        period: seconds(probe.period_seconds, 10, 1),
        timeout: seconds(probe.timeout_seconds, 1, 1),
        successes: count(probe.success_threshold, 1),
        failures: count(probe.failure_threshold, 3),
    }))
}

fn action(container: &Container, probe: &Probe) -> Result<ProbeAction, String> {
    if let Some(http) = &probe.http_get {
        if http.scheme.as_deref().is_some_and(|s| s != "HTTP") {
            return Err("httpGet.scheme: only HTTP is possible in a local mesh".into());
        }
        let header = |h: &k8s_openapi::api::core::v1::HTTPHeader| (h.name.clone(), h.value.clone());
        let path = http.path.clone().unwrap_or_else(|| "/".into());
        return Ok(ProbeAction::Http {
            port: port(container, &http.port).map_err(|e| format!("httpGet.port: {e}"))?,
            path: if path.starts_with('/') {
                path
            } else {
                format!("/{path}")
            },
            headers: http.http_headers.iter().flatten().map(header).collect(),
        });
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(container, &tcp.port).map_err(|e| format!("tcpSocket.port: {e}"))?;
        return Ok(ProbeAction::Tcp { port });
    }
    if let Some(argv) = probe.exec.as_ref().and_then(|e| e.command.clone())
        && !argv.is_empty()
    {
        return Ok(ProbeAction::Exec { argv });
    }
    Err("needs httpGet, tcpSocket or exec".into())
}

fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_ref() == Some(name))
            .map(|port| port.container_port)
            .ok_or_else(|| format!("the container has no port {name}"))?,
    };
    u16::try_from(number).map_err(|_| format!("{number} is no port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> PodFacts {
        PodFacts {
            uid: "u-1".into(),
            addresses: vec!["10.244.1.2".into(), "fd00::2".into()],
            host_address: "172.18.0.10".into(),
            search_path: "/bin".into(),
        }
    }

    fn pod(container: &str) -> Pod {
        let text = format!(
            "metadata: {{name: a, namespace: shop, labels: {{app: web}}}}\nspec: {{nodeName: n1, \
             serviceAccountName: sa, containers: [{container}]}}"
        );
        serde_yaml_ng::from_str(&text).unwrap_or_default()
    }

    fn launch_text(container: &str) -> Result<Option<Launch>, String> {
        let pod = pod(container);
        let spec = pod.spec.clone().unwrap_or_default();
        launch(&pod, &spec.containers[0], &facts())
    }

    #[test]
    fn environment_comes_from_values_and_fields() {
        let table = [
            ("{name: X, value: plain}", "plain"),
            (
                "{name: X, value: $(HOSTNAME)-$(NONE)-$$(HOME)-$}",
                "a-$(NONE)-$(HOME)-$",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}",
                "shop",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}",
                "u-1",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: \"metadata.labels['app']\"}}}",
                "web",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}",
                "n1",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: status.podIP}}}",
                "10.244.1.2",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}",
                "10.244.1.2,fd00::2",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}",
                "172.18.0.10",
            ),
            (
                "{name: X, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}",
                "sa",
            ),
        ];
        for (variable, expected) in table {
            let text = format!("{{name: c, command: [p, $(X)], args: [-a], env: [{variable}]}}");
            let launch = launch_text(&text);
            let launch = launch.ok().flatten().map(|l| l.argv);
            let expected = Some(vec!["p".into(), expected.to_owned(), "-a".into()]);
            assert_eq!(launch, expected, "{variable}");
        }
    }

    #[test]
    fn a_container_without_command_is_a_pause() {
        assert_eq!(launch_text("{name: c, args: [x]}"), Ok(None));
    }

    #[test]
    fn sources_that_a_machine_has_not_are_named() {
        let text = "{name: c, command: [p], env: [{name: X, valueFrom: {secretKeyRef: {name: s, \
                    key: k}}}]}";
        assert_eq!(
            launch_text(text),
            Err("container c: env[0]: valueFrom: only fieldRef is possible in a local mesh".into())
        );
    }

    #[test]
    fn probes_resolve_named_ports_and_defaults() {
        let text = "{name: c, ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: \
                    {port: web, path: ready}}}";
        let pod = pod(text);
        let plan = probe(&pod.spec.unwrap_or_default().containers[0]);
        let plan = plan.ok().flatten();
        assert_eq!(
            plan.as_ref().map(|p| p.action.clone()),
            Some(ProbeAction::Http {
                port: 8080,
                path: "/ready".into(),
                headers: Vec::new()
            })
        );
        assert_eq!(
            plan.map(|p| (p.period.as_secs(), p.failures)),
            Some((10, 3))
        );
    }
}
