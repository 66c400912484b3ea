//! The kubelet stand-in of one node: a small process in the node's namespace and in
//! its `kubelet` cgroup that carries out readiness probes, one JSON line each way.
//! It ends when its input does, so it never outlives its supervisor.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

/// Probes in flight; the supervisor sends one per container.
const MAX_WAITING: usize = 1024;
/// A status line is much shorter.
const MAX_HEAD: usize = 4096;

/// One probe to carry out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProbeRequest {
    /// Comes back in the answer.
    pub id: u64,
    /// Address of the pod.
    pub address: IpAddr,
    /// Port of the pod.
    pub port: u16,
    /// For an HTTP probe; without it the connection alone counts.
    pub http: Option<HttpProbe>,
    /// Deadline of the whole probe.
    pub timeout_ms: u64,
}

/// The HTTP half of a probe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HttpProbe {
    /// Path and query.
    pub path: String,
    /// Additional headers.
    pub headers: Vec<(String, String)>,
}

/// How a probe went.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// Of the request.
    pub id: u64,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// The program: requests on standard input, answers on standard output, both pipes.
///
/// # Errors
/// When standard input or output fail.
pub fn main() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve())
}

async fn serve() -> std::io::Result<()> {
    let (answers, mut outbox) = mpsc::channel::<ProbeAnswer>(MAX_WAITING);
    let mut stdout = pipe::Sender::from_owned_fd(std::io::stdout().as_fd().try_clone_to_owned()?)?;
    let stdin = pipe::Receiver::from_owned_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    let writer = tokio::spawn(async move {
        while let Some(answer) = outbox.recv().await {
            let mut line = serde_json::to_vec(&answer)?;
            line.push(b'\n');
            stdout.write_all(&line).await?;
        }
        Ok::<_, std::io::Error>(())
    });
    let mut lines = BufReader::new(stdin).lines();
    while let Some(line) = lines.next_line().await? {
        let request: ProbeRequest = serde_json::from_str(&line)?;
        let answers = answers.clone();
        tokio::spawn(async move {
            let limit = Duration::from_millis(request.timeout_ms);
            let failure = match tokio::time::timeout(limit, probe(&request)).await {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure),
                Err(_) => Some(format!("no answer within {} ms", request.timeout_ms)),
            };
            let id = request.id;
            // The receiver lives as long as standard output does.
            let _ = answers.send(ProbeAnswer { id, failure }).await;
        });
    }
    writer.abort();
    Ok(())
}

async fn probe(request: &ProbeRequest) -> Result<(), String> {
    let address = SocketAddr::new(request.address, request.port);
    let mut stream = TcpStream::connect(address)
        .await
        .map_err(|error| format!("connect {address}: {error}"))?;
    let Some(http) = &request.http else {
        return Ok(());
    };
    let mut head = format!(
        "GET {} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: kube-probe/adit\r\nConnection: close\r\n",
        http.path
    );
    for (name, value) in &http.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let failed = |error: std::io::Error| format!("GET {address}{}: {error}", http.path);
    stream.write_all(head.as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::new();
    let mut chunk = [0; 512];
    while !answer.contains(&b'\n') && answer.len() < MAX_HEAD {
        match stream.read(&mut chunk).await.map_err(failed)? {
            0 => break,
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
    let status = status_of(&answer).ok_or_else(|| format!("{address} does not speak HTTP"))?;
    // Kubernetes: "any code greater than or equal to 200 and less than 400".
    match (200..400).contains(&status) {
        true => Ok(()),
        false => Err(format!("GET {address}{}: status {status}", http.path)),
    }
}

fn status_of(answer: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(answer.split(|b| *b == b'\n').next()?).ok()?;
    let mut words = line.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/"))?;
    words.next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines() {
        assert_eq!(status_of(b"HTTP/1.1 200 OK\r\nx"), Some(200));
        assert_eq!(status_of(b"HTTP/1.1 404\r\n"), Some(404));
        assert_eq!(status_of(b"SSH-2.0-x\r\n"), None);
        assert_eq!(status_of(b""), None);
    }
}
