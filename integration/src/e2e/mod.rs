//! End-to-end tests on a real Kubernetes cluster: what a user does with `adit` and
//! `kubectl`, under load, and while parts of the mesh and of the cluster fail.
//!
//! One function is one test. To add one, write `async fn name(test: Test) ->
//! anyhow::Result<()>` in a file of [`tests`], name it in that file's `TESTS`, and it is in
//! the table of `make e2e`. It gets a namespace of its own ([`Test`]), which is removed
//! afterwards. Tests of [`Place::Shared`] run beside others and must not disturb the mesh
//! outside their namespaces; those of [`Place::Alone`] may kill whatever they like, and
//! leave it as they found it.

mod app;
mod case;
mod cluster;
mod environment;
mod helm;
mod runner;
mod test;
pub mod tests;

pub use app::{App, Caller};
pub use case::{Case, Place, Skip};
pub use cluster::{Cluster, Executed};
pub use environment::{Environment, Flavour, Wanted, own_kubeconfig};
pub use runner::{Outcome, Report, run};
pub use test::{SOON, Test, eventually, host};
