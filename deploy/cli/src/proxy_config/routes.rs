//! `adit proxy-config route`.

use serde_json::Value;

use super::{Common, Filter};
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::{Dump, is_http, object_name};
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    filter: Filter,
    /// Only the route of this name
    #[arg(long)]
    name: Option<String>,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    let routes = raw["resources"]["Route"].as_array().into_iter().flatten();
    let wanted = |route: &&Value| {
        let name = route["object"]["name"].as_str();
        args.name
            .as_deref()
            .is_none_or(|wanted| name == Some(wanted))
    };
    let value: Value = routes.filter(wanted).cloned().collect();
    output::print(out, args.common.output, &value, || {
        table(&dump, &args.filter, args.name.as_deref())
    })?;
    Ok(Outcome::Well)
}

pub(super) fn table(dump: &Dump, filter: &Filter, name: Option<&str>) -> String {
    let mut table = Table::new(["NAME", "VHOST NAME", "DOMAINS", "MATCH", "VIRTUAL SERVICE"]);
    for service in dump.services.iter().filter(|service| service.bound) {
        for port in &service.ports {
            if !filter.takes(&service.hostname, port.port) {
                continue;
            }
            let cluster = service.cluster(port);
            let mut any = false;
            for route in dump.routes_of(service, port.port) {
                any = true;
                if name.is_some_and(|wanted| route["object"]["name"] != wanted) {
                    continue;
                }
                let vhost = route["resourceName"].as_str().unwrap_or_default();
                let domains = domains(route);
                for text in matches(route) {
                    table.row([&cluster, vhost, &domains, &text, &object_name(route)]);
                }
            }
            if !any && is_http(&port.protocol) && name.is_none() {
                table.row([&cluster, "inbound|http", "*", "/*", ""]);
            }
        }
    }
    table.render()
}

fn domains(route: &Value) -> String {
    let hostnames = route["hostnames"].as_array().into_iter().flatten();
    let hostnames: Vec<&str> = hostnames.filter_map(Value::as_str).collect();
    match hostnames.is_empty() {
        true => "*".into(),
        false => hostnames.join(", "),
    }
}

/// One text for each match of each rule.
pub(super) fn matches(route: &Value) -> Vec<String> {
    let kind = route["kind"]
        .as_object()
        .and_then(|kind| kind.iter().next());
    let Some((kind, rules)) = kind else {
        return vec!["none".into()];
    };
    let rules = rules["rules"].as_array().into_iter().flatten();
    let mut all = Vec::new();
    for rule in rules {
        let leads = leads_to(rule);
        let texts: Vec<String> = match rule["matches"].as_array() {
            Some(matches) => matches.iter().map(|m| match_text(kind, m)).collect(),
            None => vec![if kind == "http" { "/*" } else { "*" }.into()],
        };
        all.extend(texts.into_iter().map(|text| format!("{text}{leads}")));
    }
    all
}

fn match_text(kind: &str, value: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut parts = Vec::new();
    if kind == "grpc" {
        let word = |key: &str| match text(&value[key]) {
            word if word.is_empty() => "*".to_owned(),
            word => word,
        };
        parts.push(format!("/{}/{}", word("service"), word("method")));
    } else {
        let path = &value["path"];
        parts.push(
            match (&path["exact"], &path["prefix"], &path["pathRegex"]) {
                (Value::String(path), _, _) => path.clone(),
                (_, Value::String(path), _) => format!("{}*", path.trim_end_matches('*')),
                (_, _, Value::String(path)) => format!("regex {path}"),
                _ => "/*".into(),
            },
        );
        if let Value::String(method) = &value["method"] {
            parts.insert(0, method.clone());
        }
    }
    for (list, sign) in [("headers", ""), ("queryParams", "?"), ("claims", "claim ")] {
        for entry in value[list].as_array().into_iter().flatten() {
            let not = if entry["invert"] == true { "!" } else { "" };
            let name = text(&entry["name"]);
            parts.push(format!("{sign}{name}{not}{}", value_text(&entry["value"])));
        }
    }
    parts.join(" ")
}

fn value_text(value: &Value) -> String {
    let kind = value["kind"]
        .as_object()
        .and_then(|kind| kind.iter().next());
    match kind {
        Some((kind, Value::String(text))) => match kind.as_str() {
            "exact" => format!("={text}"),
            "prefix" => format!("={text}*"),
            "suffix" => format!("=*{text}"),
            _ => format!("~{text}"),
        },
        _ => "=*".into(),
    }
}

/// ` -> reviews-v1:80 (90), reviews-v2:80 (10)`.
fn leads_to(rule: &Value) -> String {
    if let Some(reason) = rule["invalid"].as_str() {
        return format!(" -> 500 ({reason})");
    }
    let backends = rule["backends"].as_array().into_iter().flatten();
    let backends: Vec<&Value> = backends.collect();
    let one = |backend: &&Value| {
        let weight = backend["weight"].as_u64().unwrap_or(0);
        let name = match &backend["to"] {
            to if to["invalid"].is_string() => "500".to_owned(),
            to => {
                let service = &to["service"]["service"];
                let hostname = service["hostname"].as_str().unwrap_or_default();
                let name = hostname.split('.').next().unwrap_or_default();
                format!("{name}:{}", to["service"]["port"])
            }
        };
        match backends.len() {
            1 => name,
            _ => format!("{name} ({weight})"),
        }
    };
    let texts: Vec<String> = backends.iter().map(one).collect();
    match texts.is_empty() {
        true => String::new(),
        false => format!(" -> {}", texts.join(", ")),
    }
}
