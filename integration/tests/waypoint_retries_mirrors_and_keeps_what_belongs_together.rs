//! What a route does beyond choosing a backend: retries, deadlines, copies, sessions, CORS; and
//! the protocols that are no requests: TCP and TLS by their routes, WebSocket, streams.

use std::sync::Arc;
use std::time::Instant;

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Pod, SharedMesh, TestMesh, pod};
use anyhow::{Context, ensure};

static MESH: SharedMesh = SharedMesh::new();

const CLIENT: Pod<'_> = Pod {
    namespace: "mesh",
    name: "client",
};
const RECORDER: Pod<'_> = Pod {
    namespace: "mesh",
    name: "recorder",
};
const PORTS: &str = "{ name: http, port: 80, targetPort: 8080 }, { name: grpc, port: 7070, \
                     targetPort: 8080 }, { name: tcp, port: 9090, targetPort: 9090 }";

/// A service per behaviour; its HTTPRoute.
const ROUTES: &[(&str, &str)] = &[
    (
        "retried",
        "{ retry: { attempts: 2, codes: [503], backoff: 5ms }, backendRefs: [{ name: retried, port: \
         80 }] }",
    ),
    (
        "counted",
        "{ retry: { attempts: 2, codes: [503], backoff: 5ms }, backendRefs: [{ name: v1, port: 80 \
         }] }",
    ),
    (
        "never",
        "{ retry: { attempts: 0, codes: [503] }, backendRefs: [{ name: v1, port: 80 }] }",
    ),
    (
        "refusing",
        "{ retry: { attempts: 1 }, backendRefs: [{ name: half, port: 80 }] }",
    ),
    (
        "timed",
        "{ matches: [{ path: { value: /delay } }], timeouts: { request: 200ms }, backendRefs: [{ \
         name: v1, port: 80 }] },
         { matches: [{ path: { value: /try } }], timeouts: { request: 5s, backendRequest: 200ms }, \
         backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { value: /none } }], timeouts: { request: 0s }, backendRefs: [{ name: \
         v1, port: 80 }] }",
    ),
    (
        "mirrored",
        "{ matches: [{ path: { value: /all } }], filters: [{ type: RequestHeaderModifier, \
         requestHeaderModifier: { set: [{ name: x-set, value: here }] } }, { type: RequestMirror, \
         requestMirror: { backendRef: { name: recorder, port: 80 } } }], backendRefs: [{ name: v1, \
         port: 80 }] },
         { matches: [{ path: { value: /some } }], filters: [{ type: RequestMirror, requestMirror: { \
         backendRef: { name: recorder, port: 80 }, percent: 30 } }], backendRefs: [{ name: v1, \
         port: 80 }] },
         { matches: [{ path: { value: /dead } }], filters: [{ type: RequestMirror, requestMirror: { \
         backendRef: { name: nowhere, port: 80 } } }], backendRefs: [{ name: v1, port: 80 }] }",
    ),
    (
        "cookies",
        "{ sessionPersistence: { type: Cookie, cookie: { name: session } }, backendRefs: [{ name: \
         cookies, port: 80 }] }",
    ),
    (
        "headers",
        "{ sessionPersistence: { type: Header, header: { name: x-session } }, backendRefs: [{ name: \
         headers, port: 80 }] }",
    ),
    (
        "shared",
        "{ filters: [{ type: CORS, cors: { allowOrigins: ['https://*.example.org'], allowMethods: \
         [GET, PUT], allowHeaders: [x-token], exposeHeaders: [x-seen], allowCredentials: true, \
         maxAge: 600 } }], backendRefs: [{ name: v1, port: 80 }] }",
    ),
    (
        "sockets",
        "{ matches: [{ headers: [{ name: end-user, value: jason }] }], backendRefs: [{ name: v2, \
         port: 80 }] }, { backendRefs: [{ name: v1, port: 80 }] }",
    ),
];

fn manifests() -> Manifest {
    let mut all = Manifest::two_nodes()
        .namespace(
            "mesh",
            "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint",
        )
        .waypoint(pod("mesh/waypoint"), "service")
        .client(CLIENT, "node1", "client")
        .versioned(pod("mesh/echo-v1"), "node1", "echo", "v1")
        .versioned(pod("mesh/echo-v2"), "node2", "echo", "v2")
        .pod(
            RECORDER,
            "node2",
            "recorder",
            "app: recorder",
            "{ name: pause, image: pause }",
        )
        .service_of(
            pod("mesh/recorder"),
            "",
            "app: recorder",
            "{ name: http, port: 80, targetPort: 8080 }",
        )
        // One of its two endpoints refuses every connection.
        .pod(
            pod("mesh/silent"),
            "node1",
            "silent",
            "half: 'yes'",
            "{ name: pause, image: pause }",
        )
        .pod(
            pod("mesh/speaking"),
            "node2",
            "speaking",
            "half: 'yes'",
            "{ name: server, image: adit-sample, command: [adit-sample, serve, --version, half], \
             readinessProbe: { httpGet: { path: /healthz, port: 8080 }, periodSeconds: 1 } }",
        )
        .service_of(pod("mesh/half"), "", "half: 'yes'", PORTS)
        .service_of(pod("mesh/v1"), "", "app: echo, version: v1", PORTS)
        .service_of(pod("mesh/v2"), "", "app: echo, version: v2", PORTS)
        .service_of(pod("mesh/streams"), "", "app: echo", PORTS)
        .route(
            "GRPCRoute",
            "mesh",
            "streams",
            "{ backendRefs: [{ name: v2, port: 7070 }] }",
        )
        .service_of(pod("mesh/bytes"), "", "app: echo", PORTS)
        .route_of(
            "TCPRoute",
            "mesh",
            "bytes",
            "{ group: '', kind: Service, name: bytes, port: 9090 }",
            "{ backendRefs: [{ name: recorder-bytes, port: 9090 }] }",
        )
        .service_of(
            pod("mesh/recorder-bytes"),
            "",
            "app: recorder",
            "{ name: tcp, port: 9090, targetPort: 9090 }",
        );
    all = all
        .service_of(
            pod("mesh/secure"),
            "",
            "app: echo",
            "{ name: tls, port: 443, targetPort: 8080 }",
        )
        .service_of(
            pod("mesh/recorder-tls"),
            "",
            "app: recorder",
            "{ name: tls, port: 443, targetPort: 8443 }",
        )
        .route(
            "TLSRoute",
            "mesh",
            "secure",
            "{ backendRefs: [{ name: recorder-tls, port: 443 }] }",
        );
    for (name, rules) in ROUTES {
        let service = Pod {
            namespace: "mesh",
            name,
        };
        all = all.service_of(service, "", "app: echo", PORTS);
        all = all.route("HTTPRoute", "mesh", name, rules);
    }
    all
}

fn mesh() -> anyhow::Result<Arc<TestMesh>> {
    MESH.get(|| {
        let all = manifests();
        let mesh = MeshBuilder::default()
            .files(&[("all.yaml", all.yaml())])
            .up()?;
        mesh.wait_waypoint("waypoint.mesh")?;
        for (name, _) in ROUTES {
            mesh.wait_bound(&format!("{name}.mesh.svc.cluster.local"), true)?;
        }
        // Until the node knows where the waypoint is, connections are reset.
        mesh.asks(CLIENT, "http://v1.mesh/", &[], |a| a.has_status(200))?;
        Ok(mesh)
    })
}

#[test]
fn a_request_that_fails_is_sent_again_as_often_as_the_route_allows() -> anyhow::Result<()> {
    let mesh = mesh()?;
    // One of two endpoints fails always: the next try goes to the other.
    let fault = ["-n", "50", "-H", "x-adit-fault: status=503,only=v1"];
    let counted = mesh.requests(CLIENT, "http://retried.mesh/", &fault)?;
    assert_eq!(counted.status("200"), 50, "{counted:?}");
    assert_eq!(counted.version("v2"), 50, "{counted:?}");
    // The first two fail, then the third: there are three tries.
    for (failing, status) in [(2, 200), (3, 503)] {
        let url = format!("http://counted.mesh/?status=503&fail-first={failing}&id=c{failing}");
        mesh.ask(CLIENT, &url, &[])?.has_status(status)?;
    }
    let url = "http://never.mesh/?status=503&fail-first=1&id=never";
    mesh.ask(CLIENT, url, &[])?.has_status(503)?;
    // A code that is not listed is an answer.
    let url = "http://counted.mesh/?status=502&fail-first=1&id=other";
    mesh.ask(CLIENT, url, &[])?.has_status(502)
}

#[test]
fn a_connection_that_is_refused_is_tried_elsewhere() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let counted = mesh.requests(CLIENT, "http://refusing.mesh/", &["-n", "40"])?;
    assert_eq!(counted.status("200"), 40, "{counted:?}");
    assert_eq!(counted.version("half"), 40, "{counted:?}");
    Ok(())
}

#[test]
fn what_takes_too_long_is_answered_504() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for url in [
        "http://timed.mesh/delay/3000",
        "http://timed.mesh/try?delay=3000",
    ] {
        let begin = Instant::now();
        mesh.ask(CLIENT, url, &[])?.has_status(504)?;
        let took = begin.elapsed().as_millis();
        ensure!((200..2500).contains(&took), "{url}: {took} ms");
    }
    mesh.ask(CLIENT, "http://timed.mesh/delay/10", &[])?
        .is_of("v1")?;
    mesh.ask(CLIENT, "http://timed.mesh/none?delay=400", &[])?
        .is_of("v1")
}

#[test]
fn copies_arrive_elsewhere_and_nobody_waits_for_them() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let app = mesh.http_app(RECORDER, 8080, |_| (500, Vec::new(), "no".into()))?;
    let options = ["-X", "POST", "-d", "the body"];
    let answer = mesh.ask(CLIENT, "http://mirrored.mesh/all/a?unique=1", &options)?;
    answer.is_of("v1")?;
    let copy = mesh.eventually("the copy", || {
        let all = app.requests();
        let found = all.into_iter().find(|r| r.path == "/all/a?unique=1");
        found.context("it has not come")
    })?;
    assert_eq!(
        (copy.method.as_str(), copy.body.as_slice()),
        ("POST", &b"the body"[..])
    );
    assert_eq!(copy.header("x-set"), Some("here"), "{copy:?}");
    let counted = mesh.requests(CLIENT, "http://mirrored.mesh/some?unique=2", &["-n", "300"])?;
    assert_eq!(counted.status("200"), 300, "{counted:?}");
    // Five standard deviations to either side.
    mesh.eventually("the copies", || {
        let copies = app.count("unique=2");
        ensure!((50..=130).contains(&copies), "{copies} of 300");
        Ok(())
    })?;
    // A copy that cannot be sent is nobody's problem.
    mesh.ask(CLIENT, "http://mirrored.mesh/dead", &[])?
        .is_of("v1")
}

#[test]
fn the_requests_of_a_session_go_to_one_endpoint() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://cookies.mesh/";
    let first = mesh.ask(CLIENT, url, &[])?;
    first.has_status(200)?;
    let cookie = first.header("set-cookie").context("no cookie")?;
    let cookie = cookie.split(';').next().unwrap_or_default();
    assert!(cookie.starts_with("session="), "{cookie}");
    let header = format!("cookie: other=1; {cookie}");
    let counted = mesh.requests(CLIENT, url, &["-n", "20", "-H", &header])?;
    let server = first.server.context("no server")?;
    assert_eq!(counted.servers.get(&server), Some(&20), "{counted:?}");
    // What is not a session's token is as none: a new session begins.
    let answer = mesh.ask(CLIENT, url, &["-H", "cookie: session=nonsense"])?;
    answer.has_status(200)?;
    let cookie = answer.header("set-cookie").unwrap_or_default();
    assert!(cookie.starts_with("session="), "{answer:?}");

    let url = "http://headers.mesh/";
    let first = mesh.ask(CLIENT, url, &[])?;
    let token = first.header("x-session").context("no header")?;
    let header = format!("x-session: {token}");
    let counted = mesh.requests(CLIENT, url, &["-n", "20", "-H", &header])?;
    let server = first.server.context("no server")?;
    assert_eq!(counted.servers.get(&server), Some(&20), "{counted:?}");
    Ok(())
}

#[test]
fn a_browser_is_told_what_other_origins_may() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://shared.mesh/";
    let preflight = |origin: &str| {
        let origin = format!("origin: {origin}");
        let options = ["-X", "OPTIONS", "-H", &origin];
        let method = ["-H", "access-control-request-method: PUT"];
        mesh.ask(CLIENT, url, &[&options[..], &method[..]].concat())
    };
    let answer = preflight("https://www.example.org")?;
    assert!(matches!(answer.status, Some(200 | 204)), "{answer:?}");
    assert_eq!(answer.server, None, "{answer:?}");
    let allowed = |name: &str| answer.header(&format!("access-control-{name}"));
    assert_eq!(
        allowed("allow-origin").as_deref(),
        Some("https://www.example.org")
    );
    assert_eq!(allowed("allow-credentials").as_deref(), Some("true"));
    assert_eq!(allowed("max-age").as_deref(), Some("600"));
    assert!(
        allowed("allow-methods").is_some_and(|m| m.contains("PUT")),
        "{answer:?}"
    );
    let answer = preflight("https://www.example.com")?;
    assert_eq!(
        answer.header("access-control-allow-origin"),
        None,
        "{answer:?}"
    );
    let actual = mesh.ask(CLIENT, url, &["-H", "origin: https://www.example.org"])?;
    actual.is_of("v1")?;
    let origin = actual.header("access-control-allow-origin");
    assert_eq!(origin.as_deref(), Some("https://www.example.org"));
    let exposed = actual.header("access-control-expose-headers");
    assert_eq!(exposed.as_deref(), Some("x-seen"));
    Ok(())
}

#[test]
fn websockets_and_streams_follow_their_routes() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for (header, version) in [("end-user: jason", "v2"), ("end-user: anna", "v1")] {
        let argv = [
            "websocket",
            "http://sockets.mesh/ws",
            "--count",
            "5",
            "-H",
            header,
        ];
        let lines = mesh.sample_lines(CLIENT, &argv)?;
        let answer = lines.iter().find(|line| line["event"] == "answer");
        let answer = answer.with_context(|| format!("{lines:?}"))?;
        assert_eq!(answer["status"], 101, "{lines:?}");
        assert_eq!(answer["version"], version, "{lines:?}");
        let echoes = lines.iter().filter(|line| line["event"] == "echo").count();
        assert_eq!(echoes, 5, "{lines:?}");
    }
    let options = ["--kind", "bidi", "--messages", "100"];
    let answer = mesh.ask_grpc(CLIENT, "http://streams.mesh:7070", &options)?;
    answer.has_status(0)?;
    assert_eq!(answer.version.as_deref(), Some("v2"), "{answer:?}");
    // The status is in the trailers.
    let failing = ["-H", "x-adit-fault: grpc-status=9"];
    mesh.ask_grpc(CLIENT, "http://streams.mesh:7070", &failing)?
        .has_status(9)
}

#[test]
fn a_tcp_route_sends_bytes_elsewhere_and_its_server_may_speak_first() -> anyhow::Result<()> {
    use std::io::{Read, Write};
    let mesh = mesh()?;
    let listener = mesh.listen(RECORDER, 9090)?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"220 here\n")?;
        let mut buffer = [0; 64];
        loop {
            let read = stream.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            stream.write_all(&buffer[..read])?;
        }
    });
    let argv = [
        "tcp",
        "bytes.mesh:9090",
        "--greeting",
        "--count",
        "3",
        "--interval",
        "1",
    ];
    let lines = mesh.sample_lines(CLIENT, &argv)?;
    let greeting = lines.iter().find(|line| line["event"] == "greeting");
    let greeting = greeting.with_context(|| format!("{lines:?}"))?;
    assert_eq!(greeting["line"], "220 here");
    let echoes = lines.iter().filter(|line| line["event"] == "echo").count();
    assert_eq!(echoes, 3, "{lines:?}");
    server
        .join()
        .map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

#[test]
fn tls_passes_as_it_is_by_its_route() -> anyhow::Result<()> {
    use std::io::{Read, Write};
    let mesh = mesh()?;
    let config = mesh.hbone_tls(adit_integration::Credential::None)?;
    let mut client = rustls::ClientConnection::new(config, "secure.mesh".try_into()?)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    let listener = mesh.listen(RECORDER, 8443)?;
    let length = hello.len();
    let server = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        let mut seen = vec![0; length];
        stream.read_exact(&mut seen)?;
        stream.write_all(b"not TLS, and nobody else looks")?;
        Ok(seen)
    });
    let target = mesh.service("mesh", "secure", 443)?;
    let mut stream = mesh.connect(CLIENT, target)??;
    stream.write_all(&hello)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert_eq!(answer, "not TLS, and nobody else looks");
    let seen = server
        .join()
        .map_err(|_| anyhow::anyhow!("the server panicked"))??;
    assert!(seen == hello, "the ClientHello has changed");
    Ok(())
}
