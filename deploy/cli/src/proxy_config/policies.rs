//! `adit proxy-config policy`: what is allowed at this waypoint, and how it is told.

use serde_json::Value;

use super::Common;
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::Dump;
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, raw) = args.common.load()?;
    let resources = &raw["resources"];
    let kinds = ["AuthorizationPolicy", "RequestAuthentication"];
    let lists = kinds.iter().filter_map(|kind| resources[*kind].as_array());
    let value: Value = lists.flatten().cloned().collect();
    output::print(out, args.common.output, &value, || table(&dump))?;
    Ok(Outcome::Well)
}

pub(super) fn table(dump: &Dump) -> String {
    let mut table = Table::new([
        "NAMESPACE",
        "POLICY NAME",
        "ACTION",
        "TARGETS",
        "RULES",
        "STATUS",
    ]);
    let authorization = dump.resources.authorization_policy.iter();
    let authorization = authorization.map(|policy| {
        let action = policy["action"].as_str().unwrap_or("ALLOW");
        let dry = if policy["dryRun"] == true {
            " (dry run)"
        } else {
            ""
        };
        (format!("{action}{dry}"), policy)
    });
    let authentication = dump.resources.request_authentication.iter();
    let authentication = authentication.map(|policy| ("JWT".to_owned(), policy));
    for (action, policy) in authorization.chain(authentication) {
        let text = |key: &str| policy["object"][key].as_str().unwrap_or_default();
        let rules = policy["rules"].as_array().map_or(0, Vec::len);
        let status = policy["invalid"].as_str().or(policy["rejected"].as_str());
        let status = status.map_or("Accepted".to_owned(), |why| format!("Invalid: {why}"));
        table.row([
            text("namespace"),
            text("name"),
            &action,
            &targets(policy),
            &rules.to_string(),
            &status,
        ]);
    }
    table.render()
}

fn targets(policy: &Value) -> String {
    let one = |target: &Value| {
        let kind = &target["kind"];
        match (
            &kind["service"]["hostname"],
            &kind["gateway"],
            &kind["workload"],
        ) {
            (Value::String(host), _, _) => format!("Service {host}"),
            (_, Value::String(gateway), _) => format!("Gateway {gateway}"),
            (_, _, Value::String(workload)) => format!("Workload {workload}"),
            _ => "?".into(),
        }
    };
    let all = policy["targets"].as_array().into_iter().flatten();
    let all: Vec<String> = all.map(one).collect();
    match all.is_empty() {
        true => "*".into(),
        false => all.join(", "),
    }
}
