//! Tables from a dump. They take Istio's dump as well as ours: what is missing is shown
//! as absent, never an error.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::pem::Pem;

use crate::output::Table;

/// What is shown of a table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Filter<'a> {
    pub(super) namespace: Option<&'a str>,
    pub(super) node: Option<&'a str>,
    pub(super) address: Option<&'a str>,
    pub(super) direction: Option<&'a str>,
    /// Addresses in place of names.
    pub(super) raw: bool,
}

impl Filter<'_> {
    fn admits(&self, namespace: &str) -> bool {
        self.namespace.is_none_or(|wanted| wanted == namespace)
    }
}

pub(super) fn workloads(dump: &Value, filter: &Filter<'_>) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "POD NAME",
        "ADDRESS",
        "NODE",
        "WAYPOINT",
        "PROTOCOL",
    ]);
    for workload in list(&dump["workloads"]) {
        let addresses = strings(&workload["workloadIps"]);
        let node = text(&workload["node"]);
        if !filter.admits(text(&workload["namespace"]))
            || filter.node.is_some_and(|wanted| wanted != node)
            || filter
                .address
                .is_some_and(|wanted| !addresses.iter().any(|a| a == wanted))
        {
            continue;
        }
        table.rows.push(vec![
            text(&workload["namespace"]).into(),
            text(&workload["name"]).into(),
            addresses.join(","),
            node.into(),
            waypoint(dump, &workload["waypoint"]),
            text(&workload["protocol"]).into(),
        ]);
    }
    table.rows.sort();
    table
}

pub(super) fn services(dump: &Value, filter: &Filter<'_>) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SERVICE NAME",
        "SERVICE VIP",
        "WAYPOINT",
        "ENDPOINTS",
    ]);
    for service in list(&dump["services"]) {
        if !filter.admits(text(&service["namespace"])) {
            continue;
        }
        let vips = strings(&service["vips"]);
        let vips: Vec<&str> = vips.iter().map(|vip| without_network(vip)).collect();
        let endpoints = list(&service["endpoints"]);
        let healthy = |e: &&Value| e["status"].as_str().is_none_or(|s| s == "Healthy");
        table.rows.push(vec![
            text(&service["namespace"]).into(),
            text(&service["name"]).into(),
            vips.join(","),
            waypoint(dump, &service["waypoint"]),
            format!(
                "{}/{}",
                endpoints.iter().filter(|e| healthy(e)).count(),
                endpoints.len()
            ),
        ]);
    }
    table.rows.sort();
    table
}

pub(super) fn policies(dump: &Value, filter: &Filter<'_>) -> Table {
    let mut table = Table::new(&["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"]);
    for policy in list(&dump["policies"]) {
        if filter.admits(text(&policy["namespace"])) {
            let columns = ["namespace", "name", "action", "scope"];
            let row = columns.map(|column| text(&policy[column]).to_owned());
            table.rows.push(row.to_vec());
        }
    }
    table.rows.sort();
    table
}

pub(super) fn certificates(dump: &Value) -> Table {
    let mut table = Table::new(&[
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    for entry in list(&dump["certificates"]) {
        let name = text(&entry["identity"]);
        let state = match &entry["state"] {
            Value::Object(map) => map.keys().next().cloned().unwrap_or_default(),
            state => text(state).to_owned(),
        };
        let chain = list(&entry["certChain"]);
        if chain.is_empty() {
            let mut row = vec![
                name.to_owned(),
                "Leaf".into(),
                state.clone(),
                "false".into(),
            ];
            row.resize(7, String::new());
            table.rows.push(row);
        }
        let kinds = (0..chain.len()).map(|i| if i == 0 { "Leaf" } else { "Intermediate" });
        let roots = list(&entry["rootCerts"]);
        let all = chain.iter().zip(kinds);
        for (certificate, kind) in all.chain(roots.iter().map(|root| (root, "Root"))) {
            table.rows.push(vec![
                name.to_owned(),
                kind.into(),
                state.clone(),
                is_valid_now(certificate).to_string(),
                text(&certificate["serialNumber"]).into(),
                text(&certificate["expirationTime"]).into(),
                text(&certificate["validFrom"]).into(),
            ]);
        }
    }
    table
}

/// By the certificate itself; the dump's own dates are for reading.
fn is_valid_now(certificate: &Value) -> bool {
    let pem = STANDARD
        .decode(text(&certificate["pem"]))
        .unwrap_or_default();
    let Some(Ok(pem)) = Pem::iter_from_buffer(&pem).next() else {
        return false;
    };
    pem.parse_x509()
        .is_ok_and(|x509| x509.validity().is_valid())
}

pub(super) fn connections(dump: &Value, filter: &Filter<'_>) -> Table {
    let mut table = Table::new(&[
        "WORKLOAD",
        "DIRECTION",
        "LOCAL",
        "REMOTE",
        "REMOTE TARGET",
        "PROTOCOL",
    ]);
    let names = if filter.raw {
        BTreeMap::new()
    } else {
        names(dump)
    };
    let named = |address: &Value| name_of(&names, text(address));
    let states = dump["workloadState"].as_object();
    for state in states.into_iter().flat_map(|states| states.values()) {
        let info = &state["info"];
        if !filter.admits(text(&info["namespace"])) {
            continue;
        }
        let workload = format!("{}.{}", text(&info["name"]), text(&info["namespace"]));
        for direction in ["inbound", "outbound"] {
            if filter.direction.is_some_and(|wanted| wanted != direction) {
                continue;
            }
            for connection in list(&state["connections"][direction]) {
                // Inbound the local end is where the app listens, outbound where it called
                // from; the target is what was dialled before a service was resolved.
                let (local, remote, target) = match direction {
                    "inbound" => (&connection["actualDst"], &connection["src"], String::new()),
                    _ => (
                        &connection["src"],
                        &connection["actualDst"],
                        named(&connection["originalDst"]),
                    ),
                };
                table.rows.push(vec![
                    workload.clone(),
                    capitalized(direction),
                    named(local),
                    named(remote),
                    target,
                    text(&connection["protocol"]).into(),
                ]);
            }
        }
    }
    table.rows.sort();
    table
}

/// Names by address: pods and services.
fn names(dump: &Value) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for workload in list(&dump["workloads"]) {
        let name = format!(
            "{}.{}",
            text(&workload["name"]),
            text(&workload["namespace"])
        );
        for address in strings(&workload["workloadIps"]) {
            names.insert(address, name.clone());
        }
    }
    for service in list(&dump["services"]) {
        for vip in strings(&service["vips"]) {
            names.insert(
                without_network(&vip).to_owned(),
                text(&service["hostname"]).into(),
            );
        }
    }
    names
}

fn name_of(names: &BTreeMap<String, String>, address: &str) -> String {
    let Some((ip, port)) = address.rsplit_once(':') else {
        return address.into();
    };
    let bare = ip.trim_start_matches('[').trim_end_matches(']');
    match names.get(bare) {
        Some(name) => format!("{name}:{port}"),
        None => address.into(),
    }
}

fn waypoint(dump: &Value, waypoint: &Value) -> String {
    let destination = match &waypoint["destination"] {
        // Istio's dump: `network/ip`, or an object.
        Value::String(text) => without_network(text).to_owned(),
        _ => return "None".into(),
    };
    let services = list(&dump["services"]);
    let named = services.iter().find(|service| {
        strings(&service["vips"])
            .iter()
            .any(|vip| without_network(vip) == destination)
    });
    named.map_or(destination, |service| text(&service["name"]).to_owned())
}

/// `network/address`; the default network has an empty name.
fn without_network(address: &str) -> &str {
    address
        .split_once('/')
        .map_or(address, |(_, address)| address)
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}

/// The elements of an array, or the values of an object.
fn list(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(all) => all.iter().collect(),
        Value::Object(all) => all.values().collect(),
        _ => Vec::new(),
    }
}

fn strings(value: &Value) -> Vec<String> {
    list(value)
        .into_iter()
        .filter_map(|v| v.as_str().map(String::from))
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Value {
        serde_json::from_str(include_str!("testdata/dump.json")).unwrap_or_default()
    }

    fn cells(table: &Table) -> Vec<String> {
        table.rows.iter().map(|row| row.join("|")).collect()
    }

    #[test]
    fn workloads_show_where_they_are_and_how_they_are_reached() {
        assert_eq!(
            cells(&workloads(&dump(), &Filter::default())),
            [
                "other|c|10.244.1.9|n1|None|TCP",
                "shop|a|10.244.1.2,fd00:10:244:1::2|n1|waypoint|HBONE",
                "shop|b|10.244.2.2|n2|None|HBONE",
            ]
        );
        let filter = |filter| cells(&workloads(&dump(), &filter)).len();
        let none = Filter::default();
        assert_eq!(
            filter(Filter {
                namespace: Some("shop"),
                ..none
            }),
            2
        );
        assert_eq!(
            filter(Filter {
                node: Some("n1"),
                ..none
            }),
            2
        );
        assert_eq!(
            filter(Filter {
                address: Some("fd00:10:244:1::2"),
                ..none
            }),
            1
        );
    }

    #[test]
    fn services_count_healthy_endpoints() {
        assert_eq!(
            cells(&services(&dump(), &Filter::default())),
            [
                "shop|waypoint|10.96.1.9|None|0/0",
                "shop|web|10.96.1.0,fd00:10:96::100|None|1/2"
            ]
        );
    }

    #[test]
    fn policies_and_certificates() {
        assert_eq!(
            cells(&policies(&dump(), &Filter::default())),
            ["shop|deny-c|Deny|WorkloadSelector"]
        );
        let rows = cells(&certificates(&dump()));
        assert_eq!(
            rows,
            [
                "spiffe://cluster.local/ns/shop/sa/a|Leaf|Available|false|07|\
                 2026-11-22T00:00:00Z|2026-11-21T00:00:00Z",
                "spiffe://cluster.local/ns/shop/sa/a|Root|Available|false|01|\
                 2036-11-21T00:00:00Z|2026-11-21T00:00:00Z",
                "spiffe://cluster.local/ns/shop/sa/b|Leaf|Unavailable|false|||",
            ]
        );
    }

    #[test]
    fn connections_have_names_unless_asked_not_to() {
        let none = Filter::default();
        assert_eq!(
            cells(&connections(&dump(), &none)),
            [
                "a.shop|Inbound|a.shop:8080|b.shop:40000||HBONE",
                "a.shop|Outbound|a.shop:50000|b.shop:15008|web.shop.svc.cluster.local:80|HBONE",
            ]
        );
        let raw = connections(
            &dump(),
            &Filter {
                raw: true,
                direction: Some("outbound"),
                ..none
            },
        );
        assert_eq!(
            cells(&raw),
            ["a.shop|Outbound|10.244.1.2:50000|10.244.2.2:15008|10.96.1.0:80|HBONE"]
        );
    }

    #[test]
    fn an_empty_dump_gives_empty_tables() {
        let nothing = Value::Null;
        let filter = Filter::default();
        assert!(workloads(&nothing, &filter).rows.is_empty());
        assert!(connections(&nothing, &filter).rows.is_empty());
        assert!(certificates(&nothing).rows.is_empty());
    }
}
