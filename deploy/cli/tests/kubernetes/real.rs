//! Against the API server that `ADIT_TEST_KUBECONFIG` names; without it the tests say so and
//! end. Everything is in a namespace of the test's own, which goes with it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::adit;

/// A namespace that is removed at the end.
struct Scratch {
    kubeconfig: PathBuf,
    name: String,
}

impl Scratch {
    /// `None` without a cluster.
    fn new(purpose: &str) -> Option<Self> {
        let Some(kubeconfig) = env::var_os("ADIT_TEST_KUBECONFIG") else {
            eprintln!("skipped: ADIT_TEST_KUBECONFIG is not set");
            return None;
        };
        let scratch = Self {
            kubeconfig: kubeconfig.into(),
            name: format!("adit-cli-{purpose}-{}", std::process::id()),
        };
        scratch.kubectl(&["create", "namespace", &scratch.name]);
        Some(scratch)
    }

    fn kubectl(&self, args: &[&str]) -> String {
        let output = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn adit(&self, args: &[&str], status: i32) -> String {
        let args = [args, &["-n", &self.name]].concat();
        let ended = adit(&self.kubeconfig, &args);
        let all = ended.stdout + &ended.stderr;
        assert_eq!(ended.status, status, "{args:?}\n{all}");
        all
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(["delete", "namespace", "--wait=false", &self.name])
            .output();
    }
}

#[test]
fn a_waypoint_comes_and_goes_at_a_real_api_server() {
    let Some(scratch) = Scratch::new("waypoint") else {
        return;
    };
    let name = scratch.name.clone();
    let told = scratch.adit(&["waypoint", "apply", "--enroll-namespace"], 0);
    assert!(
        told.contains("namespace is not enrolled in ambient"),
        "{told}"
    );
    assert!(
        told.contains(&format!("waypoint {name}/waypoint applied")),
        "{told}"
    );
    let get = [
        "get",
        "gateway",
        "waypoint",
        "-n",
        &name,
        "-o",
        "json",
        "--show-managed-fields",
    ];
    let gateway: Value = serde_json::from_str(&scratch.kubectl(&get)).unwrap();
    assert_eq!(gateway["spec"]["gatewayClassName"], "istio-waypoint");
    let managers = gateway["metadata"]["managedFields"].as_array().unwrap();
    assert!(
        managers
            .iter()
            .any(|m| m["manager"] == "adit-cli" && m["operation"] == "Apply")
    );
    let get = ["get", "namespace", &name, "-o", "json"];
    let namespace: Value = serde_json::from_str(&scratch.kubectl(&get)).unwrap();
    assert_eq!(
        namespace["metadata"]["labels"]["istio.io/use-waypoint"],
        "waypoint"
    );
    // Twice is as good as once.
    scratch.adit(&["waypoint", "apply", "--enroll-namespace"], 0);
    let again: Value = {
        let get = ["get", "gateway", "waypoint", "-n", &name, "-o", "json"];
        serde_json::from_str(&scratch.kubectl(&get)).unwrap()
    };
    assert_eq!(
        again["metadata"]["generation"],
        gateway["metadata"]["generation"]
    );
    let told = scratch.adit(
        &["waypoint", "apply", "--enroll-namespace", "--name", "b"],
        1,
    );
    assert!(told.contains("already has an enrolled Waypoint"), "{told}");
    let told = scratch.adit(&["waypoint", "list"], 0);
    assert!(told.contains("waypoint   default    service"), "{told}");
    let told = scratch.adit(&["waypoint", "delete"], 0);
    assert!(
        told.contains(&format!("waypoint {name}/waypoint deleted")),
        "{told}"
    );
    let told = scratch.adit(&["waypoint", "delete"], 1);
    assert!(told.contains("not found"), "{told}");
}

#[test]
fn a_right_that_is_missing_is_named_by_a_real_api_server() {
    let Some(scratch) = Scratch::new("rights") else {
        return;
    };
    let told = scratch.adit(&["waypoint", "list", "--as", "nobody"], 1);
    assert!(
        told.contains("cannot list gateways.gateway.networking.k8s.io in namespace")
            && told.contains("User \"nobody\" cannot list resource \"gateways\""),
        "{told}"
    );
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn a_real_cluster_is_analyzed_and_checked() {
    let Some(scratch) = Scratch::new("analyze") else {
        return;
    };
    let label = format!("namespace/{}", scratch.name);
    scratch.kubectl(&["label", &label, "istio.io/dataplane-mode=ambiant"]);
    let told = scratch.adit(&["analyze", "--failure-threshold", "warning"], 1);
    assert!(
        told.contains(&format!("Warning [IST0125] (Namespace {})", scratch.name)),
        "{told}"
    );
    let args = ["check", "--pre", "-o", "json"];
    let report = adit(&scratch.kubeconfig, &args).stdout;
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(report["nodes"].as_u64().is_some(), "{report}");
    let kubernetes = report["kubernetes"].as_str().unwrap();
    assert!(kubernetes.starts_with("v1."), "{report}");
}
