//! Services and slices whose references lead nowhere.

use super::Report;
use crate::model::{
    At, Code, Kind, NamespaceObjects, Objects, Service, Severity, TargetPort, selects,
};

pub(super) fn check(objects: &Objects, report: &mut Report) {
    for of in objects.namespaces.values() {
        for service in of
            .services
            .values()
            .filter(|service| !service.external_name)
        {
            check_service(service, of, report);
        }
        for slice in of.endpoint_slices.values() {
            let Some(service) = &slice.service else {
                continue;
            };
            if slice.named > 0 {
                report.add(
                    (Kind::EndpointSlice, &slice.meta),
                    At::ROOT.key("addressType").path(),
                    Severity::Warning,
                    Code::ReferencedResourceNotFound,
                    format!(
                        "{} endpoints of Service {service:?} have names and no addresses; the mesh sends nothing there",
                        slice.named
                    ),
                );
            }
            if !of.services.contains_key(service) {
                let metadata = At::ROOT.key("metadata");
                let labels = metadata.key("labels");
                report.add(
                    (Kind::EndpointSlice, &slice.meta),
                    labels.key("kubernetes.io/service-name").path(),
                    Severity::Warning,
                    Code::ReferencedResourceNotFound,
                    format!("there is no Service {service:?}; the slice has no effect"),
                );
            }
        }
    }
}

fn check_service(service: &Service, of: &NamespaceObjects, report: &mut Report) {
    let spec = At::ROOT.key("spec");
    let list = spec.key("ports");
    for (index, port) in service.ports.iter().enumerate() {
        let at = list.index(index);
        if !port.protocol_stated {
            report.add(
                (Kind::Service, &service.meta),
                at.path(),
                Severity::Info,
                Code::PortNameIsNotUnderNamingConvention,
                format!(
                    "port {} states no protocol: set appProtocol, or begin its name with one (http, http2, https, grpc, tcp, tls)",
                    port.number
                ),
            );
        }
        let TargetPort::Name(name) = &port.target else {
            continue;
        };
        if service.selector.is_empty() {
            continue;
        }
        let lacking = of
            .pods
            .values()
            .filter(|pod| selects(&service.selector, &pod.meta.labels))
            .find(|pod| !pod.named_ports.iter().any(|named| named.name == *name));
        if let Some(pod) = lacking {
            report.add(
                (Kind::Service, &service.meta),
                at.key("targetPort").path(),
                Severity::Warning,
                Code::ReferencedResourceNotFound,
                format!(
                    "pod {:?} has no TCP port named {name:?}; it gets no traffic for port {}",
                    pod.meta.name, port.number
                ),
            );
        }
    }
}
