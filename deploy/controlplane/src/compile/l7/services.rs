//! What a waypoint has to know of the services that are bound to it.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::service_port::Protocol;

use super::resource::Resource;
use super::view::View;
use super::{Part, WaypointName, reach};
use crate::compile::mesh::MeshConfig;
use crate::model::{DeclaredProtocol, Kind, NamespaceObjects, Service};

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    for service in objects.services.values().filter(|of| !of.external_name) {
        let Some(binding) = view.binding(service) else {
            continue;
        };
        let condition = binding.condition(view.mesh);
        let status = part.status(service.meta.reference(Kind::Service));
        status.conditions.push(condition);
        let resource = Arc::new(Resource::Service(convert(service, view.mesh)));
        for waypoint in binding.serving(view.waypoints) {
            part.give(&waypoint, &resource);
            let meta = &service.meta;
            reach::compile(&waypoint, &meta.namespace, &meta.name, view, part);
        }
    }
}

/// The waypoints that serve `service`.
pub(super) fn serving(service: &Service, view: &View<'_>) -> Vec<WaypointName> {
    let binding = view.binding(service);
    binding.map_or_else(Vec::new, |binding| binding.serving(view.waypoints))
}

/// A service as the waypoint's resources name it.
pub(super) fn reference(namespace: &str, name: &str, mesh: &MeshConfig) -> wire::ServiceRef {
    wire::ServiceRef {
        namespace: namespace.into(),
        hostname: mesh.hostname(namespace, name),
    }
}

fn convert(service: &Service, mesh: &MeshConfig) -> wire::Service {
    let meta = &service.meta;
    let ports = service.ports.iter().map(|port| wire::ServicePort {
        port: port.number.into(),
        name: port.name.to_string(),
        protocol: match port.declared {
            DeclaredProtocol::Undeclared => Protocol::Undeclared,
            DeclaredProtocol::Http => Protocol::Http,
            DeclaredProtocol::Http2 => Protocol::Http2,
            DeclaredProtocol::Grpc => Protocol::Grpc,
            DeclaredProtocol::Tcp => Protocol::Tcp,
            DeclaredProtocol::Tls => Protocol::Tls,
        }
        .into(),
    });
    wire::Service {
        namespace: meta.namespace.to_string(),
        hostname: mesh.hostname(&meta.namespace, &meta.name),
        ports: ports.collect(),
    }
}
