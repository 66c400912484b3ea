//! Evaluation said again in the slowest way: over the wire form, with text and lists.

use ::http::HeaderMap;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::json;

use super::support::*;
use crate::policy::http::normalize;
use crate::proto::waypoint as proto;
use crate::proto::waypoint::authorization_policy::Action;

fn text(pattern: &str, value: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => !value.is_empty(),
        (Some(end), _) => value.ends_with(end),
        (None, Some(start)) => value.starts_with(start),
        (None, None) => value == pattern,
    }
}

/// `hit` of any value listed, of none listed in the `not` form; with no value there, no
/// value hits.
fn pair<T>(yes: &[T], no: &[T], hit: impl Fn(&T) -> bool) -> bool {
    (yes.is_empty() || yes.iter().any(&hit)) && !no.iter().any(&hit)
}

/// The same where a request has several readings: `all` of them must hold, or one.
fn readings(
    yes: &[String],
    no: &[String],
    readings: &[String],
    all: bool,
    hit: fn(&str, &str) -> bool,
) -> bool {
    let test = |wanted: &[String], all: bool| {
        let one = |reading: &String| wanted.iter().any(|value| hit(value, reading));
        if all {
            readings.iter().all(one)
        } else {
            readings.iter().any(one)
        }
    };
    (yes.is_empty() || test(yes, all)) && (no.is_empty() || !test(no, !all))
}

fn path_hit(value: &str, path: &str) -> bool {
    if !value.contains('{') {
        return text(value, path);
    }
    let (value, path): (Vec<&str>, Vec<&str>) =
        (value.split('/').collect(), path.split('/').collect());
    fn from(value: &[&str], path: &[&str]) -> bool {
        match (value, path) {
            ([], []) => true,
            // Also across slashes, also nothing.
            (["{**}", rest @ ..], _) => (1..=path.len()).any(|n| from(rest, &path[n..])),
            (["{*}", rest @ ..], [first, others @ ..]) => !first.is_empty() && from(rest, others),
            ([literal, rest @ ..], [first, others @ ..]) => literal == first && from(rest, others),
            _ => false,
        }
    }
    from(&value, &path)
}

fn host_hit(value: &str, host: &str) -> bool {
    let host = host.to_lowercase();
    let name = host.split(':').next().unwrap_or_default();
    text(&value.to_lowercase(), name.trim_end_matches('.'))
}

struct Oracle<'a> {
    call: &'a Call,
    paths: Vec<String>,
    all: bool,
}

impl Oracle<'_> {
    fn id(&self) -> Option<(&str, &str)> {
        self.call.by.and_then(|by| by.split_once('/'))
    }

    fn http(&self, test: impl FnOnce() -> bool) -> bool {
        !self.call.http || test()
    }

    fn source(&self, source: &proto::Source) -> bool {
        let call = self.call;
        let claims = call.claims.as_ref().and_then(|claims| claims.principal());
        pair(&source.principals, &source.not_principals, |v| {
            self.id()
                .is_some_and(|(ns, sa)| text(v, &format!("cluster.local/ns/{ns}/sa/{sa}")))
        }) && pair(&source.namespaces, &source.not_namespaces, |v| {
            self.id().is_some_and(|(ns, _)| text(v, ns))
        }) && pair(
            &source.service_accounts,
            &source.not_service_accounts,
            |v| call.by == Some(v),
        ) && pair(&source.ip_blocks, &source.not_ip_blocks, |v| {
            call.ip
                .to_string()
                .starts_with(v.split(".0").next().unwrap_or_default())
        }) && self.http(|| {
            pair(
                &source.request_principals,
                &source.not_request_principals,
                |v| claims.is_some_and(|(iss, sub)| text(v, &format!("{iss}/{sub}"))),
            )
        })
    }

    fn operation(&self, to: &proto::Operation) -> bool {
        let call = self.call;
        let method = vec![call.method.to_owned()];
        pair(&to.ports, &to.not_ports, |v| *v == u32::from(call.port))
            && self.http(|| readings(&to.methods, &to.not_methods, &method, self.all, text))
            && self.http(|| readings(&to.paths, &to.not_paths, &self.paths, self.all, path_hit))
            && self.http(|| pair(&to.hosts, &to.not_hosts, |v| host_hit(v, &call.host)))
    }

    fn condition(&self, when: &proto::Condition) -> bool {
        let call = self.call;
        let header = |headers: &HeaderMap, v: &str| {
            let mut lines = headers.get_all("x-team").iter();
            lines.any(|line| v == "*" || text(v, line.to_str().expect("text")))
        };
        let role = |v: &str| match call.claims.as_ref().and_then(|c| c.payload().get("role")) {
            Some(serde_json::Value::String(role)) => text(v, role),
            Some(serde_json::Value::Array(roles)) => roles
                .iter()
                .any(|role| role.as_str().is_some_and(|role| text(v, role))),
            _ => false,
        };
        let pair = |hit: &dyn Fn(&String) -> bool| pair(&when.values, &when.not_values, hit);
        match when.key.as_str() {
            "request.headers[x-team]" => self.http(|| pair(&|v| header(&call.headers, v))),
            "request.auth.claims[role]" => self.http(|| pair(&|v| role(v))),
            "source.namespace" => pair(&|v| self.id().is_some_and(|(ns, _)| text(v, ns))),
            "connection.sni" => pair(&|v| call.sni.is_some_and(|sni| text(v, sni))),
            key => panic!("{key}"),
        }
    }

    fn rule(&self, rule: &proto::AuthorizationRule) -> bool {
        let http_only = rule
            .from
            .iter()
            .any(|s| !s.request_principals.is_empty() || !s.not_request_principals.is_empty())
            || rule.to.iter().any(|o| {
                let without_ports = proto::Operation {
                    ports: vec![],
                    not_ports: vec![],
                    ..o.clone()
                };
                without_ports != proto::Operation::default()
            })
            || rule.when.iter().any(|w| w.key.starts_with("request."));
        if !self.call.http && http_only && self.all {
            return false;
        }
        (rule.from.is_empty() || rule.from.iter().any(|s| self.source(s)))
            && (rule.to.is_empty() || rule.to.iter().any(|o| self.operation(o)))
            && rule.when.iter().all(|w| self.condition(w))
    }
}

fn served(policies: &[proto::AuthorizationPolicy], call: &Call) -> bool {
    let path = call.target.split('?').next().unwrap_or_default();
    let path = normalize(path, call.mode).expect("a path");
    let mut paths = vec![path.as_str().to_owned()];
    paths.extend(
        path.other_reading()
            .map(|p| String::from_utf8_lossy(p).into_owned()),
    );
    let hit = |policy: &proto::AuthorizationPolicy| {
        let all = policy.action == Action::Allow as i32;
        let oracle = Oracle {
            call,
            paths: paths.clone(),
            all,
        };
        policy.rules.iter().any(|rule| oracle.rule(rule))
    };
    let of = |action: Action| policies.iter().filter(move |p| p.action == action as i32);
    let mut allows = of(Action::Allow).peekable();
    !of(Action::Deny).any(hit) && (allows.peek().is_none() || allows.any(hit))
}

fn some(values: &'static [&'static str]) -> BoxedStrategy<Vec<String>> {
    let some = prop::collection::vec(select(values).prop_map(str::to_owned), 1..3);
    prop_oneof![5 => Just(Vec::new()), 2 => some].boxed()
}

const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/A/sa/a",
    "cluster.local/ns/A/*",
    "*/sa/b",
    "*",
];
const NAMESPACES: &[&str] = &["A", "B", "A*", "*"];
const ACCOUNTS: &[&str] = &["A/a", "B/b"];
const BLOCKS: &[&str] = &["10.0.0.0/8", "11.0.0.0/8"];
const USERS: &[&str] = &["X/bob", "X/*", "*/eve", "*"];
const METHODS: &[&str] = &["GET", "PUT", "P*", "*"];
const PATHS: &[&str] = &[
    "/a", "/a/b", "/a/*", "*/b", "/{*}", "/{*}/b", "/a/{**}", "/{**}/b", "*",
];
const HOSTS: &[&str] = &["web.srv", "WEB*", "*.srv", "other", "*"];

fn any_source() -> impl Strategy<Value = proto::Source> {
    (
        (
            some(PRINCIPALS),
            some(PRINCIPALS),
            some(NAMESPACES),
            some(NAMESPACES),
        ),
        (some(ACCOUNTS), some(ACCOUNTS), some(BLOCKS), some(BLOCKS)),
        (some(USERS), some(USERS)),
    )
        .prop_map(|((p, np, n, nn), (s, ns, i, ni), (r, nr))| proto::Source {
            principals: p,
            not_principals: np,
            namespaces: n,
            not_namespaces: nn,
            service_accounts: s,
            not_service_accounts: ns,
            ip_blocks: i,
            not_ip_blocks: ni,
            request_principals: r,
            not_request_principals: nr,
            ..Default::default()
        })
        .prop_filter("empty", |source| *source != proto::Source::default())
}

fn any_operation() -> impl Strategy<Value = proto::Operation> {
    let ports = || prop_oneof![4 => Just(vec![]), 1 => Just(vec![80_u32]), 1 => Just(vec![81, 82])];
    (
        (some(METHODS), some(METHODS), some(PATHS), some(PATHS)),
        (some(HOSTS), some(HOSTS), ports(), ports()),
    )
        .prop_map(|((m, nm, p, np), (h, nh, o, no))| proto::Operation {
            methods: m,
            not_methods: nm,
            paths: p,
            not_paths: np,
            hosts: h,
            not_hosts: nh,
            ports: o,
            not_ports: no,
        })
        .prop_filter("empty", |to| *to != proto::Operation::default())
}

fn any_condition() -> impl Strategy<Value = proto::Condition> {
    let keys = &[
        "request.headers[x-team]",
        "request.auth.claims[role]",
        "source.namespace",
        "connection.sni",
    ][..];
    const VALUES: &[&str] = &["A", "B", "a*", "*b", "*", "ab"];
    (select(keys), some(VALUES), some(VALUES))
        .prop_map(|(key, values, not_values)| proto::Condition {
            key: key.into(),
            values,
            not_values,
        })
        .prop_filter("empty", |when| {
            !when.values.is_empty() || !when.not_values.is_empty()
        })
}

fn any_policies() -> impl Strategy<Value = Vec<proto::AuthorizationPolicy>> {
    use prop::collection::vec;
    let rule = (
        vec(any_source(), 0..3),
        vec(any_operation(), 0..3),
        prop_oneof![2 => Just(vec![]), 1 => vec(any_condition(), 1..3)],
    )
        .prop_map(|(from, to, when)| proto::AuthorizationRule { from, to, when })
        .boxed();
    // Enough rules now and then for the index.
    let rules = prop_oneof![4 => vec(rule.clone(), 0..3), 1 => vec(rule, 8..16)];
    vec((any::<bool>(), rules), 0..4).prop_map(|policies| {
        let policies = policies.into_iter().enumerate();
        policies
            .map(|(i, (allow, rules))| {
                let action = if allow { Action::Allow } else { Action::Deny };
                named("srv", &format!("p{i}"), action, rules)
            })
            .collect()
    })
}

const TEAMS: &[&[&str]] = &[&[], &["A"], &["B", "ab"], &[""]];

fn any_call() -> impl Strategy<Value = Call> {
    let targets = &[
        "/",
        "/a",
        "/a/b",
        "/b",
        "/x/b",
        "/a/b/c",
        "/x/../a",
        "//a",
        "/a%2fb",
        "/a;v=1",
        "/a/;/b",
        "/x/..%2fa",
        "/%61",
        "/a?/b",
    ][..];
    let claims = prop_oneof![
        Just(None),
        Just(Some(json!({"iss": "X", "sub": "bob", "role": "A"}))),
        Just(Some(
            json!({"iss": "Y", "sub": "eve", "role": ["ab", "B", 1]})
        )),
        Just(Some(json!({"iss": "X", "role": {"A": "B"}}))),
    ];
    (
        (
            select(&[None, Some("A/a"), Some("A/b"), Some("B/b"), Some("AA/a")][..]),
            any::<bool>(),
            select(&[80_u16, 81][..]),
            prop::bool::weighted(0.85),
        ),
        (
            select(&["GET", "PUT", "POST"][..]),
            select(targets),
            select(&["web.srv", "Web.SRV:80", "other", "x.srv.", ""][..]),
            select(TEAMS),
        ),
        claims,
        select(&[None, Some("ab"), Some("zb")][..]),
    )
        .prop_map(
            |((by, ten, port, http), (method, target, host, team), claims, sni)| {
                let mut call = Call {
                    by,
                    ip: [if ten { 10 } else { 11 }, 0, 0, 1].into(),
                    port,
                    http,
                    method,
                    sni,
                    ..get(target).host(host)
                };
                for line in team {
                    call = call.header("x-team", line);
                }
                match claims {
                    Some(claims) => call.claims(claims),
                    None => call,
                }
            },
        )
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            by,
            ip,
            port,
            http,
            method,
            target,
            host,
            headers,
            claims,
            sni,
            ..
        } = self;
        write!(
            f,
            "{by:?} {ip} {port} http={http} {method} {target} {host} "
        )?;
        write!(f, "{headers:?} {claims:?} {sni:?}")
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn agrees(policies in any_policies(), call in any_call()) {
        for policy in &policies {
            let converted = convert(policy);
            prop_assert_eq!(converted.problems(), []);
        }
        prop_assert_eq!(call.permitted(&policies), served(&policies, &call));
    }
}
