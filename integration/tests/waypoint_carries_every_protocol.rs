//! HTTP/1.1, HTTP/2, gRPC of every kind, WebSocket, trailers and plain TCP pass a waypoint as
//! they are, and those whose server speaks first too.

use adit_integration::{pod, reviews_mesh};
use anyhow::Context;

const GREETER: &str = "
apiVersion: v1
kind: Pod
metadata: { name: greeter, namespace: shop, labels: { app: greeter } }
spec:
  nodeName: node2
  containers:
    - name: greeter
      command: [adit-sample, serve, --greeting, 220 ready]
      readinessProbe: { tcpSocket: { port: 9090 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Service
metadata: { name: greeter, namespace: shop }
spec:
  selector: { app: greeter }
  ports: [{ name: tcp-mail, port: 25, targetPort: 9090 }]
";

#[test]
fn requests_and_streams_pass_as_they_are() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[("greeter.yaml", GREETER)])?;
    for (options, protocol) in [(&[][..], "HTTP/1.1"), (&["--http2"][..], "HTTP/2.0")] {
        let url = "http://reviews.shop/a/b?c=d%2Fe";
        let seen = mesh.seen(pod("shop/client"), url, options)?;
        assert_eq!(seen["path"], "/a/b?c=d%2Fe", "{seen}");
        assert_eq!(seen["protocol"], protocol, "{seen}");
        let argv = [
            "call",
            "http://reviews.shop/echo",
            "-X",
            "POST",
            "-d",
            "body",
            "--json",
        ];
        let line = mesh.first_line(pod("shop/client"), &[&argv[..], options].concat())?;
        assert_eq!(
            (&line["status"], &line["answer"]),
            (&200.into(), &"body".into())
        );
        let url = "http://reviews.shop/?trailer=x-sum:12";
        let argv = ["call", url, "--json", "-H", "te: trailers"];
        let line = mesh.first_line(pod("shop/client"), &[&argv[..], options].concat())?;
        assert_eq!(line["trailers"]["x-sum"][0], "12", "{protocol}: {line}");
    }
    let large = mesh.first_line(
        pod("shop/client"),
        &["call", "http://reviews.shop/bytes/5000000"],
    )?;
    assert_eq!(large["bytes"], 5_000_000, "{large}");
    for (kind, answers, received) in [
        ("unary", 1, 1),
        ("client", 1, 50),
        ("server", 50, 1),
        ("bidi", 50, 50),
    ] {
        let url = "http://reviews.shop:9000";
        let argv = [
            "grpc",
            url,
            "--kind",
            kind,
            "--messages",
            "50",
            "-H",
            "x-user: jason",
        ];
        let line = mesh.first_line(pod("shop/client"), &[&argv[..], &["--json"]].concat())?;
        assert_eq!(line["status"], 0, "{kind}: {line}");
        assert_eq!(line["answers"], answers, "{kind}: {line}");
        assert_eq!(line["received"], received, "{kind}: {line}");
        assert_eq!(line["metadata"]["x-user"], "jason", "{kind}: {line}");
    }
    let failing = [
        "grpc",
        "http://reviews.shop:9000",
        "-H",
        "x-adit-fault: grpc-status=7",
    ];
    let line = mesh.first_line(pod("shop/client"), &failing)?;
    assert_eq!(
        (&line["status"], &line["from"]),
        (&7.into(), &"server".into())
    );
    let argv = ["websocket", "http://reviews.shop/ws", "--count", "20"];
    let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
    let echoes = lines.iter().filter(|line| line["event"] == "echo").count();
    assert_eq!(echoes, 20, "{lines:?}");
    assert_eq!(
        lines.last().context("no lines")?["answered"],
        true,
        "{lines:?}"
    );
    Ok(())
}

#[test]
fn bytes_pass_and_servers_may_speak_first() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[("greeter.yaml", GREETER)])?;
    let argv = [
        "tcp",
        "reviews.shop:9090",
        "--count",
        "20",
        "--interval",
        "1",
    ];
    let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
    let echoes = lines.iter().filter(|line| line["event"] == "echo").count();
    assert_eq!(echoes, 20, "{lines:?}");
    let argv = ["tcp", "greeter.shop:25", "--greeting", "--count", "1"];
    let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
    let greeting = lines.iter().find(|line| line["event"] == "greeting");
    let greeting = greeting.with_context(|| format!("{lines:?}"))?;
    assert_eq!(greeting["line"], "220 ready");
    Ok(())
}
