//! What can go wrong while a mesh is built or asked for something.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the local mesh; the message names the object it is about.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// A manifest cannot be used.
    #[error("{0}")]
    Manifest(String),
    /// A file or directory could not be read, written, mounted or removed.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// What was tried, for example `create`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, as a sentence without its end.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A helper program (`ip`, `nft`) reported an error.
    #[error("{program} failed for {what}: {message}")]
    Helper {
        /// The program.
        program: &'static str,
        /// What it was run for.
        what: String,
        /// Its exit status and standard error.
        message: String,
    },
    /// Something did not happen within its deadline.
    #[error("{what} did not happen within {seconds:.1} s{detail}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The deadline in seconds.
        seconds: f64,
        /// What was seen last; empty, or begins with a separator.
        detail: String,
    },
    /// The mesh, node, pod or component named does not exist.
    #[error("{0}")]
    Unknown(String),
    /// A request to a running mesh was refused.
    #[error("{0}")]
    Refused(String),
    /// The supervisor of the mesh is gone.
    #[error("the supervisor of mesh {0} is not running; `adit local down` cleans up")]
    SupervisorGone(String),
}

impl LocalError {
    /// For `map_err` after an operation on a file.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    /// For `map_err` after a system call.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
