//! The authority in a Secret: made once, rotated without a gap, plugged in.

use std::time::Duration;

use adit_controlplane::ca::{
    ClusterCa, OWN_SECRET, PLUGGED_SECRET, PREVIOUS_SECRET, RotationTimes,
};
use adit_shared::identity::{CaFiles, LocalCa, TrustDomain};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};

use crate::cluster::{Cluster, until};

const TIMES: RotationTimes = RotationTimes {
    announce: Duration::from_secs(3),
    retire: Duration::from_secs(3),
};

async fn start(cluster: &Cluster) -> ClusterCa {
    ClusterCa::start(&cluster.handle(), TrustDomain::default(), TIMES)
        .await
        .expect("an authority")
}

fn secret(name: &str, files: &CaFiles) -> Secret {
    let data = [
        ("ca-cert.pem", &files.certificate),
        ("ca-key.pem", &files.key),
        ("cert-chain.pem", &files.chain),
        ("root-cert.pem", &files.roots),
    ];
    let data = data.map(|(key, text)| (key.to_owned(), ByteString(text.clone().into_bytes())));
    Secret {
        metadata: ObjectMeta {
            name: Some(name.into()),
            ..ObjectMeta::default()
        },
        data: Some(data.into()),
        ..Secret::default()
    }
}

fn generate() -> CaFiles {
    LocalCa::generate(&TrustDomain::default())
        .expect("a CA")
        .to_files()
}

/// The signing certificate, and how many roots are handed out.
fn seen(ca: &ClusterCa) -> (String, usize) {
    let files = ca.current().get().to_files();
    let roots = files.roots.matches("BEGIN CERTIFICATE").count();
    (files.certificate, roots)
}

async fn becomes(ca: &ClusterCa, what: &str, wanted: (&str, usize)) {
    until(what, || async {
        let (certificate, roots) = seen(ca);
        ((certificate.as_str(), roots) == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn replicas_that_start_together_make_one_authority() {
    let Some(cluster) = Cluster::open("race").await else {
        return;
    };
    let started = (0..4).map(|_| start(&cluster));
    let all = futures_util::future::join_all(started).await;
    let first = seen(&all[0]);
    assert!(all.iter().all(|ca| seen(ca) == first));
    let secrets: Api<Secret> = cluster.api();
    let made = secrets.get(OWN_SECRET).await.expect("made");
    assert_eq!(made.type_.as_deref(), Some("istio.io/ca-root"));
    // Another start finds it.
    assert_eq!(seen(&start(&cluster).await), first);
    cluster.close().await;
}

#[tokio::test]
async fn a_new_root_is_announced_then_signs_then_stands_alone() {
    let Some(cluster) = Cluster::open("rotate").await else {
        return;
    };
    let secrets: Api<Secret> = cluster.api();
    let ca = start(&cluster).await;
    let other_replica = start(&cluster).await;
    let (old, _) = seen(&ca);

    // An operator plugs one in.
    let plugged = generate();
    let new = plugged.certificate.clone();
    secrets
        .create(&PostParams::default(), &secret(PLUGGED_SECRET, &plugged))
        .await
        .expect("created");
    becomes(&ca, "the old one signs, both are trusted", (&old, 2)).await;
    becomes(&other_replica, "the other replica", (&old, 2)).await;
    // A replica that starts in the middle of it does the same.
    assert_eq!(seen(&start(&cluster).await), (old.clone(), 2));
    becomes(&ca, "the new one signs, both are trusted", (&new, 2)).await;
    becomes(&ca, "the new one alone", (&new, 1)).await;
    becomes(&other_replica, "the other replica", (&new, 1)).await;
    until("nothing is left of the old one", || async {
        let left = secrets.get_opt(PREVIOUS_SECRET).await.expect("an answer");
        left.is_none().then_some(())
    })
    .await;

    // What cannot be used does not take its place.
    let mut broken = secret(PLUGGED_SECRET, &plugged);
    let data = broken.data.as_mut().expect("data");
    data.insert("ca-key.pem".into(), ByteString(b"none".to_vec()));
    secrets
        .replace(PLUGGED_SECRET, &PostParams::default(), &broken)
        .await
        .expect("replaced");
    // And a rotation that somebody has no time for is ended by hand.
    let urgent = generate();
    secrets
        .replace(
            PLUGGED_SECRET,
            &PostParams::default(),
            &secret(PLUGGED_SECRET, &urgent),
        )
        .await
        .expect("replaced");
    becomes(&ca, "announced", (&new, 2)).await;
    secrets
        .delete(PREVIOUS_SECRET, &DeleteParams::default())
        .await
        .expect("deleted");
    becomes(&ca, "at once", (&urgent.certificate, 1)).await;
    cluster.close().await;
}
