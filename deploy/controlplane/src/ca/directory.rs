//! What has to be known about the pods that call.

use crate::auth::Caller;

/// Knows which pods run where.
pub trait PodDirectory: Send + Sync {
    /// Whether a pod of that namespace and service account, whose phase is not `Failed`, runs
    /// on `node` (Istio's node authorizer).
    fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool;

    /// Whether the pod that the caller's token names exists, with that uid and service account.
    ///
    /// The default says yes, for sources in which the node proxies themselves are not listed
    /// (the directory source); the signature of the token then vouches for it alone.
    fn knows(&self, caller: &Caller) -> bool {
        let _ = caller;
        true
    }

    /// The Gateway, in the caller's namespace, whose pod the caller's token names. The
    /// default knows none.
    fn gateway_of(&self, caller: &Caller) -> Option<String> {
        let _ = caller;
        None
    }
}
