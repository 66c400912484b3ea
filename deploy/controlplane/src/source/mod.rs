//! Where objects come from.
//!
//! A source publishes a [`SourceState`] through a `tokio::sync::watch` channel: the
//! whole set, with unchanged parts shared. The source is a directory of manifests, or the
//! API server of a cluster.

pub(crate) mod decode;
mod directory;
mod document;
mod kubernetes;
mod watch;

pub(crate) use decode::{Decoded, decode};
pub use directory::Directory;
pub use kubernetes::{KubernetesOptions, KubernetesSource};
pub use watch::{DirectorySource, SourceState, WatchOptions};

use std::fs;

use crate::model::{FieldPath, Origin, Segment};

/// The line on which a field of the object at `origin` stands now; the object's own
/// line where the file cannot tell. Reads the file: for messages, not for hot paths.
pub fn locate_field(origin: &Origin, path: &FieldPath) -> u32 {
    let text = origin
        .file
        .as_ref()
        .and_then(|file| fs::read_to_string(file).ok());
    let Some(text) = text else {
        return origin.line;
    };
    let path = match origin.item {
        Some(item) => path.below(&[Segment::Key("items".into()), Segment::Index(item)]),
        None => path.clone(),
    };
    document::split(&text)
        .iter()
        .find(|chunk| chunk.content_line() == origin.line)
        .map_or(origin.line, |chunk| chunk.locate(&path.0))
}

/// The objects of a text, with what is wrong with each.
#[cfg(test)]
pub(crate) fn decode_text(
    yaml: &str,
) -> Vec<(crate::model::Object, Vec<crate::model::FieldError>)> {
    let mut found = Vec::new();
    for chunk in document::split(yaml) {
        let document = chunk.parse().expect("YAML");
        for (_, decoded) in document
            .iter()
            .flat_map(|d| decode::decode(d, &Origin::NONE))
        {
            match decoded {
                decode::Decoded::Object { object, errors } => found.push((object, errors)),
                other => panic!("{other:?}"),
            }
        }
    }
    found
}
