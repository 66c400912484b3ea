//! What the workers' pools hold and did, summed over the workers.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::hbone::buffer::PoolStats;
use crate::hbone::pool::PoolCounts;

/// The pools of one worker. Its tunnels belong to its thread, which leaves their counts here from time to
/// time; buffers are counted where everybody can read it.
#[derive(Debug, Clone)]
pub struct WorkerPools {
    tunnels: Arc<Mutex<PoolCounts>>,
    buffers: Arc<PoolStats>,
}

impl WorkerPools {
    /// Those of a worker with these buffers.
    pub fn new(buffers: Arc<PoolStats>) -> Self {
        Self {
            tunnels: Arc::default(),
            buffers,
        }
    }

    /// What the worker's tunnels are like now.
    pub fn set_tunnels(&self, counts: PoolCounts) {
        *self.tunnels.lock() = counts;
    }
}

/// Writes the sums of all workers.
pub(super) fn encode_pools(
    encoder: &mut DescriptorEncoder<'_>,
    pools: &[WorkerPools],
) -> Result<(), fmt::Error> {
    let tunnels: Vec<PoolCounts> = pools.iter().map(|pool| *pool.tunnels.lock()).collect();
    for (name, help, read) in [
        (
            "adit_tunnel_pool_connections",
            "The current number of tunnels that new streams may be opened on",
            (|c| c.connections) as fn(&PoolCounts) -> usize,
        ),
        (
            "adit_tunnel_pool_streams",
            "The current number of streams on them",
            |c| c.streams,
        ),
        (
            "adit_tunnel_pool_attempts",
            "The current number of tunnels that are being opened",
            |c| c.attempts,
        ),
    ] {
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        let sum: usize = tunnels.iter().map(read).sum();
        ConstGauge::new(i64::try_from(sum).unwrap_or(i64::MAX)).encode(metric)?;
    }
    for (name, help, read) in [
        (
            "adit_tunnel_pool_connected",
            "The total number of tunnels that were opened",
            (|c| c.connected) as fn(&PoolCounts) -> u64,
        ),
        (
            "adit_tunnel_pool_failed",
            "The total number of tunnels that could not be opened",
            |c| c.failed,
        ),
        (
            "adit_tunnel_pool_reused",
            "The total number of streams that found a tunnel with room",
            |c| c.reused,
        ),
        (
            "adit_tunnel_pool_released",
            "The total number of tunnels that were closed because the demand did not need them",
            |c| c.released,
        ),
        (
            "adit_tunnel_pool_evicted",
            "The total number of tunnels that were closed because an end of them had gone",
            |c| c.evicted,
        ),
    ] {
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        let sum: u64 = tunnels.iter().map(read).sum();
        ConstCounter::new(sum).encode(metric)?;
    }
    encode_buffers(encoder, pools)
}

fn encode_buffers(
    encoder: &mut DescriptorEncoder<'_>,
    pools: &[WorkerPools],
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(
        "adit_buffer_pool_bytes",
        "Bytes in the buffers of the workers",
        None,
        MetricType::Gauge,
    )?;
    for (state, read) in [
        ("free", PoolStats::bytes_held as fn(&PoolStats) -> usize),
        ("in_use", PoolStats::bytes_in_use),
    ] {
        let sum: usize = pools.iter().map(|pool| read(&pool.buffers)).sum();
        let sum = i64::try_from(sum).unwrap_or(i64::MAX);
        ConstGauge::new(sum).encode(metric.encode_family(&[("state", state)])?)?;
    }
    for (name, help, read) in [
        (
            "adit_buffer_pool_misses",
            "The total number of buffers that had to be allocated",
            PoolStats::misses as fn(&PoolStats) -> u64,
        ),
        (
            "adit_buffer_pool_overflows",
            "The total number of times that the limit gave a transfer a smaller buffer",
            PoolStats::overflows,
        ),
    ] {
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        let sum: u64 = pools.iter().map(|pool| read(&pool.buffers)).sum();
        ConstCounter::new(sum).encode(metric)?;
    }
    Ok(())
}
