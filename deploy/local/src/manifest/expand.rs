//! From objects to the pods that must run: Deployments become pods with names that
//! depend on nothing but the manifest, and every pod gets a node.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, PodSpec, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::gateway::{Gateway, MANAGED, MESH_CONTROLLER};
use super::{Key, Object};

/// More replicas than addresses on a node cannot run.
const MAX_REPLICAS: i32 = 250;
/// The alphabet of Kubernetes' generated names: no vowels, no words.
const SAFE: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// A pod that must run.
#[derive(Debug, Clone, PartialEq)]
pub struct DesiredPod {
    /// The object, with namespace and, once placed, `spec.nodeName`.
    pub pod: Pod,
    /// Changes when the pod must be made anew, and not when labels or annotations do.
    pub fingerprint: String,
    /// What made the pod, for spreading: `Deployment/<name>`, or empty.
    owner: String,
    /// The Gateway whose waypoint the mesh has to run in it.
    pub waypoint: Option<String>,
}

/// A node that pods may be placed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Where the pods run that already do.
pub type Placement = BTreeMap<Key, String>;

/// What the manifests ask for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Desired {
    /// Pods.
    pub pods: BTreeMap<Key, DesiredPod>,
    /// Services.
    pub services: BTreeMap<Key, Service>,
    /// EndpointSlices of the user.
    pub slices: BTreeMap<Key, EndpointSlice>,
    /// Node objects of the user.
    pub nodes: BTreeMap<String, Node>,
    /// Namespaces of the user.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Service accounts that were generated.
    pub accounts: BTreeMap<Key, ServiceAccount>,
    /// A sentence for each thing that cannot be done.
    pub problems: Vec<String>,
}

/// Works out what must run. `nodes` are the nodes of the mesh, `running` keeps pods
/// where they are.
pub fn expand(objects: &[Object], nodes: &[NodeFacts], running: &Placement) -> Desired {
    let mut desired = Desired::default();
    let mut gateways = Vec::new();
    for object in objects {
        match object {
            Object::Gateway(gateway) => gateways.push(gateway.as_ref()),
            Object::Namespace(namespace) => {
                let name = namespace.metadata.name.clone().unwrap_or_default();
                desired.namespaces.insert(name, (**namespace).clone());
            }
            Object::Node(node) => {
                let name = node.metadata.name.clone().unwrap_or_default();
                desired.nodes.insert(name, (**node).clone());
            }
            Object::Pod(pod) => add_pod(&mut desired, (**pod).clone(), String::new()),
            Object::Deployment(deployment) => add_deployment(&mut desired, deployment),
            Object::Service(service) => {
                let mut service = (**service).clone();
                let key = key(&mut service.metadata);
                if desired.services.insert(key.clone(), service).is_some() {
                    desired.problems.push(twice("Service", &key));
                }
            }
            Object::EndpointSlice(slice) => {
                let mut slice = (**slice).clone();
                desired.slices.insert(key(&mut slice.metadata), slice);
            }
        }
    }
    // After the user's own objects: those are never taken over.
    for gateway in gateways.into_iter().filter(|g| g.is_provisioned()) {
        add_waypoint(&mut desired, gateway, nodes);
    }
    place(&mut desired, nodes, running);
    desired
}

fn add_waypoint(desired: &mut Desired, gateway: &Gateway, nodes: &[NodeFacts]) {
    let first = nodes.first().map_or("", |node| node.name.as_str());
    let mut made = gateway.provision(first);
    let key = key(&mut made.service.metadata);
    if let Some(taken) = desired.services.get(&key) {
        let labels = taken.metadata.labels.as_ref();
        let managed = labels.and_then(|labels| labels.get(MANAGED));
        let (namespace, name) = &key;
        desired.problems.push(match managed.map(String::as_str) {
            Some(MESH_CONTROLLER) => twice("Gateway", &key),
            _ => format!(
                "Gateway {namespace}/{name}: there is a Service of this name that is not managed \
                 by the mesh; no waypoint is run"
            ),
        });
        return;
    }
    let before: BTreeSet<Key> = desired.pods.keys().cloned().collect();
    add_deployment(desired, &made.deployment);
    for (pod, entry) in &mut desired.pods {
        if !before.contains(pod) {
            entry.waypoint = Some(key.1.clone());
        }
    }
    desired.accounts.insert(key.clone(), made.account);
    desired.services.insert(key, made.service);
}

fn add_pod(desired: &mut Desired, mut pod: Pod, owner: String) {
    let key = key(&mut pod.metadata);
    let spec = pod.spec.get_or_insert_with(PodSpec::default);
    spec.service_account_name
        .get_or_insert_with(|| "default".into());
    // What the cluster says about a pod is ours to say.
    pod.status = None;
    pod.metadata.uid = None;
    let fingerprint = fingerprint(spec);
    let entry = DesiredPod {
        pod,
        fingerprint,
        owner,
        waypoint: None,
    };
    if desired.pods.insert(key.clone(), entry).is_some() {
        desired.problems.push(twice("Pod", &key));
    }
}

fn add_deployment(desired: &mut Desired, deployment: &Deployment) {
    let mut metadata = deployment.metadata.clone();
    let (namespace, name) = key(&mut metadata);
    let spec = deployment.spec.clone().unwrap_or_default();
    let replicas = spec.replicas.unwrap_or(1);
    if !(0..=MAX_REPLICAS).contains(&replicas) {
        desired.problems.push(format!(
            "Deployment {namespace}/{name}: spec.replicas {replicas} is not between 0 and \
             {MAX_REPLICAS}"
        ));
        return;
    }
    let template = spec.template;
    let pod_spec = template.spec.unwrap_or_default();
    let hash = short_hash(&fingerprint(&pod_spec));
    let replica_set = format!("{name}-{hash}");
    for index in 0..replicas {
        let mut metadata = template.metadata.clone().unwrap_or_default();
        metadata.namespace = Some(namespace.clone());
        metadata.name = Some(format!("{replica_set}-{index}"));
        metadata
            .labels
            .get_or_insert_default()
            .insert("pod-template-hash".into(), hash.clone());
        metadata.owner_references = Some(vec![OwnerReference {
            api_version: "apps/v1".into(),
            kind: "ReplicaSet".into(),
            name: replica_set.clone(),
            uid: stable_uid(&format!("ReplicaSet/{namespace}/{replica_set}")),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]);
        let pod = Pod {
            metadata,
            spec: Some(pod_spec.clone()),
            status: None,
        };
        add_pod(desired, pod, format!("Deployment/{namespace}/{name}"));
    }
}

/// Pods stay where they are, go where they ask to, or else spread: fewest pods of the
/// same owner, then fewest pods, then the order of the nodes.
fn place(desired: &mut Desired, nodes: &[NodeFacts], running: &Placement) {
    let mut load: Vec<(usize, BTreeMap<String, usize>)> = vec![Default::default(); nodes.len()];
    let mut homeless = BTreeSet::new();
    let index_of = |name: &str| nodes.iter().position(|node| node.name == name);
    let mut chosen: BTreeMap<Key, usize> = BTreeMap::new();
    for (key, entry) in &desired.pods {
        let spec = entry.pod.spec.as_ref();
        let asked = spec.and_then(|spec| spec.node_name.as_deref());
        let index = match asked {
            Some(name) if index_of(name).is_none() => {
                desired.problems.push(format!(
                    "Pod {}/{}: spec.nodeName {name} is no node of this mesh",
                    key.0, key.1
                ));
                homeless.insert(key.clone());
                continue;
            }
            Some(name) => index_of(name),
            None => running.get(key).and_then(|name| index_of(name)),
        };
        if let Some(index) = index {
            load[index].0 += 1;
            *load[index].1.entry(entry.owner.clone()).or_default() += 1;
            chosen.insert(key.clone(), index);
        }
    }
    for (key, entry) in &desired.pods {
        if chosen.contains_key(key) || homeless.contains(key) {
            continue;
        }
        let selector = entry
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.node_selector.clone());
        let best = (0..nodes.len())
            .filter(|index| selects(&nodes[*index], selector.as_ref()))
            .min_by_key(|index| {
                let (all, owners) = &load[*index];
                let siblings = match entry.owner.as_str() {
                    "" => 0,
                    owner => owners.get(owner).copied().unwrap_or(0),
                };
                (siblings, *all, *index)
            });
        let Some(index) = best else {
            desired.problems.push(format!(
                "Pod {}/{}: spec.nodeSelector fits no node of this mesh",
                key.0, key.1
            ));
            homeless.insert(key.clone());
            continue;
        };
        load[index].0 += 1;
        *load[index].1.entry(entry.owner.clone()).or_default() += 1;
        chosen.insert(key.clone(), index);
    }
    desired.pods.retain(|key, _| !homeless.contains(key));
    for (key, index) in chosen {
        if let Some(spec) = desired.pods.get_mut(&key).and_then(|e| e.pod.spec.as_mut()) {
            spec.node_name = Some(nodes[index].name.clone());
        }
    }
}

fn selects(node: &NodeFacts, selector: Option<&BTreeMap<String, String>>) -> bool {
    selector.into_iter().flatten().all(|(label, wanted)| {
        let value = match label.as_str() {
            "kubernetes.io/hostname" => Some(&node.name),
            _ => node.labels.get(label),
        };
        value == Some(wanted)
    })
}

fn key(metadata: &mut ObjectMeta) -> Key {
    let namespace = metadata.namespace.get_or_insert_with(|| "default".into());
    let namespace = namespace.clone();
    (namespace, metadata.name.clone().unwrap_or_default())
}

fn twice(kind: &str, (namespace, name): &Key) -> String {
    format!("{kind} {namespace}/{name} is defined twice; the later one counts")
}

/// The specification as written; a map of serde is sorted, so equal means equal.
fn fingerprint(spec: &PodSpec) -> String {
    serde_json::to_string(spec).unwrap_or_default()
}

/// Ten characters as Kubernetes' pod-template-hash has them.
fn short_hash(text: &str) -> String {
    let mut hash = fnv1a(text);
    let mut name = String::new();
    for _ in 0..10 {
        name.push(char::from(SAFE[(hash % 27) as usize]));
        hash /= 27;
    }
    name
}

/// A uid that is the same in every run.
pub(crate) fn stable_uid(text: &str) -> String {
    let high = fnv1a(text);
    let low = fnv1a(&format!("{text}/"));
    let digits = format!("{high:016x}{low:016x}");
    format!(
        "{}-{}-5{}-8{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[13..16],
        &digits[17..20],
        &digits[20..]
    )
}

/// FNV-1a, 64 bits: for names, where a collision costs a name and nothing else.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::super::{SourceFile, parse};
    use super::*;

    fn objects(text: &str) -> Vec<Object> {
        let file = SourceFile {
            relative: "a.yaml".into(),
            text: text.into(),
        };
        let parsed = parse(&file, &BTreeSet::new());
        assert_eq!(parsed.problems, Vec::<String>::new());
        parsed.objects
    }

    fn nodes(names: &[&str]) -> Vec<NodeFacts> {
        let node = |name: &&str| NodeFacts {
            name: (*name).into(),
            labels: BTreeMap::new(),
        };
        names.iter().map(node).collect()
    }

    fn deployment(replicas: i32, label: &str, command: &str) -> String {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: shop}}\n\
             spec:\n  replicas: {replicas}\n  selector: {{matchLabels: {{app: web}}}}\n  \
             template:\n    metadata: {{labels: {{app: web, extra: {label}}}}}\n    spec:\n      \
             containers: [{{name: web, command: [{command}]}}]\n"
        )
    }

    fn expand_text(text: &str, running: &Placement) -> Desired {
        expand(&objects(text), &nodes(&["n1", "n2"]), running)
    }

    fn node_of(desired: &Desired, name: &str) -> Option<String> {
        let key = ("default".to_owned(), name.to_owned());
        desired.pods.get(&key)?.pod.spec.as_ref()?.node_name.clone()
    }

    #[test]
    fn deployments_expand_to_the_same_names_every_time_and_spread() {
        let text = deployment(4, "a", "x");
        let first = expand_text(&text, &Placement::new());
        let again = expand_text(&text, &Placement::new());
        assert_eq!(first, again);
        let names: Vec<&str> = first.pods.keys().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names.len(), 4);
        assert!(names[0].starts_with("web-") && names[0].ends_with("-0"));
        let on_first = |d: &Desired| {
            let node = |e: &DesiredPod| e.pod.spec.as_ref()?.node_name.clone();
            d.pods
                .values()
                .filter(|e| node(e).as_deref() == Some("n1"))
                .count()
        };
        assert_eq!(on_first(&first), 2);
    }

    #[test]
    fn labels_do_not_make_a_new_pod_but_a_command_does() {
        let before = expand_text(&deployment(1, "a", "x"), &Placement::new());
        let label = expand_text(&deployment(1, "b", "x"), &Placement::new());
        let command = expand_text(&deployment(1, "a", "y"), &Placement::new());
        let prints = |d: &Desired| -> Vec<(Key, String)> {
            let one = |(k, e): (&Key, &DesiredPod)| (k.clone(), e.fingerprint.clone());
            d.pods.iter().map(one).collect()
        };
        assert_eq!(prints(&before), prints(&label));
        assert_ne!(before, label);
        assert_ne!(prints(&before), prints(&command));
    }

    #[test]
    fn pods_stay_go_where_they_ask_or_are_refused() {
        let pod = |name: &str, spec: &str| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{{spec} \
                 containers: []}}\n"
            )
        };
        let text = pod("a", "nodeName: n2,")
            + &pod("b", "nodeSelector: {kubernetes.io/hostname: n2},")
            + &pod("c", "")
            + &pod("d", "nodeName: moon,")
            + &pod("e", "nodeSelector: {disk: ssd},");
        let running = Placement::from([(("default".into(), "c".into()), "n2".into())]);
        let desired = expand_text(&text, &running);
        assert_eq!(node_of(&desired, "a").as_deref(), Some("n2"));
        assert_eq!(node_of(&desired, "b").as_deref(), Some("n2"));
        assert_eq!(node_of(&desired, "c").as_deref(), Some("n2"));
        assert_eq!(desired.pods.len(), 3);
        assert_eq!(
            desired.problems,
            [
                "Pod default/d: spec.nodeName moon is no node of this mesh",
                "Pod default/e: spec.nodeSelector fits no node of this mesh"
            ]
        );
    }

    #[test]
    fn a_waypoint_gateway_brings_its_objects_but_takes_over_nobodys() {
        let gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: \
                       waypoint, namespace: shop}\nspec: {gatewayClassName: istio-waypoint}\n";
        let desired = expand_text(gateway, &Placement::new());
        let pods: Vec<_> = desired.pods.values().collect();
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0].waypoint.as_deref(), Some("waypoint"));
        let key = ("shop".to_owned(), "waypoint".to_owned());
        assert!(desired.services.contains_key(&key) && desired.accounts.contains_key(&key));
        let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: waypoint, namespace: \
                       shop}\nspec: {ports: []}\n";
        let desired = expand_text(&format!("{gateway}{service}"), &Placement::new());
        assert_eq!(desired.pods.len(), 0);
        let problem = desired.problems.join("\n");
        assert!(problem.contains("not managed by the mesh"), "{problem}");
    }

    #[test]
    fn uids_look_like_uids() {
        let uid = stable_uid("Node/n1");
        assert_eq!(uid.len(), 36);
        assert_eq!(uid, stable_uid("Node/n1"));
        assert_ne!(uid, stable_uid("Node/n2"));
    }
}
