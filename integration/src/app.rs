//! Apps in pods that are threads of the test: they keep what they are asked, and answer what
//! the test wants.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::mesh::{Pod, TestMesh};

/// A request's head and body are no longer.
const MAX_REQUEST: usize = 1 << 20;
/// A client that says nothing for so long is left.
const IDLE: Duration = Duration::from_secs(10);
/// How often the end is looked for.
const POLL: Duration = Duration::from_millis(10);

/// A request as it came over HTTP/1.1.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Headers in their order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Asked {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        all.find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// What is answered: status, headers, body.
pub type Reply = (u16, Vec<(&'static str, String)>, String);

type Requests = Arc<Mutex<Vec<Asked>>>;

/// An HTTP/1.1 server, one request a connection; it ends when it is dropped.
pub struct HttpApp {
    requests: Requests,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HttpApp {
    /// The requests so far.
    pub fn requests(&self) -> Vec<Asked> {
        let requests = self.requests.lock().unwrap_or_else(|e| e.into_inner());
        requests.clone()
    }

    /// How many of them have `text` in their path and query.
    pub fn count(&self, text: &str) -> usize {
        let requests = self.requests.lock().unwrap_or_else(|e| e.into_inner());
        requests.iter().filter(|r| r.path.contains(text)).count()
    }
}

impl Drop for HttpApp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl TestMesh {
    /// An HTTP server in a pod that answers what `answer` says.
    ///
    /// # Errors
    /// The port is taken.
    pub fn http_app(
        &self,
        pod: Pod<'_>,
        port: u16,
        answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> anyhow::Result<HttpApp> {
        let listener = self.listen(pod, port)?;
        listener.set_nonblocking(true)?;
        let requests = Requests::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (into, until) = (requests.clone(), stop.clone());
        let answer = Arc::new(answer);
        let thread = std::thread::spawn(move || {
            accept(&listener, &until, |stream| {
                let (into, answer) = (into.clone(), answer.clone());
                std::thread::spawn(move || {
                    // A client that goes away is no news.
                    let _ = serve(stream, &into, answer.as_ref());
                });
            });
        });
        Ok(HttpApp {
            requests,
            stop,
            thread: Some(thread),
        })
    }
}

fn accept(listener: &TcpListener, stop: &AtomicBool, serve: impl Fn(TcpStream)) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => serve(stream),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn serve(
    mut stream: TcpStream,
    requests: &Requests,
    answer: &dyn Fn(&Asked) -> Reply,
) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let Some(asked) = read(&mut stream)? else {
        return Ok(());
    };
    let (status, headers, body) = answer(&asked);
    let mut requests = requests.lock().unwrap_or_else(|e| e.into_inner());
    requests.push(asked);
    drop(requests);
    let mut head = format!("HTTP/1.1 {status} Answer\r\nconnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    // A close with unread bytes would be a reset.
    let _ = stream.read(&mut [0; 64]);
    Ok(())
}

fn read(stream: &mut TcpStream) -> std::io::Result<Option<Asked>> {
    let mut buffer = Vec::new();
    let mut chunk = [0; 4096];
    let mut more = |buffer: &mut Vec<u8>| -> std::io::Result<bool> {
        let read = stream.read(&mut chunk)?;
        buffer.extend_from_slice(&chunk[..read]);
        Ok(read > 0 && buffer.len() <= MAX_REQUEST)
    };
    let end = loop {
        if let Some(end) = find(&buffer, b"\r\n\r\n") {
            break end;
        }
        if !more(&mut buffer)? {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let mut asked = Asked {
        method: first.next().unwrap_or_default().to_owned(),
        path: first.next().unwrap_or_default().to_owned(),
        ..Asked::default()
    };
    for line in lines {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let header = (name.to_ascii_lowercase(), value.trim().to_owned());
        asked.headers.push(header);
    }
    buffer.drain(..end + 4);
    let length = asked.header("content-length");
    if let Some(length) = length.and_then(|text| text.parse::<usize>().ok()) {
        while buffer.len() < length {
            if !more(&mut buffer)? {
                return Ok(None);
            }
        }
    } else if asked.header("transfer-encoding").is_some() {
        while find(&buffer, b"0\r\n\r\n").is_none() {
            if !more(&mut buffer)? {
                return Ok(None);
            }
        }
    }
    asked.body = buffer;
    Ok(Some(asked))
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|w| w == what)
}
