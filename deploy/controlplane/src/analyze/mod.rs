//! What is wrong with a mesh's configuration, or probably not what was meant.
//!
//! Codes are Istio's where it has one (`istioctl analyze`). An object's annotation
//! `galley.istio.io/analyze-suppress` (codes, or `*`) silences them.

mod metadata;
mod policies;
mod services;
mod waypoint_policies;
mod waypoints;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::compile::MeshConfig;
pub use crate::model::{Code, Finding, Severity};
use crate::model::{FieldError, FieldPath, Kind, Meta, ObjectRef, Objects, Origin};
use crate::source::{Decoded, Directory, decode, locate_field};

/// Analyzes directories or files of manifests. Blocks on the file system.
pub fn analyze_paths(paths: Vec<PathBuf>, mesh: &MeshConfig) -> Vec<Finding> {
    analyze_over(&[], paths, mesh)
}

/// Analyzes objects as an API server gives them, with manifests laid over them: of two
/// objects of one name that of the manifest counts. Blocks on the file system.
pub fn analyze_over(documents: &[Value], paths: Vec<PathBuf>, mesh: &MeshConfig) -> Vec<Finding> {
    let mut base = BTreeMap::new();
    let mut wrong: Vec<(ObjectRef, Vec<FieldError>)> = Vec::new();
    for document in documents {
        for (_, decoded) in decode(document, &Origin::NONE) {
            match decoded {
                Decoded::Object { object, errors } => {
                    let reference = object.reference();
                    wrong.push((reference.clone(), errors));
                    base.insert(reference, object);
                }
                Decoded::Invalid {
                    object: Some(reference),
                    errors,
                } => wrong.push((reference, errors)),
                // An API server has checked that much.
                Decoded::Invalid { object: None, .. } => {}
                Decoded::NotOurs | Decoded::Unknown { .. } => {}
            }
        }
    }
    let mut directory = Directory::new(paths).over(base);
    directory.reload();
    let mut findings = directory.findings().to_vec();
    wrong.retain(|(reference, _)| {
        let held = directory.get(reference);
        held.is_none_or(|object| object.meta().origin.file.is_none())
    });
    findings.extend(wrong.into_iter().flat_map(|(reference, errors)| {
        errors.into_iter().map(move |error| Finding {
            severity: Severity::Error,
            code: Code::SchemaValidationError,
            object: Some(reference.clone()),
            file: None,
            line: 0,
            field: error.path.to_string(),
            message: error.message,
        })
    }));
    findings.extend(analyze(directory.objects(), mesh));
    sort(&mut findings);
    findings
}

/// Analyzes objects that are valid each by itself.
pub fn analyze(objects: &Objects, mesh: &MeshConfig) -> Vec<Finding> {
    let mut report = Report {
        findings: Vec::new(),
    };
    metadata::check(objects, &mut report);
    services::check(objects, &mut report);
    policies::check(objects, mesh, &mut report);
    waypoint_policies::check(objects, mesh, &mut report);
    waypoints::check(objects, mesh, &mut report);
    sort(&mut report.findings);
    report.findings
}

/// The worst first, then as they stand in the files.
fn sort(findings: &mut [Finding]) {
    findings.sort_by(|a, b| {
        let key = |f: &Finding| {
            (
                std::cmp::Reverse(f.severity),
                f.file.clone(),
                f.line,
                f.code,
            )
        };
        key(a).cmp(&key(b))
    });
}

struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn add(
        &mut self,
        (kind, meta): (Kind, &Meta),
        path: FieldPath,
        severity: Severity,
        code: Code,
        message: String,
    ) {
        let suppressed = meta
            .annotation("galley.istio.io/analyze-suppress")
            .is_some_and(|list| {
                let mut codes = list.split(',').map(str::trim);
                codes.any(|listed| listed == "*" || listed == code.as_str())
            });
        if suppressed {
            return;
        }
        self.findings.push(Finding {
            severity,
            code,
            object: Some(meta.reference(kind)),
            file: meta.origin.file.clone(),
            line: locate_field(&meta.origin, &path),
            field: path.to_string(),
            message,
        });
    }
}
