//! Bytes that are not HTTP: one endpoint for the whole connection, and the L4 part of policies
//! and metrics.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use adit_shared::hbone::server::Responder;
use adit_shared::policy::http::HttpPolicySet;
use adit_shared::telemetry::{ConnectionInfo, OpenConnection, Reporter, ResponseFlag};
use http::StatusCode;

use super::authorize::{Asked, Denied, authorize_connection};
use super::client_hello;
use super::consumer::{self, Place};
use super::copy::{CopyError, Traffic, between};
use super::destination::{Destination, Target};
use super::forward;
use super::io::Io;
use super::pick::{Choice, Picked, dialled};
use super::reply::Reply;
use super::routing;
use super::tunnel::Caller;
use super::upstream::{self, Connected, Endpoint, Origin};
use crate::balance::{Outcome, PickRequest, RequestResult};
use crate::route::PortRoutes;
use crate::state::{PortView, Protocol, View};
use crate::worker::Worker;

/// Endpoints that are tried for one connection.
const ATTEMPTS: usize = 3;
const GUARDED: &str =
    "a route has a service asked about HTTP requests, or is invalid, and this is not HTTP";

struct Counted<'a>(&'a OpenConnection);

impl Traffic for Counted<'_> {
    fn request(&self, bytes: usize) {
        self.0.count_request(bytes as u64);
    }

    fn response(&self, bytes: usize) {
        self.0.count_response(bytes as u64);
    }
}

/// Serves a CONNECT that has not been answered: it is refused when no endpoint can be reached,
/// so that the app's own connect fails.
pub async fn serve_unanswered(
    worker: Rc<Worker>,
    caller: Rc<Caller>,
    destination: Destination,
    client: SocketAddr,
    mut respond: Responder,
) {
    if wants_server_name(&worker, &caller, &destination) {
        // The client says nothing before its CONNECT is answered.
        if let Ok(tunnel) = respond.accept(None) {
            let io = Io::tunnel(tunnel);
            serve(worker, caller, destination, client, io).await;
        }
        return;
    }
    let opened = tokio::select! {
        biased;
        _ = respond.cancelled() => return,
        opened = open(&worker, &caller, &destination, client, None) => opened,
    };
    match opened {
        Ok(opened) => {
            if let Ok(tunnel) = respond.accept(None) {
                let flow = Flow {
                    caller: &caller,
                    destination: &destination,
                    server_name: None,
                };
                carry(&worker, flow, Io::tunnel(tunnel), opened).await;
            }
        }
        Err(reply) if reply.status == StatusCode::FORBIDDEN => {
            respond.refuse(StatusCode::UNAUTHORIZED, "connection_refused");
        }
        Err(_) => respond.refuse(StatusCode::SERVICE_UNAVAILABLE, "connection_refused"),
    }
}

/// Serves a tunnel that is open already.
pub async fn serve(
    worker: Rc<Worker>,
    caller: Rc<Caller>,
    destination: Destination,
    client: SocketAddr,
    mut io: Io,
) {
    let mut server_name = None;
    // Who waits for its server to speak has no ClientHello to send, where that is not declared.
    let silent = io.peeked().is_empty() && !is_declared_tls(&worker, &destination);
    if !silent && wants_server_name(&worker, &caller, &destination) {
        let started = Instant::now();
        match client_hello::server_name(&mut io).await {
            Ok(name) => server_name = name,
            Err(error) => {
                let destination = destination.dialled().unwrap_or(caller.peer);
                let mut info = ConnectionInfo::new(Reporter::Waypoint, client, destination);
                info.labels.source = (*caller.labels).clone();
                let telemetry = &worker.shared.telemetry;
                telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
                return io.reset();
            }
        }
    }
    let server_name = server_name.as_deref();
    match open(&worker, &caller, &destination, client, server_name).await {
        Ok(opened) => {
            let flow = Flow {
                caller: &caller,
                destination: &destination,
                server_name,
            };
            carry(&worker, flow, io, opened).await;
        }
        Err(_) => io.reset(),
    }
}

/// Whether the name in the ClientHello decides where a connection goes.
fn wants_server_name(worker: &Worker, caller: &Caller, destination: &Destination) -> bool {
    let view = worker.shared.state.load();
    let Some(Target::Service(port)) = destination.target(&view) else {
        return false;
    };
    let routes = port.routes.for_port(port.port, caller.identity.namespace());
    matches!(routes, PortRoutes::Tls(table) if table.wants_server_name())
}

fn is_declared_tls(worker: &Worker, destination: &Destination) -> bool {
    let view = worker.shared.state.load();
    let target = destination.target(&view);
    target.is_some_and(|target| target.protocol() == Protocol::Tls)
}

/// A connection to an endpoint.
struct Opened {
    to: Arc<Endpoint>,
    endpoint: Connected,
    info: ConnectionInfo,
    /// Where it was judged once more, after a consumer's route.
    consumer: Option<Place>,
}

/// Connects to an endpoint; failures have been recorded.
async fn open(
    worker: &Worker,
    caller: &Caller,
    destination: &Destination,
    client: SocketAddr,
    server_name: Option<&str>,
) -> Result<Opened, Reply> {
    let started = Instant::now();
    let asked_for = destination.dialled().unwrap_or(caller.peer);
    let mut info = ConnectionInfo::new(Reporter::Waypoint, client, asked_for);
    info.labels.source = (*caller.labels).clone();
    let fail = |info: &ConnectionInfo, reply: Reply, error: &dyn std::fmt::Display| {
        let flag = if reply == Reply::DENIED {
            ResponseFlag::Denied
        } else {
            ResponseFlag::Connect
        };
        let telemetry = &worker.shared.telemetry;
        telemetry.failed(info, started.elapsed(), flag, error);
        reply
    };
    let mut tried = Vec::new();
    let mut last = Reply::NO_HEALTHY_ENDPOINTS;
    while tried.len() < ATTEMPTS {
        let (target, mesh) = {
            let view = worker.shared.state.load();
            (destination.target(&view), view.mesh().clone())
        };
        let trust = &mesh.trust;
        let Some(target) = target else {
            return Err(fail(&info, Reply::GONE, &Reply::GONE.reason));
        };
        if let Target::Service(port) = &target {
            info = info.with_service(port.service.service());
        }
        let mut asked = Asked {
            caller,
            destination: asked_for,
            server_name,
            mesh: &mesh,
        };
        if let Err(denied) = authorize_connection(target.policies(), &asked.request(None), trust) {
            return Err(fail(&info, Reply::DENIED, &denied.error));
        }
        let routed = {
            let view = worker.shared.state.load();
            l4_route(&view, &target, caller, server_name)
        };
        let (choice, consumer) = match routed {
            Ok(Some(routed)) => routed,
            Ok(None) => (Choice::of(&target), None),
            Err(reply) if reply == Reply::DENIED => return Err(fail(&info, reply, &GUARDED)),
            Err(reply) if reply == Reply::NO_ROUTE => {
                let error = match server_name {
                    Some(name) => format!("no route for server name {name:?}"),
                    None => "no route for connections that name no server".to_owned(),
                };
                return Err(fail(&info, reply, &error));
            }
            Err(reply) => return Err(fail(&info, reply, &reply.reason)),
        };
        if let Some(port) = &consumer {
            asked.destination = SocketAddr::new(asked_for.ip(), port.port);
            let request = asked.request(None);
            if let Err(denied) = authorize_connection(&port.policies, &request, trust) {
                return Err(fail(&info, Reply::DENIED, &denied.error));
            }
        }
        let request = PickRequest {
            tried: &tried,
            destination: dialled(destination.dialled()),
            ..PickRequest::default()
        };
        let Picked { reach, held } = match choice.pick(&request) {
            Ok(picked) if !tried.contains(&picked.reach.endpoint.uid) => picked,
            Ok(_) => break,
            Err((reply, error)) => {
                last = fail(&info, reply, &error);
                return Err(last);
            }
        };
        let (workload, endpoint) = (reach.workload, reach.endpoint);
        asked.destination = endpoint.address;
        if let Some(policies) = &reach.policies
            && let Err(denied) = authorize_connection(policies, &asked.request(None), trust)
        {
            return Err(fail(&info, Reply::DENIED, &denied.error));
        }
        info = info.with_destination(&workload);
        info.destination_address = endpoint.address;
        if matches!(endpoint.way, upstream::Way::Hbone { .. }) {
            let authority = endpoint.address.to_string().into();
            info = info.with_mutual_tls(
                caller.identity.clone(),
                workload.identity.clone(),
                authority,
            );
        }
        let connecting = forward::connecting(&choice);
        let begun = Instant::now();
        let origin = Origin {
            address: client,
            identity: caller.identity.clone(),
        };
        let opening = upstream::open_tcp(worker, &endpoint, Some(&origin), None, &connecting);
        match opening.await {
            Ok(mut connected) => {
                connected.held = held;
                connected.idle = match &choice {
                    Choice::Backend(backend) => backend.settings.connection_pool.tcp_idle_timeout,
                    Choice::Workload(_) => None,
                };
                return Ok(Opened {
                    to: endpoint,
                    endpoint: connected,
                    info,
                    consumer: consumer.map(|port| consumer::place(&port)),
                });
            }
            Err(error) => {
                if let Some(held) = held {
                    let now = Instant::now();
                    let failed = RequestResult::ConnectFailed;
                    held.finish(Outcome::new(failed, now - begun), now);
                }
                last = fail(&info, error.reply, &error);
                tried.push(endpoint.uid.clone());
            }
        }
    }
    if tried.is_empty() {
        return Err(fail(&info, last, &last.reason));
    }
    Err(last)
}

/// Where a connection is sent, and where that is judged besides.
type Routed = (Choice, Option<Arc<PortView>>);

/// Where TCPRoutes and TLSRoutes lead, and where what a consumer's sends elsewhere is judged;
/// `None`: there are none.
///
/// Where a rule for requests has a service asked about them, connections that are not HTTP are
/// denied, as a CUSTOM policy denies them: else who says nothing for a moment, on a port that
/// declares nothing, would get around that.
fn l4_route(
    view: &View,
    target: &Target,
    caller: &Caller,
    server_name: Option<&str>,
) -> Result<Option<Routed>, Reply> {
    let Target::Service(port) = target else {
        return Ok(None);
    };
    let namespace = caller.identity.namespace();
    let table = match port.routes.for_port(port.port, namespace) {
        PortRoutes::Tcp(table) | PortRoutes::Tls(table) => table,
        PortRoutes::Http(table) if table.is_guarded() => return Err(Reply::DENIED),
        PortRoutes::Http(_) | PortRoutes::None => return Ok(None),
    };
    let rule = table.find(server_name).ok_or(Reply::NO_ROUTE)?;
    let (to, choice, _) = routing::l4_backend(view, rule)?;
    let judged_at = match consumer::is_consumer(&rule.route().namespace, target) {
        true => consumer::judged_at(view, target, Some(to)),
        false => None,
    };
    let elsewhere = judged_at.filter(|port| !consumer::is_same(port, target));
    Ok(Some((choice, elsewhere)))
}

/// Whose connection it is, kept to ask the policies again.
struct Flow<'a> {
    caller: &'a Caller,
    destination: &'a Destination,
    server_name: Option<&'a str>,
}

impl Flow<'_> {
    /// Returns when a change of the policies denies what they have allowed. One that came while
    /// the endpoint was being connected to counts, too.
    async fn denied(
        &self,
        worker: &Worker,
        endpoint: &Endpoint,
        consumer: Option<&Place>,
    ) -> Denied {
        let mut versions = worker.shared.state.subscribe();
        loop {
            if let Err(denied) = self.judge(&worker.shared.state.load(), endpoint, consumer) {
                return denied;
            }
            if versions.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn judge(
        &self,
        view: &View,
        endpoint: &Endpoint,
        consumer: Option<&Place>,
    ) -> Result<(), Denied> {
        // A service that is gone has no policies any more; what is open goes on.
        let Some(target) = self.destination.target(view) else {
            return Ok(());
        };
        let trust = &view.mesh().trust;
        let dialled = self.destination.dialled().unwrap_or(self.caller.peer);
        let judge = |policies: &HttpPolicySet, destination| {
            let asked = Asked {
                caller: self.caller,
                destination,
                server_name: self.server_name,
                mesh: view.mesh(),
            };
            authorize_connection(policies, &asked.request(None), trust).map(|_| ())
        };
        judge(target.policies(), dialled)?;
        if let Target::Service(port) = &target
            && let namespace = self.caller.identity.namespace()
            && let PortRoutes::Http(table) = port.routes.for_port(port.port, namespace)
            && table.is_guarded()
        {
            return Err(Denied {
                policy: None,
                error: GUARDED.to_owned(),
            });
        }
        if let Some((service, number)) = consumer
            && let Some(port) = view.service(service).and_then(|of| of.port(*number))
        {
            judge(&port.policies, SocketAddr::new(dialled.ip(), *number))?;
        }
        let own = view.policies().for_workload(&endpoint.uid);
        judge(&own, endpoint.address)
    }
}

async fn carry(worker: &Worker, flow: Flow<'_>, client: Io, opened: Opened) {
    let Opened {
        to,
        endpoint,
        info,
        consumer,
    } = opened;
    let record = worker.shared.telemetry.open(info);
    let _listed = worker.live.tcp.enter(record.counters().clone());
    let copied = {
        let counted = Counted(&record);
        let copying = between(client, endpoint.io, &counted, endpoint.idle);
        tokio::select! {
            biased;
            ended = copying => Ok(ended),
            denied = flow.denied(worker, &to, consumer.as_ref()) => Err(denied),
        }
    };
    drop((endpoint.held, endpoint.permit));
    let ended = match copied {
        Ok(ended) => ended,
        // Dropped unfinished, both sides are reset.
        Err(denied) => return record.fail(ResponseFlag::Denied, &denied.error),
    };
    match ended {
        Ok(()) => record.close(),
        Err(error @ CopyError::Endpoint(_)) => record.fail(ResponseFlag::None, &error),
        Err(error) => record.fail(ResponseFlag::None, &error),
    }
}
