//! A connection through the mesh is a TCP connection: the same bytes both ways at once, either
//! end may speak first, end its half, or reset; the server sees the client's own address. On
//! every path: HBONE on one node and across, plaintext in and out, IPv4 and IPv6.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Outcome, TestMesh, pod};
use anyhow::Context;

const LIMIT: Duration = Duration::from_secs(10);

/// Name, client, server.
const PATHS: [(&str, &str, &str); 5] = [
    ("HBONE on one node", "shop/client", "shop/near"),
    ("HBONE across nodes", "shop/client", "shop/far"),
    ("plaintext out", "shop/client", "out/far"),
    ("plaintext in", "out/client", "shop/far"),
    ("without the mesh", "out/client", "out/far"),
];

fn mesh() -> anyhow::Result<TestMesh> {
    let mut all = Manifest::two_nodes().ambient("shop").namespace("out", "");
    for (path, node) in [
        ("shop/client", "node1"),
        ("shop/near", "node1"),
        ("shop/far", "node2"),
        ("out/client", "node1"),
        ("out/far", "node2"),
    ] {
        all = all.client(pod(path), node, "default");
    }
    MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()
}

/// A pair of connected sockets over each path, in both address families: the client's, and
/// the one that the server accepted, and who it said it was.
fn over_each_path(
    port: u16,
    mut with: impl FnMut(&str, TcpStream, TcpStream, SocketAddr) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mesh = mesh()?;
    for (name, from, to) in PATHS {
        let listener = mesh.listen(pod(to), port)?;
        for ipv6 in [false, true] {
            let name = format!("{name}, {}", if ipv6 { "IPv6" } else { "IPv4" });
            let (target, own) = match ipv6 {
                false => (mesh.at(pod(to), port)?, mesh.at(pod(from), 0)?),
                true => (mesh.at_v6(pod(to), port)?, mesh.at_v6(pod(from), 0)?),
            };
            let client = mesh
                .connect(pod(from), target)?
                .with_context(|| name.clone())?;
            let (server, peer) = accept(&listener).with_context(|| name.clone())?;
            assert_eq!(
                peer.ip().to_canonical(),
                own.ip(),
                "{name}: the client's address"
            );
            for stream in [&client, &server] {
                stream.set_read_timeout(Some(LIMIT))?;
                stream.set_write_timeout(Some(LIMIT))?;
            }
            with(&name, client, server, peer).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true)?;
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match listener.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() > until {
                    return Err(io::Error::new(ErrorKind::TimedOut, "nobody connected"));
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok((stream, peer)) => {
                stream.set_nonblocking(false)?;
                return Ok((stream, peer));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Bytes that are the same for the same seed, and different at every position.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

const CHUNK: usize = 64 * 1024;

fn send_noise(mut stream: &TcpStream, seed: u64, chunks: usize) -> io::Result<()> {
    let (mut noise, mut buffer) = (Noise(seed), vec![0; CHUNK]);
    for _ in 0..chunks {
        noise.fill(&mut buffer);
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn expect_noise(mut stream: &TcpStream, seed: u64, chunks: usize) -> io::Result<()> {
    let (mut noise, mut expected) = (Noise(seed), vec![0; CHUNK]);
    let mut found = vec![0; CHUNK];
    for index in 0..chunks {
        noise.fill(&mut expected);
        stream.read_exact(&mut found)?;
        if found != expected {
            return Err(io::Error::other(format!("other bytes in chunk {index}")));
        }
    }
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more bytes than were sent")),
    }
}

#[test]
fn large_transfers_both_ways_at_once_arrive_as_they_were_sent() -> anyhow::Result<()> {
    over_each_path(7001, |_, client, server, _| {
        let (up, down) = (160, 96);
        thread::scope(|scope| {
            let all = [
                scope.spawn(|| send_noise(&client, 1, up)),
                scope.spawn(|| expect_noise(&server, 1, up)),
                scope.spawn(|| send_noise(&server, 2, down)),
                scope.spawn(|| expect_noise(&client, 2, down)),
            ];
            for (index, one) in all.into_iter().enumerate() {
                one.join()
                    .map_err(|_| anyhow::anyhow!("panic"))?
                    .with_context(|| format!("part {index}"))?;
            }
            Ok(())
        })
    })
}

#[test]
fn either_side_may_end_its_half_and_go_on_listening() -> anyhow::Result<()> {
    over_each_path(7002, |_, mut client, mut server, _| {
        client.write_all(b"question")?;
        client.shutdown(Shutdown::Write)?;
        let mut text = String::new();
        server.read_to_string(&mut text)?;
        assert_eq!(text, "question");
        // Later, and in two parts.
        thread::sleep(Duration::from_millis(50));
        server.write_all(b"ans")?;
        server.write_all(b"wer")?;
        drop(server);
        let mut text = String::new();
        client.read_to_string(&mut text)?;
        assert_eq!(text, "answer");
        Ok(())
    })?;
    over_each_path(7003, |_, mut client, mut server, _| {
        server.write_all(b"bye")?;
        server.shutdown(Shutdown::Write)?;
        let mut text = String::new();
        client.read_to_string(&mut text)?;
        assert_eq!(text, "bye");
        thread::sleep(Duration::from_millis(50));
        client.write_all(b"wait, ")?;
        client.write_all(b"one more thing")?;
        drop(client);
        let mut text = String::new();
        server.read_to_string(&mut text)?;
        assert_eq!(text, "wait, one more thing");
        Ok(())
    })
}

#[test]
fn a_server_may_speak_first() -> anyhow::Result<()> {
    over_each_path(7004, |_, mut client, mut server, _| {
        server.write_all(b"220 ready\r\n")?;
        let mut greeting = [0; 11];
        client.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"220 ready\r\n");
        client.write_all(b"QUIT\r\n")?;
        let mut quit = [0; 6];
        server.read_exact(&mut quit)?;
        Ok(())
    })
}

/// Closes so that the peer reads a reset.
fn reset(stream: TcpStream) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
    drop(stream);
    Ok(())
}

fn expect_reset(mut stream: TcpStream) -> anyhow::Result<()> {
    let error = loop {
        match stream.read(&mut [0; 64]) {
            Ok(0) => anyhow::bail!("it reads an end in good order, not a reset"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    anyhow::ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    Ok(())
}

#[test]
fn a_reset_arrives_as_a_reset() -> anyhow::Result<()> {
    over_each_path(7005, |_, mut client, mut server, _| {
        client.write_all(b"x")?;
        server.read_exact(&mut [0])?;
        reset(client)?;
        expect_reset(server).context("at the server")
    })?;
    over_each_path(7006, |_, mut client, mut server, _| {
        server.write_all(b"x")?;
        client.read_exact(&mut [0])?;
        reset(server)?;
        expect_reset(client).context("at the client")
    })
}

#[test]
fn a_closed_port_is_refused_quickly() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for (name, from, to) in PATHS {
        for target in [mesh.at(pod(to), 7)?, mesh.at_v6(pod(to), 7)?] {
            let begin = Instant::now();
            let outcome = mesh.echo(pod(from), target)?;
            assert!(outcome.is_denied(), "{name}: {outcome:?}");
            assert!(
                begin.elapsed() < Duration::from_secs(2),
                "{name}: {:?}",
                begin.elapsed()
            );
        }
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_its_node_and_what_is_no_pod_at_all() -> anyhow::Result<()> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .server(pod("shop/web"), "node1", "web", "web")
        .service(pod("shop/web"), "web", "ipFamilyPolicy: PreferDualStack");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()?;
    let web = pod("shop/web");
    // By its own addresses, by its Service's, by loopback.
    let mut own = vec![mesh.at(web, 8080)?, mesh.at_v6(web, 8080)?];
    own.extend(
        mesh.vips("shop", "web")?
            .into_iter()
            .map(|vip| SocketAddr::new(vip, 80)),
    );
    own.push("127.0.0.1:8080".parse()?);
    own.push("[::1]:8080".parse()?);
    assert!(own.len() >= 5, "{own:?}");
    for target in own {
        let outcome = mesh.http_get(web, target)?;
        assert_eq!(outcome, Outcome::Answered(200, "web".into()), "{target}");
    }
    // Unmeshed: its own node, the other node.
    let status = mesh.status()?;
    for node in &status.nodes {
        let listener = mesh.in_node(&node.name, || TcpListener::bind("[::]:7100"))??;
        for address in &node.addresses {
            let target = SocketAddr::new(address.parse()?, 7100);
            let mut client = mesh
                .connect(web, target)?
                .with_context(|| target.to_string())?;
            client.write_all(b"hi")?;
            let (mut server, peer) = accept(&listener)?;
            server.set_read_timeout(Some(LIMIT))?;
            let mut text = [0; 2];
            server.read_exact(&mut text)?;
            let own = if target.is_ipv6() {
                mesh.at_v6(web, 0)?
            } else {
                mesh.at(web, 0)?
            };
            assert_eq!(peer.ip().to_canonical(), own.ip(), "{target}");
        }
    }
    Ok(())
}

#[test]
fn many_connections_at_once_do_not_mix() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let listener = mesh.listen(pod("shop/far"), 7200)?;
    let target = mesh.at(pod("shop/far"), 7200)?;
    const COUNT: u64 = 64;
    let sockets = mesh.sockets(pod("shop/client"), false, COUNT as usize)?;
    thread::scope(|scope| {
        let server = scope.spawn(move || -> anyhow::Result<()> {
            thread::scope(|scope| {
                let mut echoes = Vec::new();
                for _ in 0..COUNT {
                    let (stream, _) = accept(&listener)?;
                    echoes.push(scope.spawn(move || -> io::Result<()> {
                        stream.set_read_timeout(Some(LIMIT))?;
                        io::copy(&mut &stream, &mut &stream)?;
                        stream.shutdown(Shutdown::Write)
                    }));
                }
                for echo in echoes {
                    echo.join().map_err(|_| anyhow::anyhow!("panic"))??;
                }
                Ok(())
            })
        });
        let clients: Vec<_> = sockets
            .into_iter()
            .zip(1..)
            .map(|(socket, seed)| {
                scope.spawn(move || -> anyhow::Result<()> {
                    let stream = adit_integration::socket::connect_socket(socket, target, LIMIT)?;
                    thread::scope(|scope| {
                        let sending = scope.spawn(|| send_noise(&stream, seed, 4));
                        expect_noise(&stream, seed, 4).with_context(|| format!("{seed}"))?;
                        sending.join().map_err(|_| anyhow::anyhow!("panic"))??;
                        Ok(())
                    })
                })
            })
            .collect();
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("panic"))??;
        }
        server.join().map_err(|_| anyhow::anyhow!("panic"))?
    })?;
    // One tunnel to one pod carries them, a few at most.
    let open = mesh
        .metrics("node2")?
        .sum("adit_tunnels_open", &[("reporter", "destination")]);
    assert!(
        (1.0..=4.0).contains(&open),
        "{open} tunnels for {COUNT} connections"
    );
    Ok(())
}
