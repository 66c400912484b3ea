//! Calls between programs of one node: HTTP/1.1 over a Unix socket, with a descriptor that
//! travels beside the request (`SCM_RIGHTS`).
//!
//! This is how the CNI plugin gives the network namespace of a pod that is being made to
//! the node agent, and the node agent to ztunnel. A path would not do: each of them has
//! mounts of its own, and a path may mean another namespace by the time it is opened.
//!
//! A connection carries one request. Only root is served. The calling side blocks: the
//! plugin is a process of a few milliseconds that has no use for a runtime.

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use parking_lot::Mutex;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// The most bytes of a body, either way.
pub const MAX_BODY: usize = 256 << 10;
/// Calls at the same time; more wait in the listener's backlog.
const MAX_CALLS: usize = 128;
/// For the request to arrive.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// For a call altogether. Handlers have deadlines of their own, below this one.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// A socket whose file somebody removed is made again after so long.
const PLACE_LOOK: Duration = Duration::from_secs(1);
/// After an accept that failed for lack of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Descriptors that one message may bring: all that the kernel lets anybody send
/// (`SCM_MAX_FD`). All but the first are closed; with room for fewer, those that were already
/// made for us would stay open.
const MAX_PASSED: usize = 253;

/// What a caller asks for.
#[derive(Debug)]
pub struct Call {
    /// Method.
    pub method: Method,
    /// Path of the target.
    pub path: String,
    /// Query of the target, without the question mark.
    pub query: String,
    /// At most [`MAX_BODY`] bytes.
    pub body: Bytes,
    /// What was passed along.
    pub descriptor: Option<OwnedFd>,
}

/// What it is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// JSON, or a sentence that says why not.
    pub body: Bytes,
}

impl Answer {
    /// An answer with `body`.
    pub fn new(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            body: body.into(),
        }
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim().to_owned()
    }
}

/// A listening socket in the file system. Dropped, it removes its file, unless that is
/// another process's by now.
#[derive(Debug)]
pub struct HandoffListener {
    listener: UnixListener,
    path: PathBuf,
    file: Option<(u64, u64)>,
}

impl HandoffListener {
    /// Opens the socket with mode 0600. One that is there already is replaced in one step:
    /// whoever listened on it keeps the calls it has, and gets no more.
    ///
    /// # Errors
    /// As `bind(2)`; `AlreadyExists` if the path is something else than a socket.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "the path is there and is not a socket",
            ));
        }
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(temporary);
        let _ = std::fs::remove_file(&temporary);
        // Nobody connects before the mode is right: the name is not known yet.
        let listener = UnixListener::bind(&temporary)?;
        let placed = std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))
            .and_then(|()| std::fs::rename(&temporary, path));
        if let Err(error) = placed {
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: file_id(path),
        })
    }

    /// Whether callers of the path still come here.
    pub fn is_in_place(&self) -> bool {
        self.file.is_some() && file_id(&self.path) == self.file
    }

    /// Answers calls by `handler` until dropped.
    pub async fn serve<H, F>(self, handler: H)
    where
        H: Fn(Call) -> F + Send + Sync + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(MAX_CALLS));
        self.answer_calls(&Arc::new(handler), &slots).await;
    }

    /// As [`HandoffListener::serve`]; the socket is made again when somebody removes its file.
    /// A successor that has taken the path over keeps it, for good.
    pub async fn serve_at<H, F>(mut self, handler: H)
    where
        H: Fn(Call) -> F + Send + Sync + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let slots = Arc::new(Semaphore::new(MAX_CALLS));
        loop {
            tokio::select! {
                () = self.answer_calls(&handler, &slots) => {}
                () = self.removed() => {}
            }
            tracing::warn!(path = %self.path.display(), "the socket was removed; it is made again");
            let mut complaint = None;
            self = loop {
                let made = match self.path.parent() {
                    Some(directory) => std::fs::create_dir_all(directory),
                    None => Ok(()),
                };
                match made.and_then(|()| Self::bind(&self.path)) {
                    Ok(listener) => break listener,
                    Err(error) => {
                        let error = error.to_string();
                        if complaint.as_ref() != Some(&error) {
                            tracing::warn!(path = %self.path.display(), "cannot listen: {error}");
                        }
                        complaint = Some(error);
                    }
                }
                tokio::time::sleep(PLACE_LOOK).await;
            };
        }
    }

    /// Returns when the file was removed and nobody has put another one in its place.
    async fn removed(&self) {
        loop {
            match file_id(&self.path) {
                None => return,
                // What becomes of a successor's is its affair.
                found if found != self.file => return std::future::pending().await,
                Some(_) => tokio::time::sleep(PLACE_LOOK).await,
            }
        }
    }

    async fn answer_calls<H, F>(&self, handler: &Arc<H>, slots: &Arc<Semaphore>)
    where
        H: Fn(Call) -> F + Send + Sync + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, path = %self.path.display(), "cannot accept a call");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // The mode says so already; a directory that somebody opened up does not change it.
            if !stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) {
                continue;
            }
            let handler = handler.clone();
            tokio::spawn(async move {
                // A caller that left, or sent something else than HTTP, is no event.
                let _ = tokio::time::timeout(CALL_DEADLINE, answer_one(stream, handler)).await;
                drop(slot);
            });
        }
    }
}

impl Drop for HandoffListener {
    fn drop(&mut self) {
        if self.is_in_place() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

async fn answer_one<H, F>(stream: UnixStream, handler: Arc<H>) -> hyper::Result<()>
where
    H: Fn(Call) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let passed = Passed::default();
    let io = TokioIo::new(ReceivingStream {
        stream,
        passed: passed.clone(),
    });
    let service = service_fn(move |request| {
        let (handler, passed) = (handler.clone(), passed.clone());
        async move {
            let answer = match read_call(request, &passed).await {
                Ok(call) => handler(call).await,
                Err(refusal) => refusal,
            };
            let mut response = Response::new(Full::new(answer.body));
            *response.status_mut() = answer.status;
            Ok::<_, Infallible>(response)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_DEADLINE)
        .keep_alive(false)
        .max_buf_size(32 << 10)
        .serve_connection(io, service)
        .await
}

async fn read_call(request: Request<Incoming>, passed: &Passed) -> Result<Call, Answer> {
    let (head, body) = request.into_parts();
    let body = tokio::time::timeout(REQUEST_DEADLINE, Limited::new(body, MAX_BODY).collect());
    let body = match body.await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => {
            return Err(Answer::new(StatusCode::BAD_REQUEST, error.to_string()));
        }
        Err(_) => return Err(Answer::new(StatusCode::REQUEST_TIMEOUT, "the body is late")),
    };
    Ok(Call {
        method: head.method,
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        body,
        descriptor: passed.0.lock().take(),
    })
}

/// The first descriptor that came over a connection.
#[derive(Debug, Default, Clone)]
struct Passed(Arc<Mutex<Option<OwnedFd>>>);

/// A stream that looks for descriptors beside the bytes.
#[derive(Debug)]
struct ReceivingStream {
    stream: UnixStream,
    passed: Passed,
}

impl AsyncRead for ReceivingStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            let received = self.stream.try_io(Interest::READABLE, || {
                receive(self.stream.as_raw_fd(), space)
            });
            match received {
                Ok((count, descriptor)) => {
                    buffer.advance(count);
                    if let Some(descriptor) = descriptor {
                        self.passed.0.lock().get_or_insert(descriptor);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

fn receive(socket: RawFd, space: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_PASSED]);
    let mut iov = [IoSliceMut::new(space)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket, &mut iov, Some(&mut control), flags)?;
    let mut first = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel has just made it for this process, and nobody else knows it.
                let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
                first.get_or_insert(descriptor);
            }
        }
    }
    Ok((message.bytes, first))
}

impl AsyncWrite for ReceivingStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Why a call got no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("nobody answers at {path}: {source}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the call to {path} broke off: {source}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It took too long.
    #[error("no answer from {path} within {limit:?}")]
    Late {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// What came is not an HTTP response.
    #[error("the answer of {0} is not understood")]
    Malformed(PathBuf),
}

/// Calls `target` at the socket `path` and waits for the answer, `limit` at most. Blocks.
///
/// # Errors
/// [`CallError`]; any answer is no error.
pub fn call(
    path: &Path,
    method: &Method,
    target: &str,
    body: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    limit: Duration,
) -> Result<Answer, CallError> {
    let until = Instant::now() + limit;
    let broken = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => CallError::Late {
            path: path.to_owned(),
            limit,
        },
        _ => CallError::Broken {
            path: path.to_owned(),
            source,
        },
    };
    let mut stream = connect(path, limit).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => CallError::Late {
            path: path.to_owned(),
            limit,
        },
        _ => CallError::Unreachable {
            path: path.to_owned(),
            source,
        },
    })?;
    let mut request = format!(
        "{method} {target} HTTP/1.1\r\nhost: node\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    send(&mut stream, &request, descriptor).map_err(broken)?;

    let mut response = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(broken(io::ErrorKind::TimedOut.into()));
        }
        stream.set_read_timeout(Some(left)).map_err(broken)?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => response.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
        if response.len() > MAX_BODY + (32 << 10) {
            return Err(CallError::Malformed(path.to_owned()));
        }
    }
    parse(&response).ok_or_else(|| CallError::Malformed(path.to_owned()))
}

/// With a deadline: `connect` of a Unix socket waits while the backlog is full.
fn connect(path: &Path, limit: Duration) -> io::Result<StdUnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(limit))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

fn send(
    stream: &mut StdUnixStream,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let raw = [descriptor.as_ref().map_or(-1, |fd| fd.as_raw_fd())];
    let control = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if descriptor.is_some() { &control } else { &[] };
    let sent = sendmsg::<()>(
        stream.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    stream.write_all(&bytes[sent..])
}

/// A response whose body ends with the connection, or with its `content-length`.
fn parse(response: &[u8]) -> Option<Answer> {
    let end = response.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&response[..end]).ok()?;
    let body = &response[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?;
    let status = StatusCode::from_bytes(status.as_bytes()).ok()?;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            let length: usize = value.trim().parse().ok()?;
            if body.len() != length {
                return None;
            }
        }
        // Our servers never send chunks.
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return None;
        }
    }
    Some(Answer::new(status, body.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    async fn ask(path: &Path, target: &'static str, body: Vec<u8>) -> Result<Answer, CallError> {
        let path = path.to_owned();
        let limit = Duration::from_secs(5);
        tokio::task::spawn_blocking(move || call(&path, &Method::POST, target, &body, None, limit))
            .await
            .expect("no panic")
    }

    async fn echo(call: Call) -> Answer {
        let what = format!(
            "{} {} {} {}",
            call.method,
            call.path,
            call.query,
            call.body.len()
        );
        Answer::new(StatusCode::OK, what)
    }

    #[tokio::test]
    async fn a_call_arrives_and_is_answered() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let listener = HandoffListener::bind(&path).expect("bound");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let server = tokio::spawn(listener.serve(echo));
        let answer = ask(&path, "/pods?x=1", vec![b'x'; 100_000]).await;
        assert_eq!(answer.expect("answered").text(), "POST /pods x=1 100000");
        let answer = ask(&path, "/pods", vec![0; MAX_BODY + 1]).await;
        assert_eq!(answer.expect("answered").status, StatusCode::BAD_REQUEST);
        server.abort();
        let _ = server.await;
        assert!(!path.exists(), "its file goes with it");
        let refused = ask(&path, "/pods", Vec::new()).await;
        assert!(matches!(refused, Err(CallError::Unreachable { .. })));
    }

    #[tokio::test]
    async fn a_descriptor_travels_along() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let listener = HandoffListener::bind(&path).expect("bound");
        let _server = tokio::spawn(listener.serve(|call: Call| async move {
            let mut text = String::new();
            if let Some(descriptor) = call.descriptor {
                let mut file = std::fs::File::from(descriptor);
                file.read_to_string(&mut text).expect("readable");
            }
            Answer::new(StatusCode::OK, text)
        }));
        let inside = directory.path().join("inside");
        std::fs::write(&inside, "what is in the file").expect("written");
        let file = std::fs::File::open(&inside).expect("there");
        let answer = tokio::task::spawn_blocking(move || {
            let limit = Duration::from_secs(5);
            call(&path, &Method::POST, "/", b"{}", Some(file.as_fd()), limit)
        });
        let answer = answer.await.expect("no panic").expect("answered");
        assert_eq!(answer.text(), "what is in the file");
    }

    #[tokio::test]
    async fn a_successor_takes_the_path_over() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let old = HandoffListener::bind(&path).expect("bound");
        let new = HandoffListener::bind(&path).expect("bound again");
        assert!(!old.is_in_place() && new.is_in_place());
        drop(old);
        let _server = tokio::spawn(new.serve(echo));
        assert!(ask(&path, "/", Vec::new()).await.is_ok());
    }

    #[tokio::test]
    async fn a_socket_that_was_removed_is_made_again() {
        let directory = scratch();
        let path = directory.path().join("run/a.sock");
        std::fs::create_dir(directory.path().join("run")).expect("made");
        let listener = HandoffListener::bind(&path).expect("bound");
        let _server = tokio::spawn(listener.serve_at(echo));
        assert!(ask(&path, "/", Vec::new()).await.is_ok());
        for removed in [&path, &directory.path().join("run")] {
            if removed.is_dir() {
                std::fs::remove_dir_all(removed).expect("removed");
            } else {
                std::fs::remove_file(removed).expect("removed");
            }
            let deadline = Instant::now() + Duration::from_secs(20);
            while ask(&path, "/", Vec::new()).await.is_err() {
                assert!(Instant::now() < deadline, "it does not come back");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// It may be ending, and must not be asked when its successor ends before it.
    #[tokio::test(start_paused = true)]
    async fn a_path_that_a_successor_took_over_is_left_to_it() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let old = HandoffListener::bind(&path).expect("bound");
        let mut removed = std::pin::pin!(old.removed());
        let moment = 3 * PLACE_LOOK;
        assert!(tokio::time::timeout(moment, &mut removed).await.is_err());
        let new = HandoffListener::bind(&path).expect("bound again");
        assert!(tokio::time::timeout(moment, &mut removed).await.is_err());
        drop(new);
        assert!(!path.exists());
        assert!(tokio::time::timeout(moment, &mut removed).await.is_err());
    }

    #[tokio::test]
    async fn descriptors_that_nobody_asked_for_are_closed() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let listener = HandoffListener::bind(&path).expect("bound");
        let _server = tokio::spawn(listener.serve(|call: Call| async move {
            Answer::new(StatusCode::OK, call.descriptor.is_some().to_string())
        }));
        let told = tokio::task::spawn_blocking(move || {
            let (mut left, passed) = StdUnixStream::pair().expect("a pair");
            let mut stream = StdUnixStream::connect(&path).expect("connected");
            // As many as the kernel lets pass.
            let many = vec![passed.as_raw_fd(); 253];
            let request = b"POST / HTTP/1.1\r\nhost: node\r\ncontent-length: 0\r\n\r\n";
            let sent = sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(request)],
                &[ControlMessage::ScmRights(&many)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            assert_eq!(sent.expect("sent"), request.len());
            drop(passed);
            let patience = Some(Duration::from_secs(20));
            stream.set_read_timeout(patience).expect("set");
            let mut told = String::new();
            stream.read_to_string(&mut told).expect("answered");
            // It ends when nobody has the other side any more.
            left.set_read_timeout(patience).expect("set");
            let end = left
                .read(&mut [0])
                .expect("somebody still has a descriptor");
            assert_eq!(end, 0);
            told
        });
        let told = told.await.expect("no panic");
        assert!(told.starts_with("HTTP/1.1 200"), "{told}");
        assert!(told.ends_with("true"), "{told}");
    }

    #[tokio::test]
    async fn who_does_not_answer_is_given_up() {
        let directory = scratch();
        let path = directory.path().join("a.sock");
        let listener = HandoffListener::bind(&path).expect("bound");
        let _server = tokio::spawn(listener.serve(|_| std::future::pending::<Answer>()));
        let limit = Duration::from_millis(50);
        let late =
            tokio::task::spawn_blocking(move || call(&path, &Method::GET, "/", &[], None, limit));
        let late = late.await.expect("no panic");
        assert!(matches!(late, Err(CallError::Late { .. })), "{late:?}");
    }

    #[test]
    fn only_whole_responses_are_taken() {
        let whole = parse(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno");
        assert_eq!(whole, Some(Answer::new(StatusCode::NOT_FOUND, "no")));
        for broken in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nno",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 xx\r\n\r\n",
        ] {
            assert_eq!(parse(broken), None, "{:?}", String::from_utf8_lossy(broken));
        }
    }
}
