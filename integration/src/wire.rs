//! What really passes a pod's network interface: counted by nftables, not by trust.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::mesh::{Pod, TestMesh};

const TABLE: &str = "adit_observe";
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// Packets that have passed a pod's eth0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packets {
    /// TCP to or from port 15008.
    pub hbone: u64,
    /// Any other TCP.
    pub plaintext: u64,
}

impl TestMesh {
    /// Starts counting at a pod's eth0, both ways.
    ///
    /// # Errors
    /// nftables says no.
    pub fn count_packets(&self, pod: Pod<'_>) -> anyhow::Result<()> {
        let rules = format!(
            "table inet {TABLE} {{
               counter hbone {{ }}
               counter plaintext {{ }}
               chain input {{ type filter hook input priority 0;
                 iifname eth0 tcp dport 15008 counter name hbone accept
                 iifname eth0 tcp sport 15008 counter name hbone accept
                 iifname eth0 meta l4proto tcp counter name plaintext; }}
               chain output {{ type filter hook output priority 0;
                 oifname eth0 tcp dport 15008 counter name hbone accept
                 oifname eth0 tcp sport 15008 counter name hbone accept
                 oifname eth0 meta l4proto tcp counter name plaintext; }}
             }}"
        );
        self.nft(pod, &["nft", &rules]).map(drop)
    }

    /// What has passed since [`Self::count_packets`].
    ///
    /// # Errors
    /// nftables says no.
    pub fn packets(&self, pod: Pod<'_>) -> anyhow::Result<Packets> {
        let listing = self.nft(
            pod,
            &["nft", "-j", "list", "counters", "table", "inet", TABLE],
        )?;
        let listing: Value = serde_json::from_str(&listing)?;
        let count = |name: &str| {
            listing["nftables"]
                .as_array()
                .and_then(|all| all.iter().find(|o| o["counter"]["name"] == name))
                .and_then(|o| o["counter"]["packets"].as_u64())
                .with_context(|| format!("counter {name}"))
        };
        Ok(Packets {
            hbone: count("hbone")?,
            plaintext: count("plaintext")?,
        })
    }

    fn nft(&self, pod: Pod<'_>, argv: &[&str]) -> anyhow::Result<String> {
        let output = self.exec(&self.place(pod), argv, COMMAND_DEADLINE)?;
        if !output.status.success() {
            bail!("nft in {}/{}: {}", pod.namespace, pod.name, output.stderr);
        }
        Ok(output.stdout)
    }
}
