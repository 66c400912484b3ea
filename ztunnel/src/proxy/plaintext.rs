//! Plaintext to a pod: no identity, the same policy, the same source address for the app.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use adit_shared::net::socket::reset_on_close;
use adit_shared::telemetry::{ConnectionInfo, Rejection, Reporter, ResponseFlag};
use tokio::net::{TcpListener, TcpStream};

use super::upstream::connect_app;
use super::{
    Accepted, Failed, Judge, Opened, Peer, accept_each, canonical, carry, reject, workload_of,
};
use crate::connections::PolicyInput;
use crate::pod::Pod;
use crate::worker::Worker;

/// Serves the pod's plaintext listener until the task is dropped.
pub async fn accept(worker: Rc<Worker>, pod: Arc<Pod>, listener: TcpListener) {
    accept_each(worker, pod, listener, "inbound plaintext", serve).await;
}

async fn serve(worker: Rc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let Accepted {
        stream,
        peer,
        _permit,
        opening,
    } = accepted;
    // The client's own connection has this address and port; the one to the app must not.
    let _hold = worker.shared.ports.hold(peer);
    let opened = Box::pin(open(&worker, pod, stream, peer)).await;
    drop(opening);
    if let Some(opened) = opened {
        carry(&worker, opened).await;
    }
}

/// Asks policy and connects to the app; `None` when that fails, which has been recorded.
async fn open(
    worker: &Worker,
    pod: Arc<Pod>,
    client: TcpStream,
    peer: SocketAddr,
) -> Option<Opened> {
    let started = Instant::now();
    let local = client.local_addr().map(canonical).ok()?;
    if pod.is_proxy_port(local) || !pod.owns(local.ip()) {
        reject(worker, &client, peer, Rejection::Loop);
        return None;
    }
    let telemetry = &worker.shared.telemetry;
    let destination = workload_of(worker, &pod).await;
    let mut info = ConnectionInfo::new(Reporter::Destination, peer, local);
    if let Some(destination) = &destination {
        info = info.with_destination(destination);
        let snapshot = worker.shared.model.load();
        if let Some(source) = snapshot.workload_at(&destination.network, peer.ip()) {
            info = info.with_source(source);
        }
    }

    let input = PolicyInput {
        identity: None,
        source: peer,
        destination: local,
        origin: None,
    };
    let judge = Judge::of(worker);
    let opened = async {
        let judged = judge.authorize(destination.as_deref(), &input)?;
        let app = connect_app(worker, &pod, peer, local)
            .await
            .map_err(|e| Failed::new(ResponseFlag::Connect, format!("connect to the app: {e}")))?;
        let entry = judge
            .enter(&worker.connections, pod.clone(), peer, input, judged)
            .inspect_err(|_| reset_on_close(&app))?;
        Ok::<_, Failed>((app, entry))
    };
    match opened.await {
        Ok((app, entry)) => Some(Opened {
            record: telemetry.open(info),
            entry,
            app,
            peer: Peer::Tcp(client),
        }),
        Err(failed) => {
            reset_on_close(&client);
            telemetry.failed(&info, started.elapsed(), failed.flag, &failed);
            None
        }
    }
}
