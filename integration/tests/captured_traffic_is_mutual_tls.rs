//! Traffic between pods of the mesh is carried over HBONE with both ends' identities; the app
//! sees the client's own address; traffic with pods outside stays plain (ztunnel's
//! `local_captured`, `cross_node_captured`, `server_uncaptured`, `client_uncaptured`).

use adit_integration::{TestMesh, pod};

#[test]
fn each_path_is_what_it_should_be() -> anyhow::Result<()> {
    let mesh = TestMesh::sample()?;
    let client = pod("shop/client");
    let (near, far) = (
        mesh.address(pod("shop/web-a"))?,
        mesh.address(pod("shop/web-b"))?,
    );
    assert_eq!(mesh.node_of(client)?, mesh.node_of(pod("shop/web-a"))?);
    assert_ne!(mesh.node_of(client)?, mesh.node_of(pod("shop/web-b"))?);

    for (address, server, node) in [(&near, "web-a", "node1"), (&far, "web-b", "node2")] {
        let call = mesh.call(client, &format!("http://{address}:8080/"))?;
        assert_eq!(call.ok(), Some(server), "{call:?}");
        let peer = call.peer.expect("an answer names its peer");
        assert_eq!(
            peer.ip().to_string(),
            mesh.address(client)?,
            "the app sees the client"
        );

        let line = mesh.access_line(node, |l| {
            l.get("direction") == "inbound" && l.get("dst.workload") == server
        })?;
        assert_eq!(
            line.get("src.identity"),
            "spiffe://cluster.local/ns/shop/sa/client"
        );
        assert_eq!(
            line.get("dst.identity"),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(line.get("dst.hbone_addr"), format!("{address}:8080"));
        let line = mesh.access_line("node1", |l| {
            l.get("direction") == "outbound" && l.get("dst.workload") == server
        })?;
        assert_eq!(line.get("dst.addr"), format!("{address}:15008"));
    }

    // From outside, and to outside.
    let call = mesh.call(pod("legacy/client"), &format!("http://{near}:8080/"))?;
    assert_eq!(call.ok(), Some("web-a"), "{call:?}");
    let line = mesh.access_line("node1", |l| l.get("src.namespace") == "legacy")?;
    assert_eq!(line.get("src.identity"), "");
    let call = mesh.call(client, "http://server.legacy/")?;
    assert_eq!(call.ok(), Some("server"), "{call:?}");
    let line = mesh.access_line("node1", |l| l.get("dst.workload") == "server")?;
    assert_eq!(line.get("dst.hbone_addr"), "");
    Ok(())
}
