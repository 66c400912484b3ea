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

    let text = well(kubeconfig, &["uninstall", "--purge", "-y"]);
    assert!(text.contains("Uninstallation complete"), "{text}");
    let text = well(kubeconfig, &["uninstall", "-y"]);
    assert!(text.contains("There is nothing"), "{text}");
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
