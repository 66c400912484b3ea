//! `adit local`: the mesh of network namespaces, from the outside.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use adit_local::{DataPlane, Mesh, MeshConfig, MeshStatus, Place, Request, Running};
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};

use crate::output::{self, Format, Outcome, Output};
use crate::table::Table;

const DEFAULT_NAME: &str = "local";
/// How long `up` waits for the pods before it says that they are not ready.
const POD_DEADLINE: Duration = Duration::from_secs(60);
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// `adit local …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a mesh from manifests and follow their changes
    Up(Up),
    /// Show nodes, pods and components
    Status(Status),
    /// Run a command in a pod, on a node, or outside
    Exec(Exec),
    /// Show the log of a pod or a component
    Logs(Logs),
    /// Restart a component (`aditd`, `ztunnel-<node>`) or make a pod anew
    Restart(Restart),
    /// Stop a component, for a look at what happens without it
    Stop(Component),
    /// Start a component that was stopped
    Start(Component),
    /// Remove a mesh and everything that belongs to it
    Down(Down),
}

/// Options of `up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Directory of manifests
    #[arg(short = 'f', long = "filename")]
    manifests: PathBuf,
    /// Name of the mesh
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// Virtual nodes; by default the Node objects of the manifests, else node1 and node2
    #[arg(long, value_delimiter = ',')]
    nodes: Vec<String>,
    /// Only pods and services, without control plane and node tunnels
    #[arg(long)]
    no_mesh: bool,
    /// Return when the mesh is up; it goes on in the background
    #[arg(long, short)]
    detach: bool,
    /// Environment of the node tunnels, `NAME=value`; may be repeated
    #[arg(long = "ztunnel-env")]
    ztunnel_env: Vec<String>,
    /// Trust domain of every identity
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// Program to run as node tunnel
    #[arg(long, default_value = "ztunnel")]
    ztunnel: String,
    /// Program to run as control plane
    #[arg(long, default_value = "aditd")]
    aditd: String,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
    /// How to print
    #[arg(short, long, default_value = "short")]
    output: Format,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// `pod`, `namespace/pod`, `node:<name>`, or `outside` for the network between nodes
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// `pod`, `namespace/pod`, `aditd` or `ztunnel-<node>`
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    /// Container of the pod; by default its first
    #[arg(short, long)]
    container: Option<String>,
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(long)]
    tail: Option<usize>,
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
}

/// Options of `restart`.
#[derive(Debug, Args)]
pub(crate) struct Restart {
    /// `aditd`, `ztunnel-<node>`, `pod` or `namespace/pod`
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    /// Start the new instance first and then stop the old one, as a rolling update does
    #[arg(long)]
    replace: bool,
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
}

/// Options of `stop` and `start`.
#[derive(Debug, Args)]
pub(crate) struct Component {
    /// `aditd` or `ztunnel-<node>`
    component: String,
    /// End it with SIGKILL (`stop` only)
    #[arg(long)]
    kill: bool,
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
}

/// Options of `down`.
#[derive(Debug, Args)]
pub(crate) struct Down {
    /// Name of the mesh; by default the only one there is
    #[arg(long)]
    name: Option<String>,
    /// Every mesh on this machine
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

pub(crate) fn run(command: Command, out: &mut Output) -> anyhow::Result<Outcome> {
    match command {
        Command::Up(options) => up(options, out),
        Command::Status(options) => status(&options, out),
        Command::Exec(options) => exec(&options),
        Command::Logs(options) => logs(&options, out),
        Command::Restart(options) => restart(options, out),
        Command::Stop(options) => stop(options, out),
        Command::Start(options) => start(options, out),
        Command::Down(options) => down(&options, out),
    }
}

/// The mesh that is meant: by name, or the only one.
pub(crate) fn find(name: Option<&str>) -> anyhow::Result<Running> {
    if let Some(name) = name {
        return Ok(Running::open(name)?);
    }
    let names = Running::list()?;
    match names.as_slice() {
        [] => bail!("there is no local mesh; `adit local up -f DIR` makes one"),
        [one] => Ok(Running::open(one)?),
        several if several.iter().any(|name| name == DEFAULT_NAME) => {
            Ok(Running::open(DEFAULT_NAME)?)
        }
        several => bail!(
            "there are several meshes, say which: --name {}",
            several.join("|")
        ),
    }
}

fn up(options: Up, out: &mut Output) -> anyhow::Result<Outcome> {
    // Only bare minimums are needed before the mesh is up; what goes wrong while a
    // manifest is followed is worth a line.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let manifests = options
        .manifests
        .canonicalize()
        .with_context(|| format!("{}", options.manifests.display()))?;
    if options.detach {
        return detach(&options.name, out);
    }
    let mut config = MeshConfig::new(options.name, manifests);
    config.nodes = options.nodes;
    config.trust_domain = options.trust_domain;
    config.ztunnel = options.ztunnel;
    config.aditd = options.aditd;
    config.ztunnel_env = environment(&options.ztunnel_env)?;
    if options.no_mesh {
        config.data_plane = DataPlane::Off;
    }
    let begin = Instant::now();
    let mesh = Mesh::up(config)?;
    let ready = mesh.wait_pods_ready(POD_DEADLINE);
    let status = mesh.status()?;
    writeln!(
        out,
        "Mesh {} is up after {:.1} s.\n",
        status.name,
        begin.elapsed().as_secs_f64()
    )?;
    write!(out, "{}", status_tables(&status))?;
    if let Err(error) = ready {
        writeln!(out, "\nNot everything is well: {error}")?;
    }
    let client = status.pods.iter().find(|pod| pod.ready);
    let client = client.map_or("NAMESPACE/POD".to_owned(), |pod| {
        format!("{}/{}", pod.namespace, pod.name)
    });
    let node = status.nodes.first().map_or("NODE", |node| &node.name);
    let name = &status.name;
    writeln!(
        out,
        "\nIt follows {}: edit the manifests and see.\n  \
         adit local status --name {name}\n  \
         adit local exec --name {name} {client} -- sh\n  \
         adit local logs --name {name} {client}",
        status.manifests.display()
    )?;
    if status.data_plane {
        writeln!(
            out,
            "  adit local logs --name {name} ztunnel-{node} --follow\n  \
             adit zc all --mesh {name} --node {node}\n  \
             adit local exec --name {name} node:{node} -- curl -s 127.0.0.1:15020/metrics"
        )?;
    }
    writeln!(out, "  adit local down --name {name}      (here: Ctrl-C)")?;
    out.flush()?;
    mesh.supervise()?;
    Ok(Outcome::Well)
}

/// Starts the same command without `--detach` in a session of its own and passes on what
/// it says until the mesh is up.
fn detach(name: &str, out: &mut Output) -> anyhow::Result<Outcome> {
    let log = std::env::temp_dir().join(format!("adit-local-{name}.log"));
    let file = File::create(&log).with_context(|| log.display().to_string())?;
    let args = std::env::args_os().skip(1);
    let args = args.filter(|arg| arg != "--detach" && arg != "-d");
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        // Ctrl-C here is not meant for it.
        .process_group(0);
    let mut child = command.spawn()?;
    let until = Instant::now() + POD_DEADLINE * 2;
    let end_mark = "adit local down --name";
    loop {
        let text = std::fs::read_to_string(&log)?;
        if text.contains(end_mark) {
            write!(out, "{}", text.replace("      (here: Ctrl-C)", ""))?;
            return Ok(Outcome::Well);
        }
        if let Some(status) = child.try_wait()? {
            output::complain(format_args!("{text}"));
            bail!("the mesh is not up ({status})");
        }
        ensure!(
            Instant::now() < until,
            "the mesh is not up in time; its supervisor says in {} why",
            log.display()
        );
        sleep(Duration::from_millis(20));
    }
}

fn environment(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let split = |pair: &String| {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--ztunnel-env {pair}: NAME=value is expected"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    pairs.iter().map(split).collect()
}

fn status(options: &Status, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = find(options.name.as_deref())?;
    let status = running.status()?;
    output::print(out, options.output, &status, || status_tables(&status))?;
    if !running.is_supervised() {
        writeln!(
            out,
            "\nThe supervisor of mesh {} is gone; `adit local down --name {}` cleans up.",
            status.name, status.name
        )?;
        return Ok(Outcome::Findings);
    }
    Ok(match status.problems.is_empty() {
        true => Outcome::Well,
        false => Outcome::Findings,
    })
}

fn status_tables(status: &MeshStatus) -> String {
    let mut text = String::new();
    let yes = |ready: bool| if ready { "yes" } else { "no" }.to_owned();
    let pid = |p: Option<adit_local::ProcessId>| p.map_or(String::new(), |p| p.pid.to_string());
    if !status.components.is_empty() {
        let mut table = Table::new(["COMPONENT", "READY", "PID", "RESTARTS", "LOG"]);
        for component in &status.components {
            table.row([
                &component.name.clone(),
                &yes(component.ready),
                &pid(component.process),
                &component.restarts.to_string(),
                &component.log.display().to_string(),
            ]);
        }
        text += &table.render();
        text.push('\n');
    }
    let mut table = Table::new([
        "NAMESPACE",
        "POD",
        "READY",
        "STATUS",
        "RESTARTS",
        "NODE",
        "ADDRESS",
    ]);
    for pod in &status.pods {
        let message = pod
            .containers
            .iter()
            .find(|c| !c.ready && !c.message.is_empty());
        let state = match (pod.terminating, message) {
            (true, _) => "Terminating".to_owned(),
            (false, Some(container)) => format!("{}: {}", pod.phase, container.message),
            (false, None) => pod.phase.clone(),
        };
        let restarts: u32 = pod.containers.iter().map(|c| c.restarts).sum();
        table.row([
            &pod.namespace.clone(),
            &pod.name.clone(),
            &yes(pod.ready),
            &state,
            &restarts.to_string(),
            &pod.node.clone(),
            &pod.addresses.join(","),
        ]);
    }
    text += &table.render();
    for problem in &status.problems {
        text += &format!("\nProblem: {problem}\n");
    }
    text
}

fn exec(options: &Exec) -> anyhow::Result<Outcome> {
    let running = find(options.name.as_deref())?;
    let place = place(&running, &options.target, options.namespace.as_deref())?;
    let mut command = running.command(&place, &options.command[0])?;
    command.args(&options.command[1..]);
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", options.command[0]))?;
    // As a shell reports it.
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, signal) => 128 + signal.unwrap_or(0),
    };
    Ok(Outcome::Status(u8::try_from(code).unwrap_or(1)))
}

fn place(running: &Running, target: &str, namespace: Option<&str>) -> anyhow::Result<Place> {
    if let Some(node) = target.strip_prefix("node:") {
        return Ok(Place::Node(node.into()));
    }
    if target == "outside" {
        return Ok(Place::Fabric);
    }
    let (namespace, name) = pod(&running.status()?, target, namespace)?;
    Ok(Place::Pod { namespace, name })
}

/// `namespace/pod`, or a pod's name if it is the only one of that name.
fn pod(
    status: &MeshStatus,
    target: &str,
    namespace: Option<&str>,
) -> anyhow::Result<(String, String)> {
    if let Some((namespace, name)) = target.split_once('/') {
        return Ok((namespace.into(), name.into()));
    }
    if let Some(namespace) = namespace {
        return Ok((namespace.into(), target.into()));
    }
    let named = status
        .pods
        .iter()
        .filter(|pod| pod.name == target && !pod.terminating);
    let found: Vec<&str> = named.map(|pod| pod.namespace.as_str()).collect();
    match found.as_slice() {
        [one] => Ok(((*one).into(), target.into())),
        [] => bail!("mesh {} has no pod {target} in any namespace", status.name),
        several => bail!(
            "pod {target} is in several namespaces, say which: -n {}",
            several.join("|")
        ),
    }
}

fn logs(options: &Logs, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = find(options.name.as_deref())?;
    let path = log_path(&running.status()?, options)?;
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        // Nothing has been started yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let begin = options.tail.map_or(0, |lines| tail_offset(&text, lines));
    out.write_all(&text[begin..])?;
    out.flush()?;
    if options.follow {
        follow(&running, &path, text.len() as u64)?;
    }
    Ok(Outcome::Well)
}

fn log_path(status: &MeshStatus, options: &Logs) -> anyhow::Result<PathBuf> {
    if let Some(component) = status.component(&options.target) {
        return Ok(component.log.clone());
    }
    let (namespace, name) = pod(status, &options.target, options.namespace.as_deref())?;
    let pod = status
        .pod(&namespace, &name)
        .with_context(|| format!("mesh {} has no pod {namespace}/{name}", status.name))?;
    let mut containers = pod.containers.iter();
    let container = match &options.container {
        None => containers.next(),
        Some(wanted) => containers.find(|container| container.name == *wanted),
    };
    let container = container.with_context(|| {
        let names: Vec<&str> = pod.containers.iter().map(|c| c.name.as_str()).collect();
        format!(
            "pod {namespace}/{name} has the containers {}",
            names.join(", ")
        )
    })?;
    Ok(container.log.clone())
}

/// Where the last `lines` lines begin.
fn tail_offset(text: &[u8], lines: usize) -> usize {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut ends = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    match lines {
        0 => text.len(),
        lines => ends.nth(lines - 1).map_or(0, |(at, _)| at + 1),
    }
}

/// Until the mesh is gone.
fn follow(running: &Running, path: &Path, mut at: u64) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    while running.status().is_ok() {
        if let Ok(mut file) = File::open(path) {
            // A log that was cut short begins anew.
            if file.metadata()?.len() < at {
                at = 0;
            }
            file.seek(SeekFrom::Start(at))?;
            let mut more = Vec::new();
            at += file.read_to_end(&mut more)? as u64;
            stdout.write_all(&more)?;
            stdout.flush()?;
        }
        sleep(FOLLOW_INTERVAL);
    }
    Ok(())
}

fn restart(options: Restart, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = find(options.name.as_deref())?;
    let status = running.status()?;
    let request = if status.component(&options.target).is_some() {
        let component = options.target.clone();
        match options.replace {
            true => Request::Replace { component },
            false => Request::Restart { component },
        }
    } else {
        ensure!(!options.replace, "--replace is for aditd and ztunnels");
        let (namespace, name) = pod(&status, &options.target, options.namespace.as_deref())?;
        Request::RestartPod { namespace, name }
    };
    running.request(&request)?;
    writeln!(out, "{} restarted", options.target)?;
    Ok(Outcome::Well)
}

fn stop(options: Component, out: &mut Output) -> anyhow::Result<Outcome> {
    let component = options.component.clone();
    let request = match options.kill {
        true => Request::Kill { component },
        false => Request::Stop { component },
    };
    find(options.name.as_deref())?.request(&request)?;
    writeln!(out, "{} stopped", options.component)?;
    Ok(Outcome::Well)
}

fn start(options: Component, out: &mut Output) -> anyhow::Result<Outcome> {
    let component = options.component.clone();
    find(options.name.as_deref())?.request(&Request::Start { component })?;
    writeln!(out, "{} started", options.component)?;
    Ok(Outcome::Well)
}

fn down(options: &Down, out: &mut Output) -> anyhow::Result<Outcome> {
    let names = match (&options.name, options.all) {
        (Some(name), _) => vec![name.clone()],
        (None, true) => Running::list()?,
        (None, false) => match Running::list()?.as_slice() {
            [] => Vec::new(),
            [one] => vec![one.clone()],
            several if several.iter().any(|name| name == DEFAULT_NAME) => {
                vec![DEFAULT_NAME.into()]
            }
            several => bail!(
                "there are several meshes, say which: --name {}",
                several.join("|")
            ),
        },
    };
    if names.is_empty() {
        writeln!(out, "there is no local mesh")?;
    }
    for name in names {
        match adit_local::down(&name)? {
            true => writeln!(out, "mesh {name} is removed"),
            false => writeln!(out, "there is no local mesh {name}"),
        }?;
    }
    Ok(Outcome::Well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log() {
        for (lines, expected) in [(0, ""), (1, "c\n"), (2, "b\nc\n"), (9, "a\nb\nc\n")] {
            let text = b"a\nb\nc\n";
            assert_eq!(&text[tail_offset(text, lines)..], expected.as_bytes());
        }
        assert_eq!(tail_offset(b"a\nb", 1), 2);
    }

    #[test]
    fn environment_pairs() {
        assert!(environment(&["A".into()]).is_err());
        let env = environment(&["A=b=c".into()]).unwrap_or_default();
        assert_eq!(env.get("A").map(String::as_str), Some("b=c"));
    }
}
