//! The program `waypoint`. Configured by environment variables alone (`config.rs`).

use std::ffi::c_long;
use std::process::ExitCode;

use adit_shared::process;
use adit_shared::telemetry::logging;
use adit_waypoint::app;
use adit_waypoint::config::Config;
use libmimalloc_sys::{mi_option_set_default, mi_option_t, mi_option_use_numa_nodes};
use tracing::error;

// A waypoint allocates for every request.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds until memory that was given back to the allocator leaves the process. Its own 1000
/// keep 4 MiB more resident under load; less than 10 costs time for each request.
const PURGE_DELAY: c_long = 10;
/// `mi_option_purge_delay` of `mimalloc.h`, which the crate has no name for.
const PURGE_DELAY_OPTION: mi_option_t = mi_option_use_numa_nodes - 1;

fn main() -> ExitCode {
    // SAFETY: a known option, set by the only thread there is. MIMALLOC_PURGE_DELAY goes before.
    unsafe { mi_option_set_default(PURGE_DELAY_OPTION, PURGE_DELAY) };
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
