//! Runs the helper programs `ip` and `nft`: input on standard input, a deadline, and
//! their standard error in our error.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::sandbox::Sandbox;
use crate::error::LocalError;

/// No helper takes longer on a machine that works.
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `ip -batch -` in the network namespace.
pub(crate) fn ip(netns: &Path, what: &str, batch: &str) -> Result<(), LocalError> {
    run("ip", &["-batch", "-"], netns, what, batch)
}

/// The same, but goes on after a command that failed.
pub(crate) fn ip_all(netns: &Path, what: &str, batch: &str) -> Result<(), LocalError> {
    run("ip", &["-force", "-batch", "-"], netns, what, batch)
}

/// Runs `nft -f -` in the network namespace.
pub(crate) fn nft(netns: &Path, what: &str, ruleset: &str) -> Result<(), LocalError> {
    run("nft", &["-f", "-"], netns, what, ruleset)
}

fn run(
    program: &'static str,
    args: &[&str],
    netns: &Path,
    what: &str,
    input: &str,
) -> Result<(), LocalError> {
    let failed = |message: String| LocalError::Helper {
        program,
        what: what.into(),
        message,
    };
    let path = find(program).ok_or_else(|| {
        failed(format!(
            "{program} is not installed (Debian: iproute2, nftables)"
        ))
    })?;
    let mut command: Command = Sandbox::netns_only(netns)?.command(&path);
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(LocalError::system(format!(
        "cannot run {program} for {what}"
    )))?;
    // Apart, so that a helper that writes before it has read everything cannot block us.
    let mut stdin = child.stdin.take();
    let input = input.to_owned();
    let writer = thread::spawn(move || {
        if let Some(stdin) = stdin.as_mut() {
            // The exit status tells what went wrong.
            let _ = stdin.write_all(input.as_bytes());
        }
    });
    let mut stderr = child.stderr.take();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        if let Some(stderr) = stderr.as_mut() {
            let _ = stderr.take(16 * 1024).read_to_string(&mut text);
        }
        text
    });
    let until = Instant::now() + DEADLINE;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_micros(500)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                break Err(failed(format!("no end after {} s", DEADLINE.as_secs())));
            }
            Err(error) => break Err(failed(error.to_string())),
        }
    };
    let _ = writer.join();
    let message = reader.join().unwrap_or_default();
    let status = status?;
    if status.success() {
        return Ok(());
    }
    Err(failed(format!("{status}: {}", message.trim())))
}

/// Helpers are often outside the `PATH` of an ordinary shell.
fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"])
        .map(|dir| Path::new(dir).join(program))
        .find(|candidate| File::open(candidate).is_ok())
}
