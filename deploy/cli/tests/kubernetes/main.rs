//! `adit` against a Kubernetes API server: a small one of our own, and a real one where the
//! environment names it.

#![allow(clippy::unwrap_used)]

mod fake;
mod real;

use std::path::Path;
use std::process::{Command, Stdio};

use http::Method;
use serde_json::{Value, json};

use self::fake::Fake;

const DUMP: &str = include_str!("../testdata/dump.json");
const WAYPOINT_DUMP: &str = include_str!("../testdata/waypoint.json");
const BAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/bad");

/// What a command leaves behind.
struct Ended {
    status: i32,
    stdout: String,
    stderr: String,
}

fn adit(kubeconfig: &Path, args: &[&str]) -> Ended {
    let output = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(args)
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .env_remove("KUBECONFIG")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Ended {
        status: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[track_caller]
fn expect(fake: &Fake, args: &[&str], status: i32) -> Ended {
    let config = fake.kubeconfig();
    let ended = adit(config.path(), args);
    assert_eq!(
        ended.status, status,
        "{args:?}\n{}{}",
        ended.stdout, ended.stderr
    );
    ended
}

/// The error, which has to be one line.
#[track_caller]
fn error(fake: &Fake, args: &[&str]) -> String {
    let ended = expect(fake, args, 1);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    let [line] = lines.as_slice() else {
        panic!("{}", ended.stderr);
    };
    line.strip_prefix("Error: ").unwrap().to_owned()
}

fn pod(namespace: &str, name: &str, node: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn ztunnel(name: &str, node: &str) -> Value {
    pod("istio-system", name, node, json!({"app": "ztunnel"}))
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn class() -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": {"name": "istio-waypoint"}})
}

fn waypoint(namespace: &str, name: &str, programmed: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"gatewayClassName": "istio-waypoint"},
        "status": {"conditions": [{"type": "Programmed", "status": programmed,
            "reason": "Pending", "message": "no pod is ready"}]}})
}

/// Two nodes with a ztunnel each, which know the same.
fn mesh() -> Fake {
    let fake = Fake::start();
    for (name, node) in [("ztunnel-aaaaa", "node1"), ("ztunnel-bbbbb", "node2")] {
        fake.put(ztunnel(name, node));
        let pod = format!("istio-system/{name}");
        fake.answer(&pod, 15000, "GET /config_dump", DUMP);
        let metrics = "istio_build{component=\"ztunnel\",tag=\"0.1.0\"} 1\n";
        fake.answer(&pod, 15020, "GET /metrics", metrics);
    }
    fake.put(class());
    fake.put(pod("shop", "web-a", "node1", json!({"app": "web"})));
    fake.put(pod("shop", "client", "node1", json!({})));
    fake
}

#[test]
fn ztunnels_are_asked_through_the_api_server() {
    let fake = mesh();
    let offline = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(["zc", "workloads", "-f"])
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/testdata/dump.json"
        ))
        .output()
        .unwrap();
    let offline = String::from_utf8(offline.stdout).unwrap();
    assert_eq!(expect(&fake, &["zc", "workloads"], 0).stdout, offline);
    let one = ["zc", "workloads", "--node", "node2"];
    assert_eq!(expect(&fake, &one, 0).stdout, offline);
    let one = ["zc", "workloads", "pod/ztunnel-bbbbb.istio-system"];
    assert_eq!(expect(&fake, &one, 0).stdout, offline);
    // A pod leads to its node's ztunnel, and only what concerns it is shown.
    for target in ["web-a.shop", "pod/web-a", "web-a"] {
        let own = expect(&fake, &["zc", "workloads", target], 0).stdout;
        assert_eq!(own.lines().count(), 2, "{own}");
        assert!(own.contains("web-a"), "{own}");
    }
    let asked = fake.log();
    let of_b = asked
        .iter()
        .filter(|line| line.contains("ztunnel-bbbbb/portforward"));
    assert_eq!(of_b.count(), 3, "{asked:?}");
}

#[test]
fn a_workload_stands_for_its_pods() {
    let fake = mesh();
    fake.put(json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}}}));
    let own = expect(&fake, &["zc", "w", "deploy/web", "-n", "shop"], 0).stdout;
    assert!(own.contains("web-a") && own.lines().count() == 2, "{own}");
    let none = error(&fake, &["zc", "w", "deploy/nobody"]);
    assert_eq!(none, "context \"fake\" has no deploy shop/nobody");
}

#[test]
fn what_is_wrong_with_a_ztunnel_is_one_sentence() {
    let fake = Fake::start();
    assert_eq!(
        error(&fake, &["zc", "workloads"]),
        "context \"fake\" has no ztunnel in namespace istio-system: `adit install` makes one"
    );
    let mut crashing = ztunnel("ztunnel-aaaaa", "node1");
    crashing["status"] = json!({"phase": "Running", "containerStatuses": [{"name": "istio-proxy",
        "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
    fake.put(crashing);
    fake.nobody_listens("istio-system/ztunnel-aaaaa", 15000);
    assert_eq!(
        error(&fake, &["zc", "workloads"]),
        "ztunnel-aaaaa of node node1 does not run: container istio-proxy: CrashLoopBackOff"
    );
    fake.put(ztunnel("ztunnel-aaaaa", "node1"));
    let refused = error(&fake, &["zc", "workloads"]);
    assert!(
        refused
            == "ztunnel-aaaaa does not answer: nobody listens on port 15000 of pod \
                istio-system/ztunnel-aaaaa",
        "{refused}"
    );
    assert_eq!(
        error(&fake, &["zc", "w", "--node", "node9"]),
        "no ztunnel runs on node node9 of context \"fake\": it is not in the mesh"
    );
    assert_eq!(
        error(&fake, &["zc", "w", "nobody.shop"]),
        "context \"fake\" has no pod shop/nobody"
    );
}

#[test]
fn a_connection_that_ends_without_a_word_is_made_once_more() {
    let fake = mesh();
    fake.closes_once("istio-system/ztunnel-aaaaa", 15000);
    let node = ["zc", "workloads", "--node", "node1"];
    assert!(expect(&fake, &node, 0).stdout.contains("web-a"));
    // What changes something is not: it may have been heard.
    fake.answer(
        "istio-system/ztunnel-aaaaa",
        15000,
        "POST /logging?level=debug",
        "",
    );
    fake.closes_once("istio-system/ztunnel-aaaaa", 15000);
    let told = error(&fake, &["zc", "log", "--node", "node1", "--level", "debug"]);
    assert!(
        told.starts_with("ztunnel-aaaaa does not answer: port 15000 of pod"),
        "{told}"
    );
}

#[test]
fn one_ztunnel_that_is_silent_does_not_hide_the_others() {
    let fake = mesh();
    fake.nobody_listens("istio-system/ztunnel-bbbbb", 15000);
    let ended = expect(&fake, &["zc", "workloads"], 1);
    assert!(ended.stdout.contains("web-a"), "{}", ended.stdout);
    assert!(
        ended
            .stderr
            .starts_with("Error: ztunnel-bbbbb does not answer"),
        "{}",
        ended.stderr
    );
}

#[test]
fn rights_that_are_missing_are_named() {
    let fake = mesh();
    fake.forbid(Method::GET, "/portforward");
    let told = error(&fake, &["zc", "w", "--node", "node1"]);
    assert_eq!(
        told,
        "ztunnel-aaaaa does not answer: cannot forward port 15000 of pod \
         istio-system/ztunnel-aaaaa: User \"u\" cannot GET \
         /api/v1/namespaces/istio-system/pods/ztunnel-aaaaa/portforward"
    );
    fake.forbid(Method::GET, "/istio-system/pods");
    let told = error(&fake, &["zc", "w"]);
    assert!(
        told.starts_with("cannot list pods in namespace istio-system: User \"u\" cannot GET "),
        "{told}"
    );
}

#[test]
fn a_context_is_chosen_as_kubectl_does() {
    let fake = mesh();
    let told = error(&fake, &["zc", "w", "--context", "nowhere"]);
    assert!(
        told.ends_with("has no context \"nowhere\"; it has fake, away"),
        "{told}"
    );
    let told = error(&fake, &["zc", "w", "--context", "away"]);
    assert_eq!(
        told,
        "the API server http://127.0.0.1:1 of context \"away\" does not answer: Connection \
         refused (os error 111)"
    );
    let missing = adit(Path::new("/does/not/exist"), &["zc", "w"]);
    assert_eq!(
        missing.stderr,
        "Error: there is no kubeconfig /does/not/exist (--kubeconfig): name one with \
         --kubeconfig\n"
    );
    let both = expect(&fake, &["waypoint", "list", "--mesh", "local"], 2);
    assert!(both.stderr.contains("give one of them"), "{}", both.stderr);
    // Without a flag it is the one of the environment.
    let config = fake.kubeconfig();
    let output = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(["zc", "w", "--node", "node1"])
        .env("KUBECONFIG", config.path())
        .env("HOME", "/nonexistent")
        .output()
        .unwrap();
    assert!(output.status.success());
}

#[test]
fn a_waypoint_is_applied_and_the_namespace_labelled() {
    let fake = mesh();
    fake.put(namespace(
        "shop",
        json!({"istio.io/dataplane-mode": "ambient"}),
    ));
    let apply = ["waypoint", "apply", "--enroll-namespace", "--for", "all"];
    let ended = expect(&fake, &apply, 0);
    assert_eq!(
        ended.stdout,
        "✅ waypoint shop/waypoint applied\n\
         ✅ namespace shop labeled with \"istio.io/use-waypoint: waypoint\"\n"
    );
    assert_eq!(ended.stderr, "");
    let patches = fake.patches();
    let (query, kind, patch) = &patches[0];
    assert_eq!(kind, "application/apply-patch+yaml");
    assert!(query.contains("fieldManager=adit-cli"), "{query}");
    assert_eq!(patch["metadata"]["labels"]["istio.io/waypoint-for"], "all");
    let (_, kind, patch) = &patches[1];
    assert_eq!(kind, "application/merge-patch+json");
    assert_eq!(
        patch["metadata"]["labels"]["istio.io/use-waypoint"],
        "waypoint"
    );
    assert!(patch["metadata"]["resourceVersion"].is_string());

    // Another one: the namespace has one already.
    let other = ["waypoint", "apply", "--enroll-namespace", "--name", "other"];
    let ended = expect(&fake, &other, 1);
    assert!(ended.stderr.contains("already has an enrolled Waypoint"));
    let ended = expect(&fake, &[&other[..], &["--overwrite"]].concat(), 0);
    assert!(ended.stdout.contains("istio.io/use-waypoint: other"));
}

#[test]
fn what_keeps_a_waypoint_from_being_applied_is_told() {
    let fake = Fake::start();
    assert_eq!(
        error(&fake, &["waypoint", "apply"]),
        "there is no namespace shop"
    );
    fake.put(namespace("shop", json!({})));
    fake.put(namespace(
        "bank",
        json!({"istio.io/dataplane-mode": "ambient"}),
    ));
    let ended = expect(&fake, &["waypoint", "apply"], 0);
    assert!(
        ended.stderr.contains("has no GatewayClass istio-waypoint")
            && ended.stderr.contains("`adit install`"),
        "{}",
        ended.stderr
    );
    fake.put(class());
    assert!(
        ended
            .stderr
            .contains("kubectl label namespace shop istio.io/dataplane-mode=ambient"),
        "{}",
        ended.stderr
    );
    let wait = [
        "waypoint",
        "apply",
        "-n",
        "bank",
        "--wait",
        "--waypoint-timeout",
        "1ms",
    ];
    let told = error(&fake, &wait);
    assert!(
        told.starts_with("timed out while waiting for waypoint bank/waypoint to be ready"),
        "{told}"
    );
    fake.without_gateway_api();
    let told = error(&fake, &["waypoint", "apply", "-n", "bank"]);
    assert!(
        told.starts_with("context \"fake\" has no Gateway API"),
        "{told}"
    );
}

#[test]
fn waypoints_are_listed_page_by_page_and_deleted() {
    let fake = Fake::start();
    for name in ["a", "b", "c", "d", "e"] {
        fake.put(waypoint("shop", name, "True"));
    }
    fake.put(waypoint("bank", "a", "False"));
    let mut ingress = waypoint("shop", "ingress", "True");
    ingress["spec"]["gatewayClassName"] = "nginx".into();
    fake.put(ingress);
    assert_eq!(
        expect(&fake, &["waypoint", "list", "-n", "bank"], 0).stdout,
        "NAME   REVISION   TRAFFIC TYPE   PROGRAMMED\na      default    service        False\n"
    );
    let all = expect(&fake, &["waypoint", "list", "-A"], 0).stdout;
    assert_eq!(all.lines().count(), 7, "{all}");
    let status = expect(&fake, &["waypoint", "status", "-A", "--wait=false"], 1);
    assert!(
        status
            .stderr
            .contains("waypoint bank/a is not ready: Pending")
    );

    let told = expect(&fake, &["waypoint", "delete", "ingress", "e"], 1);
    assert!(told.stderr.contains("gateway shop/ingress is no waypoint"));
    assert_eq!(told.stdout, "waypoint shop/e deleted\n");
    let told = expect(&fake, &["waypoint", "delete", "--all"], 0).stdout;
    assert_eq!(told.lines().count(), 4, "{told}");
    let path = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/ingress";
    assert!(fake.get(path).is_some());
}

#[test]
fn flags_may_stand_before_the_subcommand() {
    let fake = Fake::start();
    fake.put(waypoint("bank", "a", "True"));
    let config = fake.kubeconfig();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_adit"))
            .arg("--kubeconfig")
            .arg(config.path())
            .args(args)
            .env("HOME", "/nonexistent")
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
    };
    let told = run(&["-n", "bank", "waypoint", "list"]);
    assert!(told.contains("a      default"), "{told}");
    let told = run(&["waypoint", "-n", "bank", "list"]);
    assert!(told.contains("a      default"), "{told}");
    let told = run(&["--context", "away", "zc", "workloads"]);
    assert!(
        told.contains("of context \"away\" does not answer"),
        "{told}"
    );
}

#[test]
fn requests_of_all_waypoints_are_watched() {
    let fake = Fake::start();
    let labels = json!({"gateway.istio.io/managed": "istio.io-mesh-controller",
        "gateway.networking.k8s.io/gateway-name": "waypoint"});
    for name in ["waypoint-x", "waypoint-y", "waypoint-z"] {
        fake.put(pod("shop", name, "node1", labels.clone()));
        let pod = format!("shop/{name}");
        if name == "waypoint-z" {
            fake.nobody_listens(&pod, 15000);
            continue;
        }
        fake.answer(&pod, 15000, "GET /debug/tap", r#"{"next": 5}"#);
        let event = json!({"time": "T10:00:00Z", "method": "GET", "authority": "web.shop",
            "path": format!("/{name}"), "status": 200, "durationMs": 1.0});
        let news = json!({"next": 6, "events": [event]}).to_string();
        fake.answer(&pod, 15000, "GET /debug/tap?since=5", &news);
    }
    let ended = expect(&fake, &["tap", "--limit", "2"], 0);
    assert_eq!(
        ended.stdout,
        "10:00:00Z - -> - GET web.shop/waypoint-x 200 1.0ms\n\
         10:00:00Z - -> - GET web.shop/waypoint-y 200 1.0ms\n"
    );
    // What is silent is told once, however often it is asked.
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    let asked = fake.log();
    let of_x = asked
        .iter()
        .filter(|line| line.contains("waypoint-x/portforward"));
    assert_eq!(of_x.count(), 1, "one connection is enough: {asked:?}");
}

#[test]
fn the_next_request_is_followed_at_whichever_replica_it_comes_to() {
    let fake = mesh();
    let labels = json!({"gateway.istio.io/managed": "istio.io-mesh-controller",
        "gateway.networking.k8s.io/gateway-name": "waypoint"});
    for name in ["waypoint-x", "waypoint-y"] {
        fake.put(pod("shop", name, "node1", labels.clone()));
        fake.answer(&format!("shop/{name}"), 15000, "GET /", "");
    }
    // Another namespace's waypoint of the same name is none of its replicas.
    fake.put(pod("bank", "waypoint-z", "node1", labels));
    let why = [
        "why",
        "client.shop",
        "web.shop",
        "GET",
        "/a",
        "--live",
        "--wait",
        "30500ms",
    ];
    let question = "POST /debug/trace?timeout=30\
        &source=spiffe%3A%2F%2Fcluster.local%2Fns%2Fshop%2Fsa%2Fclient&method=GET&path=%2Fa";
    let told = error(&fake, &why);
    assert!(told.contains("waypoint-") && told.contains("404"), "{told}");

    let trace = json!({"ended": true, "steps": [
        {"atMicros": 20, "stage": "received", "path": "/a"},
        {"atMicros": 50, "stage": "destination", "port": 80,
            "service": "shop/web.shop.svc.cluster.local"},
        {"atMicros": 1200, "stage": "end", "status": 200, "details": "via_upstream"}]});
    fake.answer("shop/waypoint-y", 15000, question, &trace.to_string());
    let told = expect(&fake, &why, 0).stdout;
    for line in [
        "1. waypoint waypoint-y.shop\n",
        "   +0.0 ms received: path=/a\n",
        "   +1.2 ms end: details=via_upstream status=200\n",
        "=> 200 from the destination\n",
    ] {
        assert!(told.contains(line), "{told}");
    }
    let asked = fake.log();
    assert!(
        !asked.iter().any(|line| line.contains("waypoint-z")),
        "{asked:?}"
    );
    // Where no waypoint is, there is nothing to follow.
    let told = error(&fake, &["why", "client.shop", "web-b.shop:8080", "--live"]);
    assert!(
        told.starts_with("no waypoint stands before web-b.shop"),
        "{told}"
    );
}

#[test]
fn waypoints_are_asked_by_gateway_or_pod() {
    let fake = Fake::start();
    let labels = json!({"gateway.istio.io/managed": "istio.io-mesh-controller",
        "gateway.networking.k8s.io/gateway-name": "waypoint"});
    for name in ["waypoint-x", "waypoint-y"] {
        fake.put(pod("shop", name, "node1", labels.clone()));
        let pod = format!("shop/{name}");
        fake.answer(&pod, 15000, "GET /config_dump", WAYPOINT_DUMP);
    }
    let mut pending = pod("shop", "waypoint-a", "", labels);
    pending["status"] = json!({"phase": "Pending"});
    fake.put(pending);
    for target in [
        "waypoint",
        "waypoint.shop",
        "waypoint-y.shop",
        "pod/waypoint-y",
    ] {
        let told = expect(&fake, &["pc", "cluster", target], 0).stdout;
        assert!(told.contains("reviews.shop.svc.cluster.local"), "{told}");
    }
    let open = json!({"workers": [{"tunnels": [{"src": "10.244.1.2:4000", "streams": 1,
        "identity": "spiffe://cluster.local/ns/shop/sa/client", "age": 2.0}]}]});
    let open = open.to_string();
    fake.answer("shop/waypoint-y", 15000, "GET /connections", &open);
    let told = expect(&fake, &["pc", "connections", "waypoint-y.shop"], 0).stdout;
    assert!(told.contains("Tunnel in   10.244.1.2:4000"), "{told}");
    assert_eq!(
        error(&fake, &["pc", "cluster", "waypoint-a"]),
        "pod shop/waypoint-a of waypoint waypoint-a.shop does not run: Pending"
    );
    let told = error(&fake, &["pc", "cluster", "nobody"]);
    assert!(
        told.ends_with("no waypoint nobody; it has waypoint.shop"),
        "{told}"
    );
}

#[test]
fn versions_of_everything_that_runs() {
    let fake = mesh();
    fake.put(pod(
        "istio-system",
        "istiod-x",
        "node1",
        json!({"app": "istiod"}),
    ));
    let metrics = "istio_build{component=\"pilot\",tag=\"0.1.1\"} 1\n";
    fake.answer("istio-system/istiod-x", 15014, "GET /metrics", metrics);
    let told = expect(&fake, &["version"], 0).stdout;
    assert_eq!(
        told,
        format!(
            "client version: {}\ncontrol plane version: 0.1.1\n\
             data plane version: 0.1.0 (2 proxies)\n",
            env!("CARGO_PKG_VERSION")
        )
    );
    let empty = Fake::start();
    let ended = expect(&empty, &["version"], 0);
    assert!(
        ended
            .stderr
            .contains("Adit is not in namespace istio-system")
    );
}

#[test]
fn proxies_of_every_replica_are_shown_with_it() {
    let fake = Fake::start();
    for (name, proxy) in [("istiod-x", "ztunnel-aaaaa"), ("istiod-y", "ztunnel-bbbbb")] {
        fake.put(pod("istio-system", name, "node1", json!({"app": "istiod"})));
        let answer = json!([{"proxy": format!("{proxy}.istio-system"), "id": "ztunnel~1",
            "types": [{"type_url": "x/istio.workload.Address", "status": "SYNCED"}]}]);
        let pod = format!("istio-system/{name}");
        fake.answer(&pod, 15014, "GET /debug/syncz", &answer.to_string());
    }
    let told = expect(&fake, &["proxy-status"], 0).stdout;
    for (row, (proxy, replica)) in told
        .lines()
        .skip(1)
        .zip([("ztunnel-aaaaa", "istiod-x"), ("ztunnel-bbbbb", "istiod-y")])
    {
        assert!(row.contains(proxy) && row.contains(replica), "{told}");
    }
    fake.nobody_listens("istio-system/istiod-y", 15014);
    let ended = expect(&fake, &["ps"], 1);
    assert!(ended.stderr.starts_with("Error: istiod-y does not answer"));
    assert!(ended.stdout.contains("ztunnel-aaaaa"));
}

#[test]
fn the_cluster_is_analyzed_with_files_over_it() {
    let fake = Fake::start();
    fake.put(namespace("shop", json!({})));
    fake.put(namespace("bank", json!({})));
    let policy = |namespace: &str, port: &str| {
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": namespace},
            "spec": {"rules": [{"to": [{"operation": {"ports": [port]}}]}]}})
    };
    fake.put(policy("shop", "80"));
    fake.put(policy("bank", "http"));
    // The context's namespace, another one, and all.
    let told = expect(&fake, &["analyze"], 0).stdout;
    assert_eq!(
        told,
        "No validation issues found when analyzing namespace shop of context \"fake\".\n"
    );
    for scope in [&["-n", "bank"][..], &["-A"]] {
        let told = expect(&fake, &[&["analyze"], scope].concat(), 1).stdout;
        assert!(
            told.contains("Error [IST0106] (AuthorizationPolicy bank/p) spec.rules[0].to[0]"),
            "{told}"
        );
    }
    // A file mends it, or would break it.
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, object: Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, object.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let good = write("good.json", policy("bank", "80"));
    let told = expect(&fake, &["analyze", "-A", &good], 0).stdout;
    assert!(told.starts_with("No validation issues"), "{told}");
    let bad = write("bad.json", policy("shop", "http"));
    let told = expect(&fake, &["analyze", &bad], 1).stdout;
    assert!(
        told.contains(&format!("(AuthorizationPolicy shop/p {bad}:1)")),
        "{told}"
    );
    let asked = fake.log().len();
    expect(&fake, &["analyze", "--use-kube=false", &bad], 1);
    assert_eq!(fake.log().len(), asked);
    expect(&fake, &["analyze", "--use-kube=false"], 2);
    // What is wrong in files is told whatever the namespace is.
    let told = expect(&fake, &["analyze", BAD], 1).stdout;
    assert!(told.contains("policies.yaml:18"), "{told}");
}

#[test]
fn a_cluster_is_checked() {
    let fake = mesh();
    let node = |name: &str, kernel: &str| {
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "status": {"nodeInfo": {"kernelVersion": kernel, "operatingSystem": "linux"}}})
    };
    fake.put(node("node1", "6.1.0"));
    let told = expect(&fake, &["check", "--pre"], 0).stdout;
    assert!(
        told.contains("Adit can be installed in context \"fake\""),
        "{told}"
    );
    fake.forbid(Method::POST, "clusterroles");
    fake.put(node("node2", "5.10.0-8"));
    let told = expect(&fake, &["check", "--pre"], 1).stdout;
    assert!(
        told.contains("You may not create clusterroles in "),
        "{told}"
    );
    assert!(
        told.contains("Node node2 runs Linux 5.10.0-8; capture needs 5.18 or newer."),
        "{told}"
    );

    // Whoever has no label of a manager is not taken for ours.
    for (image, told) in [
        (
            "docker.io/istio/install-cni:1.30.0",
            "DaemonSet istio-system/istio-cni-node belongs to another mesh",
        ),
        (
            "registry.example/adit-cni@sha256:00",
            "DaemonSet istio-system/istio-cni-node was installed not by",
        ),
    ] {
        fake.put(json!({"apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "istio-cni-node", "namespace": "istio-system",
                "labels": {"k8s-app": "istio-cni-node"}},
            "spec": {"template": {"spec": {"containers": [{"image": image}]}}}}));
        let answer = expect(&fake, &["check", "--pre"], 1).stdout;
        assert!(answer.contains(told), "{answer}");
    }

    let set = |kind: &str, name: &str, status: Value| {
        json!({"apiVersion": "apps/v1", "kind": kind, "spec": {"replicas": 1}, "status": status,
            "metadata": {"name": name, "namespace": "istio-system"}})
    };
    fake.put(node("node2", "6.1.0"));
    fake.put(set("Deployment", "istiod", json!({"readyReplicas": 1})));
    for name in ["ztunnel", "istio-cni-node"] {
        let status = json!({"numberReady": 2, "desiredNumberScheduled": 2});
        fake.put(set("DaemonSet", name, status));
    }
    let told = expect(&fake, &["check"], 0).stdout;
    assert!(
        told.contains("The mesh in context \"fake\" is well."),
        "{told}"
    );
    fake.put(waypoint("shop", "waypoint", "False"));
    let told = expect(&fake, &["check", "-o", "json"], 1).stdout;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(
        told["problems"][0]
            .as_str()
            .unwrap()
            .contains("shop/waypoint")
    );
}
