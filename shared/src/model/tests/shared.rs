//! Publication: whoever is woken sees what woke it.

use super::wire::*;
use crate::model::{SharedModel, Update};

#[test]
fn watchers_are_woken_once_per_batch_that_changes_something() {
    let model = SharedModel::new();
    let mut watcher = model.subscribe();
    let first = workload_update(pod("a", "one", &["10.0.0.1"]));
    let version = model.apply([
        first.clone(),
        workload_update(pod("a", "two", &["10.0.0.2"])),
    ]);
    assert!(watcher.has_changed().expect("the model lives"));
    assert_eq!(*watcher.borrow_and_update(), version);
    assert_eq!(model.version(), version);
    assert!(model.load().workload_at("", ip("10.0.0.2")).is_some());
    assert_eq!(model.apply([first]), version);
    assert!(!watcher.has_changed().expect("the model lives"));
    let kept = model.load_full();
    model.apply([Update::RemoveAddress("Kubernetes//Pod/a/one".into())]);
    assert!(kept.workload_at("", ip("10.0.0.1")).is_some());
    assert!(model.load().workload_at("", ip("10.0.0.1")).is_none());
}
