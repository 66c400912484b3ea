//! Reading the `spec` of custom resources: every field, and no others.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::field::{FieldError, FieldPath, Segment};
use super::meta::Labels;

/// `null` means the same as absence.
pub(super) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A `T` from a mapping and from nothing else. Serde would take a list for a struct too,
/// field by field: `rules: [[]]` would be a rule that matches everything.
#[derive(Debug, Default)]
pub(super) struct Map<T>(T);

impl<T> Map<T> {
    pub(super) fn into_inner(self) -> T {
        self.0
    }
}

impl<T> std::ops::Deref for Map<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Map<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMaps<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> serde::de::Visitor<'de> for OnlyMaps<T> {
            type Value = T;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a mapping")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(serde::de::value::MapAccessDeserializer::new(map))
            }
        }

        deserializer
            .deserialize_map(OnlyMaps(std::marker::PhantomData))
            .map(Self)
    }
}

/// Reads a spec type from JSON, naming the field that does not fit.
pub(super) fn read_spec<'de, T: Deserialize<'de>>(spec: &'de Value) -> Result<T, FieldError> {
    let read: Result<Map<T>, _> = serde_path_to_error::deserialize(spec);
    read.map(Map::into_inner).map_err(|error| FieldError {
        path: FieldPath::from_serde(error.path()).below(&[Segment::Key("spec".into())]),
        message: error.inner().to_string(),
    })
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Selector {
    #[serde(deserialize_with = "nullable")]
    pub(super) match_labels: Labels,
}
