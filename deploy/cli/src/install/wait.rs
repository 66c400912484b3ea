//! Waiting until a workload is ready, and saying what it waits for.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::access::{Access, AccessError, id_of};
use super::object::ObjectId;
use crate::output::Output;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(500);

/// How far a workload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// All replicas are there, of this version.
    pub ready: bool,
    /// As `1 of 2 ready`.
    pub text: String,
}

/// Reads a Deployment's or DaemonSet's status.
pub fn progress(workload: &Value) -> Progress {
    let status = &workload["status"];
    let number = |field: &str| status[field].as_i64().unwrap_or_default();
    let observed = number("observedGeneration")
        >= workload["metadata"]["generation"]
            .as_i64()
            .unwrap_or_default();
    let (wanted, updated, available) = match workload["kind"] == "DaemonSet" {
        true => (
            number("desiredNumberScheduled"),
            number("updatedNumberScheduled"),
            number("numberAvailable"),
        ),
        false => (
            workload["spec"]["replicas"].as_i64().unwrap_or(1),
            number("updatedReplicas"),
            number("availableReplicas"),
        ),
    };
    // Pods of the version before count as available too.
    let old = match workload["kind"] == "DaemonSet" {
        true => 0,
        false => number("replicas") - updated,
    };
    Progress {
        ready: observed && updated >= wanted && available >= wanted && old <= 0,
        text: match observed {
            true => format!("{} of {wanted} ready", available.min(updated)),
            false => "not looked at by its controller yet".to_owned(),
        },
    }
}

/// Waits for every workload.
///
/// # Errors
/// Those that are not ready in time, and why.
pub async fn until_ready(
    access: &Access,
    workloads: &[ObjectId],
    deadline: Instant,
    out: &mut Output,
) -> anyhow::Result<()> {
    for id in workloads {
        let mut told = String::new();
        loop {
            let found = access.get_json(id).await;
            let mut text = match &found {
                Ok(Some(workload)) => {
                    let progress = progress(workload);
                    if progress.ready {
                        break;
                    }
                    progress.text
                }
                Ok(None) => "not there".to_owned(),
                // The API server may be busy restarting; the deadline holds.
                Err(error) => error.to_string(),
            };
            if let Ok(Some(workload)) = &found
                && let Some(reason) = reason(access, workload).await?
            {
                let _ = write!(text, ": {reason}");
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{id} is not ready in time: {text}"
            );
            if text != told {
                writeln!(out, "  {id}: {text}")?;
                out.flush()?;
                told = text;
            }
            sleep(INTERVAL).await;
        }
    }
    Ok(())
}

/// Why a workload's pods do not come up, by the first one that says so.
pub async fn reason(access: &Access, workload: &Value) -> Result<Option<String>, AccessError> {
    let metadata = &workload["metadata"];
    let namespace = metadata["namespace"].as_str().unwrap_or_default();
    let selector = workload["spec"]["selector"]["matchLabels"].as_object();
    let selector: Vec<_> = selector
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    let pods = access
        .list("v1", "Pod", namespace, &selector.join(","))
        .await?;
    for pod in &pods {
        let id = id_of(pod, "v1", "Pod");
        let pod = serde_json::to_value(pod).unwrap_or_default();
        if let Some(reason) = pod_reason(&pod) {
            return Ok(Some(format!("{id}: {reason}")));
        }
    }
    // No pod at all: admission, quota.
    let events = access.list("v1", "Event", namespace, "").await?;
    let name = metadata["name"].as_str().unwrap_or_default();
    let refused = events.iter().rev().find_map(|event| {
        let about = event.data["involvedObject"]["name"].as_str()?;
        let ours = about == name || about.rsplit_once('-').is_some_and(|(stem, _)| stem == name);
        let refused = event.data["reason"] == "FailedCreate";
        (ours && refused).then(|| event.data["message"].as_str())?
    });
    Ok(refused.filter(|_| pods.is_empty()).map(str::to_owned))
}

/// What a pod waits for; `None`: it is ready, or has said nothing yet.
pub fn pod_reason(pod: &Value) -> Option<String> {
    let status = &pod["status"];
    let list = |field: &str| status[field].as_array().cloned().unwrap_or_default();
    for container in list("initContainerStatuses")
        .iter()
        .chain(&list("containerStatuses"))
    {
        let name = container["name"].as_str().unwrap_or_default();
        for (state, key) in [
            ("waiting", "state"),
            ("terminated", "lastState"),
            ("terminated", "state"),
        ] {
            let state = &container[key][state];
            let Some(reason) = state["reason"].as_str() else {
                continue;
            };
            if matches!(
                reason,
                "ContainerCreating" | "PodInitializing" | "Completed"
            ) {
                continue;
            }
            let message = state["message"].as_str().unwrap_or_default();
            let message = message.lines().next().unwrap_or_default();
            let code = match state["exitCode"].as_i64() {
                Some(code) => format!(" (exit code {code})"),
                None => String::new(),
            };
            let separator = if message.is_empty() { "" } else { ": " };
            return Some(format!(
                "container {name}: {reason}{code}{separator}{message}"
            ));
        }
    }
    for condition in list("conditions") {
        let kind = condition["type"].as_str().unwrap_or_default();
        let message = condition["message"].as_str().unwrap_or_default();
        if condition["status"] == "False" && kind == "PodScheduled" {
            return Some(format!("cannot be scheduled: {message}"));
        }
    }
    let waiting = list("containerStatuses");
    let waiting = waiting
        .iter()
        .find(|container| container["ready"] == false)?;
    let running = waiting["state"]["running"].is_object();
    running.then(|| "its readiness probe has not succeeded yet".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_workload_is_ready_when_its_newest_pods_are() {
        let deployment = |generation: i64, updated: i64, available: i64, replicas: i64| {
            json!({
                "kind": "Deployment",
                "metadata": {"generation": 2},
                "spec": {"replicas": 2},
                "status": {
                    "observedGeneration": generation, "updatedReplicas": updated,
                    "availableReplicas": available, "replicas": replicas,
                },
            })
        };
        for (workload, ready, text) in [
            (deployment(2, 2, 2, 2), true, "2 of 2 ready"),
            (
                deployment(1, 2, 2, 2),
                false,
                "not looked at by its controller yet",
            ),
            (deployment(2, 1, 2, 3), false, "1 of 2 ready"),
            (deployment(2, 2, 2, 3), false, "2 of 2 ready"),
            (deployment(2, 2, 0, 2), false, "0 of 2 ready"),
        ] {
            let progress = progress(&workload);
            assert_eq!(
                (progress.ready, progress.text.as_str()),
                (ready, text),
                "{workload}"
            );
        }
        let daemons = |desired: i64, updated: i64, available: i64| {
            json!({
                "kind": "DaemonSet", "metadata": {"generation": 1},
                "status": {
                    "observedGeneration": 1, "desiredNumberScheduled": desired,
                    "updatedNumberScheduled": updated, "numberAvailable": available,
                },
            })
        };
        assert!(progress(&daemons(2, 2, 2)).ready);
        assert!(!progress(&daemons(2, 1, 2)).ready);
        assert!(!progress(&daemons(2, 2, 1)).ready);
        let unseen = json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": {}});
        assert!(!progress(&unseen).ready);
    }

    #[test]
    fn a_pod_says_what_it_waits_for() {
        let waiting = |reason: &str| {
            json!({"status": {"containerStatuses": [{
                "name": "discovery", "ready": false,
                "state": {"waiting": {"reason": reason, "message": "no such image"}},
            }]}})
        };
        for (pod, expected) in [
            (
                waiting("ImagePullBackOff"),
                Some("container discovery: ImagePullBackOff: no such image"),
            ),
            (waiting("ContainerCreating"), None),
            (
                json!({"status": {"conditions": [
                    {"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]}}),
                Some("cannot be scheduled: 0/1 nodes"),
            ),
            (
                json!({"status": {"containerStatuses": [{
                    "name": "x", "ready": false, "state": {"running": {}},
                    "lastState": {"terminated": {"reason": "Error", "exitCode": 1}}}]}}),
                Some("container x: Error (exit code 1)"),
            ),
            (json!({"status": {}}), None),
        ] {
            assert_eq!(pod_reason(&pod).as_deref(), expected, "{pod}");
        }
    }
}
