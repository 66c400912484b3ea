//! The program as it is run: output, standard error, exit status.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::thread;

use serde_json::Value;

const DUMP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/dump.json");
const DUMP_OF_MAPS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/dump-maps.json");
const WAYPOINT_DUMP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/waypoint.json");
const BAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/bad");
const GOOD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../samples/mesh");

fn adit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(args)
        // What the tests' user has configured is not what they are about.
        .env_remove("KUBECONFIG")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn expect(args: &[&str], status: i32) -> String {
    let output = adit(args);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stdout}{stderr}");
    match status {
        0 | 1 if !stdout.is_empty() => stdout,
        _ => stderr.into_owned(),
    }
}

#[test]
fn tables_of_a_stored_dump() {
    let web = "web.shop.svc.cluster.local";
    let table: [(&[&str], String); 7] = [
        (
            &["workloads"],
            "NAMESPACE   POD NAME   ADDRESS      NODE    WAYPOINT   PROTOCOL\n\
             legacy      server     10.244.2.9   node2   None       TCP\n\
             shop        client     10.244.1.5   node1   None       HBONE\n\
             shop        web-a      10.244.1.6   node1   waypoint   HBONE\n\
             shop        web-b      10.244.2.7   node2   None       HBONE\n"
                .into(),
        ),
        (
            &["services"],
            "NAMESPACE   SERVICE NAME   SERVICE VIP   WAYPOINT         ENDPOINTS\n\
             legacy      server         None          gone (unknown)   1/1\n\
             shop        waypoint       10.96.0.3     None             1/1\n\
             shop        web            10.96.0.2     waypoint         1/2\n"
                .into(),
        ),
        (
            &["policies"],
            "NAMESPACE      POLICY NAME    ACTION   SCOPE\n\
             istio-system   allow-all      Allow    Global\n\
             shop           deny-visitor   Deny     WorkloadSelector\n"
                .into(),
        ),
        (
            &["connections"],
            format!(
                "WORKLOAD      DIRECTION   LOCAL               REMOTE              REMOTE TARGET                   PROTOCOL\n\
                 client.shop   Outbound    client.shop:40001   web-a.shop:15008    {web}:80   HBONE\n\
                 client.shop   Outbound    client.shop:40002   web-b.shop:15008    {web}:80   HBONE\n\
                 client.shop   Outbound    client.shop:40003   192.0.2.1:443       192.0.2.1:443                   TCP\n\
                 web-a.shop    Inbound     web-a.shop:8080     client.shop:40000                                   HBONE\n"
            ),
        ),
        (
            &["connections", "--raw", "--direction", "inbound"],
            "WORKLOAD     DIRECTION   LOCAL             REMOTE             REMOTE TARGET   PROTOCOL\n\
             web-a.shop   Inbound     10.244.1.6:8080   10.244.1.5:40000                   HBONE\n"
                .into(),
        ),
        (
            &["workload", "--workload-namespace", "shop", "--workload-node", "NODE2"],
            "NAMESPACE   POD NAME   ADDRESS      NODE    WAYPOINT   PROTOCOL\n\
             shop        web-b      10.244.2.7   node2   None       HBONE\n"
                .into(),
        ),
        (
            &["w", "--address", "fd00:10:244:1::6"],
            "NAMESPACE   POD NAME   ADDRESS      NODE    WAYPOINT   PROTOCOL\n\
             shop        web-a      10.244.1.6   node1   waypoint   HBONE\n"
                .into(),
        ),
    ];
    for (args, expected) in table {
        let args = [&["zc"], args, &["-f", DUMP]].concat();
        assert_eq!(expect(&args, 0), expected, "{args:?}");
    }
}

#[test]
fn certificates_are_listed_with_their_validity_and_serial_number() {
    let text = expect(&["zc", "certificates", "--file", DUMP], 0);
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| {
            line.split("   ")
                .map(str::trim)
                .filter(|c| !c.is_empty())
                .collect()
        })
        .collect();
    let client = "spiffe://cluster.local/ns/shop/sa/client";
    let header = [
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ];
    assert_eq!(rows[0], header);
    let leaf = "2f96602a12c1e5a2b06ad9dd3251a705e7f004b8";
    assert_eq!(rows[1][..5], [client, "Leaf", "Available", "true", leaf]);
    assert_eq!(
        rows[2][..5],
        [client, "Intermediate", "Available", "true", "ff"]
    );
    assert_eq!(rows[3][..5], [client, "Root", "Available", "true", "1000"]);
    let visitor = "spiffe://cluster.local/ns/shop/sa/visitor";
    assert_eq!(
        rows[4],
        [visitor, "NA", "Unavailable", "false", "NA", "NA", "NA"]
    );
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let expired = [
        web,
        "Leaf",
        "Available",
        "false",
        "10",
        "2024-01-02T00:00:00Z",
    ];
    assert_eq!(rows[5][..6], expired);
}

#[test]
fn json_and_yaml_keep_what_tables_do_not_show() {
    let args = ["zc", "w", "-f", DUMP, "--workload-namespace", "shop", "-o"];
    let json: Value = serde_json::from_str(&expect(&[&args[..], &["json"]].concat(), 0)).unwrap();
    let yaml: Value =
        serde_yaml_ng::from_str(&expect(&[&args[..], &["yaml"]].concat(), 0)).unwrap();
    assert_eq!(json, yaml);
    assert_eq!(json[0]["name"], "client");
    assert_eq!(json[1]["locality"]["region"], "local");
    assert_eq!(json.as_array().map(Vec::len), Some(3));
}

#[test]
fn everything_can_be_stored_and_read_again() {
    let stored = expect(&["zc", "all", "-f", DUMP, "-o", "json"], 0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.json");
    std::fs::write(&path, &stored).unwrap();
    let again = path.to_str().unwrap();
    assert_eq!(
        expect(&["zc", "all", "-f", again], 0),
        expect(&["zc", "all", "-f", DUMP], 0)
    );
    assert_eq!(expect(&["zc", "all", "-f", again, "-o", "json"], 0), stored);
    let titled = expect(&["zc", "all", "-f", DUMP, "--with-headers"], 0);
    for title in [
        "WORKLOAD",
        "SERVICE",
        "POLICY",
        "CERTIFICATE",
        "CONNECTIONS",
    ] {
        assert!(
            titled.contains(&format!("------ {title} INFO ------\n\n")),
            "{title}"
        );
    }
}

#[test]
fn dumps_of_older_ztunnels_are_read() {
    let services = expect(&["zc", "services", "-f", DUMP_OF_MAPS], 0);
    assert!(
        services.contains("10.2.0.9      None       1/1\n"),
        "{services}"
    );
    let workloads = expect(&["zc", "workloads", "-f", DUMP_OF_MAPS], 0);
    assert!(
        workloads.contains("w1     wp         HBONE\n"),
        "{workloads}"
    );
    let certificates = expect(&["zc", "certs", "-f", DUMP_OF_MAPS], 0);
    let states: Vec<&str> = certificates
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    assert_eq!(states, ["Leaf", "Root", "NA", "NA"], "{certificates}");
}

#[test]
fn a_wrong_command_line_is_status_2_and_a_failure_status_1() {
    let conflicts = ["zc", "w", "-f", DUMP, "--node", "node1"];
    let positional = ["zc", "w", "web.shop", "--admin-address", "127.0.0.1:1"];
    let usage: [&[&str]; 6] = [
        &[],
        &["zc"],
        &["zc", "w", "-o", "xml"],
        &conflicts,
        &positional,
        &["zc", "log", "--level", "info", "--reset"],
    ];
    for args in usage {
        expect(args, 2);
    }
    let missing = expect(&["zc", "w", "-f", "/does/not/exist"], 1);
    assert!(
        missing.starts_with("Error: cannot read /does/not/exist: No such file"),
        "{missing}"
    );
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let useless = expect(&["zc", "w", "-f", manifest], 1);
    assert!(
        useless.contains("is no ztunnel dump: it is no JSON"),
        "{useless}"
    );
    let unknown = expect(&["zc", "w", "--mesh", "no-such-mesh"], 1);
    assert!(
        unknown.contains("there is no local mesh no-such-mesh"),
        "{unknown}"
    );
}

/// Answers one request on a port of its own with `answer` and yields the request's first
/// line.
fn answer_once(answer: String) -> (String, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
        stream.write_all(answer.as_bytes()).unwrap();
        first
    });
    (address, served)
}

fn http(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[test]
fn a_ztunnel_is_asked_by_its_address() {
    let (address, served) = answer_once(http("200 OK", &std::fs::read_to_string(DUMP).unwrap()));
    let asked = expect(&["zc", "workloads", "--admin-address", &address], 0);
    assert_eq!(asked, expect(&["zc", "workloads", "-f", DUMP], 0));
    assert_eq!(served.join().unwrap(), "GET /config_dump HTTP/1.1");
}

#[test]
fn log_levels_are_set_as_istioctl_has_them() {
    let (address, served) = answer_once(http("200 OK", "current log level is access=debug\n"));
    let args = [
        "zc",
        "log",
        "--admin-address",
        &address,
        "--level",
        "access:debug,warning",
    ];
    let text = expect(&args, 0);
    assert_eq!(
        text,
        format!("{address}:\ncurrent log level is access=debug\n")
    );
    let expected = "POST /logging?level=access%3Ddebug%2Cwarn HTTP/1.1";
    assert_eq!(served.join().unwrap(), expected);
}

#[test]
fn what_ztunnel_refuses_is_told() {
    let (address, served) = answer_once(http("400 Bad Request", "no such level\n"));
    let text = expect(&["zc", "log", "--admin-address", &address, "--reset"], 1);
    let expected = format!(
        "Error: {address} answers POST /logging?reset with 400 Bad Request: no such level\n"
    );
    assert_eq!(text, expected);
    served.join().unwrap();
}

#[test]
fn a_ztunnel_that_hangs_up_is_an_error() {
    let (address, served) = answer_once(String::new());
    let text = expect(&["zc", "w", "--admin-address", &address], 1);
    assert!(
        text.starts_with(&format!("Error: {address} does not answer: ")),
        "{text}"
    );
    served.join().unwrap();
}

#[test]
fn versions_of_ztunnels_are_asked_for() {
    let own = env!("CARGO_PKG_VERSION");
    let (address, served) = answer_once(http("200 OK", &std::fs::read_to_string(DUMP).unwrap()));
    let text = expect(&["version", "--admin-address", &address], 0);
    assert_eq!(
        text,
        format!("client version: {own}\ndata plane version: 0.1.0 (1 proxy)\n")
    );
    served.join().unwrap();
    let json = expect(&["version", "--remote=false", "-o", "json"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        json,
        serde_json::json!({ "clientVersion": { "version": own } })
    );
}

#[test]
fn good_manifests_have_no_findings() {
    let text = expect(&["analyze", "-f", GOOD], 0);
    assert_eq!(
        text,
        format!("No validation issues found when analyzing {GOOD}.\n")
    );
    assert_eq!(expect(&["analyze", GOOD, "-o", "json"], 0), "[]\n");
}

#[test]
fn mistakes_are_named_with_file_line_and_field() {
    let text = expect(&["analyze", BAD], 1);
    for expected in [
        "Error [IST0106] (AuthorizationPolicy shop/deny-visitor ",
        "policies.yaml:18) spec.rules[0].to[0].operation.ports[0]: \"http\" is not a port",
        "policies.yaml:38) spec.mtls.mode: \"STRIKT\" is not a mode",
        "Warning [IST0125] (Namespace shop ",
        "policies.yaml:6) metadata.labels[\"istio.io/dataplane-mode\"]: \"ambiant\"",
        "Warning [IST0127] (PeerAuthentication shop/strict ",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let summary = format!("2 errors, 2 warnings found when analyzing {BAD}.\n");
    assert!(text.ends_with(&summary), "{text}");

    let json: Value = serde_json::from_str(&expect(&["analyze", BAD, "-o", "json"], 1)).unwrap();
    assert_eq!(json[0]["code"], "IST0106");
    assert_eq!(json[0]["line"], 18);
    assert_eq!(json[0]["object"], "AuthorizationPolicy shop/deny-visitor");
    assert_eq!(json[0]["severity"], "Error");
}

#[test]
fn thresholds_and_suppressions_decide_what_counts() {
    let errors_off = ["analyze", BAD, "--suppress", "IST0106"];
    let text = expect(&errors_off, 0);
    assert!(
        text.ends_with(&format!("2 warnings found when analyzing {BAD}.\n")),
        "{text}"
    );
    expect(
        &[&errors_off[..], &["--failure-threshold", "warning"]].concat(),
        1,
    );
    let one = [
        "analyze",
        BAD,
        "-S",
        "IST0106=* shop/typo",
        "--output-threshold",
        "error",
    ];
    let text = expect(&one, 1);
    assert!(
        text.ends_with(&format!("1 error found when analyzing {BAD}.\n")),
        "{text}"
    );
    assert!(
        text.contains("deny-visitor") && !text.contains("shop/typo"),
        "{text}"
    );
    expect(&["analyze", BAD, "--namespace", "other"], 0);
    expect(&["analyze", "/does/not/exist"], 1);
}

#[test]
fn this_machine_is_checked() {
    let text = expect(&["check", "--pre"], 0);
    let mut lines = text.lines();
    let header = lines.next().unwrap();
    assert!(
        header.starts_with("FEATURE") && header.contains("NEEDED FOR"),
        "{text}"
    );
    assert!(header.ends_with("STATUS   DETAIL"), "{text}");
    assert!(
        text.contains("has everything that capture needs."),
        "{text}"
    );
    let json: Value = serde_json::from_str(&expect(&["check", "--pre", "-o", "json"], 0)).unwrap();
    let capabilities = json["capabilities"].as_array().unwrap();
    assert!(
        capabilities
            .iter()
            .any(|c| c["feature"] == "sk_lookup" && c["present"] == true)
    );
    assert_eq!(json["problems"], serde_json::json!([]));
}

#[test]
fn what_is_missing_is_told_and_fails() {
    let text = expect(&["check", "--pre", "--cgroup", "/proc"], 1);
    assert!(
        text.contains("missing   /proc is not in a cgroup v2 hierarchy\n"),
        "{text}"
    );
    let sentence =
        "cgroup v2 is missing (/proc is not in a cgroup v2 hierarchy). It is needed for ";
    assert!(text.contains(sentence), "{text}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let commands: [&[&str]; 4] = [
        &["zc", "all", "-f", DUMP, "-o", "json"],
        &["analyze", BAD],
        &["completion", "bash"],
        &["--help"],
    ];
    for args in commands {
        let mut child = Command::new(env!("CARGO_BIN_EXE_adit"))
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        let status = child.wait().unwrap();
        assert_eq!(stderr, "", "{args:?}");
        assert!(matches!(status.code(), Some(0 | 1)), "{args:?}: {status}");
    }
}

#[test]
fn the_gateway_of_a_waypoint_is_printed() {
    let text = expect(&["waypoint", "generate"], 0);
    assert_eq!(
        text,
        "apiVersion: gateway.networking.k8s.io/v1\n\
         kind: Gateway\n\
         metadata:\n  name: waypoint\n\
         spec:\n  gatewayClassName: istio-waypoint\n  listeners:\n  - name: mesh\n    \
         port: 15008\n    protocol: HBONE\n"
    );
    let args = [
        "waypoint", "generate", "--for", "all", "-r", "canary", "-n", "shop",
    ];
    let text = expect(&args, 0);
    for line in [
        "istio.io/waypoint-for: all",
        "istio.io/rev: canary",
        "namespace: shop",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let text = expect(&["waypoint", "generate", "--name", "none"], 2);
    assert!(text.contains("'none' is a reserved value"), "{text}");
    expect(&["waypoint", "generate", "--for", "some"], 2);
}

#[test]
fn tables_of_a_stored_dump_of_a_waypoint() {
    let reviews = "reviews.shop.svc.cluster.local";
    let table: [(&str, String); 4] = [
        (
            "cluster",
            format!(
                "SERVICE FQDN                        PORT   SUBSET    DIRECTION     TYPE   \
                 DESTINATION RULE\n\
                 reviews-v1.shop.svc.cluster.local   80     http      inbound-vip   EDS\n\
                 {reviews}      80     http      inbound-vip   EDS    reviews.shop\n\
                 {reviews}      80     http/v1   inbound-vip   EDS    reviews.shop\n\
                 {reviews}      9090   tcp       inbound-vip   EDS    reviews.shop\n\
                 {reviews}      9090   tcp/v1    inbound-vip   EDS    reviews.shop\n"
            ),
        ),
        (
            "endpoint",
            format!(
                "NAME              STATUS    LOCALITY   CLUSTER\n\
                 10.244.1.6:8080   HEALTHY              \
                 inbound-vip|80|http|reviews-v1.shop.svc.cluster.local\n\
                 10.244.1.6:8080   HEALTHY   local/a    inbound-vip|80|http|{reviews}\n\
                 10.244.2.5:8080   EJECTED   local/b    inbound-vip|80|http|{reviews}\n"
            ),
        ),
        (
            "policy",
            format!(
                "NAMESPACE   POLICY NAME   ACTION   TARGETS                                  \
                 RULES   STATUS\n\
                 shop        readers       ALLOW    Service {reviews}   1       Accepted\n"
            ),
        ),
        (
            "secret",
            "RESOURCE NAME                                TYPE   STATUS      VALID CERT   \
             SERIAL NUMBER   NOT AFTER              NOT BEFORE\n\
             spiffe://cluster.local/ns/shop/sa/waypoint   Leaf   Available   false        \
             ff              2020-01-02T00:00:00Z   2020-01-01T00:00:00Z\n"
                .into(),
        ),
    ];
    for (command, expected) in table {
        let text = expect(&["proxy-config", command, "-f", WAYPOINT_DUMP], 0);
        assert_eq!(text, expected, "{command}");
    }
    let routes = expect(&["pc", "route", "-f", WAYPOINT_DUMP, "--port", "80"], 0);
    let name = format!("inbound-vip|80|http|{reviews}");
    assert!(
        routes.contains(&format!("{name}   HTTPRoute/shop/reviews   *         "))
            && routes.contains("GET /api* end-user=jason -> reviews-v2:80")
            && routes.contains("/* -> reviews-v1:80 (90), 500 (10)"),
        "{routes}"
    );
    let listeners = expect(&["pc", "listener", "-f", WAYPOINT_DUMP], 0);
    assert!(
        listeners.contains("ip {10.96.1.3} -> port 80     Route: HTTPRoute/shop/reviews\n")
            && listeners.contains(&format!("Cluster: inbound-vip|9090|tcp|{reviews}\n"))
            && !listeners.contains("reviews-v1"),
        "{listeners}"
    );
    let all: Value = serde_json::from_str(&expect(
        &["pc", "all", "-f", WAYPOINT_DUMP, "-o", "json"],
        0,
    ))
    .unwrap();
    assert_eq!(all["version"]["component"], "adit-waypoint");
    expect(&["pc", "all", "-f", DUMP], 1);
}

#[test]
fn completion_scripts_know_the_subcommands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = expect(&["completion", shell], 0);
        for word in ["ztunnel-config", "analyze", "failure-threshold"] {
            assert!(script.contains(word), "{shell} {word}");
        }
    }
    expect(&["completion", "cmd"], 2);
}
