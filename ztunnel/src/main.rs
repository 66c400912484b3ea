//! The node tunnel. Configured by environment variables alone (`config.rs`).

use std::process::ExitCode;

use adit_shared::telemetry::logging;
use adit_ztunnel::{app, config::Config, process};
use tracing::error;

fn main() -> ExitCode {
    process::tune_allocator();
    let log = match logging::init() {
        Ok(log) => log,
        Err(e) => {
            eprintln!("ztunnel: {e}");
            return ExitCode::FAILURE;
        }
    };
    let run = || -> anyhow::Result<()> {
        let config = Config::from_env()?;
        process::raise_descriptor_limit();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let done = runtime.block_on(app::run(config, log.clone()));
        // Tasks that block (a profile, a netlink call) must not hold up the end.
        runtime.shutdown_background();
        done
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("ztunnel cannot start: {e:#}");
            log.flush(std::time::Duration::from_secs(1));
            ExitCode::FAILURE
        }
    }
}
