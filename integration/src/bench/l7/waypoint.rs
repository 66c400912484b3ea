//! Our waypoint with its control plane: the real programs, configured by manifests.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_local::token::{Claims, Named};
use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::ground::{Ground, HostId, OTHER_CORE, PROXY_CORE, Process};
use super::setup::{SECURE, SERVICE_PORT, Service, Setup, WEB};

/// Rules of an HTTPRoute, as the Gateway API limits them.
const RULES: usize = 16;
const NODE: &str = "node1";
const POD: &str = "waypoint-1";
const GATEWAY_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 9);

/// The waypoint, and what keeps it supplied.
pub(super) struct Waypoint {
    pub(super) process: Process,
    _control_plane: Process,
}

impl Waypoint {
    pub(super) fn start(ground: &Ground, setup: Setup) -> anyhow::Result<Self> {
        let directory = ground.path("manifests");
        // From the setup before.
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        write(ground, "base", &base(ground, setup))?;
        write(ground, "policies", &policies(setup))?;
        write_routes(ground, setup, 0)?;
        let control_plane = control_plane(ground)?;
        let listen = ground.address(HostId::Waypoint, 15008);
        let ready = ground.address(HostId::Waypoint, 15021);
        let server = format!("https://{}", ground.address(HostId::ControlPlane, 15012));
        let root = ground.ca().join("root-cert.pem").display().to_string();
        let address = |port| ground.address(HostId::Waypoint, port).to_string();
        let mut command = Command::new(program("waypoint")?);
        let variables = [
            ("GATEWAY_NAME", "waypoint".into()),
            ("POD_NAME", POD.into()),
            ("POD_NAMESPACE", "bench".into()),
            ("SERVICE_ACCOUNT", "waypoint".into()),
            ("INSTANCE_IP", ground.ip(HostId::Waypoint).to_string()),
            ("NODE_NAME", NODE.into()),
            ("CLUSTER_ID", "Kubernetes".into()),
            ("XDS_ADDRESS", server.clone()),
            ("CA_ADDRESS", server),
            ("XDS_ROOT_CA", root.clone()),
            ("CA_ROOT_CA", root),
            ("AUTH_TOKEN", token(ground)?.display().to_string()),
            ("ADIT_WORKER_THREADS", "1".into()),
            ("ADIT_HBONE_ADDRESS", address(15008)),
            ("ADMIN_ADDRESS", address(15000)),
            ("STATS_ADDRESS", address(15020)),
            ("READINESS_ADDRESS", address(15021)),
            ("RUST_LOG", "info".into()),
        ];
        command.env_clear().envs(variables);
        let process = ground.start("waypoint", PROXY_CORE, command)?;
        process.wait_listening(&[ready, listen])?;
        process.wait("ready", || {
            let answer =
                adit_local::http_request(ready, "GET", "/healthz/ready", Duration::from_secs(1));
            answer.is_ok_and(|answer| answer.status == 200)
        })?;
        Ok(Self {
            process,
            _control_plane: control_plane,
        })
    }
}

/// A program of the tree, which is built beside this one.
fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

fn control_plane(ground: &Ground) -> anyhow::Result<Process> {
    let status = ground.path("status");
    fs::create_dir_all(&status)?;
    // The pod of `secure` was captured by its node when this control plane was there before.
    let captured = json!({"items": [{
        "namespace": "bench", "name": "secure-1", "uid": "secure-1", "nodeName": NODE,
        "annotations": {"ambient.istio.io/redirection": "enabled"},
    }]});
    ground.write("status/Pod.json", &captured.to_string())?;
    let listen = ground.address(HostId::ControlPlane, 15012);
    let mut command = Command::new(program("aditd")?);
    command.env_clear().env("RUST_LOG", "warn");
    command.arg("--config-dir").arg(ground.path("manifests"));
    command.arg("--status-dir").arg(status);
    command.arg("--ca-dir").arg(ground.ca());
    command.arg("--token-key").arg(token_key(ground)?);
    command.arg("--listen").arg(listen.to_string());
    command.args(["--serving-names", &listen.ip().to_string()]);
    let monitoring = ground.address(HostId::ControlPlane, 15014);
    command
        .arg("--monitoring-listen")
        .arg(monitoring.to_string());
    let process = ground.start("aditd", OTHER_CORE, command)?;
    process.wait_listening(&[listen])?;
    Ok(process)
}

/// Makes the key that signs tokens, at the first time; returns its public half.
fn token_key(ground: &Ground) -> anyhow::Result<PathBuf> {
    let path = ground.path("token.pub");
    if !path.exists() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        ground.write("token.key", &key.serialize_pem())?;
        ground.write("token.pub", &key.public_key_pem())?;
    }
    Ok(path)
}

fn token(ground: &Ground) -> anyhow::Result<PathBuf> {
    let named = |name: &str| Named {
        name: name.into(),
        uid: name.into(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let claims = Claims::new("bench", named("waypoint"), named(POD), named(NODE), now);
    let key = fs::read(ground.path("token.key")).context("token.key")?;
    let key = jsonwebtoken::EncodingKey::from_ec_pem(&key)?;
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    ground.write("token", &jsonwebtoken::encode(&header, &claims, &key)?)
}

fn write(ground: &Ground, name: &str, objects: &[Value]) -> anyhow::Result<()> {
    let mut text = String::new();
    for object in objects {
        // JSON is YAML.
        text += &format!("---\n{object}\n");
    }
    // What is not a manifest is not read.
    let fresh = ground.write(&format!("{name}.new"), &text)?;
    fs::create_dir_all(ground.path("manifests"))?;
    Ok(fs::rename(
        fresh,
        ground.path(&format!("manifests/{name}.yaml")),
    )?)
}

fn base(ground: &Ground, setup: Setup) -> Vec<Value> {
    let ready = |kind: &str| json!({"type": kind, "status": "True"});
    let pod = |name: &str, account: &str, labels: Value, host: HostId| {
        let ip = ground.ip(host);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "bench", "uid": name, "labels": labels,
                "creationTimestamp": "2020-01-01T00:00:00Z",
            },
            "spec": {
                "nodeName": NODE, "serviceAccountName": account,
                "containers": [{"name": "main", "image": "main"}],
            },
            "status": {
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                "hostIP": "192.0.2.1",
                "conditions": [ready("Ready"), ready("ContainersReady")],
            },
        })
    };
    let service = |service: Service| {
        let protocol = if setup.http2 {
            "kubernetes.io/h2c"
        } else {
            "http"
        };
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": service.name, "namespace": "bench",
                "labels": {"istio.io/use-waypoint": "waypoint"},
            },
            "spec": {
                "clusterIP": service.vip, "clusterIPs": [service.vip],
                "selector": {"app": service.name},
                "ports": [{
                    "name": "main", "port": SERVICE_PORT, "appProtocol": protocol,
                    "targetPort": setup.upstream_port(),
                }],
            },
        })
    };
    let generated = json!({
        "gateway.networking.k8s.io/gateway-name": "waypoint",
        "gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
        "gateway.istio.io/managed": "istio.io-mesh-controller",
    });
    let mut labels = generated.clone();
    labels["istio.io/dataplane-mode"] = "none".into();
    vec![
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "uid": NODE},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": "accessLogFile: /dev/stdout\naccessLogEncoding: JSON\n"},
        }),
        json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": "bench", "labels": {"istio.io/dataplane-mode": "ambient"},
            },
        }),
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "waypoint", "namespace": "bench"},
            "spec": {
                "gatewayClassName": "istio-waypoint",
                "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "waypoint", "namespace": "bench", "labels": generated},
            "spec": {
                "clusterIP": GATEWAY_VIP, "clusterIPs": [GATEWAY_VIP],
                "selector": {"gateway.networking.k8s.io/gateway-name": "waypoint"},
                "ports": [{"name": "mesh", "port": 15008, "appProtocol": "all"}],
            },
        }),
        pod(POD, "waypoint", labels, HostId::Waypoint),
        pod(
            "web-1",
            "web",
            json!({"app": "web", "istio.io/dataplane-mode": "none"}),
            HostId::Plain,
        ),
        pod(
            "secure-1",
            "secure",
            json!({"app": "secure"}),
            HostId::Secure,
        ),
        service(WEB),
        service(SECURE),
    ]
}

/// Writes the routes of both services; `change` is a number that one of them shows.
pub(super) fn write_routes(ground: &Ground, setup: Setup, change: u64) -> anyhow::Result<()> {
    let mut rest = Vec::new();
    for service in [WEB, SECURE] {
        let rules: Vec<Value> = (0..setup.routes)
            .map(|n| rule(service, n, change))
            .collect();
        for (index, rules) in rules.chunks(RULES).enumerate() {
            let route = json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
                "metadata": {
                    "name": format!("{}-{index:04}", service.name), "namespace": "bench",
                },
                "spec": {
                    "parentRefs": [{"group": "", "kind": "Service", "name": service.name}],
                    "rules": rules,
                },
            });
            // The one that changes has a file of its own, as a user's would.
            match index {
                0 => write(ground, &format!("first-{}", service.name), &[route])?,
                _ => rest.push(route),
            }
        }
    }
    match change {
        0 => write(ground, "routes", &rest),
        _ => Ok(()),
    }
}

fn rule(service: Service, route: usize, change: u64) -> Value {
    let name = format!("r{route}");
    let mut headers = vec![json!({"name": "x-route", "value": name})];
    if route == 0 {
        headers.push(json!({"name": "x-change", "value": change.to_string()}));
    }
    json!({
        "name": name,
        "matches": [{"path": {"type": "PathPrefix", "value": format!("/r{route}")}}],
        "filters": [{
            "type": "RequestHeaderModifier",
            "requestHeaderModifier": {"set": headers},
        }],
        "backendRefs": [{"name": service.name, "port": SERVICE_PORT}],
    })
}

fn policies(setup: Setup) -> Vec<Value> {
    let policy = |name: &str, rules: Value| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "bench"},
            "spec": {
                "action": "DENY",
                "targetRefs": [{
                    "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint",
                }],
                "rules": rules,
            },
        })
    };
    let to = |operation: Value| json!({"to": [{"operation": operation}]});
    let rules = json!([
        to(json!({"paths": ["/admin*"]})),
        to(json!({"methods": ["DELETE"]}))
    ]);
    let denied = setup.denied_paths().enumerate().map(|(index, path)| {
        policy(
            &format!("denied-{index:05}"),
            json!([to(json!({"paths": [path]}))]),
        )
    });
    std::iter::once(policy("deny", rules))
        .chain(denied)
        .collect()
}

/// Where the waypoint takes HBONE.
pub(super) fn address(ground: &Ground) -> SocketAddr {
    ground.address(HostId::Waypoint, 15008)
}
