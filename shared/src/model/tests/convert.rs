//! Defaults, and what is refused and by which name.

use super::wire::*;
use crate::model::{
    Health, IpFamilies, LoadBalancingMode, Service, TunnelProtocol, Update, Workload,
    address_from_resource,
};
use crate::proto::workload as proto;

/// What istiod leaves out has a meaning.
#[test]
fn defaults_of_a_workload() {
    let wire = proto::Workload {
        uid: "u".into(),
        namespace: "ns".into(),
        ..Default::default()
    };
    let workload = Workload::try_from(&wire).expect("a workload");
    assert_eq!(
        workload.identity.to_string(),
        "spiffe://cluster.local/ns/ns/sa/default"
    );
    assert_eq!(&*workload.cluster_id, "Kubernetes");
    assert_eq!(workload.capacity, 1);
    assert_eq!(workload.health, Health::Healthy);
    assert_eq!(workload.tunnel_protocol, TunnelProtocol::None);
    assert_eq!(workload.workload_type, "deployment");
    let drained = proto::Workload {
        capacity: Some(0),
        ..wire
    };
    assert_eq!(
        Workload::try_from(&drained).expect("a workload").capacity,
        0
    );
}

#[test]
fn defaults_of_a_service() {
    let service = Service::try_from(&service("ns", "a.ns", &["10.0.0.1"])).expect("a service");
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Standard);
    assert_eq!(service.ip_families, IpFamilies::Automatic);
    assert_eq!(service.addresses[0].block.to_string(), "10.0.0.1/32");
    // An unknown visibility is PUBLIC.
    let wire = proto::Service {
        visibility: 9,
        ..super::wire::service("ns", "a.ns", &[])
    };
    assert!(
        !Service::try_from(&wire)
            .expect("a service")
            .namespace_private
    );
}

#[test]
fn addresses_are_normalised() {
    let workload = Workload::try_from(&pod("ns", "a", &["::ffff:10.0.0.1", "fd00::1"]));
    let addresses = workload.expect("a workload").addresses;
    assert_eq!(addresses, [ip("10.0.0.1"), ip("fd00::1")]);
    let wire = service("ns", "a.ns", &["::ffff:10.1.2.3/104", "fd00::1/64"]);
    let service = Service::try_from(&wire).expect("a service");
    let blocks: Vec<_> = service
        .addresses
        .iter()
        .map(|a| a.block.to_string())
        .collect();
    assert_eq!(blocks, ["10.0.0.0/8", "fd00::/64"]);
}

#[test]
fn a_refused_workload_is_named_with_the_field() {
    type Edit = fn(&mut proto::Workload);
    let cases: &[(&str, Edit)] = &[
        ("uid", |w| w.uid.clear()),
        ("namespace", |w| w.namespace.clear()),
        ("addresses[1]", |w| w.addresses.push(vec![1, 2, 3])),
        ("tunnel_protocol", |w| w.tunnel_protocol = 2),
        ("tunnel_protocol", |w| w.tunnel_protocol = 3),
        ("trust_domain", |w| w.trust_domain = "Not a domain".into()),
        ("service_account", |w| w.service_account = "a/b".into()),
        ("workload_type", |w| w.workload_type = 9),
        ("network_mode", |w| w.network_mode = 9),
        ("status", |w| w.status = -1),
        ("waypoint", |w| {
            w.waypoint = Some(proto::GatewayAddress::default())
        }),
        ("waypoint.hbone_mtls_port", |w| {
            w.waypoint = gateway_ip("", "10.0.0.1");
            w.waypoint.as_mut().expect("set").hbone_mtls_port = 65_536;
        }),
        ("waypoint.address.address", |w| {
            w.waypoint = gateway_ip("", "10.0.0.1");
            let Some(proto::GatewayAddress {
                destination: Some(proto::gateway_address::Destination::Address(address)),
                ..
            }) = &mut w.waypoint
            else {
                unreachable!()
            };
            address.address.clear();
        }),
        ("network_gateway.hostname.hostname", |w| {
            w.network_gateway = gateway_host("ns/")
        }),
        ("services[\"nohost\"]", |w| {
            w.services
                .insert("nohost".into(), proto::PortList::default());
        }),
        ("services[\"ns/h\"].ports[0].service_port", |w| {
            *w = member(w.clone(), "ns/h", &[(70_000, 80)]);
        }),
        ("services[\"ns/h\"].ports[1].target_port", |w| {
            *w = member(w.clone(), "ns/h", &[(80, 80), (81, 70_000)]);
        }),
        ("application_tunnel.protocol", |w| {
            w.application_tunnel = Some(proto::ApplicationTunnel {
                protocol: 7,
                port: 0,
            });
        }),
        ("application_tunnel.port", |w| {
            w.application_tunnel = Some(proto::ApplicationTunnel {
                protocol: 0,
                port: 65_536,
            });
        }),
    ];
    for (field, edit) in cases {
        let mut wire = pod("ns", "a", &["10.0.0.1"]);
        edit(&mut wire);
        let error = Workload::try_from(&wire).expect_err(field);
        assert_eq!((&*error.field, &*error.name), (*field, &*wire.uid));
        assert_eq!(error.kind, "workload");
    }
    let wire = proto::Workload {
        tunnel_protocol: 2,
        ..pod("ns", "a", &[])
    };
    let error = Workload::try_from(&wire).expect_err("refused").to_string();
    assert_eq!(
        error,
        "workload \"Kubernetes//Pod/ns/a\": tunnel_protocol: LEGACY_ISTIO_MTLS is not \
         supported; send NONE or HBONE"
    );
}

#[test]
fn a_refused_service_is_named_with_the_field() {
    use proto::LoadBalancing;
    type Edit = fn(&mut proto::Service);
    let cases: &[(&str, Edit)] = &[
        ("namespace", |s| s.namespace.clear()),
        ("hostname", |s| s.hostname.clear()),
        ("addresses[0].address", |s| s.addresses[0].address.clear()),
        ("addresses[0].length", |s| s.addresses[0].length = Some(33)),
        ("ports[0].service_port", |s| s.ports[0].service_port = 0),
        ("ports[0].target_port", |s| s.ports[0].target_port = 65_536),
        ("ip_families", |s| s.ip_families = 9),
        ("load_balancing.mode", |s| {
            s.load_balancing = Some(LoadBalancing {
                mode: 9,
                ..Default::default()
            });
        }),
        ("load_balancing.health_policy", |s| {
            s.load_balancing = Some(LoadBalancing {
                health_policy: 9,
                ..Default::default()
            });
        }),
        ("load_balancing.routing_preference[1]", |s| {
            let routing_preference = vec![1, 0];
            s.load_balancing = Some(LoadBalancing {
                routing_preference,
                ..Default::default()
            });
        }),
        ("weighted_waypoints[0].destination", |s| {
            s.weighted_waypoints
                .push(proto::WeightedWaypoint::default());
        }),
    ];
    for (field, edit) in cases {
        let mut wire = service("ns", "a.ns", &["10.0.0.1"]);
        edit(&mut wire);
        let error = Service::try_from(&wire).expect_err(field);
        assert_eq!(error.field, *field);
        assert_eq!(error.name, format!("{}/{}", wire.namespace, wire.hostname));
    }
}

#[test]
fn a_resource_holds_what_its_name_says() {
    use proto::address::Type;
    let address = |r#type| proto::Address {
        r#type: Some(r#type),
    };
    let workload = address(Type::Workload(pod("ns", "a", &[])));
    let service = address(Type::Service(service("ns", "a.ns", &[])));
    assert!(matches!(
        address_from_resource("Kubernetes//Pod/ns/a", &workload),
        Ok(Update::UpsertWorkload(_))
    ));
    assert!(matches!(
        address_from_resource("ns/a.ns", &service),
        Ok(Update::UpsertService(_))
    ));
    for wrong in [&workload, &service, &proto::Address { r#type: None }] {
        let error = address_from_resource("other", wrong).expect_err("refused");
        assert_eq!(error.name, "other");
    }
}
