//! The process-wide log: one test, since a process has but one.
#![allow(clippy::unwrap_used)]

use adit_shared::telemetry::logging::{self, LoggingError};
use tracing::{Level, enabled};

#[test]
fn the_filter_changes_at_run_time() {
    assert!(matches!(
        logging::set_filter("info"),
        Err(LoggingError::NotStarted)
    ));
    let writer = logging::init().unwrap();
    assert!(matches!(logging::init(), Err(LoggingError::Twice)));
    let initial = logging::current_filter().unwrap();

    assert!(!enabled!(target: "access", Level::DEBUG));
    let now = logging::set_filter("warn,access:debug").unwrap();
    assert!(now.contains("access=debug"), "{now}");
    assert!(enabled!(target: "access", Level::DEBUG));
    assert!(!enabled!(target: "other", Level::INFO));

    let error = logging::set_filter("access=nonsense").unwrap_err();
    assert!(matches!(error, LoggingError::Filter { .. }));
    assert_eq!(logging::current_filter().unwrap(), now, "as it was");

    assert_eq!(logging::reset().unwrap(), initial);
    assert!(!enabled!(target: "access", Level::DEBUG));
    tracing::info!(answer = 42, "it still writes");
    assert!(writer.flush(std::time::Duration::from_secs(10)));
}
