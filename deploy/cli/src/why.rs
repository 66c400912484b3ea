//! `adit why`: which hops a request takes, and which route, policy and rule decide.
//!
//! Nothing is guessed: the client's ztunnel is asked for what it knows, and the waypoint
//! decides about the request with the code that decides about real ones. With `--live` the
//! next real request is waited for instead, and told as it went.

mod live;

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::Method;
use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterArgs};
use crate::output::{self, Format, Outcome, Output, UsageError};
use crate::proxy::target::waypoint_in;
use crate::table::printable;
use crate::ztunnel::admin::encode;
use crate::ztunnel::dump::{Dump, Gateway, Service, Workload};
use crate::ztunnel::names::leads_nowhere;
use crate::ztunnel::target::{Wanted, targets_in};

/// What becomes of a request whose waypoint cannot be reached.
const NO_WAYPOINT: &str = "refused: the waypoint is not there, and nothing goes past it";
/// Port of the admin endpoints.
const ADMIN: u16 = 15000;

/// Explain what becomes of a request: hops, route, policy, rule
///
/// Exit status is 1 when it would not be answered by the destination.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit why client.shop reviews.shop
  adit why client.shop reviews.shop:80 POST /reviews/1 -H 'end-user: jason'
  adit why visitor.shop web-b.shop:8080

  # what becomes of the next real request, stage by stage
  adit why client.shop reviews.shop --live
  adit why client.shop reviews.shop POST /reviews --live --wait 2m")]
pub struct Args {
    /// The pod that asks, as NAME[.NAMESPACE]
    #[arg(value_name = "SRC")]
    source: String,
    /// Service or pod, as NAME[.NAMESPACE][:PORT], or an address and port
    #[arg(value_name = "DST")]
    destination: String,
    /// Method [default: GET; with --live any]
    method: Option<Method>,
    /// Path with query [default: /; with --live any, else how it begins]
    path: Option<String>,
    /// Request header, `name: value`; may be repeated
    #[arg(long = "header", short = 'H')]
    headers: Vec<String>,
    /// Wait for the next such request that really comes, and tell each stage of it at the
    /// waypoint, what was decided there and when
    #[arg(long)]
    live: bool,
    /// How long to wait for it, 5 minutes at most
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration, requires = "live")]
    wait: Duration,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Args {
    fn method(&self) -> &Method {
        self.method.as_ref().unwrap_or(&Method::GET)
    }

    fn path(&self) -> &str {
        self.path.as_deref().unwrap_or("/")
    }
}

/// What is asked about, as the client's ztunnel knows it.
struct Asked {
    node: String,
    source: Workload,
    destination: Found,
    port: u16,
}

enum Found {
    Service(Box<Service>, IpAddr),
    Workload(Box<Workload>, IpAddr),
    Unknown(IpAddr),
}

pub fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = args.cluster.open()?;
    let (asked, dump) = find(args, &cluster)?;
    if args.live {
        return watch(args, &cluster, &asked, &dump, out);
    }
    let mut steps = Vec::new();
    let verdict = explain(args, &cluster, &asked, &dump, &mut steps)?;
    let value = json!({"steps": steps, "verdict": verdict.1, "answered": verdict.0});
    output::print(out, args.output, &value, || {
        text(args, &asked, &steps, &verdict.1)
    })?;
    Ok(Outcome::of(verdict.0))
}

fn watch(
    args: &Args,
    cluster: &Cluster,
    asked: &Asked,
    dump: &Dump,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    let Some(gateway) = through(asked) else {
        bail!(
            "no waypoint stands before {} for {}: ztunnel's connections are what can be watched (`adit ztunnel-config connections`)",
            args.destination,
            asked.source.name
        );
    };
    let name = waypoint_name(gateway, dump);
    let followed = live::follow(args, cluster, asked, &name)?;
    let (answered, verdict) = live::verdict(&followed.told);
    let value = json!({"waypoint": followed.waypoint, "trace": followed.told,
        "verdict": verdict, "answered": answered});
    output::print(out, args.output, &value, || {
        let hop = format!("waypoint {}", followed.waypoint);
        let steps = [json!({"hop": hop, "says": live::lines(&followed.told)})];
        text(args, asked, &steps, &verdict)
    })?;
    Ok(Outcome::of(answered))
}

/// The waypoint that the client's ztunnel sends it to.
fn through(asked: &Asked) -> Option<&Gateway> {
    match (&asked.destination, asked.source.protocol == "HBONE") {
        (_, false) | (Found::Unknown(_), true) => None,
        (Found::Service(service, _), true) => service.waypoint.as_ref(),
        (Found::Workload(workload, _), true) => workload.waypoint.as_ref(),
    }
}

fn text(args: &Args, asked: &Asked, steps: &[Value], verdict: &str) -> String {
    let to = match &asked.destination {
        Found::Service(service, ip) => format!("{} ({ip})", service.hostname),
        Found::Workload(workload, ip) => {
            format!("{}.{} ({ip})", workload.name, workload.namespace)
        }
        Found::Unknown(ip) => ip.to_string(),
    };
    let source = &asked.source;
    let request = match args.live {
        true => "the next request".to_owned(),
        false => format!("{} {}", args.method(), args.path()),
    };
    let mut text = format!(
        "{}.{} -> {to} port {}: {request}\n",
        source.name, source.namespace, asked.port
    );
    for (index, step) in steps.iter().enumerate() {
        let word = |key: &str| step[key].as_str().unwrap_or_default().to_owned();
        let _ = writeln!(text, "{}. {}", index + 1, printable(&word("hop")));
        for line in step["says"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "   {}", printable(line.as_str().unwrap_or_default()));
        }
    }
    let _ = writeln!(text, "=> {verdict}");
    text
}

fn explain(
    args: &Args,
    cluster: &Cluster,
    asked: &Asked,
    dump: &Dump,
    steps: &mut Vec<Value>,
) -> anyhow::Result<(bool, String)> {
    let source = &asked.source;
    let captured = source.protocol == "HBONE";
    let mut says = vec![match captured {
        true => format!("it is in the mesh, as {}", identity(source)),
        false => "it is outside the mesh: it dials by itself, in plaintext".into(),
    }];
    let hop = format!("{}.{} on {}", source.name, source.namespace, asked.node);
    let endpoints = match &asked.destination {
        Found::Unknown(ip) => {
            says.push(format!(
                "{ip} is not known to the mesh: passed through as it is"
            ));
            steps.push(json!({"hop": hop, "says": says}));
            return Ok((true, "passed through".into()));
        }
        Found::Workload(workload, _) => vec![workload.as_ref().clone()],
        Found::Service(service, _) => endpoints(service, dump),
    };
    if let Some(gateway) = through(asked) {
        let name = waypoint_name(gateway, dump);
        if leads_nowhere(gateway) {
            says.push(format!(
                "it should pass waypoint {name}, which is not ready"
            ));
            steps.push(json!({"hop": hop, "says": says}));
            return Ok((false, NO_WAYPOINT.into()));
        }
        says.push(format!("ztunnel sends it to waypoint {name}"));
        steps.push(json!({"hop": hop, "says": says}));
        return through_waypoint(args, cluster, asked, dump, &name, steps);
    }
    if captured {
        says.push("no waypoint: ztunnel picks the endpoint".into());
    }
    steps.push(json!({"hop": hop, "says": says}));
    if endpoints.is_empty() {
        return Ok((false, "refused: the service has no healthy endpoint".into()));
    }
    for endpoint in &endpoints {
        steps.push(endpoint_step(endpoint, dump, captured));
    }
    Ok((
        true,
        "L4 only: method and path do not count, the policies named above decide".into(),
    ))
}

fn through_waypoint(
    args: &Args,
    cluster: &Cluster,
    asked: &Asked,
    dump: &Dump,
    name: &str,
    steps: &mut Vec<Value>,
) -> anyhow::Result<(bool, String)> {
    let hop = format!("waypoint {name}");
    let (Found::Service(_, ip) | Found::Workload(_, ip) | Found::Unknown(ip)) = &asked.destination;
    let destination = SocketAddr::new(*ip, asked.port);
    let mut headers = args.headers.join("\n");
    if !args
        .headers
        .iter()
        .any(|h| h.to_ascii_lowercase().starts_with("host:"))
    {
        let host = args
            .destination
            .trim_end_matches(&format!(":{}", asked.port));
        headers = format!("host: {host}\n{headers}");
    }
    let source = asked.source.workload_ips.first();
    let path = format!(
        "/debug/decide?source={}&sourceAddress={}&destination={}&method={}&path={}&headers={}",
        encode(&identity(&asked.source)),
        encode(source.map_or("0.0.0.0", String::as_str)),
        encode(&destination.to_string()),
        args.method(),
        encode(args.path()),
        encode(headers.trim_end()),
    );
    let answer = waypoint_in(cluster, Some(name), None, ADMIN);
    let answer = answer.and_then(|waypoint| waypoint.request(&Method::GET, &path));
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            let says = vec![output::sentence(&error)];
            steps.push(json!({"hop": hop, "says": says}));
            return Ok((false, NO_WAYPOINT.into()));
        }
    };
    let decision: Value = serde_json::from_slice(&answer).context("the waypoint's answer")?;
    let (says, verdict) = decision_text(&decision);
    steps.push(json!({"hop": hop, "says": says, "decision": decision}));
    if let Err(why) = &verdict {
        return Ok((false, why.clone()));
    }
    let uids = decision_endpoints(&decision);
    let known = dump.workloads.iter().map(|entry| &entry.view);
    for workload in known.filter(|workload| uids.contains(&workload.uid)) {
        steps.push(endpoint_step(workload, dump, true));
    }
    if uids.is_empty() {
        return Ok((false, "503: there is no endpoint".into()));
    }
    Ok((true, "forwarded".into()))
}

/// What the waypoint has to say, and whether it forwards.
fn decision_text(decision: &Value) -> (Vec<String>, Result<(), String>) {
    let mut says = Vec::new();
    if let Some(reason) = decision["refused"].as_str() {
        let status = decision["status"].as_u64().unwrap_or(503);
        says.push(format!("refuses: {reason}"));
        return (says, Err(format!("{status}: {reason}")));
    }
    let authorization = &decision["authorization"];
    let policy = authorization["policy"].as_str();
    let rule = authorization["rule"].as_u64();
    for asked in authorization["asked"].as_array().into_iter().flatten() {
        says.push(format!(
            "AuthorizationPolicy {} asks provider {} first",
            asked["policy"].as_str().unwrap_or("?"),
            asked["provider"].as_str().unwrap_or("?")
        ));
    }
    for dry in authorization["dryRun"].as_array().into_iter().flatten() {
        says.push(format!(
            "dry run of AuthorizationPolicy {}: {}",
            dry["policy"].as_str().unwrap_or("?"),
            dry["outcome"].as_str().unwrap_or("?")
        ));
    }
    if authorization["allowed"] != true {
        let reason = authorization["reason"].as_str().unwrap_or("denied");
        says.push(format!("denies: {reason}"));
        return (says, Err(format!("403: {reason}")));
    }
    says.push(match (policy, rule) {
        (Some(policy), Some(rule)) => {
            format!("allows: rule {rule} of AuthorizationPolicy {policy}")
        }
        _ => "allows: no ALLOW policy is attached".into(),
    });
    let route = &decision["route"];
    if route.is_null() {
        says.push("no route is attached: balances over the service's own endpoints".into());
        return (says, Ok(()));
    }
    if route["noMatch"] == true {
        says.push("routes are attached, and none matches".into());
        return (says, Err("404: no route matches".into()));
    }
    let word = |key: &str| route[key].as_str().unwrap_or_default();
    let mut line = format!(
        "{} {}/{} decides, rule {}",
        word("kind"),
        word("namespace"),
        word("name"),
        route["rule"]
    );
    if let Some(name) = route["ruleName"].as_str() {
        let _ = write!(line, " ({name})");
    }
    if let Some(index) = route["match"].as_u64() {
        let _ = write!(line, ", match {index}");
    }
    let backends = route["backends"].as_array().into_iter().flatten();
    let backends: Vec<String> = backends
        .map(|b| format!("{}:{}", b["service"].as_str().unwrap_or("?"), b["port"]))
        .collect();
    if !backends.is_empty() {
        let _ = write!(line, ": {}", backends.join(", "));
    }
    says.push(line);
    if let Some(asks) = route["asks"].as_object() {
        let word = |key: &str| asks.get(key).and_then(Value::as_str).unwrap_or("?");
        let port = asks.get("port").and_then(Value::as_u64).unwrap_or(0);
        says.push(format!(
            "its filter ExternalAuth asks {}:{port} ({}) first",
            word("service"),
            word("protocol")
        ));
    }
    match route["invalid"].as_str() {
        Some(reason) => {
            says.push(format!("the rule is not valid: {reason}"));
            (says, Err(format!("500: {reason}")))
        }
        None => (says, Ok(())),
    }
}

/// uids of the workloads that it may come to.
fn decision_endpoints(decision: &Value) -> Vec<String> {
    let backends = decision["route"]["backends"]
        .as_array()
        .into_iter()
        .flatten();
    let lists = backends
        .map(|b| &b["endpoints"])
        .chain([&decision["endpoints"]]);
    let endpoints = lists.flat_map(|list| list.as_array().into_iter().flatten());
    let healthy = endpoints.filter(|e| e["status"].is_null() || e["status"] == "HEALTHY");
    let mut uids: Vec<String> = healthy
        .filter_map(|e| e["workload"].as_str().map(str::to_owned))
        .collect();
    uids.sort();
    uids.dedup();
    uids
}

fn endpoint_step(workload: &Workload, dump: &Dump, meshed: bool) -> Value {
    let policies: Vec<String> = dump
        .policies
        .iter()
        .map(|entry| &entry.view)
        .filter(|policy| match policy.scope.as_str() {
            "Global" => true,
            "Namespace" => policy.namespace == workload.namespace,
            _ => {
                let key = format!("{}/{}", policy.namespace, policy.name);
                workload.authorization_policies.contains(&key)
            }
        })
        .map(|policy| format!("{}/{} ({})", policy.namespace, policy.name, policy.action))
        .collect();
    let way = match (workload.protocol.as_str(), meshed) {
        ("HBONE", true) => "by HBONE to its ztunnel",
        ("HBONE", false) => "in plaintext, which its ztunnel takes without knowing who asks",
        _ => "in plaintext: it is outside the mesh",
    };
    let says = vec![
        way.to_owned(),
        match policies.is_empty() {
            true => "no policy of its own".into(),
            false => format!("L4 policies there: {}", policies.join(", ")),
        },
    ];
    let hop = format!(
        "{}.{} on {}",
        workload.name, workload.namespace, workload.node
    );
    json!({"hop": hop, "says": says})
}

fn endpoints(service: &Service, dump: &Dump) -> Vec<Workload> {
    let healthy = service
        .endpoints
        .iter()
        .filter(|(_, e)| e.status != "Unhealthy");
    let uids: Vec<&String> = healthy.map(|(uid, _)| uid).collect();
    let all = dump.workloads.iter().map(|entry| &entry.view);
    all.filter(|workload| uids.contains(&&workload.uid))
        .cloned()
        .collect()
}

fn identity(workload: &Workload) -> String {
    format!(
        "spiffe://{}/ns/{}/sa/{}",
        workload.trust_domain, workload.namespace, workload.service_account
    )
}

/// The waypoint as the mesh names the component. Its service is `namespace/hostname`, or
/// `network/address` of a service that ztunnel knows.
fn waypoint_name(gateway: &Gateway, dump: &Dump) -> String {
    let (namespace, host) = gateway
        .destination
        .split_once('/')
        .unwrap_or(("", &gateway.destination));
    if let Ok(ip) = host.parse()
        && let Found::Service(service, _) = by_address(ip, dump)
    {
        return format!("{}.{}", service.name, service.namespace);
    }
    let name = host.split('.').next().unwrap_or(host);
    format!("{name}.{namespace}")
}

fn find(args: &Args, cluster: &Cluster) -> anyhow::Result<(Asked, Dump)> {
    let wanted = Wanted {
        positional: Some(&args.source),
        node: None,
        namespace: args.cluster.namespace.as_deref(),
        port: ADMIN,
    };
    let targets = targets_in(cluster, wanted)?;
    let [ztunnel] = targets.ztunnels.as_slice() else {
        bail!("{} is not on one node", args.source);
    };
    let Some(pod) = targets.pod else {
        let text = format!("{} is a ztunnel: name the pod that asks", args.source);
        return Err(UsageError(text).into());
    };
    let dump = ztunnel.request(&Method::GET, "/config_dump")?;
    let dump = Dump::parse(&dump).with_context(|| ztunnel.name.clone())?;
    let mut workloads = dump.workloads.iter().map(|entry| &entry.view);
    let source = workloads
        .find(|w| w.name == pod.name && w.namespace == pod.namespace)
        .with_context(|| format!("{} does not know the workload {pod}", ztunnel.name))?
        .clone();
    let (destination, port) = destination(&args.destination, &source.namespace, &dump)?;
    let asked = Asked {
        node: source.node.clone(),
        source,
        destination,
        port,
    };
    Ok((asked, dump))
}

fn destination(text: &str, own: &str, dump: &Dump) -> anyhow::Result<(Found, u16)> {
    let text = text
        .strip_prefix("http://")
        .unwrap_or(text)
        .trim_end_matches('/');
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((by_address(address.ip(), dump), address.port()));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => {
            let port = port
                .parse()
                .map_err(|_| UsageError(format!("{text}: no port number")))?;
            (host, Some(port))
        }
        None => (text, None),
    };
    let (name, namespace) = match host.split_once('.') {
        Some((name, rest)) => (name, rest.split('.').next().unwrap_or(rest)),
        None => (host, own),
    };
    let services = || dump.services.iter();
    let service = services().find(|entry| {
        let service = &entry.view;
        service.hostname == host || (service.name == name && service.namespace == namespace)
    });
    if let Some(entry) = service {
        let ip = entry.view.vips.iter().find_map(|vip| address_of(vip));
        let ip = ip.with_context(|| format!("service {host} has no address: name a pod"))?;
        let ports = entry.raw["ports"].as_object();
        let first = ports.and_then(|ports| ports.keys().filter_map(|p| p.parse().ok()).min());
        let port = port.or(first);
        let port = port.with_context(|| format!("service {host} has no port"))?;
        return Ok((Found::Service(Box::new(entry.view.clone()), ip), port));
    }
    let mut workloads = dump.workloads.iter().map(|entry| &entry.view);
    if let Some(workload) = workloads.find(|w| w.name == name && w.namespace == namespace) {
        let ip = workload.workload_ips.first().and_then(|ip| ip.parse().ok());
        let ip = ip.with_context(|| format!("{host} has no address"))?;
        let port = port.ok_or_else(|| UsageError(format!("which port of {host}? {host}:PORT")))?;
        return Ok((Found::Workload(Box::new(workload.clone()), ip), port));
    }
    bail!("there is neither a service nor a pod {name} in namespace {namespace}")
}

/// `network/address`.
fn address_of(vip: &str) -> Option<IpAddr> {
    vip.rsplit('/').next()?.parse().ok()
}

fn by_address(ip: IpAddr, dump: &Dump) -> Found {
    let mut services = dump.services.iter().map(|entry| &entry.view);
    let has = |service: &&Service| service.vips.iter().any(|vip| address_of(vip) == Some(ip));
    if let Some(service) = services.find(has) {
        return Found::Service(Box::new(service.clone()), ip);
    }
    let mut workloads = dump.workloads.iter().map(|entry| &entry.view);
    let text = ip.to_string();
    match workloads.find(|workload| workload.workload_ips.contains(&text)) {
        Some(workload) => Found::Workload(Box::new(workload.clone()), ip),
        None => Found::Unknown(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Dump {
        let text = json!({
            "workloads": [{"uid": "u", "name": "web", "namespace": "shop",
                "workloadIps": ["10.244.1.5"], "protocol": "HBONE", "node": "n1",
                "trustDomain": "cluster.local", "serviceAccount": "web"}],
            "services": [{"name": "reviews", "namespace": "shop",
                "hostname": "reviews.shop.svc.cluster.local", "vips": ["/10.96.1.3"],
                "ports": {"80": 8080, "9000": 8080},
                "waypoint": {"destination": "shop/waypoint.shop.svc.cluster.local"},
                "endpoints": {"u": {"status": "Healthy"}}}],
            "policies": [{"name": "p", "namespace": "shop", "scope": "Namespace",
                "action": "Deny"}],
        });
        Dump::parse(text.to_string().as_bytes()).expect("a dump")
    }

    #[test]
    fn destinations_by_name_and_address() {
        let dump = dump();
        let shown = |text: &str| {
            let (found, port) = destination(text, "shop", &dump).map_err(|e| e.to_string())?;
            let name = match found {
                Found::Service(service, _) => service.hostname,
                Found::Workload(workload, _) => workload.name,
                Found::Unknown(ip) => ip.to_string(),
            };
            Ok::<_, String>(format!("{name}:{port}"))
        };
        let host = "reviews.shop.svc.cluster.local";
        for (text, expected) in [
            ("reviews", Ok(format!("{host}:80"))),
            ("reviews.shop:9000", Ok(format!("{host}:9000"))),
            (host, Ok(format!("{host}:80"))),
            ("10.96.1.3:80", Ok(format!("{host}:80"))),
            ("10.244.1.5:8080", Ok("web:8080".into())),
            ("192.0.2.1:443", Ok("192.0.2.1:443".into())),
            ("web.shop:8080", Ok("web:8080".into())),
            ("web", Err("which port of web? web:PORT".into())),
            (
                "nobody",
                Err("there is neither a service nor a pod nobody in namespace shop".into()),
            ),
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
    }

    #[test]
    fn what_a_waypoint_decides_in_words() {
        let allowed = json!({"authorization": {"allowed": true, "policy": "shop/readers",
            "rule": 0}, "route": {"kind": "HTTPRoute", "namespace": "shop", "name": "reviews",
            "rule": 1, "ruleName": "everybody", "match": 0, "backends": [
                {"service": "reviews-v1.shop", "port": 80, "endpoints": [{"workload": "a",
                    "status": "HEALTHY"}, {"workload": "b", "status": "EJECTED"}]}]}});
        let (says, verdict) = decision_text(&allowed);
        assert_eq!(verdict, Ok(()));
        assert_eq!(
            says,
            [
                "allows: rule 0 of AuthorizationPolicy shop/readers",
                "HTTPRoute shop/reviews decides, rule 1 (everybody), match 0: reviews-v1.shop:80"
            ]
        );
        assert_eq!(decision_endpoints(&allowed), ["a"]);
        let mut asking = allowed;
        asking["route"]["asks"] = json!({"service": "authz.shop.svc.cluster.local",
            "namespace": "shop", "port": 9000, "protocol": "GRPC"});
        let (says, verdict) = decision_text(&asking);
        assert_eq!(verdict, Ok(()));
        assert_eq!(
            says[2..],
            ["its filter ExternalAuth asks authz.shop.svc.cluster.local:9000 (GRPC) first"]
        );
        let denied =
            json!({"authorization": {"allowed": false, "reason": "no ALLOW policy matches"}});
        let (_, verdict) = decision_text(&denied);
        assert_eq!(verdict, Err("403: no ALLOW policy matches".into()));
        let lost = json!({"authorization": {"allowed": true}, "route": {"noMatch": true}});
        assert_eq!(decision_text(&lost).1, Err("404: no route matches".into()));
        let refused = json!({"refused": "gone", "status": 503});
        assert_eq!(decision_text(&refused).1, Err("503: gone".into()));
    }

    #[test]
    fn a_waypoint_is_named_by_its_service() {
        let dump = dump();
        let named = |destination: &str| {
            let gateway = json!({"destination": destination, "hboneMtlsPort": 15008});
            waypoint_name(&serde_json::from_value(gateway).expect("a gateway"), &dump)
        };
        assert_eq!(
            named("shop/waypoint.shop.svc.cluster.local"),
            "waypoint.shop"
        );
        assert_eq!(named("/10.96.1.3"), "reviews.shop");
    }

    #[test]
    fn policies_of_an_endpoint_are_named() {
        let dump = dump();
        let step = endpoint_step(&dump.workloads[0].view, &dump, true);
        let text = step["says"].to_string();
        assert!(text.contains("shop/p (Deny)"), "{text}");
    }
}
