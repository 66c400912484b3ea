//! Running out of file descriptors. Alone in its process, because the limit is the process's.

mod support;

use std::sync::atomic::Ordering;

use adit_shared::proto::ADDRESS_TYPE;
use adit_shared::proto::workload::Address;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{Mesh, Proxy, eventually};
use tokio::net::TcpStream;

#[tokio::test]
async fn accepting_goes_on_after_descriptors_ran_out() {
    let mesh = Mesh::start().await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;

    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let limit = 256.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("lowered");
    // Clients are in this process too: take what is left, then connections of which the
    // server's half finds nothing.
    let mut files = vec![];
    let mut sockets = vec![];
    while let Ok(file) = std::fs::File::open("/dev/null") {
        files.push(file);
    }
    for _ in 0..8 {
        files.pop();
        sockets.push(TcpStream::connect(mesh.address()).await.expect("open"));
        while let Ok(file) = std::fs::File::open("/dev/null") {
            files.push(file);
        }
    }
    let accepts = &mesh.serving().metrics().accepts;
    let exhausted = || accepts.exhausted.load(Ordering::Relaxed);
    eventually("accepting fails", || exhausted() > 0).await;

    // What is connected goes on; and when there are descriptors again, so does the rest.
    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "a", &Address::default());
    });
    proxy.holds(ADDRESS_TYPE, &["a"]).await;
    drop(files);
    drop(sockets);
    let second = Proxy::start(mesh.client_config("n2"));
    second.ready().await;
    second.holds(ADDRESS_TYPE, &["a"]).await;
}
