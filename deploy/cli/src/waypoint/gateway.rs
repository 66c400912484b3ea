//! The Gateway of a waypoint: how it is written and how it is read (pure).

use serde_json::{Value, json};

use super::TrafficType;
use crate::cluster::{label_of, namespace_of};

pub(super) const CLASS: &str = "istio-waypoint";
const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
const REVISION: &str = "istio.io/rev";

/// The Gateway of a waypoint.
pub(super) fn gateway(
    name: &str,
    namespace: Option<&str>,
    traffic: Option<TrafficType>,
    revision: Option<&str>,
) -> Value {
    let mut metadata = json!({"name": name});
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    if let Some(traffic) = traffic {
        metadata["labels"][WAYPOINT_FOR] = traffic.text().into();
    }
    if let Some(revision) = revision {
        metadata["labels"][REVISION] = revision.into();
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {
            "gatewayClassName": CLASS,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    })
}

/// Only the waypoints among Gateways, by namespace and name.
pub(super) fn waypoints(gateways: Vec<Value>, revision: Option<&str>) -> Vec<Value> {
    let is_waypoint = |gateway: &Value| {
        let right = revision.is_none_or(|wanted| revision_of(gateway) == wanted);
        gateway["spec"]["gatewayClassName"] == CLASS && right
    };
    gateways.into_iter().filter(is_waypoint).collect()
}

/// The revision, `default` where none is named.
pub(super) fn revision_of(gateway: &Value) -> &str {
    label_of(gateway, REVISION).unwrap_or("default")
}

/// The traffic that the waypoint takes: its own label, else that of its class, else
/// services.
pub(super) fn traffic_of<'a>(gateway: &'a Value, classes: &'a [Value]) -> &'a str {
    let own = label_of(gateway, WAYPOINT_FOR);
    let class = classes.iter().find(|c| c["metadata"]["name"] == CLASS);
    let class = || class.and_then(|class| label_of(class, WAYPOINT_FOR));
    own.or_else(class).unwrap_or("service")
}

/// A condition of the Gateway.
pub(super) fn condition<'a>(gateway: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = gateway["status"]["conditions"].as_array()?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
}

/// Whether traffic can take it.
pub(super) fn is_programmed(gateway: &Value) -> bool {
    condition(gateway, "Programmed").is_some_and(|condition| condition["status"] == "True")
}

/// Why not, in one sentence.
pub(super) fn why_not(gateway: &Value) -> String {
    match condition(gateway, "Programmed").or_else(|| condition(gateway, "Accepted")) {
        None => "the control plane has not said anything about it".into(),
        Some(condition) => format!(
            "{}: {}",
            condition["reason"].as_str().unwrap_or("?"),
            condition["message"].as_str().unwrap_or("?")
        ),
    }
}

/// `namespace/name`.
pub(super) fn path(gateway: &Value) -> String {
    format!(
        "{}/{}",
        namespace_of(gateway),
        crate::cluster::name_of(gateway)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_says_only_what_was_asked() {
        let plain = gateway("waypoint", None, None, None);
        assert_eq!(plain["metadata"], json!({"name": "waypoint"}));
        let full = gateway("w", Some("shop"), Some(TrafficType::All), Some("canary"));
        assert_eq!(
            full["metadata"],
            json!({"name": "w", "namespace": "shop",
                "labels": {"istio.io/waypoint-for": "all", "istio.io/rev": "canary"}})
        );
    }

    #[test]
    fn the_effective_traffic_type() {
        let class = |value: &str| json!({"metadata": {"name": CLASS, "labels": {"istio.io/waypoint-for": value}}});
        let own = gateway("w", None, Some(TrafficType::Workload), None);
        let plain = gateway("w", None, None, None);
        assert_eq!(traffic_of(&own, &[class("all")]), "workload");
        assert_eq!(traffic_of(&plain, &[class("all")]), "all");
        assert_eq!(traffic_of(&plain, &[]), "service");
    }

    #[test]
    fn what_is_no_waypoint_is_passed_over() {
        let mut ingress = gateway("in", None, None, None);
        ingress["spec"]["gatewayClassName"] = "istio".into();
        let canary = gateway("c", None, None, Some("canary"));
        let all = vec![ingress, canary, gateway("w", None, None, None)];
        assert_eq!(waypoints(all.clone(), None).len(), 2);
        assert_eq!(waypoints(all.clone(), Some("canary")).len(), 1);
        assert_eq!(waypoints(all, Some("default")).len(), 1);
    }
}
