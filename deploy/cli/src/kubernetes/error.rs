//! What went wrong with the API server, as one sentence that names the object.

use std::error::Error;

use http::StatusCode;
use kube::core::Status;

use super::Kubernetes;

impl Kubernetes {
    /// `what` completes "cannot ...".
    pub(super) fn explain(&self, error: kube::Error, what: &str) -> anyhow::Error {
        match error {
            kube::Error::Api(status) => self.refused(&status, what),
            kube::Error::Auth(error) => {
                anyhow::anyhow!("cannot sign in to {}: {}", self.name(), innermost(&error))
            }
            kube::Error::SerdeError(error) => {
                anyhow::anyhow!("cannot {what}: the API server's answer is not understood: {error}")
            }
            error => self.silent(&error),
        }
    }

    fn refused(&self, status: &Status, what: &str) -> anyhow::Error {
        match StatusCode::from_u16(status.code) {
            Ok(StatusCode::UNAUTHORIZED) => anyhow::anyhow!(
                "the API server of {} does not accept the credentials: {}",
                self.name(),
                status.message
            ),
            Ok(StatusCode::FORBIDDEN) => {
                anyhow::anyhow!("cannot {what}: {}", forbidden(&status.message))
            }
            _ => anyhow::anyhow!("cannot {what}: {}", status.message),
        }
    }

    /// Nothing came back.
    pub(super) fn silent(&self, error: &(dyn Error + 'static)) -> anyhow::Error {
        anyhow::anyhow!(
            "the API server {} of {} does not answer: {}",
            self.0.server,
            self.name(),
            innermost(error)
        )
    }

    pub(super) fn too_late(&self) -> anyhow::Error {
        anyhow::anyhow!(
            "the API server {} of {} has not answered within {}",
            self.0.server,
            self.name(),
            humantime::format_duration(self.0.deadline)
        )
    }
}

/// Whether the object was not there.
pub(super) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == StatusCode::NOT_FOUND.as_u16())
}

/// `pods is forbidden: User "u" cannot list resource "pods" ...` without the part that says
/// it again.
fn forbidden(message: &str) -> &str {
    match message.split_once(" is forbidden: ") {
        Some((_, reason)) => reason,
        None => message,
    }
}

/// The cause below all wrappers: "connection refused" rather than "error sending request".
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_once() {
        let told = "gateways.gateway.networking.k8s.io is forbidden: User \"u\" cannot list \
                    resource \"gateways\" in API group \"gateway.networking.k8s.io\"";
        assert!(forbidden(told).starts_with("User \"u\" cannot list"));
        assert_eq!(forbidden("no"), "no");
    }
}
