//! Waypoints in a test's mesh: made and removed by the `adit` program, looked at through
//! their status ports, and clients that count who answered.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use adit_local::{HttpAnswer, Output, Request, http_request_in, read_manifests};
use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::mesh::{DEADLINE, MeshBuilder, Pod, SAMPLE_MESH, TestMesh};
use crate::observe::Metrics;

/// A client that makes thousands of requests ends by then.
const CLIENT_DEADLINE: Duration = Duration::from_secs(120);

/// The sample at L7, by file name.
pub const SAMPLE_WAYPOINT: &[(&str, &str)] = &[
    (
        "reviews.yaml",
        include_str!("../../deploy/samples/waypoint/reviews.yaml"),
    ),
    (
        "telemetry.yaml",
        include_str!("../../deploy/samples/waypoint/telemetry.yaml"),
    ),
    (
        "route.yaml",
        include_str!("../../deploy/samples/waypoint/route.yaml"),
    ),
    (
        "grpc-route.yaml",
        include_str!("../../deploy/samples/waypoint/grpc-route.yaml"),
    ),
    (
        "readers.yaml",
        include_str!("../../deploy/samples/waypoint/readers.yaml"),
    ),
    (
        "jwt.yaml",
        include_str!("../../deploy/samples/waypoint/jwt.yaml"),
    ),
    (
        "retry.yaml",
        include_str!("../../deploy/samples/waypoint/retry.yaml"),
    ),
];

/// A token that the sample's `jwt.yaml` takes.
pub const SAMPLE_TOKEN: &str = include_str!("../../deploy/samples/waypoint/demo.jwt");

/// The text of a file of [`SAMPLE_WAYPOINT`].
///
/// # Panics
/// There is no such file.
pub fn sample_waypoint(file: &str) -> &'static str {
    let found = SAMPLE_WAYPOINT.iter().find(|(name, _)| *name == file);
    found.expect("a file of the sample").1
}

/// The sample's mesh with `reviews` and further manifests in it, and namespace `shop` behind a
/// waypoint.
///
/// # Errors
/// Something does not get ready.
pub fn reviews_mesh(files: &[(&str, &str)]) -> anyhow::Result<TestMesh> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .files(&[("reviews.yaml", sample_waypoint("reviews.yaml"))])
        .files(files)
        .up()?;
    mesh.enrol_waypoint("shop")?;
    mesh.wait_bound("reviews.shop.svc.cluster.local", true)?;
    Ok(mesh)
}

/// What `adit-sample requests` counted.
#[derive(Debug, Clone, Deserialize)]
pub struct Counted {
    /// Requests without an answer.
    pub failures: u64,
    /// Answers by status.
    pub statuses: BTreeMap<String, u64>,
    /// Answers by version.
    pub versions: BTreeMap<String, u64>,
    /// Answers by pod.
    pub servers: BTreeMap<String, u64>,
    /// Why there was no answer.
    pub errors: BTreeMap<String, u64>,
    /// Connections that it took.
    pub connections_opened: u64,
}

impl Counted {
    /// Answers with this status.
    pub fn status(&self, status: &str) -> u64 {
        self.statuses.get(status).copied().unwrap_or_default()
    }

    /// Answers of this version.
    pub fn version(&self, version: &str) -> u64 {
        self.versions.get(version).copied().unwrap_or_default()
    }
}

impl TestMesh {
    /// Runs the program `adit` against this mesh.
    ///
    /// # Errors
    /// It cannot be run, or does not end well; its output is in the error.
    pub fn adit(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.adit_output(args)?;
        ensure!(
            output.status.success(),
            "adit {}: {}\n{}{}",
            args.join(" "),
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// [`Self::adit`], however it ends.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn adit_output(&self, args: &[&str]) -> anyhow::Result<Output> {
        let status = self.status()?;
        let mut dirs = std::env::split_paths(&status.search_path);
        let program = dirs.find_map(|dir| Some(dir.join("adit")).filter(|path| path.is_file()));
        let program = program.context("there is no program adit beside the others")?;
        let output = std::process::Command::new(program)
            .args(args)
            .args(["--mesh", &status.name])
            .stdin(Stdio::null())
            .output()?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Puts objects over the manifests, as `adit local apply`.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn apply_objects(&self, yaml: &str) -> anyhow::Result<()> {
        let objects = read_manifests(yaml)?;
        Ok(self.request(&Request::Apply { objects })?)
    }

    /// Takes away what [`Self::apply_objects`] put there.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn delete_objects(&self, yaml: &str) -> anyhow::Result<()> {
        for object in read_manifests(yaml)? {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            self.request(&Request::Delete {
                kind: text(&object["kind"]),
                namespace: text(&object["metadata"]["namespace"]),
                name: text(&object["metadata"]["name"]),
            })?;
        }
        Ok(())
    }

    /// Applies a route or a policy and waits until the control plane has taken it.
    ///
    /// # Errors
    /// It is not accepted.
    pub fn apply_accepted(&self, yaml: &str) -> anyhow::Result<()> {
        self.apply_objects(yaml)?;
        for object in read_manifests(yaml)? {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            self.eventually("acceptance", || {
                let all = self.objects(&kind)?;
                let found = all.iter().find(|o| o["metadata"]["name"] == name);
                let status = &found.context("it is not there")?["status"];
                let text = status.to_string();
                ensure!(text.contains("\"True\""), "{kind} {name}: {text}");
                ensure!(!text.contains("\"False\""), "{kind} {name}: {text}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// `adit waypoint apply -n NAMESPACE --enroll-namespace --wait`.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn enrol_waypoint(&self, namespace: &str) -> anyhow::Result<String> {
        let limit = format!("{}s", DEADLINE.as_secs());
        let args = [
            "waypoint",
            "apply",
            "-n",
            namespace,
            "--enroll-namespace",
            "--wait",
        ];
        let told = self.adit(&[&args[..], &["--waypoint-timeout", &limit]].concat())?;
        self.wait_waypoint(&format!("waypoint.{namespace}"))?;
        Ok(told)
    }

    /// Waits until a waypoint (`<gateway>.<namespace>`) is ready.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn wait_waypoint(&self, component: &str) -> anyhow::Result<()> {
        let what = format!("readiness of {component}");
        self.wait_for(&what, DEADLINE, |status| {
            let ready = |name: &str| status.component(name).is_some_and(|c| c.ready);
            ready(component).then_some(())
        })?;
        Ok(())
    }

    /// Waits until the nodes' ztunnels send what is for a service through a waypoint, or
    /// past one.
    ///
    /// # Errors
    /// They do not.
    pub fn wait_bound(&self, hostname: &str, bound: bool) -> anyhow::Result<()> {
        self.eventually("the waypoint of a service", || {
            for node in &self.status()?.nodes {
                let dump = self.config_dump(&node.name)?;
                let services = dump["services"].as_array().into_iter().flatten();
                let service = services.into_iter().find(|s| s["hostname"] == hostname);
                let service = service.with_context(|| format!("{hostname} is unknown"))?;
                let waypoint = &service["waypoint"];
                ensure!(waypoint.is_null() != bound, "{}: {waypoint}", node.name);
            }
            Ok(())
        })
    }

    /// `kill -9` of a waypoint; it stays away until [`Self::start_component`].
    ///
    /// # Errors
    /// The supervisor's.
    pub fn kill_component(&self, component: &str) -> anyhow::Result<()> {
        let component = component.to_owned();
        Ok(self.request(&Request::Kill { component })?)
    }

    /// Starts what was killed; returns when it is ready.
    ///
    /// # Errors
    /// The supervisor's.
    pub fn start_component(&self, component: &str) -> anyhow::Result<()> {
        self.request(&Request::Start {
            component: component.to_owned(),
        })?;
        self.wait_waypoint(component)
    }

    /// A GET to a port of a waypoint's loopback: 15000 admin, 15020 metrics, 15021
    /// readiness.
    ///
    /// # Errors
    /// It does not answer.
    pub fn waypoint_get(
        &self,
        component: &str,
        port: u16,
        path: &str,
    ) -> anyhow::Result<HttpAnswer> {
        let status = self.status()?;
        let uid = status.component(component).and_then(|c| c.pod.clone());
        let pod = status
            .pods
            .iter()
            .find(|pod| Some(&pod.uid) == uid.as_ref());
        let pod = pod.with_context(|| format!("there is no waypoint {component}"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(http_request_in(&pod.netns, address, "GET", path, DEADLINE)?)
    }

    /// A waypoint's metrics.
    ///
    /// # Errors
    /// It does not answer.
    pub fn waypoint_metrics(&self, component: &str) -> anyhow::Result<Metrics> {
        let answer = self.waypoint_get(component, 15020, "/stats/prometheus")?;
        Metrics::read(answer)
    }

    /// Lines of a waypoint's access log, which the sample's telemetry writes as JSON.
    ///
    /// # Errors
    /// There is no such waypoint.
    pub fn waypoint_access_log(&self, component: &str) -> anyhow::Result<Vec<Value>> {
        let text = std::fs::read_to_string(self.component_log(component)?)?;
        let lines = text.lines().filter(|line| line.starts_with('{'));
        Ok(lines
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }

    /// Many requests from a pod, with options of `adit-sample requests`.
    ///
    /// # Errors
    /// The client cannot be run; requests without an answer are counted.
    pub fn requests(&self, from: Pod<'_>, url: &str, options: &[&str]) -> anyhow::Result<Counted> {
        let mut argv = vec!["adit-sample", "requests", url];
        argv.extend(options);
        let output = self.exec(&self.place(from), &argv, CLIENT_DEADLINE)?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("{argv:?}: {}{}", output.stdout, output.stderr))
    }

    /// Any program of the sample that prints JSON lines.
    ///
    /// # Errors
    /// The client cannot be run, or prints something else.
    pub fn sample_lines(&self, from: Pod<'_>, argv: &[&str]) -> anyhow::Result<Vec<Value>> {
        let argv = [&["adit-sample"], argv].concat();
        let output = self.exec(&self.place(from), &argv, CLIENT_DEADLINE)?;
        let lines = output.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).with_context(|| format!("output {line:?}")))
            .collect()
    }

    /// The first line of [`Self::sample_lines`].
    ///
    /// # Errors
    /// As there, or there is none.
    pub fn first_line(&self, from: Pod<'_>, argv: &[&str]) -> anyhow::Result<Value> {
        let mut lines = self.sample_lines(from, argv)?.into_iter();
        lines.next().context("the client said nothing")
    }

    /// The status that a request is answered with.
    ///
    /// # Errors
    /// There was no answer.
    pub fn status_of(&self, from: Pod<'_>, url: &str, options: &[&str]) -> anyhow::Result<u64> {
        let line = self.first_line(from, &[&["call", url], options].concat())?;
        let status = line["status"].as_u64();
        status.with_context(|| format!("no answer: {line}"))
    }

    /// What the server saw of one request.
    ///
    /// # Errors
    /// There was no answer, or none of the sample server.
    pub fn seen(&self, from: Pod<'_>, url: &str, options: &[&str]) -> anyhow::Result<Value> {
        let argv = [&["call", url, "--json"], options].concat();
        let line = self.first_line(from, &argv)?;
        match &line["answer"] {
            Value::Object(answer) => Ok(Value::Object(answer.clone())),
            _ => bail!("no answer of a sample server: {line}"),
        }
    }
}
