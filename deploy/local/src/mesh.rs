//! The handle of the process that made the mesh.

use std::fs;
use std::io::Read;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::config::MeshConfig;
use crate::control::Running;
use crate::error::LocalError;
use crate::supervisor::Supervision;
use crate::system::layout::Layout;
use crate::system::teardown;

/// Standard output that is kept of a command.
const MAX_OUTPUT: u64 = 64 * 1024 * 1024;

/// Where in a mesh something runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// On a node, in no pod.
    Node(String),
    /// On the network between the nodes: outside of the cluster.
    Fabric,
}

impl Place {
    /// In the pod `name` of `namespace`.
    pub fn pod(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self::Pod {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A mesh that this process supervises. [`Self::down`] removes it; dropping it does the
/// same, so that a test that panics leaves nothing behind.
#[derive(Debug)]
pub struct Mesh {
    running: Running,
    layout: Layout,
    supervision: Option<Supervision>,
}

impl Mesh {
    /// Makes a mesh and waits until its control plane and ztunnels are ready (not the
    /// pods: [`Running::wait_pods_ready`]). Remnants of a mesh of the same name are
    /// removed first, and so are test meshes whose process is gone.
    ///
    /// # Errors
    /// [`LocalError`]; whatever was made is removed again, except the logs, whose last
    /// lines are in the error.
    pub fn up(config: MeshConfig) -> Result<Self, LocalError> {
        config.validate()?;
        teardown::sweep_at(&config.state_root)?;
        let layout = Layout::new(&config.state_root, &config.name)?;
        if let Ok(running) = Running::open_at(&config.state_root, &config.name)
            && running.is_supervised()
        {
            return Err(LocalError::Config(format!(
                "mesh {} is already up; `adit local down --name {}` removes it",
                config.name, config.name
            )));
        }
        teardown::remove(&layout)?;
        let deadline = config.ready_timeout;
        let state_root = config.state_root.clone();
        let name = config.name.clone();
        let supervision = match Supervision::start(config, layout.clone()) {
            Ok(supervision) => supervision,
            Err(error) => {
                // The reason counts more than a mount that could not be removed.
                let _ = teardown::remove(&layout);
                return Err(error);
            }
        };
        let mesh = Self {
            running: Running::open_at(&state_root, &name)?,
            layout,
            supervision: Some(supervision),
        };
        let ready = mesh.wait_for(
            "readiness of control plane and ztunnels",
            deadline,
            |status| status.components.iter().all(|c| c.ready).then_some(()),
        );
        ready.map_err(|error| mesh.with_logs(error))?;
        Ok(mesh)
    }

    /// The same mesh as other processes see it.
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`LocalError::Deadline`] when it has not ended by then (it is killed).
    pub fn exec(
        &self,
        place: &Place,
        argv: &[&str],
        deadline: Duration,
    ) -> Result<Output, LocalError> {
        self.running.exec(place, argv, deadline)
    }

    /// Blocks until the supervisor has been asked to end, by SIGTERM, SIGINT or
    /// `adit local down`, then removes the mesh.
    ///
    /// # Errors
    /// [`LocalError`] of what could not be removed.
    pub fn supervise(mut self) -> Result<(), LocalError> {
        if let Some(supervision) = self.supervision.take() {
            supervision.until_signalled();
        }
        teardown::remove(&self.layout)
    }

    /// Ends every process of the mesh and removes everything.
    ///
    /// # Errors
    /// [`LocalError`] of what could not be removed.
    pub fn down(mut self) -> Result<(), LocalError> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), LocalError> {
        let Some(supervision) = self.supervision.take() else {
            return Ok(());
        };
        supervision.stop();
        teardown::remove(&self.layout)
    }

    fn with_logs(&self, error: LocalError) -> LocalError {
        let LocalError::Deadline {
            what,
            seconds,
            mut detail,
        } = error
        else {
            return error;
        };
        let status = self.status();
        for component in status.iter().flat_map(|s| s.components.iter()) {
            let text = fs::read_to_string(&component.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(10)..].join("\n  ");
            if !component.ready {
                detail += &format!("\n{}:\n  {last}", component.log.display());
            }
        }
        LocalError::Deadline {
            what,
            seconds,
            detail,
        }
    }
}

impl Deref for Mesh {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(mesh = self.running.name(), %error, "not removed completely");
        }
    }
}

impl Running {
    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`LocalError::Deadline`] when it has not ended by then (it is killed).
    pub fn exec(
        &self,
        place: &Place,
        argv: &[&str],
        deadline: Duration,
    ) -> Result<Output, LocalError> {
        let [program, args @ ..] = argv else {
            return Err(LocalError::Config("a command needs a program".into()));
        };
        let mut command = self.command(place, program)?;
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let what = format!("the end of {}", argv.join(" "));
        let child = command
            .spawn()
            .map_err(LocalError::system(format!("cannot run {program}")))?;
        collect(child, what, deadline)
    }

    /// The path of a file in the mesh's state directory, for what a test wants to keep
    /// beside the logs.
    pub fn file(&self, name: &str) -> PathBuf {
        self.state_directory().join(name)
    }
}

fn collect(mut child: Child, what: String, deadline: Duration) -> Result<Output, LocalError> {
    let until = Instant::now() + deadline;
    let stdout = read_aside(child.stdout.take());
    let stderr = read_aside(child.stderr.take());
    let status = loop {
        let waited = child.try_wait();
        match waited.map_err(LocalError::system(what.clone()))? {
            Some(status) => break status,
            None if Instant::now() >= until => {
                // Gone is what we want.
                let _ = child.kill();
                let _ = child.wait();
                let mut detail = stdout.join().unwrap_or_default();
                detail += &stderr.join().unwrap_or_default();
                return Err(LocalError::Deadline {
                    what,
                    seconds: deadline.as_secs_f64(),
                    detail: format!("; so far it said:\n{detail}"),
                });
            }
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    Ok(Output {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

fn read_aside<R: Read + Send + 'static>(pipe: Option<R>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // What was read before an error is still worth having.
            let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
