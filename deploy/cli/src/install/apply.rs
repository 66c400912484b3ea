//! `adit install` and `adit upgrade`.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::access::{Access, Applied};
use super::crds::{EDITION, EDITION_ANNOTATION};
use super::object::{Object, ObjectId};
use super::options::SpecArgs;
use super::precheck;
use super::spec::{Component, Planned, Spec};
use super::state::{self, installed, owned};
use super::wait;
use crate::kubernetes::{ConnectionArgs, Kubernetes};
use crate::output::{Outcome, Output, UsageError};

/// Install the mesh in a cluster, or bring what is installed to what is asked for
///
/// Applying the same twice changes nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit install --set profile=ambient -y
  adit install -f operator.yaml --set values.global.hub=registry.example/adit
  adit install --set profile=minimal --dry-run -y

Profiles: `adit manifest profiles`. What would be applied: `adit manifest generate`.
With Helm instead: the charts in deploy/charts.")]
pub struct Args {
    #[command(flatten)]
    common: Common,
}

/// Bring an installation to this version of adit
///
/// What the installation was given before holds unless it is given anew; objects that are no
/// longer part of it are removed.
#[derive(Debug, clap::Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    common: Common,
    /// Forget what the installation was given before
    #[arg(long)]
    reset_values: bool,
}

#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    cluster: ConnectionArgs,
    /// Do not ask
    #[arg(short = 'y', long = "skip-confirmation")]
    yes: bool,
    /// Go on in spite of what the check before finds
    #[arg(long)]
    force: bool,
    /// Check the installation at the end as `adit verify-install` does
    #[arg(long)]
    verify: bool,
    /// Let the API server check everything, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// How long components may take to become ready
    #[arg(long, value_name = "DURATION", default_value = "300s", value_parser = humantime::parse_duration)]
    readiness_timeout: Duration,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    begin(&args.common, None, out)
}

pub fn run_upgrade(args: UpgradeArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    begin(&args.common, Some(args.reset_values), out)
}

fn begin(args: &Common, upgrade: Option<bool>, out: &mut Output) -> anyhow::Result<Outcome> {
    // Mistakes of the command line before anything else.
    let given = args.spec.read()?;
    super::objects(&given)?;
    let cluster = Kubernetes::connect(&args.cluster, given.namespace())?;
    let mut access = Access::new(cluster.client().clone(), cluster.name().to_owned());
    cluster.block_on(install(args, given, &mut access, upgrade, out))
}

/// `upgrade`: it is one, and whether what was given before is forgotten.
async fn install(
    args: &Common,
    given: Spec,
    access: &mut Access,
    upgrade: Option<bool>,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    let places = state::places(access).await?;
    if let Some(place) = state::elsewhere(&places, given.namespace(), given.revision()) {
        anyhow::bail!(
            "revision {} is installed in namespace {namespace}, and a revision is in one namespace only: -i {namespace} changes it, `adit uninstall -i {namespace}` removes it, --revision makes another",
            place.revision,
            namespace = place.namespace
        );
    }
    let before = installed(access, given.namespace(), given.revision()).await?;
    let spec = match (&before, upgrade) {
        (None, Some(_)) => anyhow::bail!(
            "there is no installation in namespace {} to upgrade: `adit install` makes one (one made with Helm is upgraded with Helm)",
            given.namespace()
        ),
        (Some(before), Some(false)) => args.spec.read_over(before.spec.clone())?,
        _ => given,
    };
    if let Some(before) = &before
        && !args.force
        && is_newer(&before.version, env!("CARGO_PKG_VERSION"))
    {
        anyhow::bail!(
            "version {} is installed, which is newer than this adit ({}); --force goes back",
            before.version,
            env!("CARGO_PKG_VERSION")
        );
    }
    let plan = super::objects(&spec)?;

    let findings = precheck::check(access, &spec, !plan.is_empty()).await?;
    for warning in &findings.warnings {
        writeln!(out, "Warning: {warning}")?;
    }
    for problem in &findings.problems {
        writeln!(out, "Problem: {problem}")?;
    }
    if !findings.problems.is_empty() && !args.force {
        writeln!(
            out,
            "Nothing was installed; --force goes on in spite of this."
        )?;
        return Ok(Outcome::Findings);
    }
    let verb = if upgrade.is_some() {
        "upgrade"
    } else {
        "install"
    };
    confirm(
        args.yes || args.dry_run,
        &format!(
            "This will {verb} the profile {} in {}.",
            spec.profile(),
            access.name
        ),
        out,
    )?;

    access.dry_run = args.dry_run;
    let deadline = Instant::now() + args.readiness_timeout;
    let mut installation = Installation {
        access,
        deadline,
        foreign: Vec::new(),
        out,
    };
    let kept = installation.apply(&spec, &plan).await?;
    installation.prune(&spec, &kept).await?;
    if args.dry_run {
        writeln!(out, "This was a dry run: nothing has been written.")?;
        return Ok(Outcome::Well);
    }
    writeln!(out, "✔ Installation complete")?;
    if args.verify {
        let well = super::verify::report(access, &spec, out).await?;
        if !well {
            return Ok(Outcome::Findings);
        }
    }
    if plan
        .iter()
        .any(|(planned, _)| planned.component == Component::Ztunnel)
    {
        writeln!(
            out,
            "\nThe mesh is ready. To enrol the pods of a namespace, without restarting them:\n\
             \x20 kubectl label namespace default istio.io/dataplane-mode=ambient\n\
             and to give it HTTP routing and policies as well:\n\
             \x20 adit waypoint apply -n default --enroll-namespace --wait"
        )?;
    }
    Ok(Outcome::Well)
}

/// Asks, where there is somebody to ask.
pub fn confirm(yes: bool, what: &str, out: &mut Output) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(UsageError(format!("{what} There is nobody to ask: -y agrees")).into());
    }
    write!(out, "{what} Proceed? (y/N) ")?;
    out.flush()?;
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("cannot read the answer")?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(UsageError("nothing was done".into()).into()),
    }
}

struct Installation<'a> {
    access: &'a Access,
    deadline: Instant,
    /// Definitions of others, which were left alone.
    foreign: Vec<String>,
    out: &'a mut Output,
}

impl Installation<'_> {
    /// Applies everything, waiting for what the rest needs. What has been applied.
    async fn apply(
        &mut self,
        spec: &Spec,
        plan: &[(Planned, Vec<Object>)],
    ) -> anyhow::Result<Vec<ObjectId>> {
        let mut kept = Vec::new();
        let mut namespaces: Vec<&str> = plan.iter().map(|(p, _)| p.namespace.as_str()).collect();
        namespaces.push(spec.namespace());
        namespaces.sort_unstable();
        namespaces.dedup();
        for namespace in namespaces {
            self.namespace(namespace).await?;
        }
        let record = state::record(spec);
        if !self.access.dry_run {
            self.access.apply(&record).await?;
        }
        kept.push(record.id);

        // Node agent and node tunnel belong together: each waits for the other. Both wait for
        // the control plane, whose root certificate they mount.
        let mut waiting: Vec<(Component, usize, Vec<ObjectId>)> = Vec::new();
        for (planned, objects) in plan {
            let mut changed = 0;
            for object in objects {
                if self.apply_one(object).await? {
                    changed += 1;
                }
                kept.push(object.id.clone());
            }
            if !self.foreign.is_empty() {
                writeln!(
                    self.out,
                    "  {} definitions are there already, not from this version of Adit, and are left as they are: {}",
                    self.foreign.len(),
                    self.foreign.join(", ")
                )?;
                self.foreign.clear();
            }
            let workloads = objects.iter().map(|object| &object.id);
            let workloads =
                workloads.filter(|id| matches!(id.kind.as_str(), "Deployment" | "DaemonSet"));
            waiting.push((planned.component, changed, workloads.cloned().collect()));
            if planned.component != Component::Cni {
                self.ready(&mut waiting).await?;
            }
        }
        self.ready(&mut waiting).await?;
        Ok(kept)
    }

    async fn ready(
        &mut self,
        waiting: &mut Vec<(Component, usize, Vec<ObjectId>)>,
    ) -> anyhow::Result<()> {
        for (component, changed, workloads) in waiting.drain(..) {
            if !self.access.dry_run {
                wait::until_ready(self.access, &workloads, self.deadline, self.out)
                    .await
                    .with_context(|| format!("{} failed", component.title()))?;
            }
            let what = match changed {
                0 => "unchanged".to_owned(),
                1 => "1 object applied".to_owned(),
                more => format!("{more} objects applied"),
            };
            let ready = if workloads.is_empty() || self.access.dry_run {
                ""
            } else {
                ", ready"
            };
            writeln!(
                self.out,
                "✔ {} ({}): {what}{ready}",
                component.title(),
                component.key()
            )?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// Whether it changed anything.
    async fn apply_one(&mut self, object: &Object) -> anyhow::Result<bool> {
        if object.id.kind == "CustomResourceDefinition" && self.is_foreign(object).await? {
            return Ok(false);
        }
        if self.access.dry_run && object.id.kind != "CustomResourceDefinition" {
            // In a namespace that is not there, the API server could not even try.
            let namespace = namespace_id(&object.id.namespace);
            if !object.id.namespace.is_empty() && self.access.get(&namespace).await?.is_none() {
                return Ok(true);
            }
        }
        let applied = self.access.apply(object).await?;
        if object.id.kind == "CustomResourceDefinition" && !self.access.dry_run {
            self.established(&object.id).await?;
        }
        Ok(applied != Applied::Unchanged)
    }

    /// Somebody else's definition, or one of a later edition, is left alone.
    async fn is_foreign(&mut self, object: &Object) -> anyhow::Result<bool> {
        let Some(there) = self.access.get(&object.id).await? else {
            return Ok(false);
        };
        let edition = there.annotations().get(EDITION_ANNOTATION);
        let edition = edition.and_then(|edition| edition.parse::<u32>().ok());
        if edition.is_some_and(|edition| edition <= EDITION) {
            return Ok(false);
        }
        let name = &object.id.name;
        self.foreign.push(name.clone());
        let missing = missing_versions(&object.manifest, &there.data);
        if !missing.is_empty() {
            writeln!(
                self.out,
                "Warning: {name}, which is not from this version of Adit, does not serve {}: manifests that want that are refused",
                missing.join(", ")
            )?;
        }
        Ok(true)
    }

    async fn established(&self, id: &ObjectId) -> anyhow::Result<()> {
        loop {
            let definition = self.access.get_json(id).await?.unwrap_or_default();
            let conditions = definition["status"]["conditions"].as_array();
            let state = |kind: &str| {
                let found = conditions.into_iter().flatten().find(|c| c["type"] == kind);
                found.map(|condition| (condition["status"] == "True", condition["message"].clone()))
            };
            match (state("Established"), state("NamesAccepted")) {
                (Some((true, _)), _) => return Ok(()),
                (_, Some((false, message))) => {
                    anyhow::bail!("{id}: the API server does not accept its names: {message}")
                }
                _ => {}
            }
            anyhow::ensure!(
                Instant::now() < self.deadline,
                "{id} is not established in time"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn namespace(&mut self, name: &str) -> anyhow::Result<()> {
        let id = namespace_id(name);
        if self.access.get(&id).await?.is_some() {
            return Ok(());
        }
        let manifest = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": name,
                "labels": {
                    "app.kubernetes.io/managed-by": "adit",
                    // The node's agents mount directories of the host.
                    "pod-security.kubernetes.io/enforce": "privileged",
                },
            },
        });
        self.access.apply(&Object { id, manifest }).await?;
        let verb = if self.access.dry_run {
            "would be created"
        } else {
            "created"
        };
        writeln!(self.out, "✔ Namespace {name} {verb}")?;
        Ok(())
    }

    /// Removes what earlier installations of this revision had and this one has not.
    async fn prune(&mut self, spec: &Spec, kept: &[ObjectId]) -> anyhow::Result<()> {
        let revision = state::revision_label(spec.revision());
        for id in owned(self.access, |of| of == revision).await? {
            let same = |other: &ObjectId| {
                (&other.kind, &other.namespace, &other.name, other.group())
                    == (&id.kind, &id.namespace, &id.name, id.group())
            };
            if !kept.iter().any(same) && self.access.delete(&id).await? {
                writeln!(
                    self.out,
                    "✔ {id} removed: no longer part of the installation"
                )?;
            }
        }
        Ok(())
    }
}

/// The namespace as an object.
pub fn namespace_id(name: &str) -> ObjectId {
    ObjectId {
        api_version: "v1".into(),
        kind: "Namespace".into(),
        namespace: String::new(),
        name: name.into(),
    }
}

/// Versions that ours serves and the one that is there does not.
fn missing_versions(ours: &Value, there: &Value) -> Vec<String> {
    let served = |definition: &Value| -> Vec<String> {
        let versions = definition["spec"]["versions"].as_array();
        let versions = versions
            .into_iter()
            .flatten()
            .filter(|v| v["served"] == true);
        versions
            .filter_map(|version| version["name"].as_str().map(str::to_owned))
            .collect()
    };
    let there = served(there);
    let mut missing = served(ours);
    missing.retain(|version| !there.contains(version));
    missing
}

/// By major, minor and patch; what cannot be read is not newer.
pub fn is_newer(installed: &str, ours: &str) -> bool {
    let parts = |version: &str| -> Vec<u64> {
        let version = version.split(['-', '+']).next().unwrap_or_default();
        version
            .split('.')
            .map_while(|part| part.parse().ok())
            .collect()
    };
    parts(installed) > parts(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        for (installed, ours, newer) in [
            ("0.1.0", "0.1.0", false),
            ("0.2.0", "0.1.0", true),
            ("0.1.0", "0.10.0", false),
            ("0.1.1-rc1", "0.1.0", true),
            ("", "0.1.0", false),
            ("dev", "0.1.0", false),
        ] {
            assert_eq!(is_newer(installed, ours), newer, "{installed} {ours}");
        }
    }

    #[test]
    fn versions_that_are_missing_are_found() {
        let definition = |versions: &[(&str, bool)]| {
            let versions = versions
                .iter()
                .map(|(name, served)| json!({"name": name, "served": served}));
            json!({"spec": {"versions": versions.collect::<Vec<_>>()}})
        };
        let ours = definition(&[("v1", true), ("v1beta1", true)]);
        let there = definition(&[("v1beta1", true), ("v1", false)]);
        assert_eq!(missing_versions(&ours, &there), ["v1"]);
        assert!(missing_versions(&ours, &ours).is_empty());
    }
}
