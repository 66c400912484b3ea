//! A large mesh compiles in a moment, and a small change of it in less.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_controlplane::compile::{Compiler, Desired, MeshConfig, Redirection, Redirections};
use adit_controlplane::model::NamespaceObjects;
use adit_controlplane::serve::ResourceSnapshot;

use crate::harness::read;

/// 100 pods, 10 services and 5 policies in each namespace.
fn namespace(index: usize, extra: &str) -> String {
    let mut yaml = format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: ns{index}, labels: {{istio.io/dataplane-mode: ambient}}}}\n"
    );
    for pod in 0..100 {
        let app = pod % 10;
        write!(yaml, "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{pod}, namespace: ns{index}, labels: {{app: a{app}, team: t{index}{extra}}}}}\nspec: {{nodeName: n{pod}, serviceAccountName: s{app}, containers: []}}\nstatus: {{phase: Running, podIP: 10.{}.{}.{pod}, conditions: [{{type: Ready, status: 'True'}}]}}\n", index / 256, index % 256).unwrap();
    }
    for service in 0..10 {
        write!(yaml, "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{service}, namespace: ns{index}}}\nspec: {{selector: {{app: a{service}, team: t{index}}}, clusterIP: 10.200.{index}.{service}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n").unwrap();
    }
    for policy in 0..5 {
        write!(yaml, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{policy}, namespace: ns{index}}}\nspec: {{selector: {{matchLabels: {{app: a{policy}}}}}, rules: [{{from: [{{source: {{namespaces: [ns1, ns2], ipBlocks: [10.0.0.0/8]}}}}], to: [{{operation: {{ports: ['8080']}}}}]}}]}}\n").unwrap();
    }
    yaml
}

#[test]
fn ten_thousand_pods() {
    let parts: BTreeMap<usize, String> = (0..100)
        .map(|index| (index, namespace(index, "")))
        .collect();
    let all: String = parts.values().map(String::as_str).collect();
    let start = Instant::now();
    let (objects, findings) = read(&all);
    let reading = start.elapsed();
    assert_eq!(findings, []);
    let mesh = MeshConfig::default();
    let mut compiler = Compiler::new(mesh.clone());

    let start = Instant::now();
    let of_namespace = |(name, of): (&Arc<str>, &Arc<NamespaceObjects>)| {
        let mut desired = Desired::default();
        desired.add(of, &mesh);
        let wanted: BTreeSet<_> = desired.enrolled.into_keys().collect();
        let redirection = Redirection {
            hbone: wanted.clone(),
            enrolments: wanted,
        };
        (name.clone(), Arc::new(redirection))
    };
    let redirections: Redirections = objects.namespaces.iter().map(of_namespace).collect();
    let mut builder = ResourceSnapshot::default().edit();
    assert_eq!(compiler.update(&objects, &redirections, &mut builder), 100);
    let snapshot = builder.build();
    let full = start.elapsed();
    let sizes: BTreeMap<_, _> = snapshot.sizes().into_iter().collect();
    let settings = 1;
    assert_eq!(
        sizes.values().sum::<usize>(),
        10_000 + 1_000 + 500 + 10_000 + settings
    );

    // One pod of one namespace says HBONE no more.
    let mut less = redirections;
    Arc::make_mut(less.get_mut("ns7").unwrap())
        .hbone
        .pop_first();
    let start = Instant::now();
    let mut builder = snapshot.edit();
    assert_eq!(compiler.update(&objects, &less, &mut builder), 1);
    let small = start.elapsed();
    assert_eq!(builder.build().generation(), snapshot.generation() + 1);

    println!("reading {reading:?}, compiling and encoding all {full:?}, one change {small:?}");
    // Generous: this is a build for tests on a busy machine.
    assert!(full < Duration::from_secs(5), "{full:?}");
    assert!(small * 5 < full, "{small:?} of {full:?}");
}
