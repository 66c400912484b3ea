//! Every query of every dashboard names metrics that a running mesh exports, with labels that
//! they really have: a board that shows nothing is worse than none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod, sample_waypoint};
use anyhow::Context;
use serde_json::Value;

/// Labels that Prometheus adds to whatever it scrapes from pods.
const TARGET_LABELS: [&str; 4] = ["pod", "namespace", "instance", "job"];

/// Labels of what a mesh that is well never counts, so that a scrape may not even name it: the
/// tests of the counting do.
const UNSEEN: [(&str, &[&str]); 12] = [
    ("adit_redirection_repairs_total", &["kind"]),
    ("adit_tls_handshake_failures_total", &["reporter"]),
    ("adit_inbound_rejections_total", &["reason"]),
    ("adit_certificate_fetch_failures_total", &["reason"]),
    ("adit_enrolment_report_failures_total", &["reason"]),
    ("istio_xds_connection_terminations_total", &["reason"]),
    ("pilot_total_xds_rejects", &["type"]),
    ("pilot_xds_expired_nonce", &["type"]),
    ("adit_xds_streams_ended", &["reason"]),
    ("adit_ca_refusals", &["reason"]),
    ("citadel_server_authentication_failure_count", &["reason"]),
    ("adit_connection_failures", &["reason"]),
];

/// Where the proxies' own metrics are held to their names and labels.
const COUNTED: &str = include_str!("../../shared/src/telemetry/metrics/tests.rs");

/// Metric -> labels; none: no sample has been seen.
type Exported = BTreeMap<String, BTreeSet<String>>;

#[test]
fn every_query_asks_for_metrics_and_labels_that_are_exported() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .files(&[("reviews.yaml", sample_waypoint("reviews.yaml"))])
        .up()?;
    mesh.enrol_waypoint("shop")?;
    mesh.wait_bound("reviews.shop.svc.cluster.local", true)?;
    mesh.calls(pod("shop/client"), "http://reviews.shop/", 5)?;
    mesh.call(pod("shop/client"), "http://web.shop/")?;
    // Nobody listens there, which is counted as well.
    let nobody = format!("http://{}:1/", mesh.address(pod("shop/web-b"))?);
    mesh.call(pod("shop/client"), &nobody)?;
    let exported = exported(&mesh)?;

    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/dashboards");
    let mut wrong = Vec::new();
    let mut queries = 0;
    for entry in std::fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let name = path.file_name().unwrap_or_default().display().to_string();
        let board: Value =
            serde_json::from_str(&std::fs::read_to_string(&path)?).with_context(|| name.clone())?;
        for query in expressions(&board) {
            queries += 1;
            for problem in problems(&query, &exported) {
                wrong.push(format!("{name}: {problem} in {query}"));
            }
        }
    }
    assert!(queries > 60, "only {queries} queries were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What the three programs answer to a scrape.
fn exported(mesh: &TestMesh) -> anyhow::Result<Exported> {
    let control_plane = mesh.get_control_plane(15014, "/metrics")?;
    let texts = [
        mesh.metrics("node1")?.text().to_owned(),
        mesh.metrics("node2")?.text().to_owned(),
        mesh.waypoint_metrics("waypoint.shop")?.text().to_owned(),
        String::from_utf8(control_plane.body)?,
    ];
    let mut exported = Exported::new();
    for text in &texts {
        // OpenMetrics' families have no suffix, Prometheus' text of aditd has no families.
        let open_metrics = text.contains("# EOF");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap_or((rest, ""));
                let suffixes: &[&str] = match (kind, open_metrics) {
                    ("counter", true) => &["_total"],
                    ("histogram", _) => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                for suffix in suffixes {
                    exported.entry(format!("{name}{suffix}")).or_default();
                }
            } else if !line.starts_with('#')
                && let Some((series, _)) = line.rsplit_once(' ')
            {
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                let found = exported.entry(name.to_owned()).or_default();
                let names = labels.split("=\"").filter_map(|part| {
                    let name = part.rsplit(['"', ',', ' ']).next()?;
                    let name = name.trim_start_matches(['{', ',']);
                    (!name.is_empty() && name.chars().all(is_word)).then(|| name.to_owned())
                });
                found.extend(names);
            }
        }
    }
    for (name, labels) in UNSEEN {
        let tested = COUNTED.contains(&format!("\"{name}\"")) || exported.contains_key(name);
        anyhow::ensure!(tested, "{name} is counted nowhere");
        let known = exported.entry(name.to_owned()).or_default();
        known.extend(labels.iter().map(|label| (*label).to_owned()));
    }
    Ok(exported)
}

/// Every PromQL text of a board: panels' targets and variables.
fn expressions(value: &Value) -> Vec<String> {
    match value {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value) {
                ("expr" | "definition", Value::String(text)) => vec![text.clone()],
                _ => expressions(value),
            })
            .collect(),
        Value::Array(list) => list.iter().flat_map(expressions).collect(),
        _ => Vec::new(),
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// What a query names that is not exported.
fn problems(query: &str, exported: &Exported) -> Vec<String> {
    const FUNCTIONS: [&str; 12] = [
        "sum",
        "rate",
        "increase",
        "min",
        "max",
        "count",
        "histogram_quantile",
        "time",
        "by",
        "label_values",
        "avg",
        "without",
    ];
    let mut problems = Vec::new();
    let mut metrics: Vec<&str> = Vec::new();
    let mut grouped: Vec<&str> = Vec::new();
    // Labels in braces belong to the metric before them; those of `by (...)` to all.
    let mut rest = query;
    let mut listing = false;
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || "\"{[)".contains(c)) {
        let after = &rest[start..];
        match after.as_bytes()[0] {
            b'"' => {
                let end = after[1..].find('"').map_or(after.len(), |end| end + 2);
                rest = &after[end..];
            }
            b'[' => rest = &after[after.find(']').unwrap_or(after.len() - 1) + 1..],
            b')' => {
                listing = false;
                rest = &after[1..];
            }
            b'{' => {
                let end = closing(after);
                for label in matchers(&after[1..end]) {
                    let metric = metrics.last().copied().unwrap_or_default();
                    if !has(exported, metric, label) {
                        problems.push(format!("{metric} has no label {label}"));
                    }
                }
                rest = &after[(end + 1).min(after.len())..];
            }
            _ => {
                let end = after.find(|c| !is_word(c)).unwrap_or(after.len());
                let word = &after[..end];
                rest = &after[end..];
                if word == "by" || word == "without" {
                    listing = true;
                } else if listing || (query.starts_with("label_values(") && rest.starts_with(')')) {
                    grouped.push(word);
                } else if !FUNCTIONS.contains(&word) && !word.starts_with("__") {
                    if !exported.contains_key(word) {
                        problems.push(format!("{word} is not exported"));
                    }
                    metrics.push(word);
                }
            }
        }
    }
    for label in grouped {
        if !metrics.iter().any(|metric| has(exported, metric, label)) {
            problems.push(format!("none of {metrics:?} has a label {label}"));
        }
    }
    problems
}

fn has(exported: &Exported, metric: &str, label: &str) -> bool {
    TARGET_LABELS.contains(&label)
        || exported
            .get(metric)
            .is_some_and(|known| known.contains(label))
}

/// Where the braces close: not inside a text.
fn closing(text: &str) -> usize {
    let mut quoted = false;
    let found = text.find(|c| {
        quoted ^= c == '"';
        c == '}' && !quoted
    });
    found.unwrap_or(text.len())
}

/// Names of labels in `a="b",c=~"d"`.
fn matchers(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for (index, part) in text.split('"').enumerate() {
        if index % 2 == 0 {
            let name = part.trim_start_matches([',', ' ']);
            let name = name.trim_end_matches(['=', '!', '~', ' ']);
            if !name.is_empty() {
                names.push(name);
            }
        }
    }
    names
}

#[test]
fn wrong_queries_are_found() {
    let exported = Exported::from([
        ("a_total".to_owned(), BTreeSet::from(["x".to_owned()])),
        ("b".to_owned(), BTreeSet::new()),
    ]);
    for (query, expected) in [
        (
            "sum by (x) (rate(a_total{pod=~\"$pod\"}[$__rate_interval]))",
            vec![],
        ),
        ("a_total / b", vec![]),
        ("label_values(a_total, x)", vec![]),
        ("rate(c_total[5m])", vec!["c_total is not exported"]),
        ("a_total{y=\"z\"}", vec!["a_total has no label y"]),
        ("sum by (y) (b)", vec!["none of [\"b\"] has a label y"]),
        ("label_values(b, x)", vec!["none of [\"b\"] has a label x"]),
    ] {
        assert_eq!(problems(query, &exported), expected, "{query}");
    }
}
