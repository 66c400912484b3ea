//! `adit local logs`.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use adit_local::{MeshStatus, Running};
use anyhow::Context as _;

use super::{NameArg, pod};
use crate::output::{Outcome, Output};

const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Show the log of a pod or a component
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `pod`, `namespace/pod`, `aditd`, `ztunnel-<node>` or `<gateway>.<namespace>`
    target: String,
    /// Namespace of the pod
    #[arg(short, long)]
    namespace: Option<String>,
    /// Container of the pod [default: its first]
    #[arg(short, long)]
    container: Option<String>,
    /// Go on with what comes, until the mesh is gone
    #[arg(short, long)]
    follow: bool,
    /// Only so many lines from the end
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    #[command(flatten)]
    mesh: NameArg,
}

pub fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let running = args.mesh.mesh()?;
    let path = log_path(&running.status()?, args)?;
    let text = match fs::read(&path) {
        Ok(text) => text,
        // Nothing has been started yet.
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let begin = args.tail.map_or(0, |lines| tail_offset(&text, lines));
    out.write_all(&text[begin..])?;
    if args.follow {
        follow(&running, &path, text.len() as u64, out)?;
    }
    Ok(Outcome::Well)
}

fn log_path(status: &MeshStatus, args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(component) = status.component(&args.target) {
        return Ok(component.log.clone());
    }
    let (namespace, name) = pod(status, &args.target, args.namespace.as_deref())?;
    let pod = status
        .pod(&namespace, &name)
        .with_context(|| format!("mesh {} has no pod {namespace}/{name}", status.name))?;
    let mut containers = pod.containers.iter();
    let container = match &args.container {
        None => containers.next(),
        Some(wanted) => containers.find(|container| container.name == *wanted),
    };
    let container = container.with_context(|| {
        let names: Vec<&str> = pod.containers.iter().map(|c| c.name.as_str()).collect();
        let names = names.join(", ");
        format!("pod {namespace}/{name} has no such container; it has {names}")
    })?;
    Ok(container.log.clone())
}

/// Where the last `lines` lines begin.
fn tail_offset(text: &[u8], lines: usize) -> usize {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let ends = body.iter().enumerate().rev();
    let mut ends = ends.filter(|(_, byte)| **byte == b'\n');
    match lines {
        0 => text.len(),
        lines => ends.nth(lines - 1).map_or(0, |(at, _)| at + 1),
    }
}

fn follow(running: &Running, path: &Path, mut at: u64, out: &mut Output) -> anyhow::Result<()> {
    while running.status().is_ok() {
        if let Ok(mut file) = File::open(path) {
            // A log that was cut short begins anew.
            if file.metadata()?.len() < at {
                at = 0;
            }
            file.seek(SeekFrom::Start(at))?;
            let mut more = Vec::new();
            at += file.read_to_end(&mut more)? as u64;
            out.write_all(&more)?;
        }
        out.flush()?;
        sleep(FOLLOW_INTERVAL);
    }
    Ok(())
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
}
