//! The program `waypoint`. Configured by environment variables alone (`config.rs`).

use std::process::ExitCode;

use adit_shared::process;
use adit_shared::telemetry::logging;
use adit_waypoint::app;
use adit_waypoint::config::Config;
use tracing::error;

// A waypoint allocates for every request.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let log = match logging::init() {
        Ok(log) => log,
        Err(e) => {
            eprintln!("waypoint: {e}");
            return ExitCode::FAILURE;
        }
    };
    let run = || -> anyhow::Result<()> {
        let config = Config::from_env()?;
        process::raise_descriptor_limit();
        // Where the system gives huge pages unasked (the allocator, built so, does not ask), they
        // would be most of an idle waypoint's memory: 11 MiB instead of 3.
        let _ = nix::sys::prctl::set_thp_disable(true);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let done = runtime.block_on(app::run(config, log.clone()));
        // Tasks that block must not hold up the end.
        runtime.shutdown_background();
        done
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("waypoint cannot start: {e:#}");
            log.flush(std::time::Duration::from_secs(1));
            ExitCode::FAILURE
        }
    }
}
