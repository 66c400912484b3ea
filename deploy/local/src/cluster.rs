//! What the API server would say: objects with addresses, uids and status, for `aditd`,
//! and which pods are behind which service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Node, Pod, Service, ServiceAccount, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::address::{Pair, ServiceAddresses};
use crate::manifest::{Key, expand_uid};

/// The most slices' endpoints a service may have in one object.
const ENDPOINTS_PER_SLICE: usize = 100;

/// A pod and what is going on with it.
#[derive(Debug, Clone)]
pub(crate) struct PodView {
    pub(crate) key: Key,
    /// With `spec.nodeName`, without status.
    pub(crate) object: Pod,
    pub(crate) uid: String,
    pub(crate) node: String,
    pub(crate) host: Pair,
    pub(crate) addresses: Pair,
    pub(crate) phase: &'static str,
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
    pub(crate) created: Timestamp,
    pub(crate) containers: Vec<ContainerView>,
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub(crate) struct ContainerView {
    pub(crate) name: String,
    pub(crate) running: bool,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
}

/// A service with its addresses.
#[derive(Debug, Clone)]
pub(crate) struct ServiceView {
    pub(crate) key: Key,
    pub(crate) object: Service,
    /// Empty for a headless service and for an ExternalName.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ports: Vec<PortView>,
}

/// A port of a service and who answers on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortView {
    pub(crate) name: Option<String>,
    pub(crate) protocol: String,
    pub(crate) port: u16,
    /// Ready ones (or all, for `publishNotReadyAddresses`).
    pub(crate) targets: BTreeSet<SocketAddr>,
}

/// A virtual node.
#[derive(Debug, Clone)]
pub(crate) struct NodeView {
    pub(crate) name: String,
    pub(crate) addresses: Pair,
    pub(crate) pod_cidrs: [String; 2],
    /// The user's object, if there is one.
    pub(crate) object: Option<Node>,
}

/// Gives every service its addresses and works out its endpoints.
pub(crate) fn services(
    objects: &BTreeMap<Key, Service>,
    slices: &BTreeMap<Key, EndpointSlice>,
    pods: &[PodView],
    ranges: &mut ServiceAddresses,
) -> (Vec<ServiceView>, Vec<String>) {
    let mut problems = Vec::new();
    let fixed: BTreeSet<IpAddr> = objects
        .values()
        .flat_map(|service| fixed_addresses(service).unwrap_or_default())
        .collect();
    let mut views = Vec::new();
    for (key, object) in objects {
        let addresses = match service_addresses(key, object, &fixed, ranges) {
            Ok(addresses) => addresses,
            Err(problem) => {
                problems.push(format!("Service {}/{}: {problem}", key.0, key.1));
                continue;
            }
        };
        let ports = ports(object);
        let ports = ports.map(|port| PortView {
            name: port.name.clone(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
            port: u16::try_from(port.port).unwrap_or(0),
            targets: targets(key, object, port, pods, slices),
        });
        views.push(ServiceView {
            key: key.clone(),
            object: object.clone(),
            addresses,
            ports: ports.collect(),
        });
    }
    (views, problems)
}

fn ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    let spec = service.spec.as_ref();
    spec.into_iter()
        .flat_map(|spec| spec.ports.iter().flatten())
}

/// The addresses that the user wrote down; `None` for a headless service.
fn fixed_addresses(service: &Service) -> Option<Vec<IpAddr>> {
    let spec = service.spec.as_ref()?;
    let one = spec.cluster_ip.iter();
    let all: Vec<&String> = one.chain(spec.cluster_ips.iter().flatten()).collect();
    if all.iter().any(|text| *text == "None") {
        return None;
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in all.iter().filter_map(|text| text.parse().ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Some(addresses)
}

fn service_addresses(
    key: &Key,
    service: &Service,
    fixed: &BTreeSet<IpAddr>,
    ranges: &mut ServiceAddresses,
) -> Result<Vec<IpAddr>, String> {
    let spec = service.spec.clone().unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(Vec::new());
    }
    for text in spec
        .cluster_ip
        .iter()
        .chain(spec.cluster_ips.iter().flatten())
    {
        if !text.is_empty() && text != "None" && text.parse::<IpAddr>().is_err() {
            return Err(format!("spec.clusterIP {text} is no address"));
        }
    }
    let Some(own) = fixed_addresses(service) else {
        return Ok(Vec::new());
    };
    if !own.is_empty() {
        return Ok(own);
    }
    let pair = ranges
        .get(&format!("{}/{}", key.0, key.1), |ip| fixed.contains(&ip))
        .ok_or("the range of service addresses is used up")?;
    let dual = spec
        .ip_family_policy
        .as_deref()
        .is_some_and(|p| p != "SingleStack");
    let mut families = spec.ip_families.unwrap_or_default();
    for family in ["IPv4", "IPv6"] {
        if families.is_empty() || (dual && !families.iter().any(|f| f == family)) {
            families.push(family.into());
        }
    }
    families
        .iter()
        .map(|family| match family.as_str() {
            "IPv4" => Ok(pair.v4.into()),
            "IPv6" => Ok(pair.v6.into()),
            other => Err(format!("spec.ipFamilies: {other} is neither IPv4 nor IPv6")),
        })
        .collect()
}

fn targets(
    key: &Key,
    service: &Service,
    port: &ServicePort,
    pods: &[PodView],
    slices: &BTreeMap<Key, EndpointSlice>,
) -> BTreeSet<SocketAddr> {
    let unready = publishes_unready(service);
    let mut all = BTreeSet::new();
    for pod in members(key, service, pods) {
        if let Some(number) = target_port(port, &pod.object)
            && (pod.ready || unready)
        {
            let sockets = pod.addresses.both().map(|ip| SocketAddr::new(ip, number));
            all.extend(sockets);
        }
    }
    for slice in slices_of(key, slices) {
        let number = slice.ports.iter().flatten().find_map(|p| {
            let name = |n: &Option<String>| n.clone().unwrap_or_default();
            (name(&p.name) == name(&port.name)).then_some(p.port)?
        });
        let Some(number) = number.and_then(|n| u16::try_from(n).ok()) else {
            continue;
        };
        for endpoint in &slice.endpoints {
            let ready = endpoint.conditions.as_ref().and_then(|c| c.ready);
            if ready.unwrap_or(true) || unready {
                let ips = endpoint.addresses.iter().filter_map(|ip| ip.parse().ok());
                all.extend(ips.map(|ip: IpAddr| SocketAddr::new(ip, number)));
            }
        }
    }
    all
}

fn publishes_unready(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|s| s.publish_not_ready_addresses)
        .unwrap_or(false)
}

fn slices_of<'a>(
    key: &'a Key,
    slices: &'a BTreeMap<Key, EndpointSlice>,
) -> impl Iterator<Item = &'a EndpointSlice> {
    slices.iter().filter_map(move |((namespace, _), slice)| {
        let labels = slice.metadata.labels.as_ref()?;
        let service = labels.get("kubernetes.io/service-name")?;
        (*namespace == key.0 && *service == key.1).then_some(slice)
    })
}

/// The pods that a service selects.
fn members<'a>(
    key: &'a Key,
    service: &'a Service,
    pods: &'a [PodView],
) -> impl Iterator<Item = &'a PodView> {
    let selector = service.spec.as_ref().and_then(|s| s.selector.as_ref());
    let selector = selector.filter(|selector| !selector.is_empty());
    pods.iter().filter(move |pod| {
        let labels = pod.object.metadata.labels.as_ref();
        let has =
            |(name, value): (&String, &String)| labels.and_then(|l| l.get(name)) == Some(value);
        let live = !pod.terminating && !matches!(pod.phase, "Succeeded" | "Failed");
        live && pod.key.0 == key.0 && selector.is_some_and(|s| s.iter().all(has))
    })
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    let number = match port.target_port.as_ref() {
        None => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let containers = pod.spec.iter().flat_map(|spec| spec.containers.iter());
            let mut ports = containers.flat_map(|c| c.ports.iter().flatten());
            ports
                .find(|p| p.name.as_ref() == Some(name))?
                .container_port
        }
    };
    u16::try_from(number).ok()
}

/// Everything that is published, by file name.
pub(crate) fn publish(
    nodes: &[NodeView],
    pods: &[PodView],
    services: &[ServiceView],
    namespaces: &BTreeSet<String>,
    accounts: &BTreeMap<Key, ServiceAccount>,
) -> BTreeMap<&'static str, String> {
    let namespaces = namespaces.iter().map(|name| {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": name, "labels": {"kubernetes.io/metadata.name": name}}})
    });
    let slices = services.iter().flat_map(|s| endpoint_slices(s, pods));
    BTreeMap::from([
        ("adit-local-namespaces.yaml", documents(namespaces)),
        (
            "adit-local-serviceaccounts.yaml",
            documents(accounts.values().map(account_object)),
        ),
        (
            "adit-local-nodes.yaml",
            documents(nodes.iter().map(node_object)),
        ),
        (
            "adit-local-pods.yaml",
            documents(pods.iter().map(pod_object)),
        ),
        (
            "adit-local-services.yaml",
            documents(services.iter().map(service_object)),
        ),
        ("adit-local-endpoints.yaml", documents(slices)),
    ])
}

fn documents(objects: impl Iterator<Item = Value>) -> String {
    let mut text = String::from("# Written by `adit local`; changes are overwritten.\n");
    for object in objects {
        text.push_str("---\n");
        // Values of our own making always have a YAML form.
        text.push_str(&serde_yaml_ng::to_string(&object).unwrap_or_default());
    }
    text
}

fn node_object(node: &NodeView) -> Value {
    let mut object = to_value(&node.object);
    object["apiVersion"] = "v1".into();
    object["kind"] = "Node".into();
    object["metadata"]["name"] = node.name.as_str().into();
    object["metadata"]["uid"] = node_uid(&node.name).into();
    object["metadata"]["labels"]["kubernetes.io/hostname"] = node.name.as_str().into();
    object["spec"]["podCIDR"] = node.pod_cidrs[0].as_str().into();
    object["spec"]["podCIDRs"] = json!(node.pod_cidrs);
    let [v4, v6] = node.addresses.both();
    object["status"] = json!({
        "addresses": [
            {"type": "InternalIP", "address": v4},
            {"type": "InternalIP", "address": v6},
            {"type": "Hostname", "address": node.name},
        ],
        "conditions": [{"type": "Ready", "status": "True"}],
    });
    object
}

/// A node's uid: the same whenever the mesh is made.
pub(crate) fn node_uid(name: &str) -> String {
    expand_uid(&format!("Node/{name}"))
}

fn pod_object(pod: &PodView) -> Value {
    let mut object = to_value(&pod.object);
    object["apiVersion"] = "v1".into();
    object["kind"] = "Pod".into();
    object["metadata"]["uid"] = pod.uid.as_str().into();
    object["metadata"]["creationTimestamp"] = time(pod.created).into();
    if pod.terminating {
        object["metadata"]["deletionTimestamp"] = time(pod.created).into();
    }
    let condition =
        |kind: &str, yes: bool| json!({"type": kind, "status": if yes { "True" } else { "False" }});
    let containers = pod.containers.iter().map(|container| {
        let state = match container.running {
            true => json!({"running": {}}),
            false => json!({"waiting": {}}),
        };
        json!({"name": container.name, "ready": container.ready, "image": "", "imageID": "",
            "restartCount": container.restarts, "started": container.running, "state": state})
    });
    let ips = pod.addresses.both();
    object["status"] = json!({
        "phase": pod.phase,
        "podIP": ips[0],
        "podIPs": ips.map(|ip| json!({"ip": ip})),
        "hostIP": pod.host.v4,
        "hostIPs": pod.host.both().map(|ip| json!({"ip": ip})),
        "startTime": time(pod.created),
        "conditions": [
            condition("PodScheduled", true),
            condition("Initialized", true),
            condition("ContainersReady", pod.ready),
            condition("Ready", pod.ready),
        ],
        "containerStatuses": containers.collect::<Vec<_>>(),
    });
    object
}

fn account_object(account: &ServiceAccount) -> Value {
    let mut object = to_value(account);
    object["apiVersion"] = "v1".into();
    object["kind"] = "ServiceAccount".into();
    object
}

fn service_object(service: &ServiceView) -> Value {
    let mut object = to_value(&service.object);
    object["apiVersion"] = "v1".into();
    object["kind"] = "Service".into();
    let (namespace, name) = &service.key;
    object["metadata"]["uid"] = expand_uid(&format!("Service/{namespace}/{name}")).into();
    if !service.addresses.is_empty() {
        object["spec"]["clusterIP"] = json!(service.addresses[0]);
        object["spec"]["clusterIPs"] = json!(service.addresses);
        object["spec"]["ipFamilies"] = service
            .addresses
            .iter()
            .map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" })
            .collect();
    }
    object
}

/// Like the endpoint slice controller: one set of slices for each family that the
/// service has (both for a headless one that asks for no family).
fn endpoint_slices(service: &ServiceView, pods: &[PodView]) -> Vec<Value> {
    let (namespace, name) = &service.key;
    let spec = service.object.spec.clone().unwrap_or_default();
    let selector = spec.selector.unwrap_or_default();
    if selector.is_empty() || spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let families: BTreeSet<bool> = match service.addresses.is_empty() {
        true => [true, false].into(),
        false => service.addresses.iter().map(IpAddr::is_ipv4).collect(),
    };
    let unready = publishes_unready(&service.object);
    let mut slices = Vec::new();
    for v4 in families {
        let kind = if v4 { "IPv4" } else { "IPv6" };
        // Pods of a service may resolve a named port differently: one slice each.
        let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&PodView>> = BTreeMap::new();
        for pod in members(&service.key, &service.object, pods) {
            let numbers = ports(&service.object).map(|port| target_port(port, &pod.object));
            groups.entry(numbers.collect()).or_default().push(pod);
        }
        let chunks = groups.iter().flat_map(|(numbers, pods)| {
            pods.chunks(ENDPOINTS_PER_SLICE)
                .map(move |pods| (numbers, pods))
        });
        for (index, (numbers, pods)) in chunks.enumerate() {
            let ports = ports(&service.object).zip(numbers);
            let ports = ports.filter_map(|(port, number)| {
                Some(
                    json!({"name": port.name.clone().unwrap_or_default(), "port": (*number)?,
                    "protocol": port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                    "appProtocol": port.app_protocol}),
                )
            });
            let endpoints = pods.iter().map(|pod| {
                let ip: IpAddr = match v4 {
                    true => pod.addresses.v4.into(),
                    false => pod.addresses.v6.into(),
                };
                json!({
                    "addresses": [ip],
                    "conditions": {"ready": pod.ready || unready, "serving": pod.ready,
                        "terminating": false},
                    "nodeName": pod.node,
                    "targetRef": {"kind": "Pod", "namespace": pod.key.0, "name": pod.key.1,
                        "uid": pod.uid},
                })
            });
            slices.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{}-{index}", kind.to_lowercase()),
                    "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name,
                        "endpointslice.kubernetes.io/managed-by": "adit-local"},
                },
                "addressType": kind,
                "endpoints": endpoints.collect::<Vec<_>>(),
                "ports": ports.collect::<Vec<_>>(),
            }));
        }
    }
    slices
}

fn to_value<T: serde::Serialize>(object: &T) -> Value {
    match serde_json::to_value(object) {
        Ok(Value::Object(map)) => Value::Object(map),
        _ => json!({}),
    }
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::address;

    pub(crate) fn pod(name: &str, host: u8, ready: bool) -> PodView {
        let text = format!(
            "metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}\nspec: {{containers: \
             [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]}}"
        );
        PodView {
            key: ("shop".into(), name.into()),
            object: serde_yaml_ng::from_str(&text).unwrap_or_default(),
            uid: format!("uid-{name}"),
            node: "n1".into(),
            host: address::node(0),
            addresses: address::pod(0, host),
            phase: "Running",
            ready,
            terminating: false,
            created: Timestamp::UNIX_EPOCH,
            containers: Vec::new(),
        }
    }

    fn service(spec: &str) -> BTreeMap<Key, Service> {
        let text = format!("metadata: {{name: web, namespace: shop}}\nspec: {{{spec}}}");
        let service = serde_yaml_ng::from_str(&text).unwrap_or_default();
        BTreeMap::from([(("shop".into(), "web".into()), service)])
    }

    fn view(spec: &str, pods: &[PodView]) -> (Vec<ServiceView>, Vec<String>) {
        let mut ranges = ServiceAddresses::default();
        services(&service(spec), &BTreeMap::new(), pods, &mut ranges)
    }

    #[test]
    fn addresses_follow_the_family_policy() {
        let count = |spec: &str| view(spec, &[]).0.first().map(|s| s.addresses.clone());
        assert_eq!(count("ports: []").map(|a| a.len()), Some(1));
        assert_eq!(count("clusterIP: None").map(|a| a.len()), Some(0));
        assert_eq!(count("type: ExternalName").map(|a| a.len()), Some(0));
        let dual = count("ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]");
        let families = dual.map(|a| a.iter().map(IpAddr::is_ipv4).collect::<Vec<_>>());
        assert_eq!(families, Some(vec![false, true]));
        let fixed = count("clusterIP: 10.96.7.7");
        assert_eq!(fixed, Some(vec![[10, 96, 7, 7].into()]));
        assert_eq!(
            view("clusterIP: nonsense", &[]).1,
            ["Service shop/web: spec.clusterIP nonsense is no address"]
        );
    }

    #[test]
    fn only_ready_pods_are_targets_and_named_ports_resolve() {
        let pods = [pod("a", 2, true), pod("b", 3, false)];
        let spec = "selector: {app: web}, ports: [{port: 80, targetPort: http}]";
        let (views, _) = view(spec, &pods);
        let v4: Vec<String> = views[0].ports[0]
            .targets
            .iter()
            .filter(|t| t.is_ipv4())
            .map(SocketAddr::to_string)
            .collect();
        assert_eq!(v4, ["10.244.1.2:8080"]);
        let all = view(&format!("{spec}, publishNotReadyAddresses: true"), &pods);
        assert_eq!(all.0[0].ports[0].targets.len(), 4);
    }

    #[test]
    fn published_objects_can_be_read_back() {
        let pods = [pod("a", 2, true)];
        let spec = "selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]";
        let (views, _) = view(spec, &pods);
        let nodes = [NodeView {
            name: "n1".into(),
            addresses: address::node(0),
            pod_cidrs: address::pod_cidrs(0),
            object: None,
        }];
        let files = publish(
            &nodes,
            &pods,
            &views,
            &["shop".into()].into(),
            &BTreeMap::new(),
        );
        let parse = |name: &str| {
            let text = files.get(name).cloned().unwrap_or_default();
            let documents = serde_yaml_ng::Deserializer::from_str(&text);
            let values = documents.map(|d| serde::Deserialize::deserialize(d).unwrap_or_default());
            values
                .filter(|v: &Value| !v.is_null())
                .collect::<Vec<Value>>()
        };
        let pods = parse("adit-local-pods.yaml");
        assert_eq!(pods[0]["status"]["podIP"], "10.244.1.2");
        assert_eq!(pods[0]["status"]["conditions"][3]["status"], "True");
        let services = parse("adit-local-services.yaml");
        assert_eq!(services[0]["spec"]["clusterIP"], "10.96.1.0");
        let slices = parse("adit-local-endpoints.yaml");
        assert_eq!(slices[0]["endpoints"][0]["targetRef"]["uid"], "uid-a");
        assert_eq!(slices[0]["ports"][0]["port"], 8080);
        assert_eq!(
            parse("adit-local-nodes.yaml")[0]["spec"]["podCIDR"],
            "10.244.1.0/24"
        );
    }
}
