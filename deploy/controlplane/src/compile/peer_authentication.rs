//! PeerAuthentications as DENY policies on connections without an identity.
//!
//! Lookup: the oldest that selects the pod, then the oldest of its namespace, then the
//! oldest of the mesh; what is not set is inherited. What holds for a pod is worked out
//! in one place, [`effective`], from which both the policies listed on the pod and their
//! bodies follow (rules and names: Istio `convertPeerAuthentication`).

use std::collections::BTreeSet;

use adit_shared::proto::security::{
    Action, Authorization, Group, Match, Rules, Scope, StringMatch,
};

use super::mesh::MeshConfig;
use super::wire;
use crate::model::{self, MutualTls, PeerAuthentication};

/// Name of the policy, in the root namespace, that refuses all plaintext. The character
/// `_` keeps it apart from what users can create.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

/// Name of the policy for a PeerAuthentication with ports of its own.
pub fn converted_name(name: &str) -> String {
    format!("converted_peer_authentication_{name}")
}

/// What holds for a pod: a mode, and the ports that have the other one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Effective {
    pub(super) mode: MutualTls,
    pub(super) exceptions: BTreeSet<u16>,
}

/// The mode that a pod inherits from its namespace and the mesh.
pub(super) fn inherited(
    mesh: Option<&PeerAuthentication>,
    namespace: Option<&PeerAuthentication>,
) -> MutualTls {
    let mode = |of: Option<&PeerAuthentication>| of.and_then(|of| of.mode);
    mode(namespace)
        .or(mode(mesh))
        .unwrap_or(MutualTls::Permissive)
}

/// What holds for pods that `own` selects.
pub(super) fn effective(own: Option<&PeerAuthentication>, inherited: MutualTls) -> Effective {
    let mode = own.and_then(|own| own.mode).unwrap_or(inherited);
    let ports = own.iter().flat_map(|own| &own.ports);
    Effective {
        mode,
        exceptions: ports
            .filter(|(_, port_mode)| port_mode.is_some_and(|port_mode| port_mode != mode))
            .map(|(port, _)| *port)
            .collect(),
    }
}

impl Effective {
    /// The policies to list on a pod that `own` selects.
    pub(super) fn policies(
        &self,
        own: Option<&PeerAuthentication>,
        mesh: &MeshConfig,
    ) -> Option<String> {
        match (own, self.mode) {
            (Some(own), _) if !self.exceptions.is_empty() => Some(format!(
                "{}/{}",
                own.meta.namespace,
                converted_name(&own.meta.name)
            )),
            (_, MutualTls::Strict) => Some(format!("{}/{STATIC_STRICT}", mesh.root_namespace)),
            (_, MutualTls::Permissive) => None,
        }
    }

    /// The body of the policy of `own`, where it has one of its own.
    pub(super) fn authorization(&self, own: &PeerAuthentication) -> Option<Authorization> {
        let groups = match self.mode {
            _ if self.exceptions.is_empty() => return None,
            // No identity, and none of the ports that let plaintext in.
            MutualTls::Strict => {
                let exceptions = self.exceptions.iter().map(|port| {
                    clause(Match {
                        not_destination_ports: vec![u32::from(*port)],
                        ..Match::default()
                    })
                });
                vec![Group {
                    rules: std::iter::once(clause(no_identity()))
                        .chain(exceptions)
                        .collect(),
                }]
            }
            // No identity on a port that lets no plaintext in.
            MutualTls::Permissive => {
                let groups = self.exceptions.iter().map(|port| Group {
                    rules: vec![clause(Match {
                        destination_ports: vec![u32::from(*port)],
                        ..no_identity()
                    })],
                });
                groups.collect()
            }
        };
        Some(deny(
            &own.meta.namespace,
            converted_name(&own.meta.name),
            groups,
        ))
    }
}

/// The policy that refuses all plaintext.
pub(super) fn static_strict(mesh: &MeshConfig) -> Authorization {
    let group = Group {
        rules: vec![clause(no_identity())],
    };
    deny(&mesh.root_namespace, STATIC_STRICT.into(), vec![group])
}

fn deny(namespace: &str, name: String, groups: Vec<Group>) -> Authorization {
    Authorization {
        name,
        namespace: namespace.into(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        groups,
        ..Authorization::default()
    }
}

fn clause(m: Match) -> Rules {
    Rules { matches: vec![m] }
}

fn no_identity() -> Match {
    let any: StringMatch = wire::string_match(&model::StringMatch::Presence);
    Match {
        not_principals: vec![any],
        ..Match::default()
    }
}
