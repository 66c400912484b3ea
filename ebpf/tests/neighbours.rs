//! Others on the same machine: the kubelet, a CNI's socket load balancer, another node of ours.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;

use adit_ebpf::{NodeConfig, Redirector, capabilities, foreign_programs};
use common::*;

/// A connection of the kubelet: outside of the pods' namespaces, in its own cgroup.
fn probe(lab: &Lab, to: SocketAddr) -> std::io::Result<TcpStream> {
    lab.outside()
        .thread(Some(&lab.cgroup.join("kubelet")), || connect(to))
}

fn probes(lab: &Lab) -> usize {
    raw_bpf::entries::<36>(&lab.pins().join("adit_probes"))
}

#[test]
fn the_kubelets_probes_reach_the_app_and_nobody_elses_connections_do() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let mapped: SocketAddr = format!("[::ffff:{}]:8080", pod.v4)
        .parse()
        .expect("an address");
    let destinations = [
        SocketAddr::new(pod.v4.into(), 8080),
        SocketAddr::new(pod.v6.into(), 8080),
        mapped,
    ];
    for to in destinations {
        let mut kubelet = probe(&lab, to).expect("connected");
        converse(&mut kubelet, &mut accept(&server).stream);
        assert_eq!(probes(&lab), 1, "{to}");
        let other = lab.out(|| connect(to).expect("captured"));
        assert_eq!(accept(&trap.plaintext).local, canonical(to));
        drop((kubelet, other));
        wait_for("the probe is forgotten", || probes(&lab) == 0);
    }
    assert!(is_idle(&server));
}

#[test]
fn a_probe_is_answered_with_syn_cookies_too() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    // Cookies for every connection: the last packet of the handshake is looked up as if it were the first.
    pod.netns.set_sysctl("ipv4/tcp_syncookies", "2");
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    for own in pod.addresses() {
        let mut kubelet = probe(&lab, SocketAddr::new(own, 8080)).expect("connected");
        converse(&mut kubelet, &mut accept(&server).stream);
        let mut other = lab.out(|| connect((own, 8080)).expect("captured"));
        converse(&mut other, &mut accept(&trap.plaintext).stream);
    }
}

#[test]
fn a_probe_that_fails_is_forgotten() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    for own in pod.addresses() {
        assert_eq!(
            errno(probe(&lab, SocketAddr::new(own, 8080))),
            Some(libc::ECONNREFUSED)
        );
    }
    wait_for("the probes are forgotten", || probes(&lab) == 0);
}

#[test]
fn the_kubelets_other_connections_are_not_noted() {
    let lab = Lab::new();
    let (pod, other) = (lab.pod(), lab.pod());
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let _server = other.serve(other.v4, 8080);
    let _kubelet = probe(&lab, SocketAddr::new(other.v4.into(), 8080)).expect("connected");
    assert_eq!(probes(&lab), 0);
}

/// Where the kubelet sits in the root cgroup, its program sees the pods' connections too.
#[test]
fn a_kubelet_above_the_pods_is_told_from_them_by_its_network() {
    let lab = Lab::new();
    let (pod, other) = (lab.pod(), lab.pod());
    let config = NodeConfig {
        kubelet_cgroup: Some(lab.cgroup.clone()),
        kubelet_netns: Some(lab.outside().fd.cookie().expect("a cookie")),
        ..lab.config()
    };
    let mut redirector = Redirector::open(config).expect("this kernel can");
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    for own in pod.addresses() {
        let to = SocketAddr::new(own, 8080);
        let mut kubelet = probe(&lab, to).expect("connected");
        converse(&mut kubelet, &mut accept(&server).stream);
        let _other = other.app(|| connect(to).expect("captured"));
        assert_eq!(accept(&trap.plaintext).local, to);
    }
    assert!(is_idle(&server));
}

/// As a service manager does with a service that is started again.
#[test]
fn a_kubelet_that_gets_a_new_cgroup_is_followed() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let to = SocketAddr::new(pod.v4.into(), 8080);
    let cgroup = lab.cgroup.join("kubelet");
    std::fs::remove_dir(&cgroup).expect("nobody is in it");
    let report = redirector.reconcile();
    assert!(report.failures.is_empty(), "{report:?}");
    make_cgroup(&cgroup);
    let report = redirector.reconcile();
    assert_eq!(
        (report.restored_links, report.failures.len()),
        (1, 0),
        "{report:?}"
    );
    let mut kubelet = probe(&lab, to).expect("connected");
    converse(&mut kubelet, &mut accept(&server).stream);

    // It has moved elsewhere.
    redirector
        .set_kubelet(&lab.cgroup.join("ztunnel"), None)
        .expect("attached");
    let mut elsewhere = lab
        .outside()
        .thread(Some(&lab.cgroup.join("ztunnel")), || connect(to))
        .expect("connected");
    converse(&mut elsewhere, &mut accept(&server).stream);
    let _before = probe(&lab, to).expect("captured");
    assert_eq!(accept(&trap.plaintext).local, to);
    assert!(redirector.reconcile().failures.is_empty());
}

#[test]
fn a_socket_load_balancer_above_us_runs_after_us_and_is_reported() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let backend = Ipv4Addr::new(192, 0, 2, 77);
    let program = raw_bpf::load_connect4("cil_sock4_conne", &raw_bpf::rewrite_to(backend));
    let root = directory(&lab.root);
    let link = raw_bpf::attach_connect4(program.as_fd(), root.as_fd());
    // Still captured, but ztunnel no longer sees the service: what the report is for.
    let _app = pod.app(|| connect(([192, 0, 2, 10], 80)).expect("captured"));
    assert_eq!(
        accept(&trap.outbound).local,
        SocketAddr::from((backend, 80))
    );

    let found = foreign_programs(&lab.cgroup).expect("queried");
    let found = found
        .iter()
        .find(|program| program.name == "cil_sock4_conne")
        .expect("reported");
    assert_eq!(found.owner, Some("Cilium"));
    assert!(found.remedy.contains("socketLB.hostNamespaceOnly"));
    assert!(found.cgroup.ends_with(&lab.id));
    let capability = capabilities(&lab.config())
        .into_iter()
        .find(|found| found.feature.contains("load balancer"));
    let capability = capability.expect("listed");
    assert!(!capability.present && !capability.required);
    assert!(
        capability.detail.contains("socketLB.hostNamespaceOnly"),
        "{}",
        capability.detail
    );

    close(link);
    let found = foreign_programs(&lab.cgroup).expect("queried");
    assert!(
        found
            .iter()
            .all(|program| program.name != "cil_sock4_conne")
    );
}

#[test]
fn a_program_below_us_runs_before_us() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let program = raw_bpf::load_connect4("below", &raw_bpf::rewrite_to(Ipv4Addr::LOCALHOST));
    let pods = directory(&lab.cgroup.join("pods"));
    let _link = raw_bpf::attach_connect4(program.as_fd(), pods.as_fd());
    let server = pod.serve(Ipv4Addr::LOCALHOST, 80);
    // Loopback by the time that we see it.
    let _app = pod.app(|| connect(([192, 0, 2, 10], 80)).expect("connected"));
    drop(accept(&server));
    assert!(is_idle(&trap.outbound));
}

#[test]
fn two_nodes_share_a_kernel() {
    let (one, two) = (Lab::new(), Lab::new());
    let shared = one.directory.join("bpf");
    let config = NodeConfig {
        bpffs: shared,
        ..two.config()
    };
    let (pod_one, pod_two) = (one.pod(), two.pod());
    let mut node_one = one.redirector();
    let mut node_two = Redirector::open(config).expect("opened");
    // The same addresses and the same index on both.
    assert_eq!(pod_one.addresses(), pod_two.addresses());
    let (trap_one, trap_two) = (pod_one.enrol(&mut node_one), pod_two.enrol(&mut node_two));
    for (pod, trap) in [(&pod_one, &trap_one), (&pod_two, &trap_two)] {
        let mut app = pod.app(|| connect(([192, 0, 2, 10], 80)).expect("captured"));
        converse(&mut app, &mut accept(&trap.outbound).stream);
    }
    node_one.withdraw(&pod_one.uid).expect("withdrawn");
    let _app = pod_two.app(|| connect(([192, 0, 2, 10], 80)).expect("captured"));
    drop(accept(&trap_two.outbound));
    assert_eq!((node_one.pods().len(), node_two.pods().len()), (0, 1));
}

#[test]
fn this_kernel_has_all_that_is_required() {
    let lab = Lab::new();
    let found = capabilities(&lab.config());
    // What is good to have is listed as such, so that `adit check` can warn.
    let optional = |feature: &str| {
        let capability = found.iter().find(|found| found.feature == feature);
        capability.is_some_and(|found| !found.required && found.present)
    };
    assert!(optional("bpf_setsockopt(SO_REUSEADDR) in bind hooks"));
    assert!(optional("sockops"));
    for capability in found {
        assert!(
            capability.present || !capability.required,
            "{} (since {}): {}",
            capability.feature,
            capability.since,
            capability.detail
        );
    }
}

#[test]
fn what_is_missing_is_named_with_its_origin() {
    let lab = Lab::new();
    let config = NodeConfig {
        cgroup: "/proc".into(),
        ..lab.config()
    };
    let error = Redirector::open(config)
        .err()
        .expect("not a cgroup")
        .to_string();
    assert!(
        error.contains("cgroup v2") && error.contains("since 4.5"),
        "{error}"
    );
}
