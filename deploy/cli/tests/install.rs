//! `adit install` and its relatives against a real API server, named by
//! `ADIT_TEST_KUBECONFIG`: an empty one of its own, without nodes. Without that variable these
//! tests say that they were skipped, and pass.
//!
//! One test, because what is installed belongs to the whole cluster.

use std::process::{Command, Output};

/// Runs `adit` against the cluster.
fn adit(kubeconfig: &str, args: &[&str]) -> (bool, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(args)
        .env("KUBECONFIG", kubeconfig)
        .output()
        .expect("adit runs");
    let text = [stdout, stderr].concat();
    (
        status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn well(kubeconfig: &str, args: &[&str]) -> String {
    let (well, text) = adit(kubeconfig, args);
    assert!(well, "adit {}: {text}", args.join(" "));
    text
}

fn kubectl(kubeconfig: &str, args: &[&str]) -> String {
    let output = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .args(args)
        .output();
    let output = output.expect("kubectl runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {args:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What needs no node to be ready.
const DEFINITIONS: [&str; 5] = [
    "install",
    "-y",
    "--set=profile=empty",
    "--set=components.base.enabled=true",
    "--set=values.base.excludedCRDs={wasmplugins.extensions.istio.io}",
];

#[test]
fn an_installation_is_made_changed_and_removed() {
    let Ok(kubeconfig) = std::env::var("ADIT_TEST_KUBECONFIG") else {
        eprintln!("skipped: ADIT_TEST_KUBECONFIG names no cluster");
        return;
    };
    let kubeconfig = kubeconfig.as_str();

    what_a_file_says_holds_until_it_is_taken_back(kubeconfig);
    let (done, text) = adit(kubeconfig, &["upgrade", "-y"]);
    assert!(!done && text.contains("there is no installation"), "{text}");
    let text = well(kubeconfig, &["install", "-y", "--dry-run"]);
    assert!(text.contains("nothing has been written"), "{text}");
    let (_, text) = adit(kubeconfig, &["verify-install"]);
    assert!(
        text.contains("is missing"),
        "a dry run writes nothing: {text}"
    );

    let text = well(kubeconfig, &DEFINITIONS);
    assert!(text.contains("(base): 14 objects applied"), "{text}");
    // The same again changes nothing.
    let text = well(kubeconfig, &DEFINITIONS);
    assert!(text.contains("(base): unchanged"), "{text}");
    assert!(well(kubeconfig, &["verify-install"]).contains("14 objects as installed"));

    // Everything is valid to the API server, strictly, now that the namespace is there.
    let text = well(kubeconfig, &["install", "-y", "--dry-run"]);
    for component in ["(pilot)", "(cni)", "(ztunnel)"] {
        assert!(text.contains(component), "{text}");
    }

    what_a_file_changes_is_valid(kubeconfig);

    // Without nodes a control plane does not come up; what it waits for is said.
    let minimal = [
        "install",
        "-y",
        "--set=profile=minimal",
        "--readiness-timeout=1s",
    ];
    let (done, text) = adit(kubeconfig, &minimal);
    assert!(!done, "{text}");
    assert!(
        text.contains("Deployment istio-system/istiod is not ready in time"),
        "{text}"
    );

    // An upgrade keeps what was given, and removes what is no longer asked for.
    let text = well(
        kubeconfig,
        &["upgrade", "-y", "--set=components.pilot.enabled=false"],
    );
    assert!(
        text.contains("Deployment istio-system/istiod removed: no longer part"),
        "{text}"
    );

    // The revision is there: in another namespace the same would take it away.
    let (done, text) = adit(kubeconfig, &[&DEFINITIONS[..], &["-i", "second"]].concat());
    let told = "revision default is installed in namespace istio-system";
    assert!(!done && text.contains(told), "{text}");
    let (done, text) = adit(kubeconfig, &["uninstall", "-y", "-i", "second"]);
    assert!(
        !done && text.contains("-i istio-system removes it"),
        "{text}"
    );
    assert!(well(kubeconfig, &["verify-install"]).contains("objects as installed"));

    another_mesh_is_left_alone(kubeconfig);
    let text = well(kubeconfig, &["uninstall", "-y"]);
    assert!(text.contains("There is nothing"), "{text}");
}

/// Without nodes a DaemonSet is ready at once, so that one can be installed whole.
fn what_a_file_says_holds_until_it_is_taken_back(kubeconfig: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("operator.yaml");
    let text = "kind: IstioOperator\nspec:\n  profile: empty\n  components:\n    ztunnel:\n      enabled: true\n      \
                k8s:\n        overlays:\n        - kind: DaemonSet\n          name: ztunnel\n          patches:\n          \
                - {path: metadata.labels}\n          - {path: spec.minReadySeconds, value: 7}\n";
    std::fs::write(&path, text).expect("a file");
    let path = path.to_str().expect("UTF-8");
    let installed = || {
        let field = "jsonpath={.spec.minReadySeconds}";
        let args = [
            "get",
            "daemonset",
            "ztunnel",
            "-n",
            "istio-system",
            "-o",
            field,
        ];
        kubectl(kubeconfig, &args)
    };
    let text = well(kubeconfig, &["install", "-y", "-f", path]);
    assert!(text.contains("(ztunnel): 2 objects applied"), "{text}");
    assert_eq!(installed(), "7");
    let text = well(kubeconfig, &["upgrade", "-y"]);
    assert!(text.contains("(ztunnel): unchanged"), "{text}");
    assert!(well(kubeconfig, &["verify-install"]).contains("2 objects as installed"));
    let none = "--set=components.ztunnel.k8s.overlays=[]";
    well(kubeconfig, &["upgrade", "-y", none]);
    assert_eq!(installed(), "");
    well(kubeconfig, &["install", "-y", "-f", path]);
    let text = well(kubeconfig, &["uninstall", "-y"]);
    let told = "DaemonSet istio-system/ztunnel removed";
    assert!(text.contains(told), "without its labels too: {text}");
}

/// Settings and overlays make objects that the API server takes; a field that it does not know
/// is its to refuse.
fn what_a_file_changes_is_valid(kubeconfig: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("operator.yaml");
    let file = |overlay: &str| {
        let text = format!(
            "kind: IstioOperator\nspec:\n  components:\n    ingressGateways: [{{name: edge, enabled: false}}]\n    \
             pilot:\n      k8s:\n        resources: {{limits: {{memory: 1Gi}}}}\n        \
             env: [{{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}]\n        \
             hpaSpec: {{minReplicas: 2, maxReplicas: 3}}\n        podDisruptionBudget: {{minAvailable: 1}}\n        \
             service: {{type: NodePort}}\n        strategy: {{rollingUpdate: {{maxSurge: 1}}}}\n        \
             volumes: [{{name: extra, emptyDir: {{}}}}]\n        volumeMounts: [{{name: extra, mountPath: /extra}}]\n        \
             overlays:\n        - kind: Deployment\n          name: istiod\n          patches: [{overlay}]\n"
        );
        std::fs::write(&path, text).expect("a file");
        adit(
            kubeconfig,
            &[
                "install",
                "-y",
                "--dry-run",
                "-f",
                path.to_str().expect("UTF-8"),
            ],
        )
    };
    let (done, text) = file("{path: spec.minReadySeconds, value: 1}");
    assert!(done && text.contains("(pilot)"), "{text}");
    let (done, text) = file("{path: spec.minReadySecnods, value: 1}");
    assert!(!done && text.contains("minReadySecnods"), "{text}");
    let (done, text) = file("{path: spec.minReadySecnods}");
    let told = "components.pilot.k8s.overlays[0] (Deployment istiod): path spec.minReadySecnods";
    assert!(!done && text.contains(told), "{text}");
}

/// `uninstall --purge`, first beside another mesh, then after it.
fn another_mesh_is_left_alone(kubeconfig: &str) {
    const NAMESPACE: &str = "adit-install-test";
    let kubectl = |args: &[&str]| kubectl(kubeconfig, args);
    let here = |args: &[&str]| kubectl(&[args, &["-n", NAMESPACE]].concat());
    kubectl(&["create", "namespace", NAMESPACE]);
    here(&[
        "create",
        "deployment",
        "istiod",
        "--image=docker.io/istio/pilot:1.30.0",
    ]);
    here(&["label", "deployment", "istiod", "app=istiod", "--overwrite"]);
    // Two of each: one that looks as if it were Adit's, one that is.
    for (name, manager) in [("theirs", "pilot-discovery"), ("ours", "adit-gateway")] {
        let manager = format!("--field-manager={manager}");
        here(&[
            "create",
            "service",
            "clusterip",
            name,
            "--tcp=15008",
            &manager,
        ]);
        let label = "gateway.istio.io/managed=istio.io-mesh-controller";
        here(&["label", "service", name, label, &manager]);
    }
    let gateway = "gateway.istio.io/managed=istio.io-gateway-controller";
    here(&[
        "create",
        "service",
        "clusterip",
        "north",
        "--tcp=80",
        "--field-manager=adit-gateway",
    ]);
    here(&["label", "service", "north", gateway]);
    here(&[
        "create",
        "configmap",
        "istio-ca-root-cert",
        "--from-literal=root-cert.pem=x",
    ]);
    here(&[
        "label",
        "configmap",
        "istio-ca-root-cert",
        "istio.io/config=true",
    ]);

    let (done, text) = adit(kubeconfig, &["uninstall", "--purge", "-y"]);
    let told = format!("Deployment {NAMESPACE}/istiod of another mesh");
    assert!(!done && text.contains(&told), "{text}");
    assert!(well(kubeconfig, &["verify-install"]).contains("objects as installed"));

    // Nor is one of Adit's that Helm looks after.
    let ours = "*=registry.example/aditd@sha256:\
        9b6ae4ff8b54a1d9a9b6c3a5f2a1d0c4e1a7a9b6c3a5f2a1d0c4e1a7a9b6c3a5";
    here(&["set", "image", "deployment/istiod", ours]);
    let (done, text) = adit(kubeconfig, &["uninstall", "--purge", "-y"]);
    assert!(
        !done && text.contains("of an Adit that `adit install` has not made"),
        "{text}"
    );

    here(&["delete", "deployment", "istiod"]);
    let text = well(kubeconfig, &["uninstall", "--purge", "-y"]);
    assert!(text.contains("Uninstallation complete"), "{text}");
    let left = here(&["get", "service,configmap", "-o", "name"]);
    for (name, stays) in [
        ("service/theirs", true),
        ("service/ours", false),
        ("service/north", true),
        ("configmap/istio-ca-root-cert", true),
    ] {
        assert_eq!(left.contains(name), stays, "{name}: {left}");
    }
    kubectl(&["delete", "namespace", NAMESPACE, "--wait=false"]);
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_not_replaced_by_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config");
    for (config, expected) in [
        ("contexts: [", "cannot be read"),
        ("{apiVersion: v1, kind: Config}", "has no current context"),
    ] {
        std::fs::write(&path, config).expect("a file");
        let path = path.to_str().expect("UTF-8");
        for args in [
            &["install", "-y"][..],
            &["uninstall", "-y"],
            &["verify-install"],
        ] {
            let (done, text) = adit(path, args);
            assert!(
                !done && text.contains(expected) && text.contains(path),
                "{args:?}: {text}"
            );
        }
    }
}

#[test]
fn mistakes_are_found_before_any_cluster_is_asked() {
    for (args, expected) in [
        (
            &["install", "--set", "values.pilto.x=1"][..],
            "values.pilto is not known",
        ),
        (
            &["install", "--set", "values.cni.cniBinDri=1"],
            "did you mean values.cni.cniBinDir?",
        ),
        (
            &["install", "-f", "/nonexistent.yaml"],
            "cannot read /nonexistent.yaml",
        ),
        (
            &["manifest", "generate", "--set", "profile=huge"],
            "profile huge is none of",
        ),
    ] {
        let (done, text) = adit("/nonexistent", args);
        assert!(!done && text.contains(expected), "{args:?}: {text}");
    }
    let text = well("/nonexistent", &["manifest", "generate"]);
    assert_eq!(
        text,
        well("/nonexistent", &["manifest", "generate"]),
        "twice the same"
    );
    assert!(text.contains("kind: DaemonSet"));
    assert!(well("/nonexistent", &["manifest", "profiles"]).contains("ambient"));
}
