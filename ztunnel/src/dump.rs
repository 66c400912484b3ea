//! The admin endpoint's dump of everything the proxy knows, with the keys that
//! `istioctl ztunnel-config` reads.

use std::collections::BTreeMap;

use adit_shared::model::{
    GatewayAddress, GatewayDestination, Health, IpFamilies, LoadBalancingMode, ServiceEntry,
    Snapshot, TunnelProtocol, Workload,
};
use adit_shared::policy::{Action, Group, Policy, Scope};
use serde_json::{Value, json};

use crate::connections::ConnectionView;
use crate::waypoints::FailingWaypoints;

/// All workloads, by uid.
pub fn workloads(snapshot: &Snapshot) -> Value {
    let mut all: Vec<&Workload> = snapshot.workloads().map(|w| &**w).collect();
    all.sort_by(|a, b| a.uid.cmp(&b.uid));
    all.into_iter().map(workload).collect()
}

fn workload(workload: &Workload) -> Value {
    let id = &workload.identity;
    let locality = &workload.locality;
    json!({
        "uid": *workload.uid,
        "name": *workload.name,
        "namespace": *workload.namespace,
        "workloadIps": workload.addresses,
        "hostname": *workload.hostname,
        "network": *workload.network,
        "protocol": match workload.tunnel_protocol {
            TunnelProtocol::None => "TCP",
            TunnelProtocol::Hbone => "HBONE",
        },
        "trustDomain": id.trust_domain().as_str(),
        "serviceAccount": id.service_account(),
        "waypoint": workload.waypoint.as_deref().map(gateway),
        "networkGateway": workload.network_gateway.as_deref().map(gateway),
        "node": *workload.node,
        "canonicalName": *workload.canonical_name,
        "canonicalRevision": *workload.canonical_revision,
        "workloadType": workload.workload_type,
        "workloadName": *workload.workload_name,
        "status": match workload.health {
            Health::Healthy => "Healthy",
            Health::Unhealthy => "Unhealthy",
        },
        "clusterId": *workload.cluster_id,
        "locality": {
            "region": *locality.region, "zone": *locality.zone, "subzone": *locality.subzone,
        },
        "networkMode": if workload.host_network { "HostNetwork" } else { "Standard" },
        "capacity": workload.capacity,
        "authorizationPolicies": workload.authorization_policies.iter().map(|p| &**p).collect::<Vec<_>>(),
        "servedBy": workload.served_by.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "requireWaypoint": workload.require_waypoint,
        "services": workload.services.iter().map(|m| m.service.to_string()).collect::<Vec<_>>(),
    })
}

fn gateway(gateway: &GatewayAddress) -> Value {
    let destination = match &gateway.destination {
        GatewayDestination::Hostname(name) => name.to_string(),
        GatewayDestination::Address(a) => format!("{}/{}", a.network, a.address),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_port })
}

/// All services, by `namespace/hostname`.
pub fn services(snapshot: &Snapshot) -> Value {
    let mut all: Vec<&ServiceEntry> = snapshot.services().map(|s| &**s).collect();
    all.sort_by(|a, b| a.service().key.cmp(&b.service().key));
    all.into_iter().map(service).collect()
}

fn service(entry: &ServiceEntry) -> Value {
    let service = entry.service();
    let ports: BTreeMap<String, u16> = service
        .ports
        .iter()
        .map(|p| (p.service_port.to_string(), p.target_port.unwrap_or(0)))
        .collect();
    let endpoints: BTreeMap<&str, Value> = entry
        .endpoints()
        .iter()
        .map(|w| {
            let ports: BTreeMap<String, u16> = w
                .ports_of(&service.key)
                .into_iter()
                .flatten()
                .map(|p| (p.service_port.to_string(), p.target_port.unwrap_or(0)))
                .collect();
            let status = match w.health {
                Health::Healthy => "Healthy",
                Health::Unhealthy => "Unhealthy",
            };
            (
                &*w.uid,
                json!({ "workloadUid": *w.uid, "port": ports, "status": status }),
            )
        })
        .collect();
    let balancing = &service.load_balancing;
    json!({
        "name": *service.name,
        "namespace": *service.key.namespace,
        "hostname": *service.key.hostname,
        "vips": service.addresses.iter().map(|a| {
            let whole = a.block.prefix_len() == a.block.max_prefix_len();
            if whole {
                format!("{}/{}", a.network, a.block.addr())
            } else {
                format!("{}/{}", a.network, a.block)
            }
        }).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": service.subject_alt_names.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "waypoint": service.waypoint.as_deref().map(gateway),
        "loadBalancer": {
            "routingPreferences": balancing.scopes.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>(),
            "mode": match balancing.mode {
                LoadBalancingMode::Standard => "Standard",
                LoadBalancingMode::Strict => "Strict",
                LoadBalancingMode::Failover => "Failover",
                LoadBalancingMode::Passthrough => "Passthrough",
            },
            "healthPolicy": if balancing.allow_unhealthy { "AllowAll" } else { "OnlyHealthy" },
        },
        "ipFamilies": match service.ip_families {
            IpFamilies::Automatic => Value::Null,
            IpFamilies::V4 => "IPv4".into(),
            IpFamilies::V6 => "IPv6".into(),
            IpFamilies::Dual => "Dual".into(),
        },
    })
}

/// The waypoints that services and workloads have, with their instances: which of them may be
/// used, and which have failed since they were last reached.
pub fn waypoints(snapshot: &Snapshot, failing: &FailingWaypoints) -> Value {
    let failing = failing.snapshot(|uid| snapshot.workload(uid).is_some());
    let of_services = snapshot.services().flat_map(|entry| {
        let service = entry.service();
        let weighted = service.weighted_waypoints.iter().map(|w| &w.destination);
        service.waypoint.iter().chain(weighted)
    });
    let of_workloads = snapshot.workloads().filter_map(|w| w.waypoint.as_ref());
    let mut found = BTreeMap::new();
    for waypoint in of_services.chain(of_workloads) {
        let shown = gateway(waypoint);
        let name = shown["destination"].to_string();
        if found.contains_key(&name) {
            continue;
        }
        let instances: Vec<&Workload> = match &waypoint.destination {
            GatewayDestination::Hostname(name) => snapshot
                .service(name)
                .into_iter()
                .flat_map(|entry| entry.endpoints().iter().map(|w| &**w))
                .collect(),
            GatewayDestination::Address(at) => snapshot
                .workload_at(&at.network, at.address)
                .into_iter()
                .map(|w| &**w)
                .collect(),
        };
        let is_up = |w: &&Workload| w.health == Health::Healthy && !failing.contains_key(&w.uid);
        let status = match instances.iter().any(is_up) {
            true => "Healthy",
            false if instances.is_empty() => "Unknown",
            false => "Unhealthy",
        };
        let instances: Vec<Value> = instances
            .iter()
            .map(|workload| {
                let failing = failing.get(&workload.uid).map(|failing| {
                    json!({
                        "since": humantime::format_rfc3339_millis(failing.since).to_string(),
                        "failures": failing.failures,
                        "error": failing.error,
                    })
                });
                json!({
                    "workloadUid": *workload.uid,
                    "status": match workload.health {
                        Health::Healthy => "Healthy",
                        Health::Unhealthy => "Unhealthy",
                    },
                    "failing": failing,
                })
            })
            .collect();
        let mut shown = shown;
        shown["status"] = status.into();
        shown["instances"] = instances.into();
        found.insert(name, shown);
    }
    found.into_values().collect()
}

/// All policies, by `namespace/name`.
pub fn policies(snapshot: &Snapshot) -> Value {
    let mut all: Vec<&Policy> = snapshot.policies().map(|p| &**p).collect();
    all.sort_by(|a, b| a.key.cmp(&b.key));
    all.into_iter().map(policy).collect()
}

fn policy(policy: &Policy) -> Value {
    let name = policy
        .key
        .split_once('/')
        .map_or(&*policy.key, |(_, name)| name);
    let rules = |groups: &[Group]| -> Vec<Vec<Vec<Value>>> {
        let groups = groups.iter().map(|group| {
            let clauses = group.clauses.iter();
            clauses
                .map(|clause| clause.matches.iter().map(policy_match).collect())
                .collect()
        });
        groups.collect()
    };
    json!({
        "name": name,
        "namespace": *policy.namespace,
        "scope": match policy.scope {
            Scope::Global => "Global",
            Scope::Namespace => "Namespace",
            Scope::WorkloadSelector => "WorkloadSelector",
        },
        "action": match policy.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
        },
        "dryRun": policy.dry_run,
        "invalid": policy.invalid.as_deref(),
        "rules": rules(&policy.groups),
        // Where its waypoint enforces the rest.
        "rulesBehindWaypoint": policy.waypoint_groups.as_deref().map(rules),
    })
}

fn policy_match(m: &adit_shared::policy::Match) -> Value {
    let lists: [(&str, Vec<String>); 14] = [
        ("namespaces", m.namespaces.values()),
        ("notNamespaces", m.not_namespaces.values()),
        ("principals", m.principals.values()),
        ("notPrincipals", m.not_principals.values()),
        ("sourceIps", m.source_ips.values()),
        ("notSourceIps", m.not_source_ips.values()),
        ("destinationIps", m.destination_ips.values()),
        ("notDestinationIps", m.not_destination_ips.values()),
        ("destinationPorts", numbers(m.destination_ports.values())),
        (
            "notDestinationPorts",
            numbers(m.not_destination_ports.values()),
        ),
        ("serviceAccounts", m.service_accounts.values()),
        ("notServiceAccounts", m.not_service_accounts.values()),
        ("trustDomains", m.trust_domains.values()),
        ("notTrustDomains", m.not_trust_domains.values()),
    ];
    let present = lists.into_iter().filter(|(_, values)| !values.is_empty());
    Value::Object(
        present
            .map(|(name, values)| (name.to_owned(), json!(values)))
            .collect(),
    )
}

fn numbers(ports: &[u16]) -> Vec<String> {
    ports.iter().map(ToString::to_string).collect()
}

/// Open connections by pod uid and direction, with the pod's name.
pub fn connections(views: Vec<ConnectionView>, pods: &BTreeMap<String, Value>) -> Value {
    let mut by_pod: BTreeMap<String, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
    for view in views {
        let (inbound, outbound) = by_pod.entry(view.uid.to_string()).or_default();
        let side = if view.inbound { inbound } else { outbound };
        side.push(json!(view));
    }
    let state: BTreeMap<String, Value> = pods
        .iter()
        .map(|(uid, info)| {
            let (inbound, outbound) = by_pod.remove(uid).unwrap_or_default();
            let value = json!({
                "state": "Up",
                "connections": { "inbound": inbound, "outbound": outbound },
                "info": info,
            });
            (uid.clone(), value)
        })
        .collect();
    json!(state)
}
