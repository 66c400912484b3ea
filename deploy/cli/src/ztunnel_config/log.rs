//! `adit ztunnel-config log`.

use std::io::Write;

use anyhow::{Context as _, bail};
use http::Method;

use crate::output::{self, Outcome, Output};
use crate::table::printable;
use crate::ztunnel::admin::encode;
use crate::ztunnel::target::{TargetArgs, request_all, targets};

/// Show or set ztunnel's log level
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # the levels as they are
  adit ztunnel-config log

  # all of one node; one target and the rest; back to how ztunnel was started
  adit zc log --node node1 --level debug
  adit zc log --level access=debug,info
  adit zc log --reset")]
pub struct Args {
    /// A ztunnel (ztunnel-NODE), or a pod (NAME[.NAMESPACE]), whose node's ztunnel is meant
    #[arg(value_name = "ZTUNNEL|POD")]
    target: Option<String>,
    /// LEVEL, or TARGET=LEVEL and LEVEL separated by commas; levels are trace, debug, info,
    /// warn, error, off
    #[arg(long)]
    level: Option<String>,
    /// Back to the levels that ztunnel was started with
    #[arg(short, long, conflicts_with = "level")]
    reset: bool,
    #[command(flatten)]
    at: TargetArgs,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let path = match (&args.level, args.reset) {
        (Some(level), _) => format!("/logging?level={}", encode(&filter(level))),
        (None, true) => "/logging?reset".to_owned(),
        (None, false) => "/logging".to_owned(),
    };
    let targets = targets(&args.at, args.target.as_deref())?;
    let mut failed = 0;
    let asked = targets.ztunnels.len();
    let answers = request_all(&targets.ztunnels, &Method::POST, &path);
    for (ztunnel, answer) in targets.ztunnels.iter().zip(answers) {
        match answer {
            Ok(answer) => {
                let answer = String::from_utf8_lossy(&answer);
                let lines = answer.trim_end().lines().map(printable);
                let text: String = lines.map(|line| line + "\n").collect();
                write!(out, "{}:\n{text}", ztunnel.name).context("cannot write the answer")?;
            }
            Err(error) if asked > 1 => {
                output::complain_of(&error);
                failed += 1;
            }
            Err(error) => return Err(error),
        }
    }
    if failed == asked {
        bail!("no ztunnel has done it");
    }
    Ok(Outcome::of(failed == 0))
}

/// What istioctl's users write, as ztunnel wants it: `target:level` with an equals sign, and
/// Envoy's names of levels.
pub fn filter(level: &str) -> String {
    let directive = |part: &str| {
        let (target, level) = match part.rsplit_once(['=', ':']) {
            Some((target, level)) => (Some(target.trim_end_matches(':')), level),
            None => (None, part),
        };
        let level = match level {
            "warning" => "warn",
            "critical" => "error",
            level => level,
        };
        match target {
            Some(target) => format!("{target}={level}"),
            None => level.to_owned(),
        }
    };
    let parts: Vec<String> = level.split(',').map(str::trim).map(directive).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_of_istioctl_are_understood() {
        for (given, expected) in [
            ("info", "info"),
            ("warning", "warn"),
            ("access:debug,info", "access=debug,info"),
            (
                "ztunnel::xds=critical, h2=trace",
                "ztunnel::xds=error,h2=trace",
            ),
            ("ztunnel::xds:debug", "ztunnel::xds=debug"),
        ] {
            assert_eq!(filter(given), expected, "{given}");
        }
    }
}
