//! What is on the wire, counted by the kernel: not by what the proxies say.

use anyhow::{Context, bail};
use serde_json::Value;

use crate::mesh::{Pod, TestMesh};

/// TCP packets that crossed a pod's own interface since the counter was set up, without those
/// of its node (probes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Packets {
    /// To or from the HBONE port.
    pub hbone: u64,
    /// To or from any other port: plaintext.
    pub plaintext: u64,
}

const TABLE: &str = "adit_test";

impl TestMesh {
    /// Starts to count at the pod's interface, from zero.
    ///
    /// # Errors
    /// nftables are not there.
    pub fn count_packets(&self, pod: Pod<'_>) -> anyhow::Result<()> {
        let [v4, v6] = self.node_side(pod)?;
        let rules = format!(
            "add table inet {TABLE}\n\
             flush table inet {TABLE}\n\
             add counter inet {TABLE} hbone\n\
             add counter inet {TABLE} plaintext\n\
             add chain inet {TABLE} classify\n\
             add chain inet {TABLE} arriving {{ type filter hook prerouting priority -400; }}\n\
             add chain inet {TABLE} leaving {{ type filter hook postrouting priority 400; }}\n\
             add rule inet {TABLE} arriving iifname eth0 meta l4proto tcp jump classify\n\
             add rule inet {TABLE} leaving oifname eth0 meta l4proto tcp jump classify\n\
             add rule inet {TABLE} classify ip saddr {v4} return\n\
             add rule inet {TABLE} classify ip daddr {v4} return\n\
             add rule inet {TABLE} classify ip6 saddr {v6} return\n\
             add rule inet {TABLE} classify ip6 daddr {v6} return\n\
             add rule inet {TABLE} classify tcp dport 15008 counter name hbone return\n\
             add rule inet {TABLE} classify tcp sport 15008 counter name hbone return\n\
             add rule inet {TABLE} classify counter name plaintext\n"
        );
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), rules)?;
        let path = file.path().to_str().context("path")?;
        self.nft(pod, &["-f", path])?;
        self.nft(pod, &["reset", "counters", "table", "inet", TABLE])?;
        Ok(())
    }

    /// What was counted since [`Self::count_packets`].
    ///
    /// # Errors
    /// Nothing counts there.
    pub fn packets(&self, pod: Pod<'_>) -> anyhow::Result<Packets> {
        let text = self.nft(pod, &["-j", "list", "counters", "table", "inet", TABLE])?;
        let value: Value = serde_json::from_str(&text)?;
        let count = |name: &str| -> anyhow::Result<u64> {
            let all = value["nftables"].as_array().context("nftables")?;
            all.iter()
                .map(|entry| &entry["counter"])
                .find(|counter| counter["name"] == name)
                .and_then(|counter| counter["packets"].as_u64())
                .with_context(|| format!("no counter {name}"))
        };
        Ok(Packets {
            hbone: count("hbone")?,
            plaintext: count("plaintext")?,
        })
    }

    fn nft(&self, pod: Pod<'_>, args: &[&str]) -> anyhow::Result<String> {
        let mut argv = vec!["nft"];
        argv.extend(args);
        self.run_in(pod, &argv)
    }

    /// Runs a program in the pod; its output.
    ///
    /// # Errors
    /// It did not succeed.
    pub fn run_in(&self, pod: Pod<'_>, argv: &[&str]) -> anyhow::Result<String> {
        let output = self.exec(&self.place(pod), argv, std::time::Duration::from_secs(10))?;
        if !output.status.success() {
            bail!("{argv:?} in {pod:?}: {}", output.stderr);
        }
        Ok(output.stdout)
    }

    /// The node's addresses in the pod's network: where probes come from.
    fn node_side(&self, pod: Pod<'_>) -> anyhow::Result<[String; 2]> {
        let status = self.status()?;
        let found = status.pod(pod.namespace, pod.name).context("no such pod")?;
        let gateway = |family: char| -> anyhow::Result<String> {
            let own = found.addresses.iter().find(|a| a.contains(family));
            let own = own.context("no address")?;
            let (network, _) = own.rsplit_once(family).context("address")?;
            Ok(format!("{network}{family}1"))
        };
        Ok([gateway('.')?, gateway(':')?])
    }
}
