//! What is counted of the agent's work: a handful of numbers, in Prometheus' text form.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a sandbox was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Enrolled,
    Left,
    Failed,
}

impl Outcome {
    const ALL: [(Self, &str); 3] = [
        (Self::Enrolled, "enrolled"),
        (Self::Left, "left"),
        (Self::Failed, "failed"),
    ];
}

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    sandboxes: [AtomicU64; 3],
    micros: [AtomicU64; 3],
}

impl Metrics {
    /// A sandbox was answered after so long.
    pub(super) fn count(&self, outcome: Outcome, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.sandboxes[outcome as usize].fetch_add(1, Ordering::Relaxed);
        self.micros[outcome as usize].fetch_add(micros, Ordering::Relaxed);
    }

    /// All of them, and `conditions` as gauges of what is still missing.
    pub(super) fn text(&self, conditions: &[(&str, bool)]) -> String {
        let mut text = String::from(
            "# HELP adit_cni_sandboxes_total Sandboxes that the plugin asked about, by outcome.\n\
             # TYPE adit_cni_sandboxes_total counter\n",
        );
        let mut seconds = String::from(
            "# HELP adit_cni_sandbox_seconds_total Time that sandboxes were held up, by outcome.\n\
             # TYPE adit_cni_sandbox_seconds_total counter\n",
        );
        for (outcome, name) in Outcome::ALL {
            let count = self.sandboxes[outcome as usize].load(Ordering::Relaxed);
            let micros = self.micros[outcome as usize].load(Ordering::Relaxed);
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "adit_cni_sandboxes_total{{outcome=\"{name}\"}} {count}"
            );
            let _ = writeln!(
                seconds,
                "adit_cni_sandbox_seconds_total{{outcome=\"{name}\"}} {:.6}",
                micros as f64 / 1e6
            );
        }
        text.push_str(&seconds);
        let ready = u8::from(conditions.iter().all(|(_, done)| *done));
        let _ = write!(
            text,
            "# HELP adit_cni_ready Whether the plugin is installed and the agent can answer it.\n\
             # TYPE adit_cni_ready gauge\nadit_cni_ready {ready}\n"
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_counted_apart() {
        let metrics = Metrics::default();
        metrics.count(Outcome::Enrolled, Duration::from_millis(3));
        metrics.count(Outcome::Enrolled, Duration::from_millis(4));
        metrics.count(Outcome::Failed, Duration::from_secs(1));
        let text = metrics.text(&[("x", true), ("y", false)]);
        for line in [
            "adit_cni_sandboxes_total{outcome=\"enrolled\"} 2",
            "adit_cni_sandboxes_total{outcome=\"left\"} 0",
            "adit_cni_sandboxes_total{outcome=\"failed\"} 1",
            "adit_cni_sandbox_seconds_total{outcome=\"enrolled\"} 0.007000",
            "adit_cni_ready 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
