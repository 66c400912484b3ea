//! The two meshes that are compared, from the same manifests.

use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use adit_local::Output;
use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mesh::{MeshBuilder, Pod, TestMesh};

/// Nodes of client and server.
pub(super) const NODES: [&str; 2] = ["node1", "node2"];

const MANIFEST: &str = r"
apiVersion: v1
kind: Node
metadata: { name: node1 }
---
apiVersion: v1
kind: Node
metadata: { name: node2 }
---
apiVersion: v1
kind: Namespace
metadata:
  name: bench
  labels: { istio.io/dataplane-mode: ambient }
---
apiVersion: v1
kind: Pod
metadata: { name: client, namespace: bench }
spec:
  nodeName: node1
  containers:
    - { name: pause, image: pause }
---
apiVersion: v1
kind: Pod
metadata: { name: server, namespace: bench }
spec:
  nodeName: node2
  containers:
    - name: server
      image: adit-sample
      command: [adit-sample, serve]
      readinessProbe: { httpGet: { path: /healthz, port: 8080 }, periodSeconds: 1 }
    - name: iperf3
      image: iperf3
      command: [iperf3, -s]
      readinessProbe: { tcpSocket: { port: 5201 }, periodSeconds: 1 }
";

/// One client may open tens of thousands of connections to one port only with these; the
/// kernel's defaults stop even a direct client at 28,000 a minute.
const CLIENT_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/ip_local_port_range", "10000 65000"),
];

/// A mesh, or the same pods without one.
pub(super) struct Ground {
    mesh: TestMesh,
    pub(super) meshed: bool,
    /// Address of the server pod.
    pub(super) server: String,
    pub(super) client_pod: Pod<'static>,
}

impl Ground {
    /// With `aditd` and ztunnels, whose log filter is `log`.
    pub(super) fn meshed(log: &str) -> anyhow::Result<Self> {
        let builder = MeshBuilder::default().ztunnel_env("RUST_LOG", log);
        Self::up(builder, true)
    }

    /// Only pods.
    pub(super) fn direct() -> anyhow::Result<Self> {
        Self::up(MeshBuilder::default().without_mesh(), false)
    }

    fn up(builder: MeshBuilder, meshed: bool) -> anyhow::Result<Self> {
        let mesh = builder.files(&[("bench.yaml", MANIFEST)]).up()?;
        let pod = |name| Pod {
            namespace: "bench",
            name,
        };
        let server = mesh.address(pod("server"))?;
        let ground = Self {
            mesh,
            meshed,
            server,
            client_pod: pod("client"),
        };
        for (name, value) in CLIENT_SYSCTLS {
            let script = format!("echo '{value}' > /proc/sys/{name}");
            ground.in_client(&["sh", "-c", &script], Duration::from_secs(5))?;
        }
        Ok(ground)
    }

    /// Congestion control of the pods' connections.
    pub(super) fn congestion_control(&self) -> anyhow::Result<String> {
        let path = "/proc/sys/net/ipv4/tcp_congestion_control";
        let output = self.in_client(&["cat", path], Duration::from_secs(5))?;
        Ok(output.stdout.trim().to_owned())
    }

    /// Process ids of the client's and the server's ztunnel.
    pub(super) fn proxies(&self) -> anyhow::Result<[u32; 2]> {
        Ok([
            self.mesh.pid(&format!("ztunnel-{}", NODES[0]))?,
            self.mesh.pid(&format!("ztunnel-{}", NODES[1]))?,
        ])
    }

    /// Fails unless connections between the pods are carried by HBONE, where there is a mesh.
    pub(super) fn verify(&self) -> anyhow::Result<()> {
        if !self.meshed {
            return Ok(());
        }
        let url = format!("http://{}:8080/", self.server);
        let call = self.mesh.call(self.client_pod, &url)?;
        if call.ok().is_none() {
            bail!("the server cannot be called: {call:?}");
        }
        let metrics = self.mesh.metrics(NODES[1])?;
        let secured = [
            ("reporter", "destination"),
            ("connection_security_policy", "mutual_tls"),
        ];
        if metrics.sum("istio_tcp_connections_opened_total", &secured) < 1.0 {
            bail!("the call did not go over HBONE");
        }
        Ok(())
    }

    /// Runs a command in the client pod to its end.
    pub(super) fn in_client(&self, argv: &[&str], deadline: Duration) -> anyhow::Result<Output> {
        let child = self.start_in_client(argv)?;
        let output = wait(child, deadline).with_context(|| argv.join(" "))?;
        if !output.status.success() {
            let (command, status) = (argv.join(" "), output.status);
            bail!("{command}: {status}: {}{}", output.stdout, output.stderr);
        }
        Ok(output)
    }

    /// Starts a command in the client pod.
    pub(super) fn start_in_client(&self, argv: &[&str]) -> anyhow::Result<Child> {
        let (program, arguments) = argv.split_first().context("a program")?;
        let place = self.mesh.place(self.client_pod);
        let mut command = self.mesh.command(&place, program)?;
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().with_context(|| argv.join(" "))
    }
}

/// Waits without polling, which would be load itself; kills at the deadline.
fn wait(child: Child, deadline: Duration) -> anyhow::Result<Output> {
    let pid = Pid::from_raw(child.id().try_into()?);
    let (done, ended) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let late = ended.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout);
        if late {
            // The child is reaped only after this thread was told, or by it.
            let _ = kill(pid, Signal::SIGKILL);
        }
        late
    });
    let output = child.wait_with_output();
    drop(done);
    if watchdog.join().unwrap_or(false) {
        bail!("not done within {deadline:?}");
    }
    let output = output?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
