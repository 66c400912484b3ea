//! What decides about a connection, without its bytes.

use std::fs::File;
use std::time::SystemTime;

use adit_shared::identity::{CertificateAuthority, CertificateRequest, LocalCa, TrustDomain};
use adit_shared::model::route::{self, Outbound};
use adit_shared::model::{Update, address_from_resource};
use adit_shared::policy::Policy;
use adit_shared::proto::enrolment::Enrolment;
use adit_shared::proto::security::{Action, Authorization, Group, Scope};
use adit_shared::proto::workload::{self as wire, Address, address};

use super::*;
use crate::pod::PodSpec;

const UID: &str = "Kubernetes//Pod/shop/web-1";

fn pod() -> Arc<Pod> {
    let enrolment = Enrolment {
        uid: "7d0c".into(),
        name: "web-1".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        addresses: vec![vec![10, 0, 0, 7]],
        outbound_only: false,
    };
    let spec = PodSpec::new(&enrolment, &TrustDomain::default(), "Kubernetes").expect("valid");
    assert_eq!(&*spec.workload, UID);
    let netns = File::open("/proc/self/ns/net").expect("this process has one");
    Arc::new(Pod::new(spec, netns))
}

fn model() -> SharedModel {
    let workload = wire::Workload {
        uid: UID.into(),
        name: "web-1".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        addresses: vec![vec![10, 0, 0, 7]],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        ..wire::Workload::default()
    };
    let address = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    let model = SharedModel::new();
    model.apply([address_from_resource(UID, &address).expect("valid")]);
    model
}

fn deny_everybody(model: &SharedModel) {
    let policy = Authorization {
        name: "deny".into(),
        namespace: "shop".into(),
        scope: Scope::Namespace.into(),
        action: Action::Deny.into(),
        groups: vec![Group::default()],
        ..Authorization::default()
    };
    let policy = Policy::from_resource("shop/deny", &policy);
    assert_eq!(policy.invalid, None);
    model.apply([Update::UpsertPolicy(policy)]);
}

/// The model changes while a connection that was allowed is being connected to the app: too
/// late for the first question, too early for the recheck of open connections.
#[test]
fn a_policy_that_comes_between_the_question_and_the_entry_is_obeyed() {
    let trust_domains = TrustDomains::new(TrustDomain::default(), Vec::new());
    let input = PolicyInput {
        identity: None,
        source: "10.0.0.9:40000".parse().expect("an address"),
        destination: "10.0.0.7:8080".parse().expect("an address"),
        origin: None,
    };
    for (denied_meanwhile, changed_meanwhile) in [(false, false), (false, true), (true, true)] {
        let (model, connections, pod) = (model(), Rc::<Connections>::default(), pod());
        let judge = Judge {
            model: &model,
            trust_domains: &trust_domains,
        };
        let workload = model.load().workload(UID).cloned().expect("known");
        let judged = judge.authorize(Some(&workload), &input).expect("allowed");
        if denied_meanwhile {
            deny_everybody(&model);
        } else if changed_meanwhile {
            model.apply([Update::RemovePolicy("shop/none".into()), upsert_other()]);
            assert_ne!(model.version(), judged);
        }
        let entered = judge.enter(&connections, pod, input.source, input.clone(), judged);
        match entered {
            Ok(_entry) => {
                assert!(!denied_meanwhile, "it had been denied");
                // So that the next pass knows that it need not ask again.
                connections.for_each(|live| assert_eq!(live.judged(), model.version()));
                assert!(!connections.is_empty());
            }
            Err(failed) => {
                assert!(denied_meanwhile, "{failed}");
                assert_eq!(failed.flag, ResponseFlag::Denied);
                assert!(connections.is_empty(), "it is in nobody's table");
            }
        }
    }
}

/// A change that concerns nobody here.
fn upsert_other() -> Update {
    let policy = Authorization {
        name: "other".into(),
        namespace: "elsewhere".into(),
        scope: Scope::Namespace.into(),
        action: Action::Deny.into(),
        groups: vec![Group::default()],
        ..Authorization::default()
    };
    Update::UpsertPolicy(Policy::from_resource("elsewhere/other", &policy))
}

/// The pod that comes back under the same uid may be in another network namespace, and a tunnel
/// of the one before leads to nobody. One that was made with an older certificate ends with it.
#[tokio::test]
async fn an_enrolment_and_a_certificate_have_tunnels_of_their_own() {
    let model = model();
    let snapshot = model.load_full();
    let workload = snapshot.workload(UID).expect("known");
    let to = "10.0.0.7:8080".parse().expect("an address");
    let way = route::outbound(&snapshot, workload, to, &[], &mut rand::rng());
    let Outbound::Hbone(way) = way else {
        panic!("the workload takes HBONE: {way:?}");
    };
    let ca = LocalCa::generate(&TrustDomain::default()).expect("a CA");
    let (one, renewed) = (certificate(&ca).await, certificate(&ca).await);
    let (before, after) = (pod(), pod());
    assert_eq!(before.spec, after.spec);
    let key = TunnelKey::new(&before, &one, &way);
    assert_eq!(key, TunnelKey::new(&before, &one, &way));
    assert_ne!(key, TunnelKey::new(&after, &one, &way));
    assert_ne!(key, TunnelKey::new(&before, &renewed, &way));
}

async fn certificate(ca: &LocalCa) -> WorkloadCertificate {
    let identity = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("legal");
    let request = CertificateRequest::new(&identity).expect("a key");
    let ttl = Duration::from_secs(600);
    let signed = CertificateAuthority::sign(ca, &identity, request.csr_pem(), ttl).await;
    let signed = signed.expect("signed");
    WorkloadCertificate::new(&identity, signed, request.into_key(), SystemTime::now())
        .expect("valid")
}
