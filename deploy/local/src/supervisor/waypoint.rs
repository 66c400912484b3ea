//! The waypoints among the components: each runs in the pod that was made for its Gateway.

use std::collections::BTreeMap;

use super::component::Component;
use super::reconcile::{PodEntry, Reconciler};
use super::setup;
use crate::error::LocalError;
use crate::state::ComponentStatus;
use crate::system::sandbox::Sandbox;

/// The waypoint in a pod that was made for it.
pub(super) struct Waypoint {
    pub(super) gateway: String,
    pub(super) sandbox: Sandbox,
    /// Runs as soon as there is a root certificate.
    pub(super) component: Option<Component>,
}

impl Reconciler {
    /// Keeps the list of components as the waypoints' pods are.
    pub(super) fn announce_waypoints(&mut self) {
        let live = self.pods.values().filter(|entry| !entry.view.terminating);
        let wanted: BTreeMap<String, (String, String)> = live
            .filter_map(|entry| {
                let pod = (entry.view.uid.clone(), entry.view.node.clone());
                Some((entry.component_name()?, pod))
            })
            .collect();
        // A pod that is made anew begins with a new status.
        self.component_status.retain(|status| match &status.pod {
            None => true,
            Some(uid) => wanted.get(&status.name).is_some_and(|(now, _)| now == uid),
        });
        for (name, (uid, node)) in wanted {
            if self
                .component_status
                .iter()
                .any(|status| status.name == name)
            {
                continue;
            }
            self.component_status.push(ComponentStatus {
                log: self.layout.component_log(&name),
                name,
                node: Some(node),
                pod: Some(uid),
                process: None,
                ready: false,
                restarts: 0,
                message: String::new(),
            });
        }
    }

    /// Starts the waypoints that have a pod and no program. Before there is a root
    /// certificate they would only fail.
    pub(super) fn start_waypoints(&mut self) {
        if !setup::root_certificate(&self.layout).exists() {
            return;
        }
        for entry in self.pods.values_mut().filter(|e| !e.view.terminating) {
            let Some(waypoint) = entry.waypoint.as_mut() else {
                continue;
            };
            if waypoint.component.is_none() {
                let (gateway, sandbox) = (&waypoint.gateway, waypoint.sandbox.clone());
                let (config, layout) = (&self.config, &self.layout);
                let plan = setup::waypoint(config, layout, gateway, &entry.view, sandbox);
                waypoint.component = Some(Component::new(plan, self.events.clone()));
            }
        }
    }

    pub(super) fn issue_tokens(&self) -> Result<(), LocalError> {
        setup::issue_tokens(&self.layout, &self.nodes)?;
        for entry in self.pods.values().filter(|e| e.waypoint.is_some()) {
            setup::issue_pod_token(&self.layout, &entry.view)?;
        }
        Ok(())
    }
}

impl PodEntry {
    /// Among the components, for the pod of a waypoint.
    pub(super) fn component_name(&self) -> Option<String> {
        let waypoint = self.waypoint.as_ref()?;
        Some(setup::waypoint_name(&waypoint.gateway, &self.view.key.0))
    }
}
