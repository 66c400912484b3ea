//! The tests, by what they are about.

mod command_line;
mod enrolment;
mod faults;
mod helm;
mod maintenance;
mod policy;
mod services;
mod startup;
mod uninstall;
mod waypoint;

use super::case::Case;

/// Every test.
pub fn all() -> Vec<Case> {
    [
        command_line::TESTS,
        enrolment::TESTS,
        policy::TESTS,
        services::TESTS,
        waypoint::TESTS,
        startup::TESTS,
        faults::TESTS,
        maintenance::TESTS,
        uninstall::TESTS,
        helm::TESTS,
    ]
    .concat()
}

#[cfg(test)]
mod table {
    use std::collections::BTreeSet;

    #[test]
    fn names_tell_tests_apart() {
        let all = super::all();
        let names: BTreeSet<_> = all.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), all.len());
        // Namespaces are named after the first fifty letters.
        let short: BTreeSet<_> = names.iter().map(|n| n.get(..50).unwrap_or(n)).collect();
        assert_eq!(short.len(), names.len());
    }
}
