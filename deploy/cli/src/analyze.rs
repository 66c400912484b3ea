//! `adit analyze`: what is wrong with manifests before, or while, they are in force.

mod live;

use std::io::Write;
use std::path::PathBuf;

use adit_controlplane::analyze::{Finding, Severity, analyze_over};
use adit_controlplane::compile::MeshConfig;
use adit_controlplane::model::Kind;
use adit_shared::identity::TrustDomain;
use anyhow::Context as _;
use clap::{ArgAction, ValueEnum};

use crate::cluster::{Cluster, ClusterArgs};
use crate::output::{self, Outcome, Output, UsageError};

/// Look for mistakes in the mesh's configuration
///
/// Reads objects as the control plane does and says what is invalid, ineffective or leads
/// nowhere, with file, line and field. Without a path it looks at what is in force: in the
/// cluster, or in the local mesh that runs. Paths are looked at as if they were applied to
/// the cluster, or for themselves with --use-kube=false.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  # what is in the cluster
  adit analyze -A

  # what would be wrong if this were applied
  adit analyze -n shop shop.yaml

  # two files by themselves, as JSON, for a program
  adit analyze --use-kube=false -f shop.yaml -f policies.yaml -o json

  # in a pipeline: warnings fail it, one check is off
  adit analyze k8s/ --failure-threshold warning --suppress 'IST0118=Service shop/*'

Codes are Istio's where it has one, else ADIT…. An object's annotation
galley.istio.io/analyze-suppress (codes, or *) silences them for that object.")]
pub struct Args {
    /// File or folder of manifests
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// File or folder of manifests; may be given several times
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Look at the cluster too
    #[arg(short = 'k', long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    use_kube: bool,
    /// Everything in the cluster, not only one namespace
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// How findings are printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Severity from which on a finding makes the command fail
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "error")]
    failure_threshold: Level,
    /// Severity from which on a finding is printed
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "info")]
    output_threshold: Level,
    /// Leave out a code, for all objects or for one: CODE or 'CODE=KIND NAMESPACE/NAME', with *
    #[arg(short = 'S', long, value_name = "CODE[=OBJECT]")]
    suppress: Vec<Suppression>,
    /// Trust domain of the mesh [default: what the cluster's mesh configuration says, else
    /// cluster.local]
    #[arg(long, value_parser = TrustDomain::new)]
    trust_domain: Option<TrustDomain>,
    /// Namespace whose policies cover the whole mesh [default: that of the control plane]
    #[arg(long, value_name = "NAMESPACE")]
    root_namespace: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Format {
    /// One line a finding, and a summary.
    #[default]
    Log,
    Json,
    Yaml,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    Info,
    #[value(alias = "warn")]
    Warning,
    Error,
}

impl From<Level> for Severity {
    fn from(level: Level) -> Self {
        match level {
            Level::Info => Self::Info,
            Level::Warning => Self::Warning,
            Level::Error => Self::Error,
        }
    }
}

/// What is looked at.
struct Subject {
    /// Of the API server.
    documents: Vec<serde_json::Value>,
    paths: Vec<PathBuf>,
    mesh: MeshConfig,
    /// Findings are told of this namespace only; those of files always.
    namespace: Option<String>,
    /// For people.
    name: String,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let subject = subject(&args)?;
    let mut findings = analyze_over(&subject.documents, subject.paths, &subject.mesh);
    findings.retain(|finding| {
        let of_namespace = |namespace: &String| {
            let object = finding.object.as_ref();
            object.is_none_or(|object| match (object.kind, &*object.namespace) {
                (Kind::Namespace, _) => *object.name == **namespace,
                // Of the whole cluster.
                (_, "") => true,
                (_, of) => of == namespace,
            })
        };
        let from_file = finding.file.is_some() && args.cluster.namespace.is_none();
        (from_file || subject.namespace.as_ref().is_none_or(of_namespace))
            && !args.suppress.iter().any(|s| s.covers(finding))
    });
    let fails = Severity::from(args.failure_threshold);
    let outcome = Outcome::of(!findings.iter().any(|f| f.severity >= fails));
    let shown = Severity::from(args.output_threshold);
    findings.retain(|finding| finding.severity >= shown);
    let text = match args.output {
        Format::Log => log(&findings, &subject.name),
        Format::Json => output::json(&findings)?,
        Format::Yaml => output::yaml(&findings)?,
    };
    out.write_all(text.as_bytes())
        .context("cannot write the findings")?;
    Ok(outcome)
}

fn subject(args: &Args) -> anyhow::Result<Subject> {
    let mut paths = [args.paths.as_slice(), &args.files].concat();
    for path in &paths {
        path.metadata()
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    let cluster = match (args.use_kube, paths.is_empty()) {
        (true, true) => Some(args.cluster.open()?),
        // Paths can be looked at for themselves where nothing runs.
        (true, false) => args.cluster.find()?,
        (false, false) => None,
        (false, true) => return Err(no_paths()),
    };
    let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    let mut name = names.join(", ");
    let mut namespace = args.cluster.namespace.clone();
    let mut documents = Vec::new();
    let mut mesh = MeshConfig {
        root_namespace: args.cluster.kubernetes.istio_namespace.as_str().into(),
        ..MeshConfig::default()
    };
    match cluster {
        Some(Cluster::Kubernetes(cluster)) => {
            documents = live::objects(&cluster)?;
            if let Some(found) = live::trust_domain(&documents, &mesh.root_namespace) {
                mesh.trust_domain = found;
            }
            if !args.all_namespaces {
                let default = || cluster.default_namespace().to_owned();
                namespace.get_or_insert_with(default);
            }
            let place = match &namespace {
                Some(namespace) => format!("namespace {namespace} of {}", cluster.name()),
                None => cluster.name().to_owned(),
            };
            name = match name.is_empty() {
                true => place,
                false => format!("{name} and {place}"),
            };
        }
        Some(Cluster::Local(running)) if paths.is_empty() => {
            let manifests = running.status()?.manifests;
            name = manifests.display().to_string();
            paths.push(manifests);
        }
        Some(Cluster::Local(_)) | None => {}
    }
    if let Some(trust_domain) = &args.trust_domain {
        mesh.trust_domain = trust_domain.clone();
    }
    if let Some(root) = &args.root_namespace {
        mesh.root_namespace = root.as_str().into();
    }
    Ok(Subject {
        documents,
        paths,
        mesh,
        namespace,
        name,
    })
}

fn no_paths() -> anyhow::Error {
    UsageError("with --use-kube=false name the files to look at".into()).into()
}

fn log(findings: &[Finding], paths: &str) -> String {
    if findings.is_empty() {
        return format!("No validation issues found when analyzing {paths}.\n");
    }
    let mut text: String = findings
        .iter()
        .map(|finding| crate::table::printable(&finding.to_string()) + "\n")
        .collect();
    let counts: Vec<String> = [
        (Severity::Error, "error"),
        (Severity::Warning, "warning"),
        (Severity::Info, "remark"),
    ]
    .into_iter()
    .map(|(severity, word)| {
        let count = findings.iter().filter(|f| f.severity == severity).count();
        (count, word)
    })
    .filter(|(count, _)| *count > 0)
    .map(|(count, word)| format!("{count} {word}{}", if count == 1 { "" } else { "s" }))
    .collect();
    text += &format!("{} found when analyzing {paths}.\n", counts.join(", "));
    text
}

/// Findings that nobody wants to see: `CODE` or `CODE=Kind namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Suppression {
    code: String,
    object: Option<String>,
}

impl std::str::FromStr for Suppression {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (code, object) = match text.split_once('=') {
            Some((code, object)) => (code, Some(object.to_owned())),
            None => (text, None),
        };
        if code.is_empty() || object.as_deref() == Some("") {
            return Err("a code is needed, and an object after =");
        }
        Ok(Self {
            code: code.to_owned(),
            object,
        })
    }
}

impl Suppression {
    fn covers(&self, finding: &Finding) -> bool {
        let name = finding.object.as_ref().map(ToString::to_string);
        self.code == finding.code.as_str()
            && self.object.as_ref().is_none_or(|pattern| {
                name.is_some_and(|name| matches(pattern.as_bytes(), name.as_bytes()))
            })
    }
}

/// Whether `text` is as `pattern` says, in which `*` stands for anything. Of several stars
/// only the last one met ever has to be tried again.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, text, expected) in [
            ("Pod shop/web", "Pod shop/web", true),
            ("Pod shop/web", "Pod shop/web2", false),
            ("Pod shop/*", "Pod shop/web", true),
            ("* shop/*", "Pod shop/web", true),
            ("*/web-*-b", "Pod shop/web-a-b-b", true),
            ("*/web-*-b", "Pod shop/web-a-c", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn a_suppression_needs_a_code() {
        for text in ["", "=Pod a/b", "IST0101="] {
            assert!(text.parse::<Suppression>().is_err(), "{text}");
        }
        let parsed: Suppression = "IST0101=Pod a/b".parse().expect("valid");
        assert_eq!(parsed.object.as_deref(), Some("Pod a/b"));
    }
}
