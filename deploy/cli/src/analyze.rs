//! `adit analyze`: the control plane's checks over manifests.

use std::path::PathBuf;
use std::process::ExitCode;

use adit_controlplane::analyze::{Finding, Severity, analyze_paths};
use adit_controlplane::compile::MeshConfig;
use anyhow::ensure;
use clap::{Args, ValueEnum};

use crate::output::{Format, print_value};

/// Options of `analyze`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Files and directories of manifests
    paths: Vec<PathBuf>,
    /// The same as a path
    #[arg(short = 'f', long = "filename")]
    files: Vec<PathBuf>,
    /// Only objects of this namespace, and those without one
    #[arg(short, long)]
    namespace: Option<String>,
    /// Codes that are not reported, `IST0118` or `IST0118=Service shop/web`; may be repeated
    #[arg(short = 'S', long)]
    suppress: Vec<String>,
    /// How to print: short is one line per finding
    #[arg(short, long, default_value = "short")]
    output: Format,
    /// The mildest that is printed
    #[arg(long, default_value = "info")]
    output_threshold: Threshold,
    /// The mildest that makes the exit status 1
    #[arg(long, default_value = "error")]
    failure_threshold: Threshold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Threshold {
    Info,
    Warning,
    Error,
}

impl Threshold {
    fn admits(self, severity: Severity) -> bool {
        severity
            >= match self {
                Self::Info => Severity::Info,
                Self::Warning => Severity::Warning,
                Self::Error => Severity::Error,
            }
    }
}

pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut paths = options.paths;
    paths.extend(options.files);
    ensure!(
        !paths.is_empty(),
        "name the files or directories to analyze"
    );
    for path in &paths {
        ensure!(path.exists(), "{} does not exist", path.display());
    }
    let mut findings = analyze_paths(paths, &MeshConfig::default());
    findings.retain(|finding| {
        let wanted = in_namespace(finding, options.namespace.as_deref());
        wanted && !options.suppress.iter().any(|s| suppresses(s, finding))
    });
    let mut severities = findings.iter().map(|finding| finding.severity);
    let failed = severities.any(|severity| options.failure_threshold.admits(severity));
    findings.retain(|finding| options.output_threshold.admits(finding.severity));
    match options.output {
        Format::Short if findings.is_empty() => println!("No validation issues found."),
        Format::Short => findings.iter().for_each(|finding| println!("{finding}")),
        format => print_value(&findings, format)?,
    }
    Ok(match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// Objects read as `<kind> <namespace>/<name>`, or `<kind> <name>` without a namespace.
fn in_namespace(finding: &Finding, namespace: Option<&str>) -> bool {
    let (Some(namespace), Some(object)) = (namespace, &finding.object) else {
        return true;
    };
    let text = object.to_string();
    let name = text.split(' ').nth(1).unwrap_or_default();
    name.split_once('/').is_none_or(|(own, _)| own == namespace)
}

fn suppresses(rule: &str, finding: &Finding) -> bool {
    let (code, object) = match rule.split_once('=') {
        Some((code, object)) => (code, Some(object)),
        None => (rule, None),
    };
    let named = finding.object.as_ref().map(ToString::to_string);
    code == finding.code.as_str()
        && object.is_none_or(|object| object == "*" || named.as_deref() == Some(object))
}
