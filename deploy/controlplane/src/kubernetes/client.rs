//! Reaching the API server, and saying why that fails.

use std::time::Duration;

use kube::config::Config;

use super::Kubernetes;

/// For the connection, not for answers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A watch brings a bookmark every minute, if nothing else. A connection that is silent for
/// longer is dead, though TCP may not know it for a quarter of an hour.
const READ_TIMEOUT: Duration = Duration::from_secs(100);
/// No object is larger than etcd's limit of 1.5 MiB; writing one takes no longer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Neither a kubeconfig nor a service account.
    #[error(
        "how to reach the API server is not known: {0}; in a pod its service account must be mounted, elsewhere KUBECONFIG must name a file"
    )]
    Config(#[from] kube::config::InferConfigError),
    /// The configuration is there and cannot be used.
    #[error("the configuration for the API server cannot be used: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// Makes a handle from `KUBECONFIG`, `~/.kube/config`, or the pod's service account,
/// whichever is there first. Sends nothing yet.
///
/// `namespace` is the control plane's, `identity` the name of this replica's pod.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(namespace: &str, identity: &str) -> Result<Kubernetes, ConnectError> {
    let mut config = Config::infer().await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.write_timeout = Some(WRITE_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    let client =
        kube::Client::try_from(config).map_err(|error| ConnectError::Client(Box::new(error)))?;
    Ok(Kubernetes {
        client,
        namespace: namespace.into(),
        identity: identity.into(),
    })
}

/// What a failed request means for whoever operates the cluster. `verb` and `resource` are
/// those of an RBAC rule, `resource` with its group: `httproutes.gateway.networking.k8s.io`.
pub fn explain(verb: &str, resource: &str, error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => format!(
            "no permission to {verb} {resource}: grant it to the service account by a ClusterRole ({})",
            status.message
        ),
        kube::Error::Api(status) if status.code == 401 => format!(
            "the API server does not know us, so {resource} cannot be read or written: is the service account's token valid? ({})",
            status.message
        ),
        kube::Error::Api(status) => format!(
            "cannot {verb} {resource}: the API server says {} {}: {}",
            status.code, status.reason, status.message
        ),
        error => format!("cannot {verb} {resource}: {}", chain(error)),
    }
}

/// An error with its causes: the reason of a failed connection is three levels down.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_refusal_names_verb_and_resource() {
        let refused =
            Status::failure("User \"x\" cannot list resource", "Forbidden").with_code(403);
        let text = explain("list", "pods", &kube::Error::Api(refused.boxed()));
        assert!(text.contains("permission to list pods"), "{text}");
        assert!(text.contains("cannot list resource"), "{text}");
    }
}
