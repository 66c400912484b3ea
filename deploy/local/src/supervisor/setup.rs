//! The ground: directories, mounts, cgroups, the fabric, the nodes; and how `aditd`, the
//! ztunnels and the waypoints are to be run on it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::mount::{MsFlags, mount};

use super::component::{ComponentPlan, ReadyCheck};
use crate::address::{CONTROL_PLANE, MAX_NODES};
use crate::cluster::{NodeView, PodView, node_uid};
use crate::config::{DataPlane, MeshConfig};
use crate::error::LocalError;
use crate::manifest::expand_uid;
use crate::system::layout::Layout;
use crate::system::process::search_path;
use crate::system::sandbox::Sandbox;
use crate::system::{cgroup, links};
use crate::token::{self, Claims, Named};

/// Port of the control plane's xDS and certificate services, as istiod's.
const XDS_PORT: u16 = 15012;
/// Port of the control plane's readiness and metrics, as istiod's.
pub(crate) const CONTROL_PLANE_MONITORING: u16 = 15014;
const CLUSTER_ID: &str = "Kubernetes";

/// Makes everything that does not depend on the pods.
pub(super) fn create(
    config: &MeshConfig,
    layout: &Layout,
    nodes: &[NodeView],
    congestion: Option<&str>,
) -> Result<(), LocalError> {
    if nodes.len() > MAX_NODES {
        return Err(LocalError::Config(format!(
            "{} nodes are more than the {MAX_NODES} that are possible",
            nodes.len()
        )));
    }
    directories(layout)?;
    let mut names = Vec::new();
    links::create_fabric(layout)?;
    links::create_control_plane(layout)?;
    cgroup::create(&layout.aditd_cgroup())?;
    for (index, node) in nodes.iter().enumerate() {
        // MAX_NODES fits.
        let index = u8::try_from(index).unwrap_or(u8::MAX);
        links::create_node(layout, &node.name, index, congestion)?;
        for cgroup in [
            layout.ztunnel_cgroup(&node.name),
            layout.kubelet_cgroup(&node.name),
            layout.node_cgroup(&node.name).join("pods"),
        ] {
            cgroup::create(&cgroup)?;
        }
        make_dir(&layout.bpffs().join(&node.name))?;
        names.push(node.name.clone());
    }
    links::route_nodes(layout, &names)?;
    if config.data_plane == DataPlane::On {
        token::create_key(&layout.token_private_key(), &layout.token_public_key())?;
        issue_tokens(layout, nodes)?;
    }
    Ok(())
}

fn directories(layout: &Layout) -> Result<(), LocalError> {
    for dir in [
        layout.netns_dir(),
        layout.bpffs(),
        layout.cluster_dir(),
        layout.status_dir(),
        layout.ca_dir(),
        layout.logs_dir(),
        layout.root.join("keys"),
        layout.root.join("tokens/pods"),
        layout.root.join("hosts/namespaces"),
        layout.root.join("resolv"),
    ] {
        make_dir(&dir)?;
    }
    for private in ["keys", "tokens", "ca"] {
        let path = layout.root.join(private);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
            .map_err(LocalError::file("protect", &path))?;
    }
    mount_fs("tmpfs", &layout.netns_dir(), "mode=0755")?;
    // What is mounted and unmounted here must also come and go in the mount namespaces
    // that ztunnels and pods get.
    let netns_dir = layout.netns_dir();
    mount(
        None::<&str>,
        &netns_dir,
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )
    .map_err(|error| LocalError::file("share", &netns_dir)(error.into()))?;
    make_dir(&netns_dir.join("nodes"))?;
    make_dir(&layout.pod_netns_dir())?;
    mount_fs("bpf", &layout.bpffs(), "mode=0700")
}

fn mount_fs(kind: &'static str, path: &Path, options: &str) -> Result<(), LocalError> {
    mount(
        Some(kind),
        path,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )
    .map_err(|error| LocalError::file("mount", path)(error.into()))
}

fn make_dir(path: &Path) -> Result<(), LocalError> {
    cgroup::create_dirs(path).map_err(LocalError::file("create", path))
}

/// The congestion control for namespaces: the first of the configured ones, and only
/// where the machine's own is `bbr`.
pub(super) fn congestion_control(config: &MeshConfig) -> Option<String> {
    let read = |name| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::read_to_string(path).unwrap_or_default()
    };
    if read("tcp_congestion_control").trim() != "bbr" {
        return None;
    }
    // What is available but not allowed to everybody cannot be set in a new namespace.
    let allowed = read("tcp_allowed_congestion_control");
    let mut wanted = config.congestion_control.iter();
    let found = wanted.find(|name| allowed.split_whitespace().any(|a| a == name.as_str()));
    if found.is_none() {
        tracing::info!("congestion control stays bbr: none of the configured ones is there");
    }
    found.cloned()
}

/// The pod of a node's ztunnel, by name and uid.
pub(super) fn ztunnel_pod(node: &str) -> Named {
    let name = format!("ztunnel-{node}");
    Named {
        uid: expand_uid(&format!("Pod/istio-system/{name}")),
        name,
    }
}

/// Writes a fresh token for every node's ztunnel.
pub(super) fn issue_tokens(layout: &Layout, nodes: &[NodeView]) -> Result<(), LocalError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 makes tokens that nobody accepts, and everybody says so.
    let now = now.unwrap_or_default().as_secs();
    for node in nodes {
        let account = Named {
            name: "ztunnel".into(),
            uid: expand_uid("ServiceAccount/istio-system/ztunnel"),
        };
        let own = Named {
            name: node.name.clone(),
            uid: node_uid(&node.name),
        };
        let claims = Claims::new("istio-system", account, ztunnel_pod(&node.name), own, now);
        let path = layout.node_token(&node.name);
        token::issue(&layout.token_private_key(), &claims, &path)?;
    }
    Ok(())
}

/// Writes a fresh token for the service account of a waypoint's pod.
pub(super) fn issue_pod_token(layout: &Layout, pod: &PodView) -> Result<(), LocalError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    let (namespace, name) = pod.key.clone();
    let account = service_account(pod);
    let account = Named {
        uid: expand_uid(&format!("ServiceAccount/{namespace}/{account}")),
        name: account,
    };
    let own = Named {
        name,
        uid: pod.uid.clone(),
    };
    let node = Named {
        name: pod.node.clone(),
        uid: node_uid(&pod.node),
    };
    let claims = Claims::new(&namespace, account, own, node, now);
    let path = layout.pod_token(&pod.uid);
    token::issue(&layout.token_private_key(), &claims, &path)
}

fn service_account(pod: &PodView) -> String {
    let spec = pod.object.spec.as_ref();
    let account = spec.and_then(|spec| spec.service_account_name.clone());
    account.unwrap_or_else(|| "default".into())
}

/// How `aditd` is run.
pub(super) fn aditd(config: &MeshConfig, layout: &Layout) -> Result<ComponentPlan, LocalError> {
    let path = |p: std::path::PathBuf| p.display().to_string();
    let mut args = vec![
        "--config-dir".into(),
        path(layout.cluster_dir()),
        "--status-dir".into(),
        path(layout.status_dir()),
        "--ca-dir".into(),
        path(layout.ca_dir()),
        "--token-key".into(),
        path(layout.token_public_key()),
        "--trust-domain".into(),
        config.trust_domain.clone(),
        "--listen".into(),
        format!("{}:{XDS_PORT}", CONTROL_PLANE.v4),
        "--monitoring-listen".into(),
        format!("{}:{CONTROL_PLANE_MONITORING}", CONTROL_PLANE.v4),
    ];
    args.extend(config.aditd_args.iter().cloned());
    let netns = layout.aditd_netns();
    let sandbox = Sandbox::netns_only(&netns)?
        .cgroup(&layout.aditd_cgroup())?
        .names(
            "aditd",
            &layout.hosts(None),
            None,
            &[layout.netns_dir(), layout.bpffs()],
        )?
        .session();
    Ok(ComponentPlan {
        name: "aditd".into(),
        pod: None,
        replaceable: false,
        program: config.aditd.clone(),
        args,
        env: environment(config, &config.aditd_env, Vec::new()),
        sandbox,
        dirs: config.binary_dirs.clone(),
        log: layout.component_log("aditd"),
        ready: ReadyCheck {
            netns,
            address: (CONTROL_PLANE.v4, CONTROL_PLANE_MONITORING).into(),
            path: "/ready",
        },
        restart: config.restart_components,
        grace: config.grace,
    })
}

/// The root certificate that `aditd` writes when it has one.
pub(super) fn root_certificate(layout: &Layout) -> std::path::PathBuf {
    layout.ca_dir().join("root-cert.pem")
}

/// How the ztunnel of a node is run.
pub(super) fn ztunnel(
    config: &MeshConfig,
    layout: &Layout,
    node: &NodeView,
) -> Result<ComponentPlan, LocalError> {
    let name = &node.name;
    let mut own = proxy_variables(config, layout, name);
    own.extend([
        ("AUTH_TOKEN", text(layout.node_token(name))),
        ("POD_NAME", ztunnel_pod(name).name),
        ("POD_NAMESPACE", "istio-system".into()),
        ("SERVICE_ACCOUNT", "ztunnel".into()),
        ("INSTANCE_IP", node.addresses.v4.to_string()),
        ("ADIT_CGROUP", text(layout.node_cgroup(name))),
        ("ADIT_BPFFS", text(layout.bpffs().join(name))),
        ("ADIT_NETNS_DIR", text(layout.pod_netns_dir())),
        ("ADIT_KUBELET_CGROUP", text(layout.kubelet_cgroup(name))),
    ]);
    let netns = layout.node_netns(name);
    let sandbox = Sandbox::netns_only(&netns)?
        .cgroup(&layout.ztunnel_cgroup(name))?
        .names(name, &layout.hosts(None), None, &[])?
        .session();
    Ok(ComponentPlan {
        name: format!("ztunnel-{name}"),
        pod: None,
        replaceable: true,
        program: config.ztunnel.clone(),
        args: Vec::new(),
        env: environment(config, &config.ztunnel_env, own),
        sandbox,
        dirs: config.binary_dirs.clone(),
        log: layout.component_log(&format!("ztunnel-{name}")),
        ready: ReadyCheck {
            netns,
            address: ([127, 0, 0, 1], 15021).into(),
            path: "/healthz/ready",
        },
        restart: config.restart_components,
        grace: config.grace,
    })
}

/// The name of a waypoint among the components, as Istio's tools name proxies.
pub(super) fn waypoint_name(gateway: &str, namespace: &str) -> String {
    format!("{gateway}.{namespace}")
}

/// How the waypoint of a Gateway is run, in the pod that was made for it.
pub(super) fn waypoint(
    config: &MeshConfig,
    layout: &Layout,
    gateway: &str,
    pod: &PodView,
    sandbox: Sandbox,
) -> ComponentPlan {
    let (namespace, name) = &pod.key;
    let mut own = proxy_variables(config, layout, &pod.node);
    own.extend([
        ("AUTH_TOKEN", text(layout.pod_token(&pod.uid))),
        ("POD_NAME", name.clone()),
        ("POD_NAMESPACE", namespace.clone()),
        ("POD_UID", pod.uid.clone()),
        ("SERVICE_ACCOUNT", service_account(pod)),
        ("INSTANCE_IP", pod.addresses.v4.to_string()),
        ("GATEWAY_NAME", gateway.to_owned()),
    ]);
    let component = waypoint_name(gateway, namespace);
    ComponentPlan {
        program: config.waypoint.clone(),
        args: Vec::new(),
        env: environment(config, &config.waypoint_env, own),
        sandbox,
        dirs: config.binary_dirs.clone(),
        log: layout.component_log(&component),
        name: component,
        pod: Some(pod.uid.clone()),
        replaceable: false,
        ready: ReadyCheck {
            netns: layout.pod_netns(&pod.uid),
            address: ([127, 0, 0, 1], 15021).into(),
            path: "/healthz/ready",
        },
        restart: config.restart_components,
        grace: config.grace,
    }
}

/// What ztunnels and waypoints are told alike.
fn proxy_variables(
    config: &MeshConfig,
    layout: &Layout,
    node: &str,
) -> Vec<(&'static str, String)> {
    let control_plane = format!("https://istiod.istio-system.svc:{XDS_PORT}");
    let root = text(root_certificate(layout));
    vec![
        ("NODE_NAME", node.to_owned()),
        ("XDS_ADDRESS", control_plane.clone()),
        ("CA_ADDRESS", control_plane),
        ("XDS_ROOT_CA", root.clone()),
        ("CA_ROOT_CA", root),
        ("CLUSTER_ID", CLUSTER_ID.into()),
        ("TRUST_DOMAIN", config.trust_domain.clone()),
    ]
}

fn text(path: std::path::PathBuf) -> String {
    path.display().to_string()
}

/// The user's variables win over ours.
fn environment(
    config: &MeshConfig,
    user: &BTreeMap<String, String>,
    own: Vec<(&str, String)>,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), search_path(&config.binary_dirs)),
        ("RUST_LOG".to_owned(), "info".to_owned()),
    ]);
    for inherited in ["RUST_LOG", "RUST_BACKTRACE"] {
        if let Ok(value) = std::env::var(inherited) {
            env.insert(inherited.into(), value);
        }
    }
    env.extend(
        own.into_iter()
            .map(|(name, value)| (name.to_owned(), value)),
    );
    env.extend(user.clone());
    env
}
