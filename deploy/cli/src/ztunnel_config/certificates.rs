//! `adit ztunnel-config certificates`.

use std::collections::HashSet;
use std::time::SystemTime;

use serde_json::Value;

use crate::output::{self, Outcome, Output};
use crate::table::Table;
use crate::ztunnel::dump::{Certificate, Certificates, Dump, list};
use crate::ztunnel::serial;

use super::{Common, Loaded};

/// The certificates that ztunnel holds for its node's pods
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit ztunnel-config certificates
  adit zc certificate --node node1 -o json")]
pub struct Args {
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let Loaded { dump, outcome, .. } = args.common.load()?;
    output::print(out, args.common.output, &list(&dump.certificates), || {
        table(&dump, SystemTime::now())
    })?;
    Ok(outcome)
}

/// `now` decides what is valid.
pub(super) fn table(dump: &Dump, now: SystemTime) -> String {
    let mut table = Table::new([
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    for row in rows(dump.certificates.iter().map(|entry| &entry.view), now) {
        table.row(row.each_ref().map(String::as_str));
    }
    table.render()
}

/// A row for each certificate; `now` decides what is valid.
pub fn rows<'a>(all: impl Iterator<Item = &'a Certificates>, now: SystemTime) -> Vec<[String; 7]> {
    let mut rows = Vec::new();
    // Several nodes have the same roots for an identity.
    let mut seen = HashSet::new();
    for of in all {
        let state = state(&of.state);
        if of.cert_chain.is_empty() {
            let row = [&of.identity, "NA", state, "false", "NA", "NA", "NA"];
            rows.push(row.map(str::to_owned));
            continue;
        }
        // Old ztunnels have the root at the end of the chain.
        let last_is_root = of.root_certs.is_empty() && of.cert_chain.len() > 1;
        let last = of.cert_chain.len() - 1;
        let chain = of.cert_chain.iter().enumerate().map(|(index, cert)| {
            let kind = match index {
                0 => "Leaf",
                index if index == last && last_is_root => "Root",
                _ => "Intermediate",
            };
            (kind, cert)
        });
        for (kind, cert) in chain.chain(of.root_certs.iter().map(|cert| ("Root", cert))) {
            if !seen.insert((&of.identity, kind, &cert.serial_number)) {
                continue;
            }
            let valid = if is_valid(cert, now) { "true" } else { "false" };
            let serial = serial::hex(&cert.serial_number);
            let row = [
                of.identity.as_str(),
                kind,
                state,
                valid,
                or_na(&serial),
                or_na(&cert.expiration_time),
                or_na(&cert.valid_from),
            ];
            rows.push(row.map(str::to_owned));
        }
    }
    rows
}

fn state(state: &Value) -> &str {
    match state {
        Value::String(state) if state.starts_with("Unavailable") => "Unavailable",
        Value::String(state) => state,
        Value::Object(map) => map.keys().next().map_or("NA", String::as_str),
        _ => "NA",
    }
}

fn is_valid(cert: &Certificate, now: SystemTime) -> bool {
    let time = |text: &str| humantime::parse_rfc3339(text).ok();
    let from = time(&cert.valid_from);
    let until = time(&cert.expiration_time);
    matches!((from, until), (Some(from), Some(until)) if (from..=until).contains(&now))
}

fn or_na(text: &str) -> &str {
    if text.is_empty() { "NA" } else { text }
}
