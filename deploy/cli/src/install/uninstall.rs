//! `adit uninstall`: the other way round.
//!
//! Node agents and node tunnels go together: when an agent ends and both DaemonSets are gone,
//! it takes itself out of the node's CNI configuration and has the node tunnel remove the
//! node's capture. The control plane follows, then the rights of all.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use kube::ResourceExt as _;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::access::{Access, id_of};
use super::apply::{confirm, namespace_id};
use super::crds::EDITION_ANNOTATION;
use super::object::ObjectId;
use super::options::ClusterArgs;
use super::state::{GENERATED_LABEL, owned};
use crate::output::{Outcome, Output};

/// Controllers of GatewayClasses that the control plane makes.
const CONTROLLERS: [&str; 2] = ["istio.io/mesh-controller", "istio.io/gateway-controller"];
const ROOT_CERTIFICATE: &str = "istio-ca-root-cert";

/// Remove the mesh from a cluster
///
/// Pods that are in the mesh go on without it, and are not restarted. Without --purge what
/// users have written stays: policies and their definitions, and the key of the certificate
/// authority, so that installing again continues where this ended.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Remove everything, of every revision: definitions with all policies, the certificate
    /// authority's key, root certificates, waypoints, annotations, the namespace
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
    /// Go on when a node's agent does not end in time
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
    super::block_on(uninstall(args, out))
}

async fn uninstall(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let (client, name) = args.cluster.connect().await?;
    let mut access = Access::new(client, name);
    access.dry_run = args.dry_run;
    let revision = args.revision.as_deref();
    let objects = owned(&access, if args.purge { None } else { revision }).await?;
    if objects.is_empty() && !args.purge {
        writeln!(
            out,
            "There is nothing in {} that `adit install` has made.",
            access.name
        )?;
        return Ok(Outcome::Well);
    }
    let waypoints = waypoints(&access).await?;
    if !waypoints.is_empty() && !args.purge {
        writeln!(
            out,
            "Warning: {} stay and are looked after by nobody: `adit waypoint delete --all` first removes them.",
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
        access: &access,
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
        removal.leftovers(&args.istio_namespace).await?;
    }
    match args.dry_run {
        true => writeln!(out, "This was a dry run: nothing has been removed.")?,
        false => writeln!(out, "✔ Uninstallation complete")?,
    }
    Ok(Outcome::Well)
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
            for object in self
                .access
                .list(api_version, kind, "", GENERATED_LABEL)
                .await?
            {
                self.delete(&id_of(&object, api_version, kind)).await?;
            }
        }
        Ok(())
    }

    /// What was written at run time, and what users have written for the mesh.
    async fn leftovers(&mut self, root: &str) -> anyhow::Result<()> {
        let class = "gateway.networking.k8s.io/v1";
        for object in self.access.list(class, "GatewayClass", "", "").await? {
            let controller = object.data["spec"]["controllerName"]
                .as_str()
                .unwrap_or_default();
            if CONTROLLERS.contains(&controller) {
                self.delete(&id_of(&object, class, "GatewayClass")).await?;
            }
        }
        for object in self
            .access
            .list("v1", "ConfigMap", "", "istio.io/config=true")
            .await?
        {
            if object.name_any() == ROOT_CERTIFICATE {
                self.delete(&id_of(&object, "v1", "ConfigMap")).await?;
            }
        }
        for (api_version, kind, names) in [
            ("v1", "Secret", &["istio-ca-secret", "adit-ca-previous"][..]),
            ("v1", "ConfigMap", &[ROOT_CERTIFICATE]),
            (
                "coordination.k8s.io/v1",
                "Lease",
                &["istio-leader", "istio-gateway-deployment", "adit-leader"],
            ),
        ] {
            for name in names {
                let id = ObjectId {
                    api_version: api_version.into(),
                    kind: kind.into(),
                    namespace: root.into(),
                    name: (*name).into(),
                };
                self.delete(&id).await?;
            }
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
        let namespace = namespace_id(root);
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
        const REDIRECTION: &str = "ambient.istio.io/redirection";
        let mut count = 0;
        for pod in self.access.list("v1", "Pod", "", "").await? {
            if pod.annotations().contains_key(REDIRECTION) {
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
