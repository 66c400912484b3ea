//! Capture as it should be: what others remove is put back, what earlier processes left is
//! taken over or taken away.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use adit_ebpf::{Redirector, Repairs, SteeringChanges};
use adit_shared::telemetry::Event;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};

use super::EnrolmentManager;
use super::wanted::Target;

/// The least time between two repairs of what somebody else removes.
const REPAIR_PAUSE: Duration = Duration::from_millis(20);

impl EnrolmentManager {
    /// Puts back at once what somebody removes from the pods' rules and routes: without them
    /// new connections leave in plaintext.
    pub(super) async fn keep_steering(&self) {
        let watch = self.redirector.lock().watch();
        let late = |e| warn!(target: "enrolment", "rules that others remove are noticed late: {e}");
        let changes = match SteeringChanges::new(watch.clone()) {
            Ok(changes) => changes,
            Err(e) => return late(e),
        };
        loop {
            if let Err(e) = changes.changed().await {
                return late(e);
            }
            loop {
                let watch = watch.clone();
                let Ok(repairs) = spawn_blocking(move || watch.repair()).await else {
                    break;
                };
                self.report_repairs(&repairs);
                // Who removes them again and again must not keep us from everything else.
                sleep(REPAIR_PAUSE).await;
                if !repairs.again {
                    break;
                }
            }
        }
    }

    fn report_repairs(&self, repairs: &Repairs) {
        let repaired = [
            ("rule", repairs.rules),
            ("route", repairs.routes),
            ("sysctl", repairs.sysctls),
        ];
        for (kind, count) in repaired {
            if count > 0 {
                warn!(target: "enrolment", kind, count, "somebody had removed what captures pods; put back");
            }
            for _ in 0..count {
                self.telemetry.emit(&Event::RedirectionRepaired { kind });
            }
        }
        for (uid, error) in &repairs.failures {
            // So it is with every pod that ends: what tears its network down comes before the
            // control plane. What persists is a warning of the next look at everything.
            info!(target: "enrolment", %uid, "capture changed by somebody else: {error}");
        }
    }

    /// Pods that an earlier process captured and nobody wants any more.
    pub(super) async fn withdraw_leftovers(&self, wanted: &BTreeMap<Arc<str>, Target>) {
        let known = self.redirector.lock().pods();
        let unwanted = known.into_iter();
        for pod in unwanted.filter(|pod| !wanted.contains_key(pod.uid.as_str())) {
            let (uid, addresses) = (pod.uid, pod.addresses);
            info!(target: "enrolment", %uid, "capture of an earlier process removed");
            let discovery = self.discovery.clone();
            self.capture(&uid, move |redirector, uid| {
                // Rules and routes can only be removed from a namespace that can be found; one
                // whose pod is gone has taken them along.
                let netns = discovery.find(uid, &addresses).ok();
                if let Some(netns) = netns
                    && let Err(e) = redirector.adopt(uid, netns.as_fd())
                {
                    warn!(target: "enrolment", uid, "its network namespace is another one: {e}");
                }
                redirector.withdraw(uid)
            })
            .await;
        }
    }

    /// What a ztunnel with another layout of maps left: its programs were all that kept this
    /// node's pods from passing until they were enrolled here.
    pub(super) async fn remove_outdated(&self) {
        let redirector = self.redirector.clone();
        match spawn_blocking(move || redirector.lock().remove_outdated()).await {
            Ok(Ok(0)) => {}
            Ok(Ok(_)) => info!(target: "enrolment", "capture of an earlier version removed"),
            Ok(Err(e)) => warn!(target: "enrolment", "capture of an earlier version: {e}"),
            Err(e) => warn!(target: "enrolment", "capture of an earlier version: {e}"),
        }
    }

    pub(super) async fn capture(
        &self,
        uid: &str,
        change: impl FnOnce(&mut Redirector, &str) -> Result<(), adit_ebpf::Error> + Send + 'static,
    ) {
        let (redirector, name) = (self.redirector.clone(), uid.to_owned());
        let done = spawn_blocking(move || change(&mut redirector.lock(), &name)).await;
        // A pod whose enrolment never succeeded has none.
        if let Ok(Err(e)) = done
            && !matches!(e, adit_ebpf::Error::UnknownPod(_))
        {
            warn!(target: "enrolment", uid, "capture not changed: {e}");
        }
    }

    /// Puts back what somebody removed behind our back.
    pub(super) async fn check_capture(&self) {
        let redirector = self.redirector.clone();
        match spawn_blocking(move || redirector.lock().reconcile()).await {
            Ok(report) => {
                let repaired = [
                    ("rule", report.restored_rules),
                    ("route", report.restored_routes),
                    ("sysctl", report.restored_sysctls),
                    ("link", report.restored_links),
                    ("pin", report.restored_pins),
                    ("entry", report.restored_entries),
                ];
                for (kind, count) in repaired {
                    for _ in 0..count {
                        self.telemetry.emit(&Event::RedirectionRepaired { kind });
                    }
                }
            }
            Err(e) => warn!(target: "enrolment", "capture could not be checked: {e}"),
        }
    }
}
