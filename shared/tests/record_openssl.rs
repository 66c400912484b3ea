//! Our record layer against OpenSSL (`s_server`, `s_client`), which shares no code with it.
//!
//! Skipped, loudly, where there is no `openssl` of version 1.1.1 or later.

#[path = "support/tls.rs"]
mod tls;

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::hbone::record::{TlsError, TlsStream};
use tempfile::TempDir;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use tls::{HANDSHAKE, Pki, SUITES, name};

const DEADLINE: Duration = Duration::from_secs(30);

/// OpenSSL's names of [`SUITES`].
const NAMES: [&str; 3] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
];

struct Openssl {
    directory: TempDir,
    pki: Pki,
}

impl Openssl {
    fn new() -> Option<Self> {
        let version = std::process::Command::new("openssl")
            .arg("version")
            .output();
        if !version.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: there is no openssl on this machine; interoperation is not tested");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let pki = Pki::new();
        let write = |name: &str, content: &str| {
            std::fs::write(directory.path().join(name), content).expect("written");
        };
        write("ca.pem", &pki.ca_pem);
        write("cert.pem", &pki.cert_pem);
        write("key.pem", &pki.key_pem);
        Some(Self { directory, pki })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn spawn(&self, arguments: &[&str]) -> Peer {
        let mut child = Command::new("openssl")
            .args(arguments)
            .args(["-cert", "cert.pem", "-key", "key.pem", "-CAfile", "ca.pem"])
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("openssl starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let errors = BufReader::new(child.stderr.take().expect("piped"));
        Peer {
            child,
            input,
            output,
            errors,
        }
    }

    /// `s_server` on a port of its choice.
    async fn server(&self, arguments: &[&str]) -> (Peer, TcpStream) {
        let port = free_port().await;
        let accept = port.to_string();
        let arguments = [
            &[
                "s_server",
                "-accept",
                &accept,
                "-Verify",
                "1",
                "-verify_return_error",
            ],
            arguments,
        ]
        .concat();
        let peer = self.spawn(&arguments);
        // It says nothing when quiet: wait until it listens.
        let socket = timeout(DEADLINE, async {
            loop {
                match TcpStream::connect(("127.0.0.1", port)).await {
                    Ok(socket) => break socket,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        (peer, socket.await.expect("s_server listens"))
    }

    /// `s_client`, connected to us.
    async fn client(&self, arguments: &[&str]) -> (Peer, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let arguments = [
            &[
                "s_client",
                "-connect",
                &address,
                "-servername",
                "localhost",
                "-verify_return_error",
            ],
            arguments,
        ]
        .concat();
        let peer = self.spawn(&arguments);
        let accepted = timeout(DEADLINE, listener.accept()).await;
        (
            peer,
            accepted.expect("s_client connects").expect("accepted").0,
        )
    }
}

async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").port()
}

/// The child process; killed when it is dropped.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    errors: BufReader<ChildStderr>,
}

impl Peer {
    async fn says(&mut self, line: &str) {
        self.input
            .write_all(line.as_bytes())
            .await
            .expect("written");
        self.input.flush().await.expect("flushed");
    }

    /// Waits for a line that begins with `start` and ends with `end`.
    async fn shows(&mut self, start: &str, end: &str) {
        wait_for(&mut self.output, start, end).await;
    }
}

async fn wait_for(output: &mut (impl AsyncBufRead + Unpin), start: &str, end: &str) {
    let found = timeout(DEADLINE, async {
        let mut line = Vec::new();
        loop {
            line.clear();
            let len = output.read_until(b'\n', &mut line).await.expect("output");
            assert!(
                len > 0,
                "openssl ended before it showed {start:?} .. {end:?}"
            );
            let line = String::from_utf8_lossy(&line);
            if line.starts_with(start) && line.trim_end().ends_with(end) {
                break;
            }
        }
    });
    let shown = found.await;
    assert!(shown.is_ok(), "openssl never showed {start:?} .. {end:?}");
}

type Stream = TlsStream<TcpStream>;

async fn hears(stream: &mut Stream, text: &str) {
    let mut got = vec![0; text.len()];
    let read = timeout(DEADLINE, stream.read_exact(&mut got)).await;
    read.expect("in time").expect("read");
    assert_eq!(String::from_utf8_lossy(&got), text);
}

async fn says(stream: &mut Stream, text: &str) {
    stream.write_all(text.as_bytes()).await.expect("written");
    stream.flush().await.expect("flushed");
}

/// Lines both ways, with KeyUpdates of both kinds from OpenSSL in between, and with ours every
/// third record if `limited`.
async fn talk(mut peer: Peer, mut stream: Stream, client: bool, limited: bool) {
    if limited {
        stream.limit_records_per_key(3);
    }
    for round in 0..4 {
        for update in ["", "k\n", "K\n"] {
            // A command is one only if it comes alone, so its effect is to be waited for. The
            // client takes note and updates with its next data; the server does it at once.
            if !update.is_empty() {
                peer.says(update).await;
                if client {
                    wait_for(&mut peer.errors, "KEYUPDATE", "").await;
                } else {
                    peer.shows(">>>", "KeyUpdate").await;
                }
            }
            let line = format!("x{round} from openssl\n");
            peer.says(&line).await;
            hears(&mut stream, &line).await;
            let line = format!("y{round} from us");
            says(&mut stream, &format!("{line}\n")).await;
            if update == "K\n" && !limited {
                // We answer what is asked.
                peer.shows("<<<", "KeyUpdate").await;
            }
            peer.shows("", &line).await;
        }
        if limited {
            for _ in 0..3 {
                says(&mut stream, "z\n").await;
            }
            peer.shows("<<<", "KeyUpdate").await;
        }
    }
    // Either side closes once; `s_server` does so only in answer.
    if client {
        peer.says("Q\n").await;
    } else {
        stream.shutdown().await.expect("shut down");
    }
    let mut rest = Vec::new();
    let end = timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
    end.expect("in time").expect("OpenSSL closes cleanly");
    let status = timeout(DEADLINE, peer.child.wait()).await;
    status.expect("openssl ends").expect("waited");
}

#[tokio::test]
async fn openssl_as_a_server_with_key_updates() {
    let Some(openssl) = Openssl::new() else {
        return;
    };
    for (suite, suite_name) in SUITES.into_iter().zip(NAMES) {
        for limited in [false, true] {
            let arguments = [
                "-tls1_3",
                "-msg",
                "-ciphersuites",
                suite_name,
                "-naccept",
                "1",
            ];
            let (peer, socket) = openssl.server(&arguments).await;
            let config = Arc::new(openssl.pki.client(suite));
            let stream = TlsStream::connect(socket, config, name(), HANDSHAKE).await;
            talk(peer, stream.expect("connected"), false, limited).await;
        }
    }
}

#[tokio::test]
async fn openssl_as_a_client_with_key_updates() {
    let Some(openssl) = Openssl::new() else {
        return;
    };
    for (suite, suite_name) in SUITES.into_iter().zip(NAMES) {
        for limited in [false, true] {
            let arguments = ["-tls1_3", "-msg", "-ciphersuites", suite_name];
            let (peer, socket) = openssl.client(&arguments).await;
            let config = Arc::new(openssl.pki.server(suite));
            let stream = TlsStream::accept(socket, config, HANDSHAKE).await;
            talk(peer, stream.expect("accepted"), true, limited).await;
        }
    }
}

/// 64 MiB each way, with records of a size of OpenSSL's choice and padded ones.
#[tokio::test]
async fn bulk_to_and_from_openssl() {
    let Some(openssl) = Openssl::new() else {
        return;
    };
    let data: Vec<u8> = (0..64u32 << 20).map(|i| (i % 249) as u8).collect();
    for padding in [&[][..], &["-record_padding", "4096"]] {
        let arguments = [&["-tls1_3", "-quiet", "-naccept", "1"], padding].concat();
        let (peer, socket) = openssl.server(&arguments).await;
        let config = Arc::new(openssl.pki.client(SUITES[0]));
        let stream = TlsStream::connect(socket, config, name(), HANDSHAKE).await;
        let (mut rx, mut tx) = tokio::io::split(stream.expect("connected"));
        let Peer {
            mut child,
            mut input,
            mut output,
            ..
        } = peer;
        let (mut there, mut here) = (vec![0; data.len()], vec![0; data.len()]);
        let moved = timeout(DEADLINE * 2, async {
            tokio::join!(
                async {
                    tx.write_all(&data).await.expect("written");
                    tx.flush().await.expect("flushed");
                },
                async { input.write_all(&data).await.expect("written") },
                async { rx.read_exact(&mut here).await.map(drop).expect("read") },
                async {
                    output
                        .read_exact(&mut there)
                        .await
                        .map(drop)
                        .expect("output")
                },
            )
        });
        moved.await.expect("in time");
        assert!(there == data, "us to OpenSSL");
        assert!(here == data, "OpenSSL to us");
        child.kill().await.expect("killed");
    }
}

#[tokio::test]
async fn nothing_below_tls_1_3_is_spoken() {
    let Some(openssl) = Openssl::new() else {
        return;
    };
    let (_peer, socket) = openssl.server(&["-tls1_2", "-naccept", "1"]).await;
    let config = Arc::new(openssl.pki.client(SUITES[0]));
    let refused = TlsStream::connect(socket, config, name(), HANDSHAKE).await;
    assert!(
        matches!(refused, Err(TlsError::Handshake(_))),
        "{refused:?}"
    );
    let (_peer, socket) = openssl.client(&["-tls1_2"]).await;
    let config = Arc::new(openssl.pki.server(SUITES[0]));
    let refused = TlsStream::accept(socket, config, HANDSHAKE).await;
    assert!(
        matches!(refused, Err(TlsError::Handshake(_))),
        "{refused:?}"
    );
}
