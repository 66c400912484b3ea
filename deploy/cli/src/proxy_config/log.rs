//! `adit proxy-config log`.

use std::io::Write as _;

use http::Method;

use crate::output::{Outcome, Output};
use crate::proxy::target::{TargetArgs, waypoint};
use crate::table::printable;
use crate::ztunnel::admin::encode;
use crate::ztunnel_config::log_filter;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The waypoint, as NAME[.NAMESPACE] or by its pod [default: the only one]
    #[arg(value_name = "WAYPOINT")]
    target: Option<String>,
    /// LEVEL, or TARGET=LEVEL and LEVEL separated by commas; levels are trace, debug, info,
    /// warn, error, off
    #[arg(long)]
    level: Option<String>,
    /// Back to the levels that the waypoint was started with
    #[arg(short, long, conflicts_with = "level")]
    reset: bool,
    #[command(flatten)]
    at: TargetArgs,
}

pub(super) fn run(args: &Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let path = match (&args.level, args.reset) {
        (Some(level), _) => format!("/logging?level={}", encode(&log_filter(level))),
        (None, true) => "/logging?reset".to_owned(),
        (None, false) => "/logging".to_owned(),
    };
    let waypoint = waypoint(&args.at, args.target.as_deref())?;
    let answer = waypoint.request(&Method::POST, &path)?;
    let answer = String::from_utf8_lossy(&answer);
    writeln!(out, "{}:", waypoint.name)?;
    for line in answer.trim_end().lines() {
        writeln!(out, "{}", printable(line))?;
    }
    Ok(Outcome::Well)
}
