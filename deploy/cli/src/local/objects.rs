//! `adit local apply|delete|label|get`: objects of a running mesh.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use adit_local::{Applied, read_manifests};
use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::NameArg;
use crate::cluster::{self, Cluster, name_of, namespace_of};
use crate::output::{self, Format, Outcome, Output};
use crate::table::Table;

/// Put objects over the manifests of a running mesh
///
/// They hold until they are deleted or the mesh is removed. The manifests stay as they
/// are.
#[derive(Debug, clap::Args)]
pub struct ApplyArgs {
    /// File or directory of manifests, - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    files: Vec<PathBuf>,
    /// Namespace of objects that name none
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    mesh: NameArg,
}

/// Remove an object that was applied
#[derive(Debug, clap::Args)]
pub struct DeleteArgs {
    /// Kind, for example httproute
    #[arg(required_unless_present = "files", requires = "name_of_object")]
    kind: Option<String>,
    /// Name
    #[arg(id = "name_of_object", value_name = "NAME")]
    name: Option<String>,
    /// The objects of these manifests
    #[arg(
        short = 'f',
        long = "filename",
        value_name = "PATH",
        conflicts_with = "kind"
    )]
    files: Vec<PathBuf>,
    /// Namespace
    #[arg(short, long, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    mesh: NameArg,
}

/// Change labels of an object
#[derive(Debug, clap::Args)]
pub struct LabelArgs {
    /// Kind, for example namespace
    kind: String,
    /// Name
    #[arg(id = "name_of_object", value_name = "NAME")]
    name: String,
    /// KEY=VALUE sets, KEY- removes
    #[arg(required = true)]
    labels: Vec<String>,
    /// Also where the label has another value
    #[arg(long)]
    overwrite: bool,
    /// Namespace
    #[arg(short, long, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    mesh: NameArg,
}

/// Show objects as the control plane sees them, with their status
#[derive(Debug, clap::Args)]
pub struct GetArgs {
    /// Kind, for example gateways
    kind: String,
    /// Name [default: all]
    #[arg(id = "name_of_object", value_name = "NAME")]
    name: Option<String>,
    /// Namespace [default: all]
    #[arg(short, long)]
    namespace: Option<String>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    mesh: NameArg,
}

pub fn apply(args: &ApplyArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let mut objects = read(&args.files)?;
    for object in &mut objects {
        let metadata = &mut object["metadata"];
        if let Some(namespace) = &args.namespace
            && metadata["namespace"].is_null()
        {
            metadata["namespace"] = namespace.as_str().into();
        }
    }
    let cluster = Cluster::Local(args.mesh.mesh()?);
    for done in cluster.apply(objects)? {
        writeln!(out, "{} {}", done.object, text(done.outcome))?;
    }
    Ok(Outcome::Well)
}

pub fn delete(args: &DeleteArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = Cluster::Local(args.mesh.mesh()?);
    let targets = match (&args.kind, &args.name) {
        (Some(kind), Some(name)) => vec![(kind.clone(), args.namespace.clone(), name.clone())],
        _ => {
            let objects = read(&args.files)?;
            let target = |object: &Value| {
                let kind = object["kind"].as_str().unwrap_or_default();
                let version = object["apiVersion"].as_str().unwrap_or_default();
                let kind = match version.split_once('/') {
                    Some((group, _)) => format!("{kind}.{group}"),
                    None => kind.to_owned(),
                };
                (
                    kind,
                    namespace_of(object).to_owned(),
                    name_of(object).to_owned(),
                )
            };
            objects.iter().map(target).collect()
        }
    };
    for (kind, namespace, name) in targets {
        cluster.delete(&kind, &namespace, &name)?;
        writeln!(out, "{} {name:?} deleted", kind.to_ascii_lowercase())?;
    }
    Ok(Outcome::Well)
}

pub fn label(args: &LabelArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let labels = cluster::parse_labels(&args.labels)?;
    let cluster = Cluster::Local(args.mesh.mesh()?);
    let (kind, name) = (args.kind.to_ascii_lowercase(), &args.name);
    let done = cluster.label(&kind, &args.namespace, name, labels, args.overwrite)?;
    let told = match done {
        Applied::Unchanged => "not labeled",
        _ => "labeled",
    };
    writeln!(out, "{kind}/{name} {told}")?;
    Ok(Outcome::Well)
}

pub fn get(args: &GetArgs, out: &mut Output) -> anyhow::Result<Outcome> {
    let cluster = Cluster::Local(args.mesh.mesh()?);
    let mut all = cluster.list(&args.kind, args.namespace.as_deref())?;
    if let Some(name) = &args.name {
        all.retain(|object| name_of(object) == name);
        if all.is_empty() {
            bail!("{} {name:?} not found", args.kind);
        }
    }
    let value = match (&args.name, all.as_slice()) {
        (Some(_), [one]) => one.clone(),
        _ => json!({"apiVersion": "v1", "kind": "List", "items": all}),
    };
    output::print(out, args.output, &value, || {
        let mut table = Table::new(["NAMESPACE", "NAME", "CONDITIONS"]);
        for object in &all {
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or("");
            table.row([namespace, name_of(object), &conditions(&object["status"])]);
        }
        table.render()
    })?;
    Ok(Outcome::Well)
}

/// `Accepted=True, Programmed=False (AddressNotAssigned)`, of the object and its parents.
fn conditions(status: &Value) -> String {
    let parents = status["parents"].as_array().into_iter().flatten();
    let all = std::iter::once(status).chain(parents);
    let all = all.flat_map(|holder| holder["conditions"].as_array().into_iter().flatten());
    let one = |condition: &Value| {
        let text = |key: &str| condition[key].as_str().unwrap_or("?");
        match text("status") {
            "True" => format!("{}=True", text("type")),
            status => format!("{}={status} ({})", text("type"), text("reason")),
        }
    };
    let all: Vec<String> = all.map(one).collect();
    all.join(", ")
}

fn text(outcome: Applied) -> &'static str {
    match outcome {
        Applied::Created => "created",
        Applied::Configured => "configured",
        Applied::Unchanged => "unchanged",
    }
}

fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            objects.extend(read_manifests(&text).context("standard input")?);
            continue;
        }
        let files = match path.is_dir() {
            false => vec![path.clone()],
            true => {
                let mut files: Vec<PathBuf> = fs::read_dir(path)
                    .with_context(|| path.display().to_string())?
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .filter(|path| {
                        let extension = path.extension().and_then(|e| e.to_str());
                        matches!(extension, Some("yaml" | "yml" | "json"))
                    })
                    .collect();
                files.sort();
                files
            }
        };
        for file in files {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let read = read_manifests(&text).with_context(|| file.display().to_string())?;
            objects.extend(read);
        }
    }
    Ok(objects)
}
