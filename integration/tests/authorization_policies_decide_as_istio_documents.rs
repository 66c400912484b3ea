//! The table of Istio's AuthorizationPolicy semantics (reference: istio.md 5.7, rows for
//! ztunnel), over real connections: each row's policies are applied, its calls made, and the
//! next row's policies replace them. Where Adit differs on purpose the row says so.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_integration::mesh::MeshBuilder;
use adit_integration::socket::{connect_socket, echo_once};
use adit_integration::{Manifest, Outcome, Pod, TestMesh, pod};

/// Where a call goes.
#[derive(Debug, Clone, Copy)]
enum To {
    /// Service `web`, port 80, by HTTP.
    Web,
    /// The same with method DELETE.
    WebDelete,
    /// Port 8080 of the pod `web`, by its address.
    WebPod,
    /// The echo port 9090 of the pod `web`, by its address.
    Echo,
    /// Another app in the same namespace.
    Other,
    /// `app: web` in another namespace.
    Elsewhere,
}

const OK: bool = true;
const DENY: bool = false;

struct Row {
    /// Of the reference's table.
    number: &'static str,
    policies: Manifest,
    calls: Vec<(&'static str, To, bool)>,
}

/// Policies in `srv` unless a name says where; each is `spec` or `namespace=spec`.
fn row(number: &'static str, specs: &[&str], calls: &[(&'static str, To, bool)]) -> Row {
    let mut policies = Manifest::default();
    for (index, spec) in specs.iter().enumerate() {
        let (namespace, spec) = match spec.split_once('=') {
            Some((namespace, spec)) if !namespace.contains('{') => (namespace, spec),
            _ => ("srv", *spec),
        };
        // A name of its own: an invalid version of a policy that was valid leaves that in force.
        let name = format!("row-{}-{index}", number.replace([' ', ','], "-"));
        let name = name.replace("CIDR", "cidr");
        policies = policies.policy("AuthorizationPolicy", namespace, &name, "", spec);
    }
    Row {
        number,
        policies,
        calls: calls.to_vec(),
    }
}

const A1: &str = "a/sa1";
const A2: &str = "a/sa2";
/// Like `a/sa1`, on the other node.
const A1_FAR: &str = "a/sa1-far";
const B1: &str = "b/sa1";
const TEAM: &str = "team-x/c";
const XTEAM: &str = "xteam-x/c";
const SRV1: &str = "srv/sa1";
const PLAIN: &str = "plain/c";

fn mesh() -> anyhow::Result<TestMesh> {
    let mut all = Manifest::two_nodes()
        .namespace("plain", "")
        .namespace("mark", "");
    for namespace in ["a", "b", "team-x", "xteam-x", "srv", "elsewhere"] {
        all = all.ambient(namespace);
    }
    for (path, node, account) in [
        (A1, "node1", "sa1"),
        (A2, "node1", "sa2"),
        (A1_FAR, "node2", "sa1"),
        (B1, "node1", "sa1"),
        (TEAM, "node1", "c"),
        (XTEAM, "node1", "c"),
        (SRV1, "node1", "sa1"),
        (PLAIN, "node1", "c"),
    ] {
        all = all.client(pod(path), node, account);
    }
    for (path, app) in [
        ("srv/web", "web"),
        ("srv/other", "other"),
        ("elsewhere/web", "web"),
    ] {
        all = all.server(pod(path), "node2", "web", app);
    }
    all = all.service(pod("srv/web"), "web", "");
    MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()
}

/// Addresses of the targets, looked up once.
struct Targets {
    service: SocketAddr,
    pod: SocketAddr,
    echo: SocketAddr,
    other: SocketAddr,
    elsewhere: SocketAddr,
}

impl Targets {
    fn call(&self, mesh: &TestMesh, from: Pod<'_>, to: To) -> anyhow::Result<Outcome> {
        match to {
            To::Web => mesh.http_get(from, self.service),
            To::WebDelete => mesh.http_request(from, self.service, "DELETE"),
            To::WebPod => mesh.http_get(from, self.pod),
            To::Echo => mesh.echo(from, self.echo),
            To::Other => mesh.http_get(from, self.other),
            To::Elsewhere => mesh.http_get(from, self.elsewhere),
        }
    }
}

#[test]
fn every_row_of_the_table_holds() -> anyhow::Result<()> {
    use To::{Echo, Elsewhere, Other, Web, WebDelete, WebPod};
    let mesh = mesh()?;
    let near = mesh.address(pod(A1))?;
    let targets = Targets {
        service: mesh.service("srv", "web", 80)?,
        pod: mesh.at(pod("srv/web"), 8080)?,
        echo: mesh.at(pod("srv/web"), 9090)?,
        other: mesh.at(pod("srv/other"), 8080)?,
        elsewhere: mesh.at(pod("elsewhere/web"), 8080)?,
    };
    let only_a1 =
        "{ rules: [{ from: [{ source: { principals: [cluster.local/ns/a/sa/sa1] } }] }] }";
    let deny_not_a1 = "{ action: DENY, rules: [{ from: [{ source: { notPrincipals: \
                       [cluster.local/ns/a/sa/sa1] } }] }] }";
    let from_a = "from: [{ source: { namespaces: [a] } }]";
    let allow_a = format!("{{ rules: [{{ {from_a} }}] }}");
    let near_and_not = format!(
        "{{ rules: [{{ from: [{{ source: {{ ipBlocks: [{near}], notIpBlocks: [10.244.1.0/24] }} }}] }}] }}"
    );
    let a_and_port =
        format!("{{ rules: [{{ {from_a}, to: [{{ operation: {{ ports: ['8080'] }} }}] }}] }}");
    let a_or_port = format!(
        "{{ rules: [{{ {from_a} }}, {{ to: [{{ operation: {{ ports: ['8080'] }} }}] }}] }}"
    );
    let not_a1 = "{ action: DENY, rules: [{ from: [{ source: { principals: \
                  [cluster.local/ns/a/sa/sa1] } }] }] }";
    let everything_selected = format!("{{ selector: {{}}, rules: [{{ {from_a} }}] }}");
    let deny_a_delete = format!(
        "{{ action: DENY, rules: [{{ {from_a}, to: [{{ operation: {{ methods: [DELETE] }} }}] }}] }}"
    );
    let audit = format!("{{ action: AUDIT, rules: [{{ {from_a} }}] }}");

    let mut rows = vec![
        row("1", &[], &[(A1, Web, OK), (PLAIN, WebPod, OK)]),
        row(
            "2",
            &["{}"],
            &[(A1, Web, DENY), (SRV1, WebPod, DENY), (PLAIN, WebPod, DENY)],
        ),
        row(
            "3",
            &["{ rules: [{}] }"],
            &[(PLAIN, WebPod, OK), (A1, Web, OK)],
        ),
        row(
            "4, 5",
            &["{ action: DENY, selector: { matchLabels: { app: web } }, rules: [{}] }"],
            &[(A1, Web, DENY), (A1, Other, OK), (A1, Elsewhere, OK)],
        ),
        row(
            "6, 7, 8",
            &[only_a1],
            &[
                (A1, Web, OK),
                (A2, Web, DENY),
                (B1, Web, DENY),
                (PLAIN, WebPod, DENY),
            ],
        ),
        row(
            "9, 10",
            &["{ rules: [{ from: [{ source: { principals: ['*'] } }] }] }"],
            &[(A2, Web, OK), (PLAIN, WebPod, DENY)],
        ),
        row(
            "11",
            &["{ rules: [{ from: [{ source: { principals: ['*/sa/sa1'] } }] }] }"],
            &[(B1, Web, OK), (A2, Web, DENY)],
        ),
        row(
            "12",
            &["{ rules: [{ from: [{ source: { principals: ['cluster.local/ns/a/*'] } }] }] }"],
            &[(A1, Web, OK), (A2, Web, OK), (B1, Web, DENY)],
        ),
        row(
            "13, 14",
            &[deny_not_a1],
            &[(PLAIN, WebPod, DENY), (A1, Web, OK), (A2, Web, DENY)],
        ),
        row("15", &[&allow_a], &[(A2, Web, OK), (B1, Web, DENY)]),
        row(
            "16",
            &["{ rules: [{ from: [{ source: { namespaces: ['team-*'] } }] }] }"],
            &[(TEAM, Web, OK), (XTEAM, Web, DENY)],
        ),
        row(
            "17, 18",
            &["{ rules: [{ from: [{ source: { notNamespaces: [a] } }] }] }"],
            &[(A1, Web, DENY), (B1, Web, OK), (PLAIN, WebPod, OK)],
        ),
        row(
            "19",
            &["{ rules: [{ from: [{ source: { serviceAccounts: [a/sa1] } }] }] }"],
            &[(A1, Web, OK), (B1, Web, DENY), (SRV1, Web, DENY)],
        ),
        row(
            "20",
            &["{ rules: [{ from: [{ source: { serviceAccounts: [sa1] } }] }] }"],
            &[(SRV1, Web, OK), (A1, Web, DENY)],
        ),
        // Invalid, so closed: for whom it is meant, and for nobody else.
        row(
            "21",
            &[
                "{ selector: { matchLabels: { app: web } }, rules: [{ from: [{ source: { \
               serviceAccounts: [a/sa1], principals: ['*'] } }] }] }",
            ],
            &[(A1, Web, DENY), (A1, Other, OK)],
        ),
        row(
            "22",
            &["{ rules: [{ from: [{ source: { ipBlocks: [10.244.1.0/24] } }] }] }"],
            &[(A1, Web, OK), (PLAIN, WebPod, OK), (A1_FAR, Web, DENY)],
        ),
        row("23", &[&near_and_not], &[(A1, Web, DENY)]),
        row(
            "24",
            &["{ rules: [{ to: [{ operation: { ports: ['80'] } }] }] }"],
            &[(A1, Web, DENY)],
        ),
        row(
            "25",
            &["{ rules: [{ to: [{ operation: { ports: ['8080'] } }] }] }"],
            &[(A1, Web, OK), (A1, Echo, DENY), (PLAIN, WebPod, OK)],
        ),
        row(
            "26",
            &["{ action: DENY, rules: [{ to: [{ operation: { ports: ['9090'] } }] }] }"],
            &[(A1, Web, OK), (A1, Echo, DENY), (PLAIN, Echo, DENY)],
        ),
        row(
            "27",
            &[&a_and_port],
            &[(A1, Web, OK), (A1, Echo, DENY), (B1, Web, DENY)],
        ),
        row(
            "28",
            &[&a_or_port],
            &[(A1, Echo, OK), (B1, Web, OK), (B1, Echo, DENY)],
        ),
        row("29", &[&allow_a, not_a1], &[(A1, Web, DENY), (A2, Web, OK)]),
        row(
            "30",
            &["istio-system={}", &allow_a],
            &[(A1, Web, OK), (B1, Web, DENY)],
        ),
        row(
            "31",
            &[
                "istio-system={ action: DENY, rules: [{ from: [{ source: { namespaces: [b] } }] }] }",
                "{ rules: [{ from: [{ source: { namespaces: [b] } }] }] }",
            ],
            &[(B1, Web, DENY)],
        ),
        row(
            "32",
            &["elsewhere={}"],
            &[(A1, Web, OK), (A1, Elsewhere, DENY)],
        ),
        row(
            "33",
            &[
                "istio-system={ action: DENY, selector: { matchLabels: { app: web } }, rules: [{}] }",
            ],
            &[(A1, Web, DENY), (A1, Elsewhere, DENY), (A1, Other, OK)],
        ),
        row(
            "34",
            &[&everything_selected],
            &[
                (A1, Web, OK),
                (B1, Web, DENY),
                (B1, Other, DENY),
                (B1, Elsewhere, OK),
            ],
        ),
        row(
            "35",
            &[
                "{ selector: { matchLabels: { app: web } }, rules: [{ to: [{ operation: { methods: \
               [GET] } }] }] }",
            ],
            &[(A1, Web, DENY)],
        ),
        row(
            "36",
            &[
                "{ rules: [{ to: [{ operation: { methods: [GET] } }] }, { from: [{ source: { \
               principals: [cluster.local/ns/a/sa/sa1] } }] }] }",
            ],
            &[(A1, Web, OK), (A2, Web, DENY)],
        ),
        row(
            "37",
            &["{ action: DENY, rules: [{ to: [{ operation: { methods: [DELETE] } }] }] }"],
            &[(A1, Web, OK), (A1, WebDelete, OK)],
        ),
        row("38", &[&deny_a_delete], &[(A1, Web, OK)]),
        row(
            "39",
            &[
                "{ action: DENY, rules: [{ to: [{ operation: { ports: ['8080'], methods: [DELETE] } \
               }] }] }",
            ],
            &[(A1, Web, DENY), (A1, Echo, OK)],
        ),
        row("40", &[&audit], &[(A1, Web, OK)]),
        row(
            "41",
            &[
                "{ action: CUSTOM, provider: { name: x }, selector: { matchLabels: { app: web } }, \
               rules: [{ to: [{ operation: { ports: ['8080'] } }] }] }",
            ],
            &[(A1, Web, OK)],
        ),
        row(
            "42",
            &["{ rules: [{ when: [{ key: source.namespace, values: [a] }] }] }"],
            &[(A1, Web, OK), (B1, Web, DENY), (PLAIN, WebPod, DENY)],
        ),
        row(
            "43",
            &[
                "{ rules: [{ when: [{ key: destination.port, values: ['8080'], notValues: ['8081'] \
               }] }] }",
            ],
            &[(A1, Web, OK), (A1, Echo, DENY)],
        ),
        row(
            "44",
            &[
                "{ action: DENY, rules: [{ when: [{ key: source.ip, notValues: [10.244.1.0/24] }] }] }",
            ],
            &[(A1, Web, OK), (A1_FAR, Web, DENY)],
        ),
        row(
            "45",
            &[
                "{ rules: [{ when: [{ key: source.namespace, values: [a] }, { key: \
               destination.port, values: ['8080'] }] }] }",
            ],
            &[(A1, Web, OK), (A1, Echo, DENY), (B1, Web, DENY)],
        ),
        row(
            "102",
            &["{ rules: [{ from: [{ source: { principals: [other.td/ns/a/sa/sa1] } }] }] }"],
            &[(A1, Web, DENY)],
        ),
        // Istio denies silently; the SPIFFE id says the trust domain, so Adit can tell.
        row(
            "103",
            &["{ rules: [{ from: [{ source: { trustDomains: [cluster.local] } }] }] }"],
            &[(A1, Web, OK), (PLAIN, WebPod, DENY)],
        ),
        // Istio matches nothing; Adit fails closed.
        row(
            "113",
            &["{ action: DENY, rules: [{ to: [{ operation: { ports: ['0', '70000'] } }] }] }"],
            &[(A1, Web, DENY)],
        ),
        row(
            "unknown when key",
            &["{ rules: [{ when: [{ key: source.moon, values: [full] }] }] }"],
            &[(A1, Web, DENY)],
        ),
        row(
            "no CIDR",
            &["{ action: DENY, rules: [{ from: [{ source: { ipBlocks: [10.0.0.0/99] } }] }] }"],
            &[(A1, Web, DENY)],
        ),
    ];
    let named = |number, metadata: &str, calls: &[_]| Row {
        number,
        policies: Manifest::default().policy(
            "AuthorizationPolicy",
            "srv",
            "p0",
            metadata,
            "{ action: DENY, rules: [{}] }",
        ),
        calls: calls.to_vec(),
    };
    rows.push(named(
        "46",
        "annotations: { istio.io/dry-run: 'true' }",
        &[(A1, Web, OK)],
    ));
    rows.push(named(
        "112",
        "labels: { istio.io/rev: canary }",
        &[(A1, Web, OK)],
    ));
    // And back: nothing of all that is left.
    rows.push(row(
        "1 again",
        &[],
        &[(A1, Web, OK), (B1, Echo, OK), (PLAIN, WebPod, OK)],
    ));

    let mut wrong = Vec::new();
    for row in rows {
        mesh.set_policies(row.policies.clone())?;
        for (from, to, expected) in row.calls {
            let outcome = targets.call(&mesh, pod(from), to)?;
            let right = match expected {
                OK => outcome.is_ok(),
                DENY => outcome.is_denied(),
            };
            if !right {
                let meant = if expected == OK { "200" } else { "DENY" };
                wrong.push(format!(
                    "row {}: {from} to {to:?}: {outcome:?}, not {meant}",
                    row.number
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Invalid policies are named where an operator looks.
    let log = std::fs::read_to_string(mesh.component_log("aditd")?)?;
    for text in ["source.moon", "10.0.0.0/99", "70000"] {
        assert!(
            log.contains(text),
            "aditd's log does not name {text}:\n{log}"
        );
    }
    Ok(())
}

/// An edit that makes a policy invalid does not take effect: neither more nor less is allowed
/// than before, and the log says so.
#[test]
fn an_invalid_edit_leaves_the_last_good_version_in_force() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let target = mesh.at(pod("srv/web"), 8080)?;
    let apply = |spec: &str| {
        mesh.set_policies(Manifest::default().policy("AuthorizationPolicy", "srv", "p", "", spec))
    };
    apply("{ rules: [{ from: [{ source: { namespaces: [a] } }] }] }")?;
    let holds = || -> anyhow::Result<()> {
        assert!(mesh.http_get(pod(A1), target)?.is_ok());
        assert!(mesh.http_get(pod(B1), target)?.is_denied());
        Ok(())
    };
    holds()?;
    for broken in [
        "{ rules: [{ from: [{ source: { ipBlocks: [300.1.1.1] } }] }] }",
        "{ action: MAYBE, rules: [{}] }",
    ] {
        apply(broken)?;
        holds()?;
    }
    // Not even YAML, and everything else in that file is as it was.
    mesh.apply("policies.yaml", "kind: [unclosed\n  : {")?;
    mesh.eventually("the complaint", || {
        let log = std::fs::read_to_string(mesh.component_log("aditd")?)?;
        for text in ["300.1.1.1", "MAYBE", "policies.yaml"] {
            anyhow::ensure!(
                log.contains(text),
                "aditd's log does not name {text}:\n{log}"
            );
        }
        Ok(())
    })?;
    holds()?;
    // And repaired it counts again.
    apply("{ rules: [{ from: [{ source: { namespaces: [b] } }] }] }")?;
    assert!(mesh.http_get(pod(A1), target)?.is_denied());
    assert!(mesh.http_get(pod(B1), target)?.is_ok());
    Ok(())
}

/// Row 47: open connections of the caller that is denied end at once, others go on.
#[test]
fn a_new_policy_closes_what_it_denies_and_nothing_else() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let target = mesh.at(pod("srv/web"), 9090)?;
    let open = |from: &str| -> anyhow::Result<_> {
        let socket = mesh.socket(pod(from), false)?;
        let mut stream = connect_socket(socket, target, Duration::from_secs(5))?;
        echo_once(&mut stream, b"hello\n")?;
        Ok(stream)
    };
    let (mut denied, mut kept, mut plain) = (open(A1)?, open(B1)?, open(PLAIN)?);
    let before = mesh.metrics("node2")?;
    let deny = "{ action: DENY, rules: [{ from: [{ source: { namespaces: [a] } }] }] }";
    let applied = Instant::now();
    mesh.set_policies(Manifest::default().policy("AuthorizationPolicy", "srv", "p", "", deny))?;
    // It waits for the server, which says nothing: only the mesh can end it.
    let ended = io::Read::read(&mut denied, &mut [0; 8]);
    let after = applied.elapsed();
    let error = ended.expect_err("a denied connection is reset, not closed in good order");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(after < Duration::from_secs(3), "it took {after:?}");
    echo_once(&mut kept, b"still here\n")?;
    echo_once(&mut plain, b"still here\n")?;
    assert!(mesh.echo(pod(A1), target)?.is_denied());
    let line = mesh.access_line("node2", |l| {
        l.get("direction") == "inbound"
            && l.get("src.workload") == "sa1"
            && l.get("src.namespace") == "a"
            && !l.get("error").is_empty()
    })?;
    assert!(line.get("error").contains("policy"), "{line:?}");
    let denials = |m: &adit_integration::Metrics| {
        let labels = [("reporter", "destination"), ("response_flags", "DENY")];
        m.sum("istio_tcp_connections_failed_total", &labels)
    };
    assert!(
        denials(&mesh.metrics("node2")?) > denials(&before),
        "the refused call is counted"
    );
    Ok(())
}

/// A policy that begins to apply because the pod's labels change closes what it denies too
/// (Istio's ztunnel looks only at changes of policies).
#[test]
fn a_label_that_brings_a_pod_under_a_policy_closes_its_connections() -> anyhow::Result<()> {
    let manifest = |labels: &str| {
        let container = "{ name: s, image: adit-sample, command: [adit-sample, serve] }";
        Manifest::two_nodes()
            .namespace("mark", "")
            .ambient("srv")
            .ambient("a")
            .client(pod("a/c"), "node1", "c")
            .pod(pod("srv/web"), "node2", "web", labels, container)
    };
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", manifest("app: web").yaml())])
        .up()?;
    let deny = "{ action: DENY, selector: { matchLabels: { locked: 'yes' } }, rules: [{}] }";
    mesh.set_policies(Manifest::default().policy("AuthorizationPolicy", "srv", "p", "", deny))?;
    let target = mesh.at(pod("srv/web"), 9090)?;
    let mut open = mesh.connect(pod("a/c"), target)??;
    echo_once(&mut open, b"open\n")?;
    mesh.apply("all.yaml", manifest("app: web, locked: 'yes'").yaml())?;
    let error = io::Read::read(&mut open, &mut [0; 8]).expect_err("it is reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(mesh.echo(pod("a/c"), target)?.is_denied());
    mesh.apply("all.yaml", manifest("app: web").yaml())?;
    mesh.eventually("the way back", || {
        let outcome = mesh.echo(pod("a/c"), target)?;
        anyhow::ensure!(outcome.is_ok(), "{outcome:?}");
        Ok(())
    })
}
