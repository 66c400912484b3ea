//! `adit verify-install`: whether what is in the cluster is what was installed.

use std::io::Write as _;

use serde_json::Value;

use super::access::Access;
use super::options::SpecArgs;
use super::spec::Spec;
use super::state::installed;
use super::wait;
use crate::kubernetes::{ConnectionArgs, Kubernetes};
use crate::output::{Outcome, Output};

/// Check that an installation is complete, as it was made, and ready
///
/// Every object is compared with what this version of adit would install; fields that others
/// have added do not count. Exit status 1 if something is missing, changed or not ready.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    cluster: ConnectionArgs,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = Kubernetes::connect(&args.cluster, args.spec.namespace())?;
    let access = Access::new(cluster.client().clone(), cluster.name().to_owned());
    cluster.block_on(verify(&args, &access, out))
}

async fn verify(args: &Args, access: &Access, out: &mut Output) -> anyhow::Result<Outcome> {
    let before = installed(access, args.spec.namespace(), args.spec.revision()).await?;
    let base = match before {
        Some(before) => before.spec,
        None => {
            writeln!(
                out,
                "{} has no record of an installation by `adit install`; it is compared with the defaults and what is given here.",
                access.name
            )?;
            Spec::default()
        }
    };
    let spec = args.spec.read_over(base)?;
    Ok(Outcome::of(report(access, &spec, out).await?))
}

/// Compares and tells. Whether all is well.
pub async fn report(access: &Access, spec: &Spec, out: &mut Output) -> anyhow::Result<bool> {
    let mut well = true;
    for (planned, objects) in super::objects(spec)? {
        let mut faults = Vec::new();
        for object in &objects {
            let Some(there) = access.get_json(&object.id).await? else {
                faults.push(format!("{} is missing", object.id));
                continue;
            };
            let definition = object.id.kind == "CustomResourceDefinition";
            // Definitions of others are as good; installing said so.
            if !definition && let Some(path) = difference(&object.manifest, &there, "") {
                faults.push(format!("{}: {path} is not as installed", object.id));
            }
            if matches!(object.id.kind.as_str(), "Deployment" | "DaemonSet") {
                let progress = wait::progress(&there);
                if !progress.ready {
                    let reason = wait::reason(access, &there).await?;
                    let reason = reason
                        .map(|reason| format!(": {reason}"))
                        .unwrap_or_default();
                    faults.push(format!(
                        "{} is not ready, {}{reason}",
                        object.id, progress.text
                    ));
                }
            }
        }
        let title = planned.component.title();
        match faults.is_empty() {
            true => writeln!(out, "✔ {title}: {} objects as installed", objects.len())?,
            false => {
                well = false;
                writeln!(out, "✘ {title}:")?;
                for fault in faults {
                    writeln!(out, "  {fault}")?;
                }
            }
        }
    }
    Ok(well)
}

/// The path of the first field that differs from what is wanted. What is there beyond it, as
/// defaults and other writers' fields, does not count.
fn difference(wanted: &Value, there: &Value, path: &str) -> Option<String> {
    let below = |key: &str| match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    };
    match (wanted, there) {
        (Value::Object(wanted), Value::Object(there)) => wanted.iter().find_map(|(key, wanted)| {
            difference(wanted, there.get(key).unwrap_or(&Value::Null), &below(key))
        }),
        // Not wanting a value, and quantities and numbers that the API server writes anew.
        (Value::Null, _) => None,
        (Value::Object(wanted), Value::Null) if wanted.is_empty() => None,
        (Value::Array(wanted), Value::Null) if wanted.is_empty() => None,
        (Value::Array(wanted), Value::Array(there)) if wanted.len() == there.len() => {
            let pairs = wanted.iter().zip(there).enumerate();
            pairs.into_iter().find_map(|(index, (wanted, there))| {
                difference(wanted, there, &format!("{path}[{index}]"))
            })
        }
        // An empty variable's value is left out by the API server.
        (Value::String(wanted), Value::Null) if wanted.is_empty() => None,
        (wanted, there) => (wanted != there).then(|| path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_wanted_is_compared() {
        let wanted = json!({"a": {"b": [1, {"c": "x"}]}, "empty": {}, "none": ""});
        let there = json!({"a": {"b": [1, {"c": "x", "default": true}], "more": 1}});
        assert_eq!(difference(&wanted, &there, ""), None);
        let changed = json!({"a": {"b": [1, {"c": "y"}]}});
        assert_eq!(difference(&wanted, &changed, ""), Some("a.b[1].c".into()));
        let shorter = json!({"a": {"b": [1]}});
        assert_eq!(difference(&wanted, &shorter, ""), Some("a.b".into()));
    }
}
