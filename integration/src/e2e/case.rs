//! What a test is to the runner.

use futures_util::future::LocalBoxFuture;

use super::test::Test;

/// Whether a test may run beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// It stays in its own namespaces.
    Shared,
    /// It disturbs the mesh or the cluster.
    Alone,
    /// It takes the mesh away: nothing can run after it.
    Last,
}

/// A test by name.
#[derive(Clone, Copy)]
pub struct Case {
    /// The function's name.
    pub name: &'static str,
    /// Beside which others it may run.
    pub place: Place,
    /// The test.
    pub run: fn(Test) -> LocalBoxFuture<'static, anyhow::Result<()>>,
}

/// Why a test cannot say anything on this cluster; as an error of a test it counts as
/// neither passed nor failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Skip(pub String);

/// A list of [`Case`]s from the names of functions.
macro_rules! cases {
    ($($place:ident: [$($name:ident),* $(,)?]),* $(,)?) => {
        &[$($($crate::e2e::Case {
            name: stringify!($name),
            place: $crate::e2e::Place::$place,
            run: |test| Box::pin($name(test)),
        }),*),*]
    };
}
pub(crate) use cases;
