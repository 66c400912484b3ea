//! A thousand pods come and go. Alone in its binary, for it counts the process's descriptors.

mod common;

use common::*;

#[test]
fn a_thousand_enrolments_leave_nothing_behind() {
    /// Of two pods each.
    const CYCLES: usize = 500;
    let lab = Lab::new();
    let pods = [lab.pod(), lab.pod()];
    let mut redirector = lab.redirector();
    let traps = pods.each_ref().map(Pod::listeners);
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("listed").count();
    let mut before = 0;
    for cycle in 0..CYCLES {
        for (pod, trap) in pods.iter().zip(&traps) {
            pod.enrol_with(&mut redirector, trap)
                .unwrap_or_else(|error| panic!("cycle {cycle}: {error}"));
        }
        for pod in &pods {
            redirector
                .withdraw(&pod.uid)
                .unwrap_or_else(|error| panic!("cycle {cycle}: {error}"));
        }
        if cycle == 10 {
            before = descriptors();
        }
    }
    assert_eq!(descriptors(), before);
    assert_eq!(
        std::fs::read_dir(lab.pins().join("pods"))
            .expect("listed")
            .count(),
        0
    );
    for (map, key) in [
        ("adit_cookies", 8),
        ("adit_addresses", 16),
        ("adit_enrolments", 4),
    ] {
        let pin = lab.pins().join(map);
        let entries = match key {
            8 => raw_bpf::entries::<8>(&pin),
            16 => raw_bpf::entries::<16>(&pin),
            _ => raw_bpf::entries::<4>(&pin),
        };
        assert_eq!(entries, 0, "{map}");
    }
    for pod in &pods {
        assert!(!pod.netns.show("rule").contains("fwmark"));
    }
}
