//! The resources as they were received, by name, and what each of them touches.

use std::collections::HashMap;
use std::sync::Arc;

use adit_shared::model::ServiceName;
use adit_shared::proto::waypoint as pb;
use bytes::Bytes;
use prost::Message;

use super::Touched;
use super::view::Protocol;

/// Everything that was received and is in force.
#[derive(Default)]
pub(super) struct Store {
    pub(super) settings: Option<pb::Settings>,
    pub(super) waypoints: HashMap<String, pb::Waypoint>,
    pub(super) services: HashMap<ServiceName, Arc<[DeclaredPort]>>,
    service_names: HashMap<String, ServiceName>,
    pub(super) providers: HashMap<String, pb::Provider>,
}

/// What a service says of one of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeclaredPort {
    pub(super) port: u16,
    pub(super) name: Arc<str>,
    pub(super) protocol: Protocol,
}

impl Store {
    /// Takes a resource.
    ///
    /// # Errors
    /// Why it cannot be used; what was there before stays.
    pub(super) fn upsert(
        &mut self,
        type_url: &str,
        name: &str,
        body: Bytes,
        touched: &mut Touched,
    ) -> Result<(), String> {
        match type_url {
            pb::SETTINGS_TYPE => {
                self.settings = Some(decode(body)?);
                touched.everything = true;
            }
            pb::WAYPOINT_TYPE => {
                self.waypoints.insert(name.to_owned(), decode(body)?);
            }
            pb::SERVICE_TYPE => {
                let wire: pb::Service = decode(body)?;
                let service = ServiceName {
                    namespace: wire.namespace.as_str().into(),
                    hostname: wire.hostname.as_str().into(),
                };
                let ports = wire
                    .ports
                    .iter()
                    .map(declared_port)
                    .collect::<Result<_, _>>()?;
                self.services.insert(service.clone(), ports);
                let before = self.service_names.insert(name.to_owned(), service.clone());
                if let Some(before) = before.filter(|before| *before != service) {
                    self.services.remove(&before);
                    touched.services.insert(before);
                }
                touched.services.insert(service);
            }
            pb::PROVIDER_TYPE => {
                self.providers.insert(name.to_owned(), decode(body)?);
                touched.everything = true;
            }
            other => return Err(format!("resources of type {other} are not known here")),
        }
        Ok(())
    }

    /// Forgets a resource.
    pub(super) fn remove(&mut self, type_url: &str, name: &str, touched: &mut Touched) {
        match type_url {
            pb::SETTINGS_TYPE => {
                self.settings = None;
                touched.everything = true;
            }
            pb::WAYPOINT_TYPE => {
                self.waypoints.remove(name);
            }
            pb::SERVICE_TYPE => {
                if let Some(service) = self.service_names.remove(name) {
                    self.services.remove(&service);
                    touched.services.insert(service);
                }
            }
            pb::PROVIDER_TYPE => {
                self.providers.remove(name);
                touched.everything = true;
            }
            _ => {}
        }
    }
}

fn decode<M: Message + Default>(body: Bytes) -> Result<M, String> {
    M::decode(body).map_err(|e| e.to_string())
}

fn declared_port(wire: &pb::ServicePort) -> Result<DeclaredPort, String> {
    use pb::service_port::Protocol as Wire;
    let port = u16::try_from(wire.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| format!("ports: {} is no port", wire.port))?;
    let protocol = match Wire::try_from(wire.protocol) {
        Ok(Wire::Undeclared) => Protocol::Undeclared,
        Ok(Wire::Http) => Protocol::Http,
        Ok(Wire::Http2) => Protocol::Http2,
        Ok(Wire::Grpc) => Protocol::Grpc,
        // A protocol that we do not know is not ours to look into.
        Ok(Wire::Tcp | Wire::Udp) | Err(_) => Protocol::Tcp,
        Ok(Wire::Tls) => Protocol::Tls,
    };
    Ok(DeclaredPort {
        port,
        name: wire.name.as_str().into(),
        protocol,
    })
}
