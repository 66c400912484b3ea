//! Pods come and go, and others meddle with what we made.

mod common;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use adit_ebpf::{Error, PodRedirection, PodState, RoutingError};
use common::*;

fn foreign() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 10], 80))
}

/// Nothing of ours is in the namespace.
fn assert_clean(pod: &Pod) {
    for family in ["-4", "-6"] {
        assert!(!pod.netns.show(&format!("{family} rule")).contains("fwmark"));
        assert!(
            !pod.netns
                .show(&format!("{family} route show table all"))
                .contains("44311")
        );
    }
    assert_eq!(pod.netns.sysctl("ipv4/tcp_fwmark_accept"), "0");
}

#[test]
fn a_released_pod_connects_as_without_a_mesh_and_is_still_captured_inbound() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| bind(foreign()).expect("bound"));
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let mut captured = pod.app(|| connect(foreign()).expect("captured"));
    let mut accepted = accept(&trap.outbound);

    redirector.release(&pod.uid).expect("released");
    assert_eq!(redirector.pods()[0].state, PodState::Released);
    let mut app = pod.app(|| connect(foreign()).expect("connected"));
    converse(&mut app, &mut accept(&beyond).stream);
    // What was captured before goes on.
    converse(&mut captured, &mut accepted.stream);
    let _client = lab.out(|| connect((pod.v4, 8080)).expect("captured"));
    drop(accept(&trap.plaintext));
    // Reconciling does not capture it again.
    assert_eq!(redirector.reconcile().restored(), 0);
    let _app = pod.app(|| connect(foreign()).expect("connected"));
    drop(accept(&beyond));
    // Enrolling does.
    pod.enrol_with(&mut redirector, &trap).expect("enrolled");
    let _app = pod.app(|| connect(foreign()).expect("captured"));
    drop(accept(&trap.outbound));
}

#[test]
fn a_withdrawn_pod_is_as_it_was() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| bind(foreign()).expect("bound"));
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    redirector.withdraw(&pod.uid).expect("withdrawn");
    assert!(redirector.pods().is_empty());
    assert_clean(&pod);
    let _app = pod.app(|| connect(foreign()).expect("connected"));
    drop(accept(&beyond));
    for own in pod.addresses() {
        let mut client = lab.out(|| connect((own, 8080)).expect("connected"));
        converse(&mut client, &mut accept(&server).stream);
    }
    assert!(matches!(
        redirector.withdraw(&pod.uid),
        Err(Error::UnknownPod(_))
    ));
    assert!(matches!(
        redirector.release(&pod.uid),
        Err(Error::UnknownPod(_))
    ));
}

#[test]
fn a_pod_whose_namespace_is_gone_is_withdrawn() {
    let lab = Lab::new();
    let (mut redirector, uid) = {
        let pod = lab.pod();
        let mut redirector = lab.redirector();
        let trap = pod.enrol(&mut redirector);
        drop((redirector, trap));
        (lab.redirector(), pod.uid.clone())
    };
    assert_eq!(redirector.pods()[0].state, PodState::Left);
    assert!(redirector.reconcile().failures.is_empty());
    redirector.withdraw(&uid).expect("withdrawn");
    assert!(redirector.pods().is_empty());
    assert!(!lab.pins().join("pods/0").exists());
}

#[test]
fn a_pod_that_an_earlier_process_left_is_withdrawn_whether_or_not_its_namespace_is_named() {
    let lab = Lab::new();
    for named in [false, true] {
        let (pod, other) = (lab.pod(), lab.pod());
        let mut redirector = lab.redirector();
        let _trap = pod.enrol(&mut redirector);
        drop(redirector);
        let mut redirector = lab.redirector();
        if named {
            let wrong = redirector.adopt(&pod.uid, other.netns.fd.as_fd());
            assert!(matches!(wrong, Err(Error::OtherNamespace(_))));
            redirector
                .adopt(&pod.uid, pod.netns.fd.as_fd())
                .expect("adopted");
        }
        redirector.withdraw(&pod.uid).expect("withdrawn");
        assert_clean(&pod);
    }
}

#[test]
fn an_enrolment_that_fails_leaves_nothing() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.listeners();
    let mut enrol = |uid: &str, addresses: &[IpAddr]| {
        redirector.enrol(PodRedirection {
            uid,
            netns: pod.netns.fd.as_fd(),
            addresses,
            outbound_only: false,
            listeners: trap.all(),
        })
    };
    let elsewhere: IpAddr = "10.7.99.99".parse().expect("an address");
    let error = enrol("pod", &[elsewhere]).expect_err("not its address");
    assert!(
        matches!(error, Error::Routing { source: RoutingError::AddressMissing(missing), .. } if missing == elsewhere)
    );
    assert!(matches!(enrol("pod", &[]), Err(Error::NoAddress(_))));
    assert!(matches!(
        enrol("", &pod.addresses()),
        Err(Error::InvalidUid(0))
    ));
    assert!(matches!(
        enrol(&"x".repeat(65), &pod.addresses()),
        Err(Error::InvalidUid(65))
    ));
    assert_clean(&pod);

    for number in 0..16 {
        pod.netns
            .ip(&format!("addr add 10.7.201.{number}/16 dev eth0"));
    }
    let error = enrol("pod", &pod.addresses()).expect_err("too many addresses");
    assert!(matches!(
        error,
        Error::Routing {
            source: RoutingError::TooManyAddresses(_),
            ..
        }
    ));
    pod.netns.ip("link set lo down");
    let error = enrol("pod", &pod.addresses()).expect_err("no loopback");
    assert!(matches!(
        error,
        Error::Routing {
            source: RoutingError::LoopbackDown,
            ..
        }
    ));
    assert_clean(&pod);

    // A listener with ztunnel's own mark: the kernel's answers would leave the pod.
    socket2::SockRef::from(&trap.outbound)
        .set_mark(adit_ebpf::MARK_OWN)
        .expect("set");
    let error = pod
        .enrol_with(&mut redirector, &trap)
        .expect_err("a wrong mark");
    assert!(matches!(error, Error::ListenerMark(_)));
    assert!(redirector.pods().is_empty());
}

#[test]
fn an_address_that_is_still_being_checked_for_duplicates_is_waited_for() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let address: IpAddr = "fd07::dad".parse().expect("an address");
    pod.netns.ip("addr add fd07::dad/64 dev eth0");
    let trap = pod.listeners();
    redirector
        .enrol(PodRedirection {
            uid: &pod.uid,
            netns: pod.netns.fd.as_fd(),
            addresses: &[address],
            outbound_only: false,
            listeners: trap.all(),
        })
        .unwrap_or_else(|error| panic!("{error}"));
    let destination: SocketAddr = "[2001:db8::10]:80".parse().expect("an address");
    let _app = pod.app(|| connect(destination).expect("captured"));
    assert_eq!(accept(&trap.outbound).peer.ip(), address);
}

#[test]
fn a_pod_with_one_family_is_captured_in_that_family() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    pod.netns.set_sysctl("ipv6/conf/all/disable_ipv6", "1");
    let trap = pod.listeners();
    pod.enrol_with(&mut redirector, &trap)
        .unwrap_or_else(|error| panic!("{error}"));
    let _app = pod.app(|| connect(foreign()).expect("captured"));
    drop(accept(&trap.outbound));
    let destination: SocketAddr = "[2001:db8::10]:80".parse().expect("an address");
    // As without a mesh.
    let failed = errno(pod.app(|| connect(destination)));
    assert!(
        matches!(
            failed,
            Some(libc::ENETUNREACH | libc::EADDRNOTAVAIL | libc::EACCES)
        ),
        "{failed:?}"
    );
}

#[test]
fn a_pods_new_addresses_are_followed() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    // One more: found when reconciling, and then known as the pod's own.
    pod.netns.ip("addr add 10.7.202.1/16 dev eth0");
    let report = redirector.reconcile();
    assert_eq!((report.updated_addresses, report.failures.len()), (1, 0));
    let mut app = pod.app(|| connect(([10, 7, 202, 1], 8080)).expect("the app itself"));
    converse(&mut app, &mut accept(&server).stream);
    // Another primary one, by a new enrolment.
    pod.netns.ip(&format!("addr del {}/16 dev eth0", pod.v4));
    let address: IpAddr = "10.7.202.2".parse().expect("an address");
    pod.netns.ip("addr add 10.7.202.2/16 dev eth0");
    pod.netns.ip("route replace default via 10.7.0.1");
    assert_eq!(
        redirector.reconcile().failures.len(),
        1,
        "the primary address is gone"
    );
    redirector
        .enrol(PodRedirection {
            uid: &pod.uid,
            netns: pod.netns.fd.as_fd(),
            addresses: &[address],
            outbound_only: false,
            listeners: trap.all(),
        })
        .unwrap_or_else(|error| panic!("{error}"));
    let mut app = pod.app(|| connect(foreign()).expect("captured"));
    let mut accepted = accept(&trap.outbound);
    assert_eq!(accepted.peer.ip(), address);
    converse(&mut app, &mut accepted.stream);
}

#[test]
fn a_new_sandbox_of_the_same_pod_replaces_the_old_one() {
    let lab = Lab::new();
    let (old, new) = (lab.pod(), lab.pod());
    let mut redirector = lab.redirector();
    let trap_old = old.enrol(&mut redirector);
    let trap_new = new.listeners();
    redirector
        .enrol(PodRedirection {
            uid: &old.uid,
            netns: new.netns.fd.as_fd(),
            addresses: &new.addresses(),
            outbound_only: false,
            listeners: trap_new.all(),
        })
        .expect("enrolled");
    assert_eq!(redirector.pods().len(), 1);
    assert_clean(&old);
    let _app = new.app(|| connect(foreign()).expect("captured"));
    drop(accept(&trap_new.outbound));
    assert!(is_idle(&trap_old.outbound));
}

#[test]
fn what_others_removed_is_put_back_and_counted() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let report = redirector.reconcile();
    assert_eq!(
        (report.restored(), report.empty_slots, report.failures.len()),
        (0, 0, 0),
        "{report:?}"
    );

    pod.netns.ip("rule del pref 5");
    pod.netns.ip("-6 rule del pref 6");
    pod.netns.ip("route flush table 44311");
    pod.netns
        .ip("-6 route del local default dev lo table 44311");
    pod.netns.set_sysctl("ipv4/fwmark_reflect", "0");
    raw_bpf::detach_pinned(&lab.pins().join("connect4"));
    raw_bpf::detach_pinned(&lab.pins().join("pods/0"));
    std::fs::remove_file(lab.pins().join("connect6")).expect("removed");
    std::fs::remove_file(lab.pins().join("adit_pods")).expect("removed");
    let report = redirector.reconcile();
    let restored = (
        report.restored_rules,
        report.restored_routes,
        report.restored_sysctls,
        report.restored_links,
        report.restored_pins,
    );
    assert_eq!(restored, (2, 3, 1, 2, 2), "{report:?}");
    assert!(report.failures.is_empty(), "{report:?}");
    assert_eq!(redirector.reconcile().restored(), 0);

    let mut app = pod.app(|| connect(foreign()).expect("captured"));
    converse(&mut app, &mut accept(&trap.outbound).stream);
    let mut client = lab.out(|| connect((pod.v4, 8080)).expect("captured"));
    converse(&mut client, &mut accept(&trap.plaintext).stream);
    close(trap);
    assert_eq!(redirector.reconcile().empty_slots, 3);
}

/// Waits until the watch has something to tell.
fn is_told(watch: &adit_ebpf::SteeringWatch, patience: Duration) -> bool {
    let mut fd = libc::pollfd {
        fd: watch.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one element, alive during the call.
    let ready = unsafe { libc::poll(&mut fd, 1, patience.as_millis() as i32) };
    assert!(ready >= 0, "{}", std::io::Error::last_os_error());
    ready == 1
}

#[test]
fn what_others_remove_is_told_of_at_once_and_put_back_without_the_redirector() {
    let lab = Lab::new();
    let (pod, other) = (lab.pod(), lab.pod());
    let mut redirector = lab.redirector();
    let watch = redirector.watch();
    let _trap = pod.enrol(&mut redirector);
    let _others = other.enrol(&mut redirector);
    // Links that have just come up.
    while is_told(&watch, SHORT) {
        let repairs = watch.repair();
        assert_eq!((repairs.rules, repairs.routes), (0, 0), "{repairs:?}");
    }
    for (removal, expected) in [
        ("rule del pref 5", (1, 0)),
        ("-6 rule del pref 6", (1, 0)),
        ("route del local default dev lo table 44311", (0, 1)),
        ("-6 route del local default dev lo table 44311", (0, 1)),
        ("route flush table 44311", (0, 2)),
    ] {
        pod.netns.ip(removal);
        assert!(is_told(&watch, PATIENCE), "{removal}");
        let repairs = watch.repair();
        assert_eq!((repairs.rules, repairs.routes), expected, "{removal}");
        assert!(repairs.failures.is_empty(), "{repairs:?}");
        assert_eq!(redirector.reconcile().restored(), 0, "{removal}");
        // What was put back tells of nothing.
        let repairs = watch.repair();
        assert_eq!((repairs.rules, repairs.routes), (0, 0), "{removal}");
        assert!(!is_told(&watch, Duration::from_millis(50)), "{removal}");
    }

    // A pod that has left is left alone.
    redirector.withdraw(&pod.uid).expect("withdrawn");
    watch.repair();
    assert_clean(&pod);
    other.netns.ip("rule del pref 5");
    assert!(is_told(&watch, PATIENCE));
    assert_eq!(watch.repair().rules, 1);
}

#[test]
fn a_rule_or_route_that_was_changed_is_set_right() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    // Another condition on our rule; another source on our route; a route that is not ours.
    pod.netns.ip("rule del pref 5");
    pod.netns
        .ip("rule add pref 5 fwmark 0x2ad17c01 iif eth0 lookup 44311");
    pod.netns
        .ip("route replace local default dev lo metric 1 table 44311");
    pod.netns
        .ip("route add 192.0.2.0/24 via 10.7.0.1 table 44311");
    let report = redirector.reconcile();
    assert_eq!(
        (report.restored_rules, report.restored_routes),
        (1, 1),
        "{report:?}"
    );
    assert!(report.failures.is_empty(), "{report:?}");
    assert!(!pod.netns.show("rule").contains("iif eth0"));
    assert!(!pod.netns.show("route show table 44311").contains("via"));
    let _app = pod.app(|| connect(foreign()).expect("captured"));
    assert_eq!(accept(&trap.outbound).peer.ip(), pod.v4);
}

#[test]
fn a_cgroup_that_is_removed_is_reported() {
    let lab = Lab::new();
    let other = lab.root.join("other");
    std::fs::create_dir(&other).expect("created");
    let config = adit_ebpf::NodeConfig {
        cgroup: other.clone(),
        ..lab.config()
    };
    let mut redirector = adit_ebpf::Redirector::open(config).expect("opened");
    std::fs::remove_dir(&other).expect("removed");
    wait_for("the kernel ends the links", || {
        !redirector.reconcile().failures.is_empty()
    });
    // A new process finds the pins of links that are dead, and attaches anew.
    drop(redirector);
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let _app = pod.app(|| connect(foreign()).expect("captured"));
    drop(accept(&trap.outbound));
}
