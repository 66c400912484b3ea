//! Waypoints as clients: who is one, what it gets and in which order; over TCP and TLS.

mod support;

use std::sync::Arc;

use adit_controlplane::compile::l7::{Resource, ResourceKey, WaypointName};
use adit_controlplane::serve::{ResourceSnapshot, SnapshotBuilder};
use adit_shared::proto::waypoint::{
    AuthorizationPolicy, ObjectRef, ROUTE_TYPE, Route, SERVICE_TYPE, SETTINGS_TYPE, Service,
    Settings, TYPES, WAYPOINT_TYPE, Waypoint,
};
use adit_shared::proto::workload::Address;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use support::{Mesh, PATIENCE, Proxy, eventually};

fn give(edit: &mut SnapshotBuilder, waypoint: &str, resource: Resource) {
    let (key, resource) = keyed(waypoint, resource);
    edit.set_for_waypoint(&key, &resource);
}

fn take(edit: &mut SnapshotBuilder, waypoint: &str, resource: Resource) {
    edit.remove_for_waypoint(&keyed(waypoint, resource).0);
}

fn keyed(waypoint: &str, resource: Resource) -> (ResourceKey, Arc<Resource>) {
    let name = WaypointName {
        namespace: "shop".into(),
        name: waypoint.into(),
    };
    let resource = Arc::new(resource);
    (ResourceKey::of(name, &resource), resource)
}

fn waypoint(name: &str) -> Resource {
    Resource::Waypoint(Waypoint {
        namespace: "shop".into(),
        name: name.into(),
        ..Waypoint::default()
    })
}

fn service(name: &str) -> Resource {
    Resource::Service(Service {
        namespace: "shop".into(),
        hostname: name.into(),
        ..Service::default()
    })
}

fn object(kind: &str, name: &str) -> Option<ObjectRef> {
    Some(ObjectRef {
        kind: kind.into(),
        namespace: "shop".into(),
        name: name.into(),
        created: 0,
    })
}

fn route(name: &str) -> Resource {
    Resource::Route(Route {
        object: object("HTTPRoute", name),
        ..Route::default()
    })
}

fn policy(name: &str) -> Resource {
    Resource::AuthorizationPolicy(AuthorizationPolicy {
        object: object("AuthorizationPolicy", name),
        ..AuthorizationPolicy::default()
    })
}

fn two_waypoints() -> ResourceSnapshot {
    let mut edit = SnapshotBuilder::new();
    edit.set(SETTINGS_TYPE, "mesh", &Settings::default());
    edit.set(ADDRESS_TYPE, "address", &Address::default());
    for (name, of) in [("waypoint", "one"), ("waypoint-2", "two")] {
        give(&mut edit, name, waypoint(name));
        give(&mut edit, name, service(of));
        give(&mut edit, name, route(of));
    }
    edit.build()
}

fn types() -> Vec<&'static str> {
    let mut types = vec![AUTHORIZATION_TYPE, ADDRESS_TYPE];
    types.extend(TYPES);
    types
}

#[tokio::test]
async fn each_waypoint_gets_its_own_and_what_is_for_all() {
    let mesh = Mesh::start_with(|_| {}, two_waypoints()).await;
    for (name, of) in [("waypoint", "one"), ("waypoint-2", "two")] {
        let proxy = Proxy::start_with(mesh.waypoint_config("shop", name, name), &types());
        proxy.ready().await;
        proxy.holds(ADDRESS_TYPE, &["address"]).await;
        proxy.holds(SETTINGS_TYPE, &["mesh"]).await;
        proxy.holds(WAYPOINT_TYPE, &[&format!("shop/{name}")]).await;
        proxy.holds(SERVICE_TYPE, &[&format!("shop/{of}")]).await;
        proxy
            .holds(ROUTE_TYPE, &[&format!("HTTPRoute/shop/{of}")])
            .await;
    }
}

#[tokio::test]
async fn nobody_else_gets_what_is_for_waypoints() {
    let mesh = Mesh::start_with(
        |config| config.streams.known_pod = std::time::Duration::from_millis(50),
        two_waypoints(),
    )
    .await;
    // A node proxy, and a waypoint that does not say so.
    let mut silent = mesh.waypoint_config("shop", "waypoint", "waypoint");
    silent.node.extra.clear();
    for config in [mesh.client_config("n1"), silent] {
        let proxy = Proxy::start_with(config, &types());
        proxy.ready().await;
        proxy.holds(ADDRESS_TYPE, &["address"]).await;
        for url in TYPES {
            assert!(proxy.names(url).is_empty(), "{url}");
        }
    }
    // A pod that is of no Gateway, of another one, or of one in another namespace.
    for (namespace, account, said) in [
        ("shop", "cart", "waypoint"),
        ("shop", "waypoint-2", "waypoint"),
    ] {
        let proxy = Proxy::start_with(mesh.waypoint_config(namespace, account, said), &types());
        let refused = proxy.wait("refused", |status| status.last_error.is_some());
        tokio::time::timeout(PATIENCE, refused)
            .await
            .expect("refused");
        assert!(proxy.messages().is_empty(), "{account}");
    }
    let proxy = Proxy::start_with(
        mesh.waypoint_config("bank", "waypoint", "waypoint"),
        &types(),
    );
    proxy.ready().await;
    proxy.holds(ADDRESS_TYPE, &["address"]).await;
    assert!(proxy.names(SERVICE_TYPE).is_empty());
}

/// What is referred to comes before what refers to it, and goes after it.
#[tokio::test]
async fn policies_come_before_routes_and_go_after_them() {
    let mesh = Mesh::start_with(|_| {}, two_waypoints()).await;
    let proxy = Proxy::start_with(
        mesh.waypoint_config("shop", "waypoint", "waypoint"),
        &types(),
    );
    proxy.ready().await;
    proxy.holds(SERVICE_TYPE, &["shop/one"]).await;
    let initial = proxy.messages().len();
    mesh.publish(|edit| {
        give(edit, "waypoint", route("new"));
        give(edit, "waypoint", service("new"));
        give(edit, "waypoint", policy("new"));
        edit.set(ADDRESS_TYPE, "new", &Address::default());
    });
    eventually("the additions", || proxy.messages().len() == initial + 4).await;
    mesh.publish(|edit| {
        take(edit, "waypoint", policy("new"));
        edit.remove(ADDRESS_TYPE, "new");
        take(edit, "waypoint", route("new"));
        take(edit, "waypoint", service("new"));
    });
    eventually("the removals", || proxy.messages().len() == initial + 8).await;
    // Not this waypoint's.
    mesh.publish(|edit| give(edit, "waypoint-2", route("other")));
    mesh.publish(|edit| give(edit, "waypoint", route("one more")));
    eventually("the last", || proxy.messages().len() == initial + 9).await;
    assert_eq!(
        proxy.messages()[initial..],
        [
            "AuthorizationPolicy +AuthorizationPolicy/shop/new",
            "Address +new",
            "Route +HTTPRoute/shop/new",
            "Service +shop/new",
            "Service -shop/new",
            "Route -HTTPRoute/shop/new",
            "Address -new",
            "AuthorizationPolicy -AuthorizationPolicy/shop/new",
            "Route +HTTPRoute/shop/one more",
        ]
    );
}
