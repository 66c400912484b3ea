//! What others removed is put back.

use std::os::fd::AsFd as _;

use super::{Error, Pod, PodState, Redirector, io_error};
use crate::abi::Slot;
use crate::bpf::AttachType;
use crate::links::PinnedLink;
use crate::routing;

/// What [`Redirector::reconcile`] found to be wrong, and put right.
#[derive(Debug, Default)]
pub struct ReconcileReport {
    /// Rules that were missing or changed.
    pub restored_rules: usize,
    /// Routes that were missing or changed.
    pub restored_routes: usize,
    /// Settings of pods that had been changed.
    pub restored_sysctls: usize,
    /// Links that had been detached.
    pub restored_links: usize,
    /// Pins that had been removed.
    pub restored_pins: usize,
    /// Pods whose entry had been removed from the maps.
    pub restored_entries: usize,
    /// Pods that gained or lost an address.
    pub updated_addresses: usize,
    /// Slots of captured pods without a listener: connections there are refused.
    pub empty_slots: usize,
    /// What could not be put right.
    pub failures: Vec<Error>,
}

impl ReconcileReport {
    /// Everything that was put right.
    pub fn restored(&self) -> usize {
        self.restored_rules
            + self.restored_routes
            + self.restored_sysctls
            + self.restored_links
            + self.restored_pins
            + self.restored_entries
    }
}

impl Redirector {
    /// Puts back what others removed: hooks, links, pins, entries, and of pods that this process enrolled
    /// rules, routes and settings.
    pub fn reconcile(&mut self) -> ReconcileReport {
        let mut report = ReconcileReport::default();
        if let Err(error) = self.reconcile_node(&mut report) {
            report.failures.push(error);
        }
        for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(mut pod) = self.pods.remove(&uid) else {
                continue;
            };
            if let Err(error) = self.reconcile_pod(&uid, &mut pod, &mut report) {
                report.failures.push(error);
            }
            self.pods.insert(uid, pod);
        }
        let restored = report.restored();
        if restored > 0 || !report.failures.is_empty() {
            tracing::warn!(
                node = self.node,
                ?report,
                "the capture had been tampered with"
            );
        }
        report
    }

    fn reconcile_node(&mut self, report: &mut ReconcileReport) -> Result<(), Error> {
        self.pins.create().map_err(io_error("the pin directory"))?;
        report.restored_pins += self.maps.pin_again(&self.pins)?;
        for hook in &mut self.hooks {
            if let Err(error) = hook.find_cgroup() {
                // A kubelet that restarts has none for a moment; the pods' is always there.
                if hook.attach_type == AttachType::SockOps {
                    continue;
                }
                return Err(io_error(format!("the cgroup {}", hook.path.display()))(
                    error,
                ));
            }
            if !hook.link.is_attached_to(hook.cgroup.as_fd()) {
                hook.link = PinnedLink::establish(
                    &hook.pin,
                    hook.attach_type,
                    hook.program.as_fd(),
                    hook.cgroup.as_fd(),
                )
                .map_err(io_error(format!("attaching {:?} again", hook.attach_type)))?;
                report.restored_links += 1;
            } else if !hook.link.is_pinned() {
                hook.link
                    .pin_again()
                    .map_err(io_error("pinning a hook again"))?;
                report.restored_pins += 1;
            }
        }
        Ok(())
    }

    fn reconcile_pod(
        &mut self,
        uid: &str,
        pod: &mut Pod,
        report: &mut ReconcileReport,
    ) -> Result<(), Error> {
        if pod.state == PodState::Left {
            return Ok(());
        }
        let Some(netns) = &pod.netns else {
            return Ok(());
        };
        let establish = || routing::establish(netns, &pod.given);
        let established =
            self.watch
                .exclusively(uid, establish)
                .map_err(|source| Error::Routing {
                    uid: uid.to_owned(),
                    source,
                })?;
        report.restored_rules += established.changed.rules;
        report.restored_routes += established.changed.routes;
        report.restored_sysctls += established.changed.sysctls;
        match &pod.link {
            Some(link) if link.is_attached_to(netns.as_fd()) => {
                if !link.is_pinned() {
                    link.pin_again()
                        .map_err(io_error(format!("pod {uid}: pinning its link")))?;
                    report.restored_pins += 1;
                }
            }
            // Taken off on purpose: see `unsteer`.
            None if pod.state == PodState::Released => {}
            _ => {
                pod.link = Some(self.attach(uid, pod.index, netns)?);
                report.restored_links += 1;
            }
        }
        if established.addresses != pod.addresses {
            report.updated_addresses += 1;
        }
        self.maps.describe(uid, pod, &established)?;
        self.maps.record(uid, pod)?;
        if pod.state == PodState::Captured {
            report.empty_slots += Slot::ALL
                .iter()
                .filter(|slot| !self.maps.has_listener(pod.index, **slot))
                .count();
            if self.maps.remember_cookie(pod)? {
                report.restored_entries += 1;
            }
        }
        Ok(())
    }
}
