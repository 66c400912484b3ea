//! Clients in pods, by the sample program.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::mesh::{Pod, TestMesh};

/// A command in a pod ends by then.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// One HTTP call, as the client saw it.
#[derive(Debug, Clone, Deserialize)]
pub struct Call {
    /// HTTP status; `None`: no answer, see `error`.
    pub status: Option<u16>,
    /// Name of the pod that answered.
    pub server: Option<String>,
    /// The client's address as the server saw it.
    pub peer: Option<SocketAddr>,
    /// Why the mesh answered in place of a server.
    pub reason: Option<String>,
    /// Why there was no answer.
    pub error: Option<String>,
    /// From start to the end of the answer.
    pub latency_ms: f64,
}

impl Call {
    /// The pod that answered 200.
    pub fn ok(&self) -> Option<&str> {
        self.server.as_deref().filter(|_| self.status == Some(200))
    }
}

/// What a long-lived TCP client reports.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamEvent {
    /// `connected`, `refused`, `echo` or `ended`.
    pub event: String,
    /// How it ended.
    pub how: Option<String>,
    /// Why it was refused.
    pub error: Option<String>,
}

/// A long-lived TCP connection from a pod; its client ends when this is dropped.
pub struct Stream {
    child: Child,
    events: Receiver<StreamEvent>,
}

impl Stream {
    /// The next event of a kind; others before it are passed over.
    ///
    /// # Errors
    /// It did not come in time, or the client ended without it.
    pub fn wait(&self, event: &str, limit: Duration) -> anyhow::Result<StreamEvent> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(found) if found.event == event => return Ok(found),
                Ok(other) if other.event == "ended" || other.event == "refused" => {
                    bail!("waited for {event:?}, but: {other:?}");
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("no event {event:?} within {limit:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the client ended without {event:?}"),
            }
        }
    }

    /// Forgets events that have come already.
    pub fn skip_old(&self) {
        while self.events.try_recv().is_ok() {}
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// HTTP calls that a pod makes all the time, each on its own connection.
pub struct Caller {
    child: Child,
    reader: JoinHandle<()>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Caller {
    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Waits for `more` calls after this moment.
    ///
    /// # Errors
    /// They do not come.
    pub fn wait_more(&self, more: usize) -> anyhow::Result<()> {
        let wanted = self.calls().len() + more;
        let until = Instant::now() + COMMAND_DEADLINE;
        while self.calls().len() < wanted {
            if Instant::now() > until {
                bail!("{} of {wanted} calls", self.calls().len());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends the client; every call that it made to the end.
    pub fn stop(mut self) -> Vec<Call> {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.reader.join();
        self.calls.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl TestMesh {
    /// Starts a client that calls `url` until it is stopped, with a pause of `interval_ms`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn caller(&self, from: Pod<'_>, url: &str, interval_ms: u64) -> anyhow::Result<Caller> {
        let mut command = self.command(&self.place(from), "adit-sample")?;
        command
            .args(["call", url, "--count", "1000000", "--interval"])
            .arg(interval_ms.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().context("stdout")?;
        let calls = Arc::new(Mutex::new(Vec::new()));
        let into = calls.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(call) = serde_json::from_str(&line) {
                    into.lock().unwrap_or_else(|e| e.into_inner()).push(call);
                }
            }
        });
        Ok(Caller {
            child,
            reader,
            calls,
        })
    }

    /// `count` HTTP calls from a pod, one after the other, each on its own connection.
    ///
    /// # Errors
    /// The client could not be run; calls that fail are values.
    pub fn calls(&self, from: Pod<'_>, url: &str, count: usize) -> anyhow::Result<Vec<Call>> {
        self.calls_with(from, url, &["--count", &count.to_string()])
    }

    /// One HTTP call from a pod.
    ///
    /// # Errors
    /// As [`Self::calls`].
    pub fn call(&self, from: Pod<'_>, url: &str) -> anyhow::Result<Call> {
        self.calls(from, url, 1)?
            .pop()
            .context("the client said nothing")
    }

    /// HTTP calls with further options of `adit-sample call`.
    ///
    /// # Errors
    /// As [`Self::calls`].
    pub fn calls_with(
        &self,
        from: Pod<'_>,
        url: &str,
        options: &[&str],
    ) -> anyhow::Result<Vec<Call>> {
        let mut argv = vec!["adit-sample", "call", url];
        argv.extend(options);
        let output = self.exec(&self.place(from), &argv, COMMAND_DEADLINE)?;
        let calls = output
            .stdout
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("output {line:?}")))
            .collect::<anyhow::Result<Vec<Call>>>()?;
        if calls.is_empty() {
            bail!("{argv:?} said nothing: {}", output.stderr);
        }
        Ok(calls)
    }

    /// A long-lived TCP connection from a pod to an echo port, with a line every 50 ms.
    ///
    /// # Errors
    /// The client could not be started.
    pub fn stream(&self, from: Pod<'_>, target: &str) -> anyhow::Result<Stream> {
        let mut command = self.command(&self.place(from), "adit-sample")?;
        command
            .args(["tcp", target, "--interval", "50"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().context("stdout")?;
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else {
                    continue;
                };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Stream { child, events })
    }
}
