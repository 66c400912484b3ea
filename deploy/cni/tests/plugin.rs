//! The plugin as a runtime runs it: the real binary, configuration on standard input, and an
//! agent of this test behind the socket.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_cni::protocol::{Added, Sandbox};
use adit_shared::net::handoff::{Answer, Call, HandoffListener};
use http::StatusCode;
use nix::sys::stat::fstat;
use parking_lot::Mutex;
use serde_json::{Value, json};

/// What the agent was asked: target, body, and the inode of what came along.
type Asked = Arc<Mutex<Vec<(String, Value, Option<u64>)>>>;

struct Lab {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    asked: Asked,
}

impl Lab {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .expect("a runtime"),
            asked: Asked::default(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("cni.sock")
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("cni.log")
    }

    /// An agent that answers everything with this.
    fn agent(&self, status: StatusCode, body: &'static str) {
        let asked = self.asked.clone();
        let _inside = self.runtime.enter();
        let listener = HandoffListener::bind(&self.socket()).expect("bound");
        self.runtime.spawn(listener.serve(move |call: Call| {
            let body_of_call = serde_json::from_slice(&call.body).unwrap_or_default();
            let inode = call.descriptor.map(|fd| fstat(fd).expect("a file").st_ino);
            asked.lock().push((call.path, body_of_call, inode));
            async move { Answer::new(status, body) }
        }));
    }

    fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "name": "net",
            "type": "adit-cni",
            "agentSocket": self.socket(),
            "excludeNamespaces": ["kube-system"],
            "unheldNamespaces": ["istio-system"],
            "logFile": self.log(),
            "prevResult": result(version),
        })
    }

    fn call(&self, verb: &str, namespace: &str, conf: &Value) -> Output {
        self.call_for("eth0", verb, namespace, conf)
    }

    fn call_for(&self, interface: &str, verb: &str, namespace: &str, conf: &Value) -> Output {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web-1;K8S_POD_UID=u1"
        );
        let mut child = Command::new(env!("CARGO_BIN_EXE_adit-cni"))
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "s1")
            .env("CNI_NETNS", "/proc/self/ns/net")
            .env("CNI_IFNAME", interface)
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut input = child.stdin.take().expect("piped");
        input
            .write_all(conf.to_string().as_bytes())
            .expect("written");
        drop(input);
        child.wait_with_output().expect("it ends")
    }
}

fn result(version: &str) -> Value {
    let mut ips = json!([
        {"address": "10.244.1.5/24", "gateway": "10.244.1.1", "interface": 1},
        {"address": "fd00::5/64", "interface": 1},
        {"address": "10.244.1.1/24", "interface": 0},
    ]);
    if !version.starts_with('1') {
        for ip in ips.as_array_mut().expect("a list") {
            let v6 = ip["address"]
                .as_str()
                .is_some_and(|text| text.contains(':'));
            ip["version"] = json!(if v6 { "6" } else { "4" });
        }
    }
    json!({
        "cniVersion": version,
        "interfaces": [
            {"name": "cni0", "mac": "00:00:00:00:00:01"},
            {"name": "eth0", "mac": "00:00:00:00:00:02", "sandbox": "/var/run/netns/x"},
        ],
        "ips": ips,
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
        "somethingOfTheFuture": [1, 2, 3],
    })
}

fn output(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

const ENROLLED: &str = r#"{"enrolled": true}"#;
const LEFT: &str = r#"{"enrolled": false, "reason": "no label"}"#;

#[test]
fn a_sandbox_is_told_of_and_the_result_goes_through() {
    let lab = Lab::new();
    lab.agent(StatusCode::OK, ENROLLED);
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let done = lab.call("ADD", "shop", &lab.conf(version));
        assert!(done.status.success(), "{done:?}");
        assert_eq!(output(&done), result(version));
    }
    let asked = lab.asked.lock();
    assert_eq!(asked.len(), 5);
    let (target, body, inode) = &asked[0];
    let sandbox: Sandbox = serde_json::from_value(body.clone()).expect("understood");
    let expected = Sandbox {
        id: "s1".into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        uid: Some("u1".into()),
        addresses: vec![
            [10, 244, 1, 5].into(),
            "fd00::5".parse().expect("an address"),
        ],
    };
    assert_eq!((target.as_str(), sandbox), ("/add", expected));
    let own = std::fs::File::open("/proc/self/ns/net").expect("there");
    assert_eq!(*inode, Some(fstat(own).expect("a file").st_ino));
    let log = std::fs::read_to_string(lab.log()).expect("a log");
    assert!(log.contains("shop/web-1"), "{log}");
}

#[test]
fn a_pod_that_stays_outside_starts() {
    let lab = Lab::new();
    lab.agent(StatusCode::OK, LEFT);
    let done = lab.call("ADD", "shop", &lab.conf("1.0.0"));
    assert_eq!(output(&done), result("1.0.0"));
    let log = std::fs::read_to_string(lab.log()).expect("a log");
    assert!(log.contains("left alone: no label"), "{log}");
    let added: Added = serde_json::from_str(LEFT).expect("understood");
    assert!(!added.enrolled);
}

#[test]
fn a_pod_that_cannot_be_captured_does_not_start_and_says_why() {
    let lab = Lab::new();
    lab.agent(StatusCode::SERVICE_UNAVAILABLE, "ztunnel does not run");
    let done = lab.call("ADD", "shop", &lab.conf("1.1.0"));
    assert!(!done.status.success());
    let error = output(&done);
    assert_eq!(error["cniVersion"], "1.1.0");
    assert_eq!(error["code"], 11);
    assert_eq!(error["msg"], "adit-cni: ztunnel does not run");
}

#[test]
fn without_an_agent_only_those_who_need_no_mesh_start() {
    let lab = Lab::new();
    for (namespace, starts) in [
        ("shop", false),
        ("kube-system", true),
        ("istio-system", true),
    ] {
        let done = lab.call("ADD", namespace, &lab.conf("1.0.0"));
        assert_eq!(done.status.success(), starts, "{namespace}: {done:?}");
        let output = output(&done);
        if starts {
            assert_eq!(output, result("1.0.0"));
        } else {
            assert_eq!(output["code"], 11);
            let message = output["msg"].as_str().expect("a sentence");
            assert!(message.contains("istio-cni-node"), "{message}");
        }
    }
    assert!(lab.asked.lock().is_empty());
}

#[test]
fn deleting_never_fails() {
    let lab = Lab::new();
    let mut conf = lab.conf("1.0.0");
    assert!(lab.call("DEL", "shop", &conf).status.success(), "no agent");
    lab.agent(StatusCode::INTERNAL_SERVER_ERROR, "no");
    if let Some(conf) = conf.as_object_mut() {
        conf.remove("prevResult");
    }
    let done = lab.call("DEL", "shop", &conf);
    assert!(done.status.success() && done.stdout.is_empty(), "{done:?}");
    assert_eq!(lab.asked.lock()[0].0, "/del");
    assert_eq!(lab.asked.lock()[0].1["id"], "s1");
}

#[test]
fn a_check_is_the_agents_to_answer() {
    let lab = Lab::new();
    lab.agent(StatusCode::CONFLICT, "not captured");
    let done = lab.call("CHECK", "shop", &lab.conf("1.0.0"));
    assert!(!done.status.success());
    assert_eq!(output(&done)["code"], 100);
    assert!(
        lab.call("CHECK", "kube-system", &lab.conf("1.0.0"))
            .status
            .success()
    );
}

#[test]
fn the_other_verbs() {
    let lab = Lab::new();
    let version = lab.call("VERSION", "shop", &json!({"cniVersion": "1.0.0"}));
    let version = output(&version);
    assert_eq!(version["cniVersion"], "1.0.0");
    let known = version["supportedVersions"].as_array().expect("a list");
    assert!(known.contains(&json!("1.1.0")) && known.contains(&json!("0.3.1")));

    // An agent that is down does not take the node out of service.
    let status = lab.call("STATUS", "shop", &lab.conf("1.1.0"));
    assert!(status.status.success(), "{status:?}");

    lab.agent(StatusCode::OK, "");
    let mut conf = lab.conf("1.1.0");
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "s1", "ifname": "eth0"}]);
    assert!(lab.call("GC", "shop", &conf).status.success());
    assert_eq!(lab.asked.lock()[0].0, "/gc");
    assert_eq!(lab.asked.lock()[0].1, json!(["s1"]));
}

#[test]
fn what_is_wrong_with_a_call_has_the_specifications_code() {
    let lab = Lab::new();
    let code = |done: &Output| output(done)["code"].clone();
    let mut without = lab.conf("1.0.0");
    if let Some(conf) = without.as_object_mut() {
        conf.remove("prevResult");
    }
    assert_eq!(code(&lab.call("ADD", "shop", &without)), 7);
    assert_eq!(code(&lab.call("ADD", "shop", &lab.conf("0.2.0"))), 1);
    assert_eq!(code(&lab.call("ADD", "shop", &json!("text"))), 6);
    assert_eq!(code(&lab.call("DANCE", "shop", &lab.conf("1.0.0"))), 4);
    let mut broken = lab.conf("1.0.0");
    broken["prevResult"]["ips"] = json!([{"address": "here"}]);
    assert_eq!(code(&lab.call("ADD", "shop", &broken)), 6);
}

/// Each sandbox of the node waits for it.
#[test]
fn it_takes_milliseconds() {
    let lab = Lab::new();
    let conf = lab.conf("1.0.0");
    let fastest = (0..10).map(|_| {
        let started = Instant::now();
        assert!(lab.call("ADD", "kube-system", &conf).status.success());
        started.elapsed()
    });
    let fastest = fastest.min().expect("ten");
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

#[test]
fn a_log_that_cannot_be_written_fails_nothing() {
    let lab = Lab::new();
    let mut conf = lab.conf("1.0.0");
    conf["logFile"] = json!(Path::new("/nowhere/at/all"));
    assert!(lab.call("ADD", "kube-system", &conf).status.success());
}

/// Another network of the pod (Multus): neither its addresses nor its end are the pod's.
#[test]
fn further_interfaces_of_a_pod_are_nobodys_affair() {
    let lab = Lab::new();
    lab.agent(StatusCode::OK, r#"{"enrolled": true}"#);
    let conf = lab.conf("1.0.0");
    for verb in ["ADD", "CHECK", "DEL"] {
        let output = lab.call_for("net1", verb, "shop", &conf);
        assert!(output.status.success(), "{verb}: {output:?}");
        if verb == "ADD" {
            let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(printed, result("1.0.0"));
        }
    }
    assert!(lab.asked.lock().is_empty(), "{:?}", lab.asked.lock());
    assert!(lab.call("ADD", "shop", &conf).status.success());
    assert_eq!(lab.asked.lock().len(), 1);
}
