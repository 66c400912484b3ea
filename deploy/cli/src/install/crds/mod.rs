//! The custom resource definitions of Istio's groups.
//!
//! The file of the chart base is made from `schema.txt` by the tests of this module
//! (`ADIT_UPDATE=1`), which hold it to that. Names, versions, short names and columns are
//! Istio's, so that `kubectl get ap` and everybody's manifests work; where the readers of the
//! control plane take a field, it is typed.

#[cfg(test)]
mod generate;
#[cfg(test)]
mod table;

/// Which edition of the definitions an object is: a higher one is left alone.
pub const EDITION_ANNOTATION: &str = "install.adit.dev/crd-edition";
/// To be raised with every change of what users may write.
pub const EDITION: u32 = 1;
