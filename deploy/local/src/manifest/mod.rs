//! What the user wrote. Files become documents, documents become typed objects or a
//! sentence that names file, line, object and field; the documents that the local mesh
//! does not own go on to `aditd` untouched and on their own lines.

mod container;
mod expand;
mod gateway;
mod identity;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use container::{Launch, PodFacts, ProbeAction, ProbePlan, launch, probe};
pub(crate) use expand::stable_uid as expand_uid;
pub use expand::{Desired, DesiredPod, NodeFacts, Placement, expand};
pub use gateway::{Gateway, GatewaySpec, Infrastructure, Provisioned, WAYPOINT_CLASS};
pub(crate) use identity::plural;
pub use identity::{Identity, is_kind};

use crate::error::LocalError;

/// A larger manifest is somebody's mistake.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Directories below directories: a bound for loops of links.
const MAX_DEPTH: usize = 16;

/// Namespace and name.
pub type Key = (String, String);

/// A file as the user wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Its path below the manifest directory.
    pub relative: PathBuf,
    /// Its content.
    pub text: String,
}

/// An object that the local mesh itself acts on.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Object {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    Pod(Box<Pod>),
    Deployment(Box<Deployment>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Gateway(Box<Gateway>),
}

impl Object {
    /// Kind, namespace (empty for what has none) and name.
    pub fn identity(&self) -> (&'static str, String, String) {
        let (kind, metadata) = match self {
            Self::Namespace(object) => ("Namespace", &object.metadata),
            Self::Node(object) => ("Node", &object.metadata),
            Self::Pod(object) => ("Pod", &object.metadata),
            Self::Deployment(object) => ("Deployment", &object.metadata),
            Self::Service(object) => ("Service", &object.metadata),
            Self::EndpointSlice(object) => ("EndpointSlice", &object.metadata),
            Self::Gateway(object) => ("Gateway", &object.metadata),
        };
        let namespace = match kind {
            "Namespace" | "Node" => String::new(),
            _ => metadata
                .namespace
                .clone()
                .unwrap_or_else(|| "default".into()),
        };
        (kind, namespace, metadata.name.clone().unwrap_or_default())
    }
}

/// A file, understood.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParsedFile {
    /// Objects that the local mesh acts on.
    pub objects: Vec<Object>,
    /// The text for `aditd`: documents that the mesh publishes in its own form are
    /// blank lines, everything else stands where it stood.
    pub remainder: String,
    /// A sentence for each document that cannot be used.
    pub problems: Vec<String>,
}

/// Reads every manifest below `directory`, sorted by path.
///
/// # Errors
/// [`LocalError::File`] when the directory cannot be read, and a file that is too large
/// or no text as a [`LocalError::Manifest`] in its place.
pub fn read_directory(directory: &Path) -> Result<(Vec<SourceFile>, Vec<String>), LocalError> {
    let mut files = Vec::new();
    let mut problems = Vec::new();
    collect(directory, directory, MAX_DEPTH, &mut files, &mut problems)?;
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok((files, problems))
}

fn collect(
    root: &Path,
    directory: &Path,
    depth: usize,
    files: &mut Vec<SourceFile>,
    problems: &mut Vec<String>,
) -> Result<(), LocalError> {
    let entries = fs::read_dir(directory).map_err(LocalError::file("read", directory))?;
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // An entry that has just been removed is no error; the next look will not see it.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if hidden {
            continue;
        }
        if meta.is_dir() && depth > 0 {
            collect(root, &path, depth - 1, files, problems)?;
        }
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if !meta.is_file() || !matches!(extension, "yaml" | "yml" | "json") {
            continue;
        }
        let relative = path.strip_prefix(root).unwrap_or(&path).to_owned();
        if meta.len() > MAX_FILE {
            problems.push(format!("{}: larger than 16 MiB", relative.display()));
            continue;
        }
        match fs::read_to_string(&path) {
            Ok(text) => files.push(SourceFile { relative, text }),
            Err(error) => problems.push(format!("{}: {error}", relative.display())),
        }
    }
    Ok(())
}

/// Understands one file. Of `hidden` objects nothing is seen: something else has been
/// applied in their place.
pub fn parse(file: &SourceFile, hidden: &BTreeSet<Identity>) -> ParsedFile {
    let mut parsed = ParsedFile::default();
    for document in documents(&file.text) {
        let place = format!("{}:{}", file.relative.display(), document.line);
        let value = value(document.text);
        let identity = value.as_ref().ok().and_then(Identity::of);
        if identity.is_some_and(|identity| hidden.contains(&identity)) {
            blank(document.text, &mut parsed.remainder);
            continue;
        }
        match value.and_then(|value| parse_document(&value)) {
            Ok(Meaning::Ours(object)) => {
                blank(document.text, &mut parsed.remainder);
                parsed.objects.push(object);
            }
            Ok(Meaning::Shared(object)) => {
                parsed.remainder.push_str(document.text);
                parsed.objects.push(object);
            }
            Ok(Meaning::Other) => parsed.remainder.push_str(document.text),
            Err(problem) => {
                parsed.remainder.push_str(document.text);
                parsed.problems.push(format!("{place}: {problem}"));
            }
        }
    }
    parsed
}

/// [`parse`] for a file that was understood before: where a document is broken now, the
/// objects that it may have held stay as they were.
pub fn parse_again(
    file: &SourceFile,
    before: &ParsedFile,
    hidden: &BTreeSet<Identity>,
) -> ParsedFile {
    let mut parsed = parse(file, hidden);
    if !parsed.problems.is_empty() {
        let now: Vec<_> = parsed.objects.iter().map(Object::identity).collect();
        let is_hidden = |(kind, namespace, name): (&str, String, String)| {
            let same = |i: &Identity| i.kind == kind && i.namespace == namespace && i.name == name;
            hidden.iter().any(same)
        };
        let lost = before
            .objects
            .iter()
            .filter(|o| !now.contains(&o.identity()) && !is_hidden(o.identity()));
        parsed.objects.extend(lost.cloned());
    }
    parsed
}

struct Document<'a> {
    /// Begins with its `---` line, if it has one.
    text: &'a str,
    line: usize,
}

/// YAML 1.2, 9.1.4: `---` at the beginning of a line begins a document.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut all = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.trim_end();
        if offset > start && (marker == "---" || marker.starts_with("--- ")) {
            all.push(Document {
                text: &text[start..offset],
                line: start_line,
            });
            (start, start_line) = (offset, index + 1);
        }
        offset += line.len();
    }
    if offset > start {
        all.push(Document {
            text: &text[start..offset],
            line: start_line,
        });
    }
    all
}

/// The objects of a file, with their lines; what cannot be read is passed over.
pub(crate) fn values(file: &SourceFile) -> Vec<(usize, Value)> {
    let all = documents(&file.text).into_iter();
    all.filter_map(|document| Some((document.line, value(document.text).ok()?)))
        .filter(|(_, value)| !value.is_null())
        .collect()
}

/// The objects of a file, lists taken apart, or what is wrong with the first that is none.
pub(crate) fn checked_values(file: &SourceFile) -> Result<Vec<Value>, String> {
    let mut all = Vec::new();
    for document in documents(&file.text) {
        let wrong = |error: String| format!("line {}: {error}", document.line);
        let value = value(document.text).map_err(wrong)?;
        match &value["items"] {
            Value::Array(items) if value["kind"].as_str().is_some_and(|k| k.ends_with("List")) => {
                all.extend(items.clone());
            }
            _ if value.is_null() => {}
            _ => all.push(value),
        }
    }
    for value in &all {
        let identity =
            Identity::of(value).ok_or("an object needs apiVersion, kind and metadata.name")?;
        check_names(&identity)?;
    }
    Ok(all)
}

/// What becomes a path must be a name.
pub(crate) fn check_names(identity: &Identity) -> Result<(), String> {
    let kind = &identity.kind;
    let word = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric());
    let group = identity.group.is_empty() || is_object_name(&identity.group);
    if !word(kind) || !group || kind.len() > 63 {
        return Err(format!("{kind:?} of {:?} is no kind", identity.group));
    }
    let namespace = identity.namespace.is_empty() || is_object_name(&identity.namespace);
    if !is_object_name(&identity.name) || !namespace {
        return Err(format!("{kind} {:?} is no object name", identity.path()));
    }
    Ok(())
}

fn value(text: &str) -> Result<Value, String> {
    let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?;
    serde_json::to_value(value).map_err(|e| e.to_string())
}

/// As many lines, without content; the marker stays, so that neighbours stay apart.
fn blank(text: &str, out: &mut String) {
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if index == 0 && line.trim_end() == "---" {
            out.push_str(line);
        } else {
            out.push('\n');
        }
    }
}

enum Meaning {
    /// Published by the mesh in its own form.
    Ours(Object),
    /// Read by the mesh and by `aditd`.
    Shared(Object),
    /// Nothing to the mesh.
    Other,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: HeadMetadata,
}

#[derive(Deserialize, Default)]
struct HeadMetadata {
    #[serde(default)]
    name: String,
    namespace: Option<String>,
}

fn parse_document(value: &Value) -> Result<Meaning, String> {
    if value.is_null() {
        return Ok(Meaning::Other);
    }
    let head: Head = typed(value).map_err(|e| format!("no Kubernetes object: {e}"))?;
    let object = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Namespace") => typed(value).map(|o| Meaning::Shared(Object::Namespace(o))),
        ("v1", "Node") => typed(value).map(|o| Meaning::Ours(Object::Node(o))),
        ("v1", "Pod") => typed(value).map(|o| Meaning::Ours(Object::Pod(o))),
        ("v1", "Service") => typed(value).map(|o| Meaning::Ours(Object::Service(o))),
        ("apps/v1", "Deployment") => typed(value).map(|o| Meaning::Ours(Object::Deployment(o))),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            typed(value).map(|o| Meaning::Shared(Object::EndpointSlice(o)))
        }
        ("gateway.networking.k8s.io/v1" | "gateway.networking.k8s.io/v1beta1", "Gateway") => {
            typed(value).map(|o| Meaning::Shared(Object::Gateway(o)))
        }
        _ => return Ok(Meaning::Other),
    };
    let name = match (&head.metadata.namespace, head.kind.as_str()) {
        (_, "Namespace" | "Node") => head.metadata.name.clone(),
        (namespace, _) => {
            let namespace = namespace.as_deref().unwrap_or("default");
            format!("{namespace}/{}", head.metadata.name)
        }
    };
    if !is_object_name(&head.metadata.name) {
        let name = head.metadata.name;
        return Err(format!(
            "{}: metadata.name {name:?} is no object name",
            head.kind
        ));
    }
    if let Some(namespace) = &head.metadata.namespace
        && !is_object_name(namespace)
    {
        return Err(format!(
            "{} {}: metadata.namespace {namespace:?} is no object name",
            head.kind, head.metadata.name
        ));
    }
    object.map_err(|error| format!("{} {name}: {error}", head.kind))
}

/// Names become paths: RFC 1123 names only, which Kubernetes asks for as well.
fn is_object_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let mut chars = name.chars();
    name.len() <= 253
        && edge(chars.next())
        && edge(name.chars().last())
        && name.bytes().all(legal)
        && !name.contains("..")
}

/// The error begins with the path of the field.
fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => error.into_inner().to_string(),
            _ => format!("{path}: {}", error.into_inner()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> ParsedFile {
        let file = SourceFile {
            relative: "a.yaml".into(),
            text: text.into(),
        };
        parse(&file, &BTreeSet::new())
    }

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n";

    #[test]
    fn documents_that_the_mesh_publishes_become_blank_lines() {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                      metadata: {name: p}\n";
        let parsed = parse_text(&format!("{POD}---\n{policy}"));
        assert_eq!(parsed.remainder, format!("\n\n\n\n---\n{policy}"));
        assert_eq!(parsed.objects.len(), 1);
        assert!(parsed.problems.is_empty());
    }

    #[test]
    fn a_broken_document_goes_on_to_aditd_and_spoils_nothing() {
        let parsed = parse_text(&format!("kind: [\n---\n{POD}"));
        assert!(parsed.remainder.starts_with("kind: [\n---\n\n"));
        assert_eq!(parsed.objects.len(), 1);
        assert!(parsed.problems[0].starts_with("a.yaml:1: "));
    }

    #[test]
    fn a_document_that_breaks_keeps_its_last_good_objects() {
        let before = parse_text(&format!("{POD}---\n{}", POD.replace("name: a", "name: b")));
        let file = |text: String| SourceFile {
            relative: "a.yaml".into(),
            text,
        };
        let broken = parse_again(
            &file(format!("{POD}---\nkind: [")),
            &before,
            &BTreeSet::new(),
        );
        assert_eq!(broken.objects, before.objects);
        let removed = parse_again(&file(POD.into()), &before, &BTreeSet::new());
        assert_eq!(removed.objects.len(), 1);
    }

    #[test]
    fn of_a_hidden_object_only_blank_lines_are_left() {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                      metadata: {name: p}\n";
        let file = SourceFile {
            relative: "a.yaml".into(),
            text: format!("{POD}---\n{policy}"),
        };
        let identities = values(&file).into_iter();
        let hidden = identities.filter_map(|(_, value)| Identity::of(&value));
        let parsed = parse(&file, &hidden.collect());
        assert_eq!(parsed.remainder, "\n\n\n\n---\n\n\n\n");
        assert_eq!(parsed.objects.len(), 0);
    }

    #[test]
    fn names_of_applied_objects_cannot_leave_their_directory() {
        for text in [
            "apiVersion: v1\nkind: ../x\nmetadata: {name: a}\n",
            "apiVersion: ../v1\nkind: X\nmetadata: {name: a}\n",
            "apiVersion: v1\nkind: X\nmetadata: {name: ../a}\n",
            "apiVersion: v1\nkind: X\nmetadata: {name: a, namespace: ..}\n",
            "kind: X\n",
            "a: [",
        ] {
            let file = SourceFile {
                relative: "-".into(),
                text: text.into(),
            };
            assert!(checked_values(&file).is_err(), "{text}");
        }
    }

    #[test]
    fn errors_name_file_line_object_and_field() {
        let text = format!(
            "{POD}---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: \
             shop}}\nspec: {{replicas: many}}\n"
        );
        let problem = parse_text(&text).problems.join("\n");
        assert!(
            problem.starts_with("a.yaml:5: Deployment shop/web: spec.replicas: "),
            "{problem}"
        );
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        for name in ["../x", "a/b", "", ".", "a..b", "A"] {
            assert!(!is_object_name(name), "{name}");
        }
        assert!(is_object_name("web-0.v1"));
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: ../..}\nspec: \
                    {containers: []}\n";
        assert_eq!(parse_text(text).objects.len(), 0);
    }
}
