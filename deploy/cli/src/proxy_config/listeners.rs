//! `adit proxy-config listener`.

use serde_json::{Value, json};

use super::{Common, Filter};
use crate::output::{self, Outcome, Output};
use crate::proxy::dump::{Dump, Port, Service, is_http, protocol_word};
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    filter: Filter,
    /// As istioctl's; a waypoint is all there is
    #[arg(long)]
    waypoint: bool,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (dump, _) = args.common.load()?;
    let rows = rows(&dump, &args.filter);
    let value: Value = rows
        .iter()
        .map(|[listener, chain, matched, destination]| {
            json!({"listener": listener, "chain": chain, "match": matched,
                "destination": destination})
        })
        .collect();
    output::print(out, args.common.output, &value, || render(&rows))?;
    Ok(Outcome::Well)
}

pub(super) fn table(dump: &Dump, filter: &Filter) -> String {
    render(&rows(dump, filter))
}

fn render(rows: &[[String; 4]]) -> String {
    let mut table = Table::new(["LISTENER", "CHAIN", "MATCH", "DESTINATION"]);
    for row in rows {
        table.row(row.each_ref().map(String::as_str));
    }
    table.render()
}

fn rows(dump: &Dump, filter: &Filter) -> Vec<[String; 4]> {
    let address = dump.config["hboneAddress"].as_str().unwrap_or("[::]:15008");
    let mut rows = vec![[
        "connect_terminate".to_owned(),
        "default".to_owned(),
        format!("{address} mTLS, CONNECT"),
        "main_internal".to_owned(),
    ]];
    for service in dump.services.iter().filter(|service| service.bound) {
        for port in &service.ports {
            if !filter.takes(&service.hostname, port.port) {
                continue;
            }
            let chain = format!(
                "inbound-vip|{}|{}|{}",
                port.port,
                protocol_word(&port.protocol),
                service.hostname
            );
            let ips = service.addresses.join(", ");
            rows.push([
                "main_internal".into(),
                chain,
                format!("ip {{{ips}}} -> port {}", port.port),
                destination(dump, service, port),
            ]);
        }
    }
    rows
}

/// The routes of the port, or its cluster where there is none.
fn destination(dump: &Dump, service: &Service, port: &Port) -> String {
    let names: Vec<&str> = dump
        .routes_of(service, port.port)
        .filter_map(|route| route["resourceName"].as_str())
        .collect();
    match (names.is_empty(), is_http(&port.protocol)) {
        (false, _) => format!("Route: {}", names.join(", ")),
        (true, true) => format!("Inline Route: /* -> {}", service.cluster(port)),
        (true, false) => format!("Cluster: {}", service.cluster(port)),
    }
}
