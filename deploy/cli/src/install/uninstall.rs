//! `adit uninstall`: the other way round.
//!
//! Node agents and node tunnels go together: when an agent ends and both DaemonSets are gone,
//! it takes itself out of the node's CNI configuration and has the node tunnel remove the
//! node's capture. The control plane follows, then the rights of all.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use adit_controlplane::ca::{OWN_SECRET, PREVIOUS_SECRET};
use adit_controlplane::kubernetes::ROOT_CONFIG_MAP;
use adit_controlplane::kubernetes::lease::LEADER;
use adit_controlplane::status::REDIRECTION;
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::access::{Access, id_of};
use super::apply::{confirm, namespace_id};
use super::crds::EDITION_ANNOTATION;
use super::object::ObjectId;
use super::owner::{self, Owner, is_written_by_adit};
use super::state::{self, Place, owned};
use crate::kubernetes::{ConnectionArgs, Kubernetes};
use crate::output::{Outcome, Output};

/// Classes of waypoints have this controller.
const CONTROLLER: &str = "istio.io/mesh-controller";
/// What the control plane makes of waypoints. Istio's north-south gateways have another value.
const GENERATED: &str = "gateway.istio.io/managed=istio.io-mesh-controller";

/// Remove the mesh from a cluster
///
/// Pods that are in the mesh go on without it, and are not restarted. Without --purge what
/// users have written stays: policies and their definitions, and the key of the certificate
/// authority, so that installing again continues where this ended.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ConnectionArgs,
    /// Remove everything, of every revision: definitions with all policies, the certificate
    /// authority's key, root certificates, what runs of waypoints, annotations, the namespace.
    /// Gateways and routes stay, whose definitions are not Adit's
    #[arg(long)]
    purge: bool,
    /// Remove one revision only
    #[arg(short, long, value_name = "NAME", conflicts_with = "purge")]
    revision: Option<String>,
    /// The namespace of the mesh's own components
    #[arg(
        short = 'i',
        long = "istioNamespace",
        alias = "istio-namespace",
        value_name = "NAMESPACE",
        default_value = "istio-system"
    )]
    istio_namespace: String,
    /// Do not ask
    #[arg(short = 'y', long = "skip-confirmation")]
    yes: bool,
    /// Go on when a node's agent does not end in time; with --purge, also when there is
    /// another mesh or one that Helm has installed
    #[arg(long)]
    force: bool,
    /// Say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// How long pods may take to end
    #[arg(long, value_name = "DURATION", default_value = "180s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = Kubernetes::connect(&args.cluster, &args.istio_namespace)?;
    let mut access = Access::new(cluster.client().clone(), cluster.name().to_owned());
    access.dry_run = args.dry_run;
    cluster.block_on(uninstall(&args, &access, out))
}

async fn uninstall(args: &Args, access: &Access, out: &mut Output) -> anyhow::Result<Outcome> {
    if args.purge && !args.force {
        alone(access).await?;
    }
    let places = state::places(access).await?;
    let is_meant = |revision: &str| args.purge || means(args, &places, revision);
    let objects = owned(access, is_meant).await?;
    if objects.is_empty() && !args.purge {
        return nothing(args, &places, &access.name, out);
    }
    let waypoints = waypoints(access).await?;
    if !waypoints.is_empty() && !args.purge {
        writeln!(
            out,
            "Warning: {} stay and are looked after by nobody: `adit waypoint delete --all -n NAMESPACE` before this removes those of a namespace.",
            waypoints.join(", ")
        )?;
    }
    let purge = match args.purge {
        true => ", and everything that users have written for it",
        false => "",
    };
    let what = format!(
        "This will remove the mesh from {}: {} objects{purge}.",
        access.name,
        objects.len()
    );
    confirm(args.yes || args.dry_run, &what, out)?;

    let mut removal = Removal {
        access,
        deadline: Instant::now() + args.timeout,
        force: args.force,
        out,
    };
    removal.workloads(&objects).await?;
    if args.purge {
        removal.generated().await?;
    }
    for id in &objects {
        removal.delete(id).await?;
    }
    if args.purge {
        let mut namespaces: BTreeSet<&str> = BTreeSet::from([args.istio_namespace.as_str()]);
        namespaces.extend(places.iter().map(|place| place.namespace.as_str()));
        removal.leftovers(&namespaces).await?;
    }
    match args.dry_run {
        true => writeln!(out, "This was a dry run: nothing has been removed.")?,
        false => writeln!(out, "✔ Uninstallation complete")?,
    }
    Ok(Outcome::Well)
}

/// Whether objects of a revision are to be removed: unless another one was named, or it is
/// installed in another namespace.
fn means(args: &Args, places: &[Place], revision: &str) -> bool {
    let named = args.revision.as_deref();
    named.is_none_or(|named| state::revision_label(named) == revision)
        && state::elsewhere(places, &args.istio_namespace, revision).is_none()
}

fn nothing(
    args: &Args,
    places: &[Place],
    cluster: &str,
    out: &mut Output,
) -> anyhow::Result<Outcome> {
    let named = args.revision.as_deref().map(state::revision_label);
    let mut others = places.iter();
    if let Some(place) = others.find(|place| named.is_none_or(|named| named == place.revision)) {
        anyhow::bail!(
            "nothing of what is installed in {cluster} is in namespace {}; revision {} is in {namespace}: -i {namespace} removes it",
            args.istio_namespace,
            place.revision,
            namespace = place.namespace
        );
    }
    writeln!(
        out,
        "There is nothing in {cluster} that `adit install` has made."
    )?;
    Ok(Outcome::Well)
}

/// What `--purge` removes belongs to the whole cluster: another mesh would miss it, and an
/// Adit that Helm has installed as well.
async fn alone(access: &Access) -> anyhow::Result<()> {
    let parts = owner::parts(access).await?;
    let named = |owner: Owner| -> Vec<String> {
        let found = parts.iter().filter(|part| part.owner == owner);
        found.map(|part| part.id.to_string()).collect()
    };
    let (others, elsewhere) = (named(Owner::Other), named(Owner::Elsewhere));
    anyhow::ensure!(
        others.is_empty(),
        "{} of another mesh: --purge would take definitions and policies from it. Without --purge only Adit is removed; --force goes on",
        others.join(", ")
    );
    anyhow::ensure!(
        elsewhere.is_empty(),
        "{} of an Adit that `adit install` has not made: --purge would take keys, definitions and policies from it. Remove it first, with Helm if that has installed it; --force goes on",
        elsewhere.join(", ")
    );
    Ok(())
}

async fn waypoints(access: &Access) -> anyhow::Result<Vec<String>> {
    let gateways = access
        .list("gateway.networking.k8s.io/v1", "Gateway", "", "")
        .await?;
    let ours = gateways
        .iter()
        .filter(|gateway| gateway.data["spec"]["gatewayClassName"] == "istio-waypoint");
    let ids = ours.map(|gateway| id_of(gateway, "gateway.networking.k8s.io/v1", "Gateway"));
    Ok(ids.map(|id| id.to_string()).collect())
}

struct Removal<'a> {
    access: &'a Access,
    deadline: Instant,
    force: bool,
    out: &'a mut Output,
}

impl Removal<'_> {
    async fn delete(&mut self, id: &ObjectId) -> anyhow::Result<()> {
        if self.access.delete(id).await? {
            let verb = if self.access.dry_run {
                "would be removed"
            } else {
                "removed"
            };
            writeln!(self.out, "  {id} {verb}")?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// Deletes what Adit has written; what only looks like it stays.
    async fn delete_ours(
        &mut self,
        object: &DynamicObject,
        api_version: &str,
        kind: &str,
    ) -> anyhow::Result<()> {
        match is_written_by_adit(object) {
            true => self.delete(&id_of(object, api_version, kind)).await,
            false => Ok(()),
        }
    }

    /// What would stand in the way; node agents and node tunnels, until their pods have ended;
    /// then the control plane.
    async fn workloads(&mut self, objects: &[ObjectId]) -> anyhow::Result<()> {
        let of = |kind: &'static str| objects.iter().filter(move |id| id.kind == kind);
        let budgets = of("HorizontalPodAutoscaler").chain(of("PodDisruptionBudget"));
        for id in of("ValidatingWebhookConfiguration").chain(budgets) {
            self.delete(id).await?;
        }
        for kind in ["DaemonSet", "Deployment"] {
            let mut ending = Vec::new();
            for id in of(kind) {
                if let Some(workload) = self.access.get_json(id).await? {
                    let labels = workload["spec"]["selector"]["matchLabels"].clone();
                    self.delete(id).await?;
                    ending.push((id, labels));
                }
            }
            for (id, labels) in ending {
                let selector: Vec<_> = labels
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
                    .collect();
                self.ended(id, &selector.join(",")).await?;
            }
        }
        Ok(())
    }

    async fn ended(&mut self, id: &ObjectId, selector: &str) -> anyhow::Result<()> {
        if self.access.dry_run {
            return Ok(());
        }
        loop {
            let pods = self
                .access
                .list("v1", "Pod", &id.namespace, selector)
                .await?;
            let Some(pod) = pods.first() else {
                return Ok(());
            };
            if Instant::now() >= self.deadline {
                let node = pod.data["spec"]["nodeName"].as_str().unwrap_or("no node");
                let text = format!(
                    "{} on {node} has not ended in time: what it has changed on that node may stay until the node is restarted",
                    id_of(pod, "v1", "Pod")
                );
                anyhow::ensure!(self.force, "{text}; --force goes on");
                writeln!(self.out, "Warning: {text}.")?;
                return Ok(());
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// What the control plane has made of Gateways: nobody looks after it any more.
    async fn generated(&mut self) -> anyhow::Result<()> {
        for (api_version, kind) in [
            ("autoscaling/v2", "HorizontalPodAutoscaler"),
            ("policy/v1", "PodDisruptionBudget"),
            ("apps/v1", "Deployment"),
            ("v1", "Service"),
            ("v1", "ServiceAccount"),
        ] {
            for object in self.access.list(api_version, kind, "", GENERATED).await? {
                self.delete_ours(&object, api_version, kind).await?;
            }
        }
        Ok(())
    }

    /// What was written at run time, and what users have written for the mesh.
    async fn leftovers(&mut self, namespaces: &BTreeSet<&str>) -> anyhow::Result<()> {
        let class = "gateway.networking.k8s.io/v1";
        for object in self.access.list(class, "GatewayClass", "", "").await? {
            if object.data["spec"]["controllerName"] == CONTROLLER {
                self.delete_ours(&object, class, "GatewayClass").await?;
            }
        }
        let roots = self
            .access
            .list("v1", "ConfigMap", "", "istio.io/config=true");
        for object in roots.await? {
            if object.name_any() == ROOT_CONFIG_MAP {
                self.delete_ours(&object, "v1", "ConfigMap").await?;
            }
        }
        for namespace in namespaces {
            self.state_of(namespace).await?;
        }
        self.annotations().await?;
        let definitions = "apiextensions.k8s.io/v1";
        let mut foreign = BTreeSet::new();
        for object in self
            .access
            .list(definitions, "CustomResourceDefinition", "", "")
            .await?
        {
            let group = object.data["spec"]["group"].as_str().unwrap_or_default();
            if object.annotations().contains_key(EDITION_ANNOTATION) {
                self.delete(&id_of(&object, definitions, "CustomResourceDefinition"))
                    .await?;
            } else if group.ends_with(".istio.io") {
                foreign.insert(group.to_owned());
            }
        }
        if !foreign.is_empty() {
            let groups: Vec<_> = foreign.into_iter().collect();
            writeln!(
                self.out,
                "  The definitions of {} are not from Adit, and stay.",
                groups.join(", ")
            )?;
        }
        for namespace in namespaces {
            self.namespace(namespace).await?;
        }
        Ok(())
    }

    /// What the control plane keeps in its namespace.
    async fn state_of(&mut self, root: &str) -> anyhow::Result<()> {
        for (api_version, kind, name) in [
            ("v1", "Secret", OWN_SECRET),
            ("v1", "Secret", PREVIOUS_SECRET),
            ("coordination.k8s.io/v1", "Lease", LEADER),
        ] {
            let id = ObjectId {
                api_version: api_version.into(),
                kind: kind.into(),
                namespace: root.into(),
                name: name.into(),
            };
            if let Some(object) = self.access.get(&id).await? {
                self.delete_ours(&object, api_version, kind).await?;
            }
        }
        Ok(())
    }

    async fn namespace(&mut self, name: &str) -> anyhow::Result<()> {
        let namespace = namespace_id(name);
        if let Some(there) = self.access.get(&namespace).await? {
            let made = there.labels().get("app.kubernetes.io/managed-by");
            match made.map(String::as_str) {
                Some("adit") => {
                    self.delete(&namespace).await?;
                    self.gone(&namespace).await?;
                }
                _ => writeln!(self.out, "  {namespace} was there before, and stays.")?,
            }
        }
        Ok(())
    }

    /// Waits until a namespace that is being removed is gone: what is in it goes first.
    async fn gone(&mut self, namespace: &ObjectId) -> anyhow::Result<()> {
        while !self.access.dry_run && self.access.get(namespace).await?.is_some() {
            if Instant::now() >= self.deadline {
                writeln!(
                    self.out,
                    "Warning: {namespace} is still being removed; its status says what it waits for."
                )?;
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Pods say of themselves whether they are captured.
    async fn annotations(&mut self) -> anyhow::Result<()> {
        let mut count = 0;
        for pod in self.access.list("v1", "Pod", "", "").await? {
            if pod.annotations().contains_key(REDIRECTION) && is_written_by_adit(&pod) {
                let patch = json!({"metadata": {"annotations": {REDIRECTION: null}}});
                self.access.merge(&id_of(&pod, "v1", "Pod"), &patch).await?;
                count += 1;
            }
        }
        if count > 0 {
            writeln!(
                self.out,
                "  The annotation {REDIRECTION} removed from {count} pods"
            )?;
        }
        Ok(())
    }
}
