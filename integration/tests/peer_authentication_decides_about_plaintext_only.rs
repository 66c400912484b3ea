//! PeerAuthentication refuses plaintext where it is STRICT and never touches what comes over
//! mutual TLS (reference: istio.md 5.7, rows 104 to 111).

use std::net::SocketAddr;

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Outcome, TestMesh, pod};

const OK: bool = true;
const DENY: bool = false;

struct Row {
    number: &'static str,
    policies: Manifest,
    /// Plaintext to 8080, plaintext to 9090.
    plain: [bool; 2],
}

fn peer(policies: Manifest, namespace: &str, name: &str, spec: &str) -> Manifest {
    policies.policy("PeerAuthentication", namespace, name, "", spec)
}

fn one(number: &'static str, namespace: &str, spec: &str, plain: [bool; 2]) -> Row {
    Row {
        number,
        policies: peer(Manifest::default(), namespace, "default", spec),
        plain,
    }
}

fn two(number: &'static str, specs: [(&str, &str); 2], plain: [bool; 2]) -> Row {
    let mut policies = Manifest::default();
    for (index, (namespace, spec)) in specs.into_iter().enumerate() {
        policies = peer(policies, namespace, &format!("p{index}"), spec);
    }
    Row {
        number,
        policies,
        plain,
    }
}

#[test]
fn every_row_of_the_table_holds() -> anyhow::Result<()> {
    let all = Manifest::two_nodes()
        .namespace("plain", "")
        .namespace("mark", "")
        .ambient("srv")
        .ambient("a")
        .client(pod("plain/c"), "node1", "c")
        .client(pod("a/c"), "node1", "c")
        .server(pod("srv/web"), "node2", "web", "web");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()?;
    let web = mesh.at(pod("srv/web"), 8080)?;
    let echo = mesh.at(pod("srv/web"), 9090)?;

    const STRICT: &str = "{ mtls: { mode: STRICT } }";
    const PERMISSIVE: &str = "{ mtls: { mode: PERMISSIVE } }";
    const DISABLE: &str = "{ mtls: { mode: DISABLE } }";
    let web_with = |mode: &str, port: u16, port_mode: &str| {
        format!(
            "{{ selector: {{ matchLabels: {{ app: web }} }}, {mode} portLevelMtls: {{ {port}: {{ mode: \
             {port_mode} }} }} }}"
        )
    };
    let web_mode = |mode: &str| {
        format!("{{ selector: {{ matchLabels: {{ app: web }} }}, mtls: {{ mode: {mode} }} }}")
    };
    let aged = |name: &str, day: u8, mode: &str, policies: Manifest| {
        policies.policy(
            "PeerAuthentication",
            "srv",
            name,
            &format!("creationTimestamp: '2026-01-0{day}T00:00:00Z'"),
            &format!("{{ mtls: {{ mode: {mode} }} }}"),
        )
    };
    let rows = vec![
        one("none", "a", PERMISSIVE, [OK, OK]),
        one("104", "srv", STRICT, [DENY, DENY]),
        one(
            "105",
            "srv",
            &web_with("mtls: { mode: STRICT },", 9090, "PERMISSIVE"),
            [DENY, OK],
        ),
        one(
            "strict, disable port",
            "srv",
            &web_with("mtls: { mode: STRICT },", 9090, "DISABLE"),
            [DENY, OK],
        ),
        one(
            "106",
            "srv",
            &web_with("mtls: { mode: PERMISSIVE },", 8080, "STRICT"),
            [DENY, OK],
        ),
        one(
            "disable, strict port",
            "srv",
            &web_with("mtls: { mode: DISABLE },", 8080, "STRICT"),
            [DENY, OK],
        ),
        one(
            "unset, strict port",
            "srv",
            &web_with("", 9090, "STRICT"),
            [OK, DENY],
        ),
        one("root strict", "istio-system", STRICT, [DENY, DENY]),
        two(
            "107",
            [("istio-system", STRICT), ("srv", DISABLE)],
            [OK, OK],
        ),
        two(
            "root permissive, workload strict",
            [("istio-system", PERMISSIVE), ("srv", &web_mode("STRICT"))],
            [DENY, DENY],
        ),
        two(
            "root strict, workload permissive",
            [("istio-system", STRICT), ("srv", &web_mode("PERMISSIVE"))],
            [OK, OK],
        ),
        two(
            "root strict, workload unset, permissive port",
            [
                ("istio-system", STRICT),
                ("srv", &web_with("", 9090, "PERMISSIVE")),
            ],
            [DENY, OK],
        ),
        Row {
            number: "108",
            policies: aged(
                "new",
                2,
                "STRICT",
                aged("old", 1, "PERMISSIVE", Manifest::default()),
            ),
            plain: [OK, OK],
        },
        Row {
            number: "108, the other way round",
            policies: aged(
                "new",
                2,
                "PERMISSIVE",
                aged("old", 1, "STRICT", Manifest::default()),
            ),
            plain: [DENY, DENY],
        },
        one("109", "istio-system", &web_mode("STRICT"), [OK, OK]),
        Row {
            number: "110",
            policies: peer(Manifest::default(), "srv", "default", STRICT).policy(
                "AuthorizationPolicy",
                "srv",
                "all",
                "",
                "{ rules: [{}] }",
            ),
            plain: [DENY, DENY],
        },
    ];
    let mut wrong = Vec::new();
    let mut check = |what: String, outcome: Outcome, expected: bool| {
        let right = match expected {
            OK => outcome.is_ok(),
            DENY => outcome.is_denied(),
        };
        if !right {
            wrong.push(format!("row {what}: {outcome:?}"));
        }
    };
    for Row {
        number,
        policies,
        plain,
    } in rows
    {
        mesh.set_policies(policies)?;
        check(
            format!("{number}, plaintext 8080"),
            get(&mesh, "plain/c", web)?,
            plain[0],
        );
        check(
            format!("{number}, plaintext 9090"),
            mesh.echo(pod("plain/c"), echo)?,
            plain[1],
        );
        check(
            format!("{number}, mutual TLS 8080"),
            get(&mesh, "a/c", web)?,
            OK,
        );
        check(
            format!("{number}, mutual TLS 9090"),
            mesh.echo(pod("a/c"), echo)?,
            OK,
        );
        // Row 111: what a pod sends to itself is not captured.
        check(
            format!("{number}, to itself"),
            get(&mesh, "srv/web", web)?,
            OK,
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Probes pass STRICT: the last row has been in force for several of them, one a second,
    // and a single failure would have made the pod unready.
    let until = std::time::Instant::now() + std::time::Duration::from_millis(2500);
    while std::time::Instant::now() < until {
        assert!(
            mesh.status()?.pod("srv", "web").is_some_and(|p| p.ready),
            "a probe failed"
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}

fn get(mesh: &TestMesh, from: &str, to: SocketAddr) -> anyhow::Result<Outcome> {
    mesh.http_get(pod(from), to)
}
