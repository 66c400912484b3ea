//! The election over a real Lease.

use std::time::Duration;

use adit_controlplane::kubernetes::lease::{ApiLease, Election, Elector, LEADER, Timing};
use tokio::time::{Instant, timeout};

use crate::cluster::{Cluster, PATIENCE};

const QUICK: Timing = Timing {
    lease: Duration::from_secs(6),
    renew_deadline: Duration::from_secs(4),
    retry: Duration::from_millis(500),
};

async fn leads(elector: &Elector, value: bool) {
    let mut leading = elector.leading();
    let waited = timeout(PATIENCE, leading.wait_for(|leads| *leads == value));
    waited.await.expect("in time").expect("runs");
}

#[tokio::test]
async fn one_replica_leads_and_the_next_follows_at_once() {
    let Some((_alone, cluster)) = Cluster::connect("lease").await else {
        return;
    };
    let candidate = |name: &str| {
        let store = ApiLease::new(cluster.client.clone(), &cluster.namespace, LEADER);
        Elector::with(store, Election::new(name, QUICK))
    };
    let a = candidate("a");
    leads(&a, true).await;
    let b = candidate("b");
    let lease = Cluster::named("coordination.k8s.io/v1", "Lease", LEADER);
    let first = cluster.get(&lease).await.expect("a Lease");
    assert_eq!(first["spec"]["holderIdentity"], "a");
    let renewed =
        |lease: &serde_json::Value| lease["spec"]["renewTime"] != first["spec"]["renewTime"];
    cluster.until("it is renewed", &lease, renewed).await;
    assert!(!*b.leading().borrow());
    let before = Instant::now();
    a.release().await;
    leads(&b, true).await;
    assert!(before.elapsed() < QUICK.lease, "{:?}", before.elapsed());
    let taken = cluster.get(&lease).await.expect("a Lease");
    assert_eq!(taken["spec"]["holderIdentity"], "b");
    assert_eq!(taken["spec"]["leaseTransitions"], 1);

    // It crashes: the Lease has to run out.
    drop(b);
    let c = candidate("c");
    leads(&c, true).await;
    c.release().await;
    cluster.remove().await;
}
