//! Comes with the data path.

use adit_shared::telemetry::LogWriter;

use crate::config::Config;

/// Runs the proxy.
///
/// # Errors
/// Always, until the data path is there.
pub async fn run(_config: Config, _log: LogWriter) -> anyhow::Result<()> {
    anyhow::bail!("the data path is not there yet")
}
