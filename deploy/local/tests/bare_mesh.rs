//! The ground that a mesh stands on, without `aditd` and ztunnel: nodes, pods, names,
//! service addresses, and that nothing is left behind. Needs root.

use std::fs;
use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_local::{DataPlane, Mesh, MeshConfig, MeshStatus, Output, Place, Request, Running};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const SOON: Duration = Duration::from_secs(15);

/// The programs of the pods are this test program itself, called with the name of one
/// of the two ignored tests below: so the test needs nothing that may not be installed.
fn own_program() -> Result<String> {
    Ok(std::env::current_exe()?.display().to_string())
}

/// Answers every connection with the pod's name and the peer's address.
#[test]
#[ignore = "the server program of pods"]
fn program_serve() -> Result {
    let listener = TcpListener::bind("[::]:8080")?;
    let name = std::env::var("POD")?;
    loop {
        let (mut stream, peer) = listener.accept()?;
        let _ = stream.read(&mut [0; 4096]);
        let peer = peer.ip().to_canonical();
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{name} {peer}"
        );
    }
}

/// Prints what the server at `$TARGET` says, or the kind of error.
#[test]
#[ignore = "the client program of pods"]
fn program_fetch() -> Result {
    let target = std::env::var("TARGET")?;
    let fetch = || -> std::io::Result<String> {
        let address = target
            .to_socket_addrs()?
            .next()
            .ok_or(ErrorKind::NotFound)?;
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text.split("\r\n\r\n").nth(1).unwrap_or_default().into())
    };
    match fetch() {
        Ok(text) => println!("\n[{text}]"),
        Err(error) => println!("\n[{:?}]", error.kind()),
    }
    Ok(())
}

/// A test that makes the mesh `$MESH` from `$MANIFESTS` and is killed before it ends.
#[test]
#[ignore = "the program of a test that crashes"]
fn program_crash() -> Result {
    let mut config = MeshConfig::new(std::env::var("MESH")?, std::env::var("MANIFESTS")?);
    config.data_plane = DataPlane::Off;
    config.ephemeral = true;
    let mesh = Mesh::up(config)?;
    mesh.wait_pods_ready(SOON)?;
    println!("\n[up]");
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

struct Ground {
    dir: tempfile::TempDir,
    config: MeshConfig,
}

impl Ground {
    fn new(name: &str, manifest: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("mesh.yaml"), manifest)?;
        let name = format!("{name}-{}", std::process::id());
        let mut config = MeshConfig::new(name, dir.path());
        config.nodes = vec!["n1".into(), "n2".into()];
        config.data_plane = DataPlane::Off;
        config.ephemeral = true;
        config.grace = Duration::from_millis(200);
        let kubelet = Path::new(env!("CARGO_BIN_EXE_adit-kubelet"));
        config
            .binary_dirs
            .extend(kubelet.parent().map(PathBuf::from));
        Ok(Self { dir, config })
    }

    fn up(&self) -> Result<Mesh> {
        let mesh = Mesh::up(self.config.clone())?;
        mesh.wait_pods_ready(SOON)?;
        Ok(mesh)
    }

    fn write(&self, manifest: &str) -> Result {
        Ok(fs::write(self.dir.path().join("mesh.yaml"), manifest)?)
    }
}

fn server(name: &str, node: &str, extra: &str) -> Result<String> {
    let program = own_program()?;
    Ok(format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: \
         {{app: web, {extra}}}\nspec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 0\n  \
         containers:\n  - name: server\n    command: [{program}]\n    args: [--ignored, --exact, \
         program_serve]\n    env: [{{name: POD, valueFrom: {{fieldRef: {{fieldPath: \
         metadata.name}}}}}}]\n    readinessProbe: {{httpGet: {{port: 8080, path: /}}, \
         periodSeconds: 1}}\n"
    ))
}

fn pause(name: &str, node: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {{nodeName: {node}, containers: [{{name: pause}}]}}\n"
    )
}

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
    spec:\n  selector: {app: web}\n  ipFamilyPolicy: RequireDualStack\n  ports: [{name: http, port: \
    80, targetPort: 8080}]\n";

fn run(mesh: &Running, pod: &str, argv: &[&str]) -> Result<Output> {
    Ok(mesh.exec(&Place::pod("shop", pod), argv, SOON)?)
}

fn fetch(mesh: &Running, place: &Place, target: &str) -> Result<String> {
    let mut command = mesh.command(place, &own_program()?)?;
    command
        .args(["--ignored", "--exact", "--nocapture", "program_fetch"])
        .env("TARGET", target);
    let output = String::from_utf8(command.output()?.stdout)?;
    let line = output
        .lines()
        .find_map(|l| l.strip_prefix('[')?.strip_suffix(']'));
    Ok(line.ok_or(output.clone())?.to_owned())
}

fn uid(status: &MeshStatus, name: &str) -> Option<String> {
    status.pod("shop", name).map(|pod| pod.uid.clone())
}

#[test]
fn pods_reach_each_other_across_nodes_and_through_service_addresses() -> Result {
    let servers = server("a", "n1", "x: y")? + &server("b", "n2", "x: y")?;
    let ground = Ground::new("reach", &(servers + &pause("c", "n1") + SERVICE))?;
    let mesh = ground.up()?;
    let status = mesh.status()?;
    let addresses = |pod: &str| status.pod("shop", pod).map(|p| p.addresses.clone());
    for target in ["a", "b"] {
        for source in ["a", "b", "c"] {
            let to = addresses(target).ok_or("no pod")?;
            let from = addresses(source).ok_or("no pod")?;
            for (to, from) in to.iter().zip(from) {
                let ip: std::net::IpAddr = to.parse()?;
                let to = std::net::SocketAddr::new(ip, 8080).to_string();
                let answer = fetch(&mesh, &Place::pod("shop", source), &to)?;
                // A pod that asks itself does so over loopback, from the same address.
                assert_eq!(answer, format!("{target} {from}"), "{source} to {to}");
            }
        }
    }
    let client = Place::pod("shop", "c");
    let from = addresses("c").ok_or("no pod")?;
    assert_eq!(fetch(&mesh, &client, "b:8080")?, format!("b {}", from[0]));
    for name in ["web", "web.shop", "web.shop.svc.cluster.local"] {
        let mut seen = std::collections::BTreeSet::new();
        // 40 times the same of two: once in 5e11.
        for _ in 0..40 {
            let answer = fetch(&mesh, &client, &format!("{name}:80"))?;
            assert!(from.iter().any(|ip| answer.ends_with(ip)), "{answer}");
            seen.insert(answer[..1].to_owned());
            if seen.len() == 2 {
                break;
            }
        }
        assert_eq!(seen.len(), 2, "{name} reaches both endpoints");
    }
    // Some of these reach the pod itself through its service.
    for _ in 0..8 {
        let answer = fetch(&mesh, &Place::pod("shop", "a"), "web:80")?;
        assert!(
            answer.starts_with("a ") || answer.starts_with("b "),
            "{answer}"
        );
    }
    let hosts = run(&mesh, "c", &["cat", "/etc/hosts"])?.stdout;
    let v6 = hosts
        .lines()
        .find(|line| line.starts_with("fd00:10:96::") && line.ends_with(" web"))
        .and_then(|line| line.split(' ').next())
        .ok_or("no IPv6 service address")?;
    for _ in 0..20 {
        // Endpoints on the same node too: no redirect must lead past the translation.
        let answer = fetch(&mesh, &client, &format!("[{v6}]:80"))?;
        assert!(answer.contains("fd00:10:244:1::"), "{answer}");
    }
    // A node's own connections are translated too, and the outside reaches pods.
    for place in [Place::Node("n2".into()), Place::Fabric] {
        let target = match place {
            Place::Fabric => "10.244.1.2:8080",
            _ => "web.shop:80",
        };
        let answer = fetch(&mesh, &place, target)?;
        let from_node = answer.contains(" 172.18.0.") || answer.contains(" fd00:172:18::");
        assert!(from_node, "{place:?}: {answer}");
    }
    mesh.down()?;
    Ok(())
}

#[test]
fn a_service_without_ready_endpoints_refuses_at_once() -> Result {
    let ground = Ground::new("refuse", &(pause("c", "n1") + SERVICE))?;
    let mesh = ground.up()?;
    for place in [Place::pod("shop", "c"), Place::Node("n1".into())] {
        assert_eq!(fetch(&mesh, &place, "web.shop:80")?, "ConnectionRefused");
    }
    mesh.down()?;
    Ok(())
}

#[test]
fn edits_are_followed_and_labels_do_not_restart_pods() -> Result {
    let ground = Ground::new("edit", &(server("a", "n1", "x: y")? + SERVICE))?;
    let mesh = ground.up()?;
    let before = mesh.status()?;
    let cluster = mesh.file("cluster/adit-local-pods.yaml");

    ground.write(&(server("a", "n1", "x: changed")? + &pause("c", "n2") + SERVICE))?;
    let after = mesh.wait_for("the new pod", SOON, |status| {
        status.pod("shop", "c").filter(|pod| pod.ready)?;
        Some(status.clone())
    })?;
    assert!(fs::read_to_string(&cluster)?.contains("x: changed"));
    assert_eq!(uid(&before, "a"), uid(&after, "a"));
    assert_eq!(
        before.pod("shop", "a").map(|p| p.containers.clone()),
        after.pod("shop", "a").map(|p| p.containers.clone())
    );

    // A file that breaks changes nothing but is shown to aditd as it is.
    ground.write("kind: [\n")?;
    mesh.wait_for("the problem", SOON, |status| {
        status
            .problems
            .iter()
            .find(|p| p.starts_with("mesh.yaml:1: "))
            .cloned()
    })?;
    assert_eq!(uid(&mesh.status()?, "a"), uid(&before, "a"));
    assert_eq!(
        fs::read_to_string(mesh.file("cluster/mesh.yaml"))?,
        "kind: [\n"
    );

    ground.write(&pause("c", "n2"))?;
    let status = mesh.wait_for("the end of pod a", SOON, |status| {
        (status.pods.len() == 1).then(|| status.clone())
    })?;
    assert_eq!(uid(&status, "c"), uid(&after, "c"));
    let gone = before.pod("shop", "a").ok_or("no pod")?;
    assert!(!gone.cgroup.exists() && !gone.netns.exists());
    mesh.down()?;
    Ok(())
}

#[test]
fn programs_that_end_are_started_again_and_what_they_say_is_kept() -> Result {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\nspec: {nodeName: n1, \
               containers: [{name: c, command: [sh, -c, 'echo $POD_IP; hostname; cat \
               /proc/self/cgroup; exit 3'], env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: \
               status.podIP}}}]}]}\n";
    let ground = Ground::new("again", pod)?;
    let mesh = Mesh::up(ground.config.clone())?;
    let pod = mesh.wait_for("two restarts", SOON, |status| {
        let pod = status.pod("shop", "a")?;
        (pod.containers.first()?.restarts >= 2).then(|| pod.clone())
    })?;
    let log = fs::read_to_string(&pod.containers[0].log)?;
    let mut lines = log.lines();
    assert_eq!(lines.next(), Some("10.244.1.2"));
    assert_eq!(lines.next(), Some("a"));
    assert!(log.contains(&format!("/n1/pods/{}", pod.uid)), "{log}");
    mesh.request(&Request::RestartPod {
        namespace: "shop".into(),
        name: "a".into(),
    })?;
    assert_ne!(uid(&mesh.status()?, "a").as_ref(), Some(&pod.uid));
    let refused = mesh.request(&Request::Kill {
        component: "ztunnel-n1".into(),
    });
    assert!(refused.is_err());
    mesh.down()?;
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result {
    let ground = Ground::new("down", &(server("a", "n1", "x: y")? + &pause("c", "n2")))?;
    let mesh = ground.up()?;
    let status = mesh.status()?;
    let root = mesh.state_directory().to_owned();
    let pid = status
        .pod("shop", "a")
        .and_then(|p| p.containers[0].process);
    let pid = pid.ok_or("no process")?.pid;
    let cgroup = status.nodes[0]
        .cgroup
        .parent()
        .ok_or("no cgroup")?
        .to_owned();
    assert!(cgroup.exists() && Path::new(&format!("/proc/{pid}")).exists());
    // A second one of the same name is refused while this one lives.
    let second = Mesh::up(ground.config.clone()).err().map(|e| e.to_string());
    assert!(second.is_some_and(|e| e.contains("already up")));
    mesh.down()?;
    assert!(!root.exists() && !cgroup.exists());
    // Its parent may not have waited for it yet.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().unwrap_or_default();
    assert!(state.is_empty() || state.starts_with(['Z', 'X']), "{stat}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&root.display().to_string()));
    Ok(())
}

#[test]
fn what_a_crashed_test_left_is_removed_by_the_next() -> Result {
    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\nspec: \
                    {containers: [{name: c, command: [sleep, '1000']}]}\n";
    let ground = Ground::new("after-crash", manifest)?;
    let name = format!("crash-{}", std::process::id());
    let mut crashing = std::process::Command::new(own_program()?)
        .args(["--ignored", "--exact", "--nocapture", "program_crash"])
        .env("MESH", &name)
        .env("MANIFESTS", ground.dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let stdout = crashing.stdout.take().ok_or("no output")?;
    let mut lines = std::io::BufReader::new(stdout).lines();
    let up = lines.any(|line| line.is_ok_and(|line| line == "[up]"));
    crashing.kill()?;
    crashing.wait()?;
    assert!(up);
    let left = Running::open(&name)?;
    let pod = left.status()?.pod("shop", "a").cloned().ok_or("no pod")?;
    let pid = pod.containers[0].process.ok_or("no process")?.pid;
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    assert!(!left.is_supervised() && command.contains("sleep"));

    ground.up()?.down()?;
    assert!(!left.state_directory().exists() && !pod.cgroup.exists());
    // Its own parent may not have noticed yet, but it runs no more.
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(!command.contains("sleep"), "{command}");
    Ok(())
}

#[test]
fn dropping_a_mesh_removes_it() -> Result {
    let ground = Ground::new("drop", &pause("c", "n1"))?;
    let root = {
        let mesh = ground.up()?;
        mesh.state_directory().to_owned()
    };
    assert!(!root.exists());
    Ok(())
}

#[test]
fn many_pods_are_up_in_a_few_seconds() -> Result {
    let manifest = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: many, namespace: shop}\n\
                    spec: {replicas: 50, selector: {}, template: {spec: {containers: [{name: c, \
                    command: [sleep, infinity]}]}}}\n";
    let ground = Ground::new("many", manifest)?;
    let begin = std::time::Instant::now();
    let mesh = ground.up()?;
    let took = begin.elapsed();
    let status = mesh.status()?;
    assert_eq!(status.pods.iter().filter(|p| p.ready).count(), 50);
    assert_eq!(status.pods.iter().filter(|p| p.node == "n1").count(), 25);
    mesh.down()?;
    assert!(took < Duration::from_secs(20), "{took:?}");
    Ok(())
}
