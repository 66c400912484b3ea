//! Envoy, as a plain L7 proxy and as Istio wires its waypoints: HBONE is terminated by one
//! listener, an internal listener finds the service by the address that was dialled, and
//! towards endpoints in the mesh another internal listener opens CONNECT streams again.
//!
//! It has what the other proxies have: the same routes, the same rules, an access log. It lacks
//! what Istio adds to it (telemetry, peer metadata), so that a real one is slower.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use super::ground::{Ground, HostId, PROXY_CORE, Process};
use super::setup::{PLAIN_PORT, SECURE, SERVICE_PORT, Service, Setup, WEB};

const HBONE_PORT: u16 = 15008;
/// Access log of the plain proxy.
pub(super) const PLAIN_LOG: &str = "envoy-access.log";
/// Access log of the waypoint.
pub(super) const WAYPOINT_LOG: &str = "envoy-waypoint-access.log";

/// Envoy where `install-deps` puts it, below the build's directory; otherwise on the PATH.
fn program() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    // target/release/bench
    let target = own.parent().and_then(Path::parent);
    let installed = target.map(|target| target.join("bench/envoy/bin/envoy"));
    match installed.filter(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => super::peers::find("envoy"),
    }
}

pub(super) fn plain(ground: &Ground, setup: Setup) -> anyhow::Result<Process> {
    let listen = ground.address(HostId::Envoy, PLAIN_PORT);
    let log = ground.path(PLAIN_LOG);
    let manager = manager(ground, setup, WEB, &log)?;
    let config = json!({"static_resources": {
        "listeners": [{
            "name": "plain",
            "address": socket(&listen),
            "filter_chains": [{"filters": [manager]}],
        }],
        "clusters": [web_cluster(ground, setup)],
    }});
    start(ground, "envoy", &config, &[listen]).context("Envoy")
}

pub(super) fn waypoint(ground: &Ground, setup: Setup) -> anyhow::Result<Process> {
    let listen = ground.address(HostId::EnvoyWaypoint, HBONE_PORT);
    let log = ground.path(WAYPOINT_LOG);
    let chain = |service: Service| -> anyhow::Result<Value> {
        Ok(json!({
            "filter_chain_match": {
                "prefix_ranges": [{"address_prefix": service.vip, "prefix_len": 32}],
                "destination_port": SERVICE_PORT,
            },
            "filters": [manager(ground, setup, service, &log)?],
        }))
    };
    let credential = ground.credential("waypoint")?;
    let tls = |validated: Value| {
        json!({
            "alpn_protocols": ["h2"],
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "tls_certificates": [{
                "certificate_chain": {"filename": credential[0]},
                "private_key": {"filename": credential[1]},
            }],
            "validation_context": validated,
        })
    };
    let trusted = json!({
        "trusted_ca": {"filename": ground.ca().join("root-cert.pem")},
        "match_typed_subject_alt_names": [{
            "san_type": "URI",
            "matcher": {"prefix": "spiffe://cluster.local/"},
        }],
    });
    let config = json!({
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": typed("bootstrap.internal_listener.v3.InternalListener", json!({})),
        }],
        "static_resources": {
            "listeners": [
                {
                    "name": "connect_terminate",
                    "address": socket(&listen),
                    "filter_chains": [{
                        "transport_socket": {
                            "name": "envoy.transport_sockets.tls",
                            "typed_config": typed(
                                "transport_sockets.tls.v3.DownstreamTlsContext",
                                json!({
                                    "require_client_certificate": true,
                                    "common_tls_context": tls(trusted.clone()),
                                }),
                            ),
                        },
                        "filters": [connect_terminate()],
                    }],
                },
                {
                    "name": "main_internal",
                    "internal_listener": {},
                    "listener_filters": [original_dst_filter()],
                    "filter_chains": [chain(WEB)?, chain(SECURE)?],
                },
                {
                    "name": "connect_originate",
                    "internal_listener": {},
                    "listener_filters": [original_dst_filter()],
                    "filter_chains": [{"filters": [{
                        "name": "envoy.filters.network.tcp_proxy",
                        "typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy", json!({
                            "stat_prefix": "connect_originate",
                            "cluster": "connect_originate",
                            "tunneling_config": {"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"},
                        })),
                    }]}],
                },
            ],
            "clusters": [
                {
                    "name": "main_internal",
                    "load_assignment": endpoint("main_internal", json!({
                        "address": {"envoy_internal_address": {
                            "server_listener_name": "main_internal",
                        }},
                    })),
                    "transport_socket": internal_upstream(json!([])),
                },
                web_cluster(ground, setup),
                secure_cluster(ground, setup),
                {
                    "name": "connect_originate",
                    "type": "ORIGINAL_DST",
                    "lb_policy": "CLUSTER_PROVIDED",
                    "original_dst_lb_config": {"upstream_port_override": HBONE_PORT},
                    "typed_extension_protocol_options": protocol(json!({
                        "http2_protocol_options": {"allow_connect": true},
                    })),
                    "transport_socket": {
                        "name": "envoy.transport_sockets.tls",
                        "typed_config": typed(
                            "transport_sockets.tls.v3.UpstreamTlsContext",
                            json!({"common_tls_context": tls(trusted)}),
                        ),
                    },
                },
            ],
        },
    });
    start(ground, "envoy-waypoint", &config, &[listen]).context("Envoy as a waypoint")
}

fn start(
    ground: &Ground,
    name: &str,
    config: &Value,
    listen: &[std::net::SocketAddr],
) -> anyhow::Result<Process> {
    let config = ground.write(&format!("{name}.json"), &config.to_string())?;
    let mut command = Command::new(program()?);
    command.args(["--concurrency", "1", "--disable-hot-restart"]);
    command.args(["--service-node", "bench", "--service-cluster", "bench"]);
    command.args(["--log-level", "warn", "--config-path"]);
    command.arg(config);
    let process = ground.start(name, PROXY_CORE, command)?;
    process.wait_listening(listen)?;
    Ok(process)
}

/// Takes CONNECT streams to the internal listener; what was dialled and who called go with
/// them.
fn connect_terminate() -> Value {
    let state = |key: &str, factory: Option<&str>, value: &str| {
        let mut state = json!({
            "object_key": key,
            "format_string": {"text_format_source": {"inline_string": value}},
            "shared_with_upstream": "ONCE",
        });
        if let Some(factory) = factory {
            state["factory_key"] = factory.into();
        }
        state
    };
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": typed(MANAGER, json!({
            "stat_prefix": "connect_terminate",
            "http2_protocol_options": {"allow_connect": true, "max_concurrent_streams": 100},
            "upgrade_configs": [{"upgrade_type": "CONNECT"}],
            "http_filters": [
                {
                    "name": "envoy.filters.http.set_filter_state",
                    "typed_config": typed("filters.http.set_filter_state.v3.Config", json!({
                        "on_request_headers": [
                            state(
                                "envoy.filters.listener.original_dst.local_ip",
                                None,
                                "%REQ(:AUTHORITY)%",
                            ),
                            state(
                                "io.istio.peer_principal",
                                Some("envoy.string"),
                                "%DOWNSTREAM_PEER_URI_SAN%",
                            ),
                        ],
                    })),
                },
                router(),
            ],
            "route_config": {
                "name": "default",
                "virtual_hosts": [{
                    "name": "default",
                    "domains": ["*"],
                    "routes": [{
                        "match": {"connect_matcher": {}},
                        "route": {
                            "cluster": "main_internal",
                            "timeout": "0s",
                            "upgrade_configs": [{
                                "upgrade_type": "CONNECT",
                                "connect_config": {},
                            }],
                        },
                    }],
                }],
            },
        })),
    })
}

const MANAGER: &str = "filters.network.http_connection_manager.v3.HttpConnectionManager";

/// What a service's requests go through.
fn manager(
    ground: &Ground,
    setup: Setup,
    service: Service,
    access_log: &Path,
) -> anyhow::Result<Value> {
    let mut policies = serde_json::Map::new();
    let policy =
        |permission: Value| json!({"permissions": [permission], "principals": [{"any": true}]});
    policies.insert(
        "deny".into(),
        json!({
            "permissions": [
                {"url_path": {"path": {"prefix": "/admin"}}},
                {"header": {"name": ":method", "string_match": {"exact": "DELETE"}}},
            ],
            "principals": [{"any": true}],
        }),
    );
    for (index, path) in setup.denied_paths().enumerate() {
        let permission = json!({"url_path": {"path": {"exact": path}}});
        policies.insert(format!("deny-{index:05}"), policy(permission));
    }
    let routes = routes_file(service);
    write_routes(ground, setup, service, 0)?;
    Ok(json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": typed(MANAGER, json!({
            "stat_prefix": service.name,
            "codec_type": "AUTO",
            "access_log": [{
                "name": "envoy.access_loggers.file",
                "typed_config": typed("access_loggers.file.v3.FileAccessLog", json!({
                    "path": access_log,
                    "log_format": {"json_format": log_format()},
                })),
            }],
            "http_filters": [
                {
                    "name": "envoy.filters.http.rbac",
                    "typed_config": typed("filters.http.rbac.v3.RBAC", json!({
                        "rules": {"action": "DENY", "policies": policies},
                    })),
                },
                router(),
            ],
            "rds": {
                "route_config_name": service.name,
                "config_source": {
                    "resource_api_version": "V3",
                    "path_config_source": {
                        "path": ground.path(&routes),
                        "watched_directory": {"path": ground.path("envoy-routes")},
                    },
                },
            },
        })),
    }))
}

/// The fields of Istio's default format.
fn log_format() -> Value {
    json!({
        "start_time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "protocol": "%PROTOCOL%",
        "response_code": "%RESPONSE_CODE%",
        "response_flags": "%RESPONSE_FLAGS%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "duration": "%DURATION%",
        "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
        "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
        "user_agent": "%REQ(USER-AGENT)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "authority": "%REQ(:AUTHORITY)%",
        "upstream_host": "%UPSTREAM_HOST%",
        "upstream_cluster": "%UPSTREAM_CLUSTER%",
        "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
        "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
        "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "requested_server_name": "%REQUESTED_SERVER_NAME%",
        "route_name": "%ROUTE_NAME%",
    })
}

fn routes_file(service: Service) -> String {
    format!("envoy-routes/{}.json", service.name)
}

/// Writes the routes of a service; `change` is a number that one of them shows.
pub(super) fn write_routes(
    ground: &Ground,
    setup: Setup,
    service: Service,
    change: u64,
) -> anyhow::Result<()> {
    let header = |name: &str, value: String| {
        json!({
            "header": {"key": name, "value": value},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        })
    };
    let routes = (0..setup.routes).map(|route| {
        let mut headers = vec![header("x-route", format!("r{route}"))];
        if route == 0 {
            headers.push(header("x-change", change.to_string()));
        }
        json!({
            "name": format!("r{route}"),
            "match": {"path_separated_prefix": format!("/r{route}")},
            "route": {"cluster": service.name},
            "request_headers_to_add": headers,
        })
    });
    let resource = typed_in(
        "config.route.v3.RouteConfiguration",
        json!({
            "name": service.name,
            "virtual_hosts": [{
                "name": service.name,
                "domains": ["*"],
                "routes": routes.collect::<Vec<_>>(),
            }],
        }),
    );
    let response = json!({"version_info": change.to_string(), "resources": [resource]});
    let file = routes_file(service);
    // Envoy follows renames.
    let fresh = ground.write(&format!("{file}.new"), &response.to_string())?;
    Ok(std::fs::rename(fresh, ground.path(&file))?)
}

fn web_cluster(ground: &Ground, setup: Setup) -> Value {
    let upstream = ground.address(HostId::Plain, setup.upstream_port());
    json!({
        "name": WEB.name,
        "typed_extension_protocol_options": app_protocol(setup),
        "load_assignment": endpoint(WEB.name, json!({"address": socket(&upstream)})),
    })
}

fn secure_cluster(ground: &Ground, setup: Setup) -> Value {
    let pod = ground
        .address(HostId::Secure, setup.upstream_port())
        .to_string();
    let mut assignment = endpoint(
        SECURE.name,
        json!({
            "address": {"envoy_internal_address": {
                "server_listener_name": "connect_originate",
                "endpoint_id": pod,
            }},
        }),
    );
    assignment["endpoints"][0]["lb_endpoints"][0]["metadata"] = json!({
        "filter_metadata": {"envoy.filters.listener.original_dst": {"local": pod}},
    });
    json!({
        "name": SECURE.name,
        "typed_extension_protocol_options": app_protocol(setup),
        "load_assignment": assignment,
        "transport_socket": internal_upstream(json!([{
            "kind": {"host": {}},
            "name": "envoy.filters.listener.original_dst",
        }])),
    })
}

fn app_protocol(setup: Setup) -> Value {
    protocol(match setup.http2 {
        true => json!({"http2_protocol_options": {}}),
        false => json!({"http_protocol_options": {}}),
    })
}

fn protocol(options: Value) -> Value {
    json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions":
            typed("upstreams.http.v3.HttpProtocolOptions", json!({
                "explicit_http_config": options,
            })),
    })
}

fn internal_upstream(metadata: Value) -> Value {
    let raw = typed("transport_sockets.raw_buffer.v3.RawBuffer", json!({}));
    json!({
        "name": "envoy.transport_sockets.internal_upstream",
        "typed_config": typed(
            "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            json!({
                "passthrough_metadata": metadata,
                "transport_socket": {
                    "name": "envoy.transport_sockets.raw_buffer",
                    "typed_config": raw,
                },
            }),
        ),
    })
}

fn original_dst_filter() -> Value {
    json!({
        "name": "envoy.filters.listener.original_dst",
        "typed_config": typed("filters.listener.original_dst.v3.OriginalDst", json!({})),
    })
}

fn router() -> Value {
    json!({
        "name": "envoy.filters.http.router",
        "typed_config": typed("filters.http.router.v3.Router", json!({})),
    })
}

fn endpoint(cluster: &str, endpoint: Value) -> Value {
    json!({
        "cluster_name": cluster,
        "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
    })
}

fn socket(address: &std::net::SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}

/// A message of Envoy's extensions with its type.
fn typed(name: &str, message: Value) -> Value {
    typed_in(&format!("extensions.{name}"), message)
}

fn typed_in(name: &str, mut message: Value) -> Value {
    message["@type"] = format!("type.googleapis.com/envoy.{name}").into();
    message
}
