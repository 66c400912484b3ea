//! A directory of ordinary manifests, read again whenever it changes.
//!
//! What is wrong never takes away what was right: an object that cannot be read keeps
//! its last good version, a document that is no YAML keeps all that its file held, and
//! a directory that cannot be listed keeps all its files. Only a file that is gone, or
//! an object that is gone from a file which reads well, is removed.
//!
//! Of two objects of the same name the one in the file with the lesser path wins, in
//! one file the first; the other is reported. Names that start with a dot (editors'
//! files, `..data` of ConfigMap mounts) and names that do not end in `.yaml`, `.yml` or
//! `.json` are not read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::decode::{Decoded, decode};
use super::document::{Chunk, parse_json, split};
use crate::model::{
    Code, FieldError, Finding, Object, ObjectRef, ObjectTable, Objects, Origin, Segment, Severity,
};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// Most files that are read.
const MAX_FILES: usize = 100_000;
/// Deepest folder that is read; also ends circles of symbolic links.
const MAX_DEPTH: usize = 16;
/// A file that changed less than this before it was read may change again without a
/// new time stamp, so it is read once more.
const SETTLED: Duration = Duration::from_secs(2);

/// The state of some directories, or of single files.
#[derive(Debug)]
pub struct Directory {
    roots: Vec<PathBuf>,
    /// Objects that hold where no file has them.
    base: BTreeMap<ObjectRef, Object>,
    files: BTreeMap<Arc<Path>, FileState>,
    table: ObjectTable,
    findings: Vec<Finding>,
}

#[derive(Debug)]
struct FileState {
    stamp: Stamp,
    entries: Vec<Entry>,
    findings: Vec<Finding>,
}

#[derive(Debug, Clone)]
struct Entry {
    object: Object,
    /// It was read without errors.
    good: bool,
}

/// What tells that a file is another than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    settled: bool,
}

impl Stamp {
    fn of(metadata: &Metadata, now: SystemTime) -> Self {
        let age = metadata
            .modified()
            .ok()
            .and_then(|modified| now.duration_since(modified).ok());
        Self {
            file: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            settled: age.is_some_and(|age| age >= SETTLED),
        }
    }

    fn is_current(&self, metadata: &Metadata, now: SystemTime) -> bool {
        let found = Self::of(metadata, now);
        self.settled
            && Self {
                settled: true,
                ..found
            } == *self
    }
}

impl Directory {
    /// Directories or files that have not been read yet.
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self {
            roots,
            base: BTreeMap::new(),
            files: BTreeMap::new(),
            table: ObjectTable::default(),
            findings: Vec::new(),
        }
    }

    /// Lays the files over other objects: of two of one name that of the file counts.
    pub fn over(mut self, base: BTreeMap<ObjectRef, Object>) -> Self {
        self.base = base;
        self
    }

    /// Everything it holds.
    pub fn objects(&self) -> &Objects {
        self.table.objects()
    }

    /// The object of that name.
    pub fn get(&self, reference: &ObjectRef) -> Option<&Object> {
        self.table.get(reference)
    }

    /// What is wrong with it.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Reads what has changed. Blocks on the file system.
    pub fn reload(&mut self) {
        let mut scan = Scan::default();
        for root in &self.roots {
            scan.visit(root, 0, true);
        }
        let now = SystemTime::now();
        let mut findings = scan.findings;
        let mut files = BTreeMap::new();
        let mut old = std::mem::take(&mut self.files);
        for (path, metadata) in scan.files {
            let before = old.remove(&path);
            let state = match before {
                Some(state) if state.stamp.is_current(&metadata, now) => state,
                before => match read(&path) {
                    Ok((text, metadata)) => {
                        let stamp = Stamp::of(&metadata, now);
                        load(&path, &text, stamp, before.as_ref())
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => {
                        let finding = unreadable(&path, 0, error.to_string());
                        match before {
                            Some(state) => {
                                findings.push(finding);
                                state
                            }
                            None => {
                                findings.push(finding);
                                continue;
                            }
                        }
                    }
                },
            };
            files.insert(path, state);
        }
        // Below a folder that cannot be listed nothing is known to be gone.
        for (path, state) in old {
            if scan.unlisted.iter().any(|folder| path.starts_with(folder)) {
                files.insert(path, state);
            }
        }
        let mut objects: BTreeMap<ObjectRef, Object> = BTreeMap::new();
        for state in files.values() {
            findings.extend(state.findings.iter().cloned());
            for entry in &state.entries {
                let reference = entry.object.reference();
                match objects.get(&reference) {
                    None => {
                        objects.insert(reference, entry.object.clone());
                    }
                    Some(winner) => findings.push(duplicate(&entry.object, winner)),
                }
            }
        }
        for (reference, object) in &self.base {
            let slot = objects.entry(reference.clone());
            slot.or_insert_with(|| object.clone());
        }
        self.files = files;
        self.findings = findings;
        self.table.replace(objects);
    }
}

fn duplicate(loser: &Object, winner: &Object) -> Finding {
    let origin = &loser.meta().origin;
    Finding {
        severity: Severity::Error,
        code: Code::Duplicate,
        object: Some(loser.reference()),
        file: origin.file.clone(),
        line: origin.line,
        field: "metadata.name".into(),
        message: format!(
            "the same object stands in {}, which is the one in force",
            winner.meta().origin
        ),
    }
}

fn unreadable(path: &Arc<Path>, line: u32, message: String) -> Finding {
    Finding {
        severity: Severity::Error,
        code: Code::Unreadable,
        object: None,
        file: Some(path.clone()),
        line,
        field: String::new(),
        message: format!(
            "cannot be read, the last good version of its objects stays in force: {message}"
        ),
    }
}

#[derive(Default)]
struct Scan {
    files: Vec<(Arc<Path>, Metadata)>,
    unlisted: BTreeSet<PathBuf>,
    findings: Vec<Finding>,
}

impl Scan {
    /// Symbolic links are followed: ConfigMap mounts consist of them.
    fn visit(&mut self, path: &Path, depth: usize, is_root: bool) {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_root => return,
            Err(error) => return self.give_up(path, error.to_string()),
        };
        if metadata.is_dir() {
            if depth >= MAX_DEPTH {
                return self.give_up(path, format!("folders are nested deeper than {MAX_DEPTH}"));
            }
            let entries = match fs::read_dir(path) {
                Ok(entries) => entries,
                Err(error) => return self.give_up(path, error.to_string()),
            };
            for entry in entries {
                match entry {
                    Ok(entry) if is_hidden(&entry.file_name()) => {}
                    Ok(entry) => self.visit(&entry.path(), depth + 1, false),
                    Err(error) => self.give_up(path, error.to_string()),
                }
            }
        } else if metadata.is_file() && (is_root || is_manifest(path)) {
            if self.files.len() >= MAX_FILES {
                return self.give_up(path, format!("there are more than {MAX_FILES} files"));
            }
            self.files.push((path.into(), metadata));
        }
    }

    fn give_up(&mut self, path: &Path, reason: String) {
        self.findings.push(unreadable(&path.into(), 0, reason));
        self.unlisted.insert(path.into());
    }
}

fn is_hidden(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().first() == Some(&b'.')
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension == *known)
    })
}

fn read(path: &Path) -> io::Result<(String, Metadata)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!(
            "is larger than {MAX_FILE_BYTES} bytes"
        )));
    }
    Ok((text, metadata))
}

fn load(path: &Arc<Path>, text: &str, stamp: Stamp, before: Option<&FileState>) -> FileState {
    let known = before
        .iter()
        .flat_map(|state| &state.entries)
        .map(|entry| (entry.object.reference(), entry))
        .collect();
    let mut loading = Loading {
        path,
        known,
        entries: Vec::new(),
        findings: Vec::new(),
        broken: false,
    };
    if path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        let chunk = Chunk {
            text,
            first_line: 1,
        };
        loading.document(&chunk, parse_json(text));
    } else {
        for chunk in split(text) {
            loading.document(&chunk, chunk.parse());
        }
    }
    loading.finish(stamp)
}

struct Loading<'a> {
    path: &'a Arc<Path>,
    known: BTreeMap<ObjectRef, &'a Entry>,
    entries: Vec<Entry>,
    findings: Vec<Finding>,
    broken: bool,
}

impl Loading<'_> {
    fn document(
        &mut self,
        chunk: &Chunk<'_>,
        parsed: Result<Option<serde_json::Value>, super::document::SyntaxError>,
    ) {
        let document = match parsed {
            Ok(None) => return,
            Ok(Some(document)) => document,
            Err(error) => {
                self.broken = true;
                let finding = unreadable(self.path, error.line, error.message);
                return self.findings.push(finding);
            }
        };
        let origin = Origin {
            file: Some(self.path.clone()),
            line: chunk.content_line(),
            item: None,
        };
        for (item, decoded) in decode(&document, &origin) {
            self.decoded(chunk, &origin, item, decoded);
        }
    }

    fn decoded(
        &mut self,
        chunk: &Chunk<'_>,
        origin: &Origin,
        item: Option<usize>,
        decoded: Decoded,
    ) {
        match decoded {
            Decoded::Object { object, errors } => {
                let reference = object.reference();
                let before = self.known.get(&reference).copied();
                let good = errors.is_empty();
                let kept = before.filter(|entry| !good && entry.good);
                self.report(
                    chunk,
                    item,
                    Some(&reference),
                    &errors,
                    match kept {
                        Some(_) => "; the last good version stays in force",
                        None => "; it fails closed until it is mended",
                    },
                );
                self.entries.push(match (kept, before) {
                    (Some(entry), _) => entry.clone(),
                    // The same `Arc` tells everyone that nothing changed.
                    (None, Some(entry)) if entry.object == object => Entry {
                        object: entry.object.clone(),
                        good,
                    },
                    _ => Entry { object, good },
                });
            }
            Decoded::Invalid { object, errors } => {
                let kept = object
                    .as_ref()
                    .and_then(|reference| self.known.get(reference).copied());
                // An object without a name may be any of those that the file had.
                self.broken |= object.is_none();
                self.report(
                    chunk,
                    item,
                    object.as_ref(),
                    &errors,
                    match (kept, &object) {
                        (Some(_), _) | (None, None) => "; the last good version stays in force",
                        (None, Some(_)) => "; the object is ignored",
                    },
                );
                self.entries.extend(kept.cloned());
            }
            Decoded::NotOurs => {}
            Decoded::Unknown { kind } => self.findings.push(Finding {
                severity: Severity::Info,
                code: Code::UnknownKind,
                object: None,
                file: Some(self.path.clone()),
                line: origin.line,
                field: "kind".into(),
                message: format!("{kind} is not a kind that the mesh reads"),
            }),
        }
    }

    fn report(
        &mut self,
        chunk: &Chunk<'_>,
        item: Option<usize>,
        object: Option<&ObjectRef>,
        errors: &[FieldError],
        consequence: &str,
    ) {
        for error in errors {
            let path = match item {
                Some(item) => error
                    .path
                    .below(&[Segment::Key("items".into()), Segment::Index(item)]),
                None => error.path.clone(),
            };
            self.findings.push(Finding {
                severity: Severity::Error,
                code: Code::SchemaValidationError,
                object: object.cloned(),
                file: Some(self.path.clone()),
                line: chunk.locate(&path.0),
                field: error.path.to_string(),
                message: format!("{}{consequence}", error.message),
            });
        }
    }

    fn finish(mut self, stamp: Stamp) -> FileState {
        if self.broken {
            let found: BTreeSet<_> = self
                .entries
                .iter()
                .map(|entry| entry.object.reference())
                .collect();
            let missing = self.known.iter().filter(|(key, _)| !found.contains(*key));
            self.entries
                .extend(missing.map(|(_, entry)| (*entry).clone()));
        }
        FileState {
            stamp,
            entries: self.entries,
            findings: self.findings,
        }
    }
}
