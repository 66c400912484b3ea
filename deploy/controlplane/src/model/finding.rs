//! What is to be told to a user about an object.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::meta::ObjectRef;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Does probably not do what was meant.
    Warning,
    /// Not in force as written.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One message. Codes are Istio's (`istioctl analyze`) where it has one, else `ADIT…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which check found it.
    pub code: Code,
    /// The object, where one could be made out.
    pub object: Option<ObjectRef>,
    /// The file.
    pub file: Option<Arc<Path>>,
    /// The line, from 1; 0 without a file.
    pub line: u32,
    /// The field, for example `spec.rules[0].to[0].operation.ports[1]`; empty: all of it.
    pub field: String,
    /// What is the matter, and where there is one the way out.
    pub message: String,
}

/// The checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// A file or a document that is not YAML or not an object.
    Unreadable,
    /// The same object in two places.
    Duplicate,
    /// A kind that the control plane does not know.
    UnknownKind,
    /// An object that its kind's rules do not allow.
    SchemaValidationError,
    /// A name that leads nowhere.
    ReferencedResourceNotFound,
    /// An annotation of ours that means nothing there.
    MisplacedAnnotation,
    /// An `istio.io` annotation that nobody knows.
    UnknownAnnotation,
    /// An annotation or a label with a value that means nothing.
    InvalidAnnotation,
    /// A service port whose name states no protocol.
    PortNameIsNotUnderNamingConvention,
    /// A selector that picks nothing.
    NoMatchingWorkloadsFound,
    /// A policy or a part of it that has no effect.
    IneffectivePolicy,
    /// A policy that is not in force as written.
    NegativeConditionStatus,
    /// Several objects claim the same; the oldest wins.
    Conflict,
    /// A policy names a service's port where it sees the workload's.
    ServicePortInPolicy,
    /// A subset of a DestinationRule without a pod.
    DestinationRuleSubsetNotSelectPods,
    /// A DestinationRule for a host that nobody has.
    UnknownDestinationRuleHost,
}

impl Code {
    /// The code as `adit analyze` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReferencedResourceNotFound => "IST0101",
            Self::SchemaValidationError => "IST0106",
            Self::MisplacedAnnotation => "IST0107",
            Self::UnknownAnnotation => "IST0108",
            Self::PortNameIsNotUnderNamingConvention => "IST0118",
            Self::InvalidAnnotation => "IST0125",
            Self::NoMatchingWorkloadsFound => "IST0127",
            Self::IneffectivePolicy => "IST0167",
            Self::NegativeConditionStatus => "IST0171",
            Self::DestinationRuleSubsetNotSelectPods => "IST0173",
            Self::UnknownDestinationRuleHost => "IST0174",
            Self::Unreadable => "ADIT0001",
            Self::Duplicate => "ADIT0002",
            Self::UnknownKind => "ADIT0003",
            Self::Conflict => "ADIT0004",
            Self::ServicePortInPolicy => "ADIT0005",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            severity,
            code,
            object,
            file,
            line,
            field,
            message,
        } = self;
        write!(f, "{severity} [{}]", code.as_str())?;
        if let Some(object) = object {
            write!(f, " ({object}")?;
            if let Some(file) = file {
                write!(f, " {}:{line}", file.display())?;
            }
            f.write_str(")")?;
        } else if let Some(file) = file {
            write!(f, " ({}:{line})", file.display())?;
        }
        if !field.is_empty() {
            write!(f, " {field}:")?;
        }
        write!(f, " {message}")
    }
}

impl Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut map = serializer.serialize_struct("Finding", 7)?;
        map.serialize_field("severity", &self.severity)?;
        map.serialize_field("code", self.code.as_str())?;
        let object = self.object.as_ref().map(ToString::to_string);
        map.serialize_field("object", &object)?;
        map.serialize_field("file", &self.file.as_deref().map(Path::to_string_lossy))?;
        map.serialize_field("line", &self.line)?;
        map.serialize_field("field", &self.field)?;
        map.serialize_field("message", &self.message)?;
        map.end()
    }
}
