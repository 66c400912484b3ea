//! Tells the API server by which roots it knows our webhook: `caBundle` of the
//! ValidatingWebhookConfiguration, which the installer makes and we keep current.

use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::ca::CurrentCa;
use crate::kubernetes::{FIELD_MANAGER, Kubernetes, explain};

const RESOURCE: &str = "validatingwebhookconfigurations.admissionregistration.k8s.io";
/// For one answer.
const DEADLINE: Duration = Duration::from_secs(15);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);

/// Keeps the bundles. Dropping it ends that.
#[derive(Debug)]
pub struct CaBundles {
    task: JoinHandle<()>,
}

impl CaBundles {
    /// Keeps those of the configuration of that name.
    ///
    /// Must be called within a tokio runtime.
    pub fn start(kubernetes: Kubernetes, name: String, ca: CurrentCa) -> Self {
        Self {
            task: tokio::spawn(run(Api::all(kubernetes.client), name, ca)),
        }
    }

    /// Returns when nothing is kept any more, which comes about by a defect only.
    pub async fn ended(&mut self) {
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "the webhook's caBundle is not kept any more");
        }
    }
}

impl Drop for CaBundles {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(api: Api<ValidatingWebhookConfiguration>, name: String, mut ca: CurrentCa) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(watcher::watcher(api.clone(), config));
    let mut backoff = DefaultBackoff::default();
    let mut known: Option<ValidatingWebhookConfiguration> = None;
    let mut again = false;
    let mut told = String::new();
    loop {
        tokio::select! {
            event = stream.next() => match event {
                Some(Ok(
                    watcher::Event::Apply(found) | watcher::Event::InitApply(found),
                )) => known = Some(found),
                Some(Ok(watcher::Event::Delete(_) | watcher::Event::Init)) => known = None,
                Some(Ok(watcher::Event::InitDone)) => backoff.reset(),
                Some(Err(error)) => {
                    let complaint = match &error {
                        watcher::Error::InitialListFailed(error) => explain("list", RESOURCE, error),
                        watcher::Error::WatchStartFailed(error) => explain("watch", RESOURCE, error),
                        error => error.to_string(),
                    };
                    tell(&mut told, complaint);
                    sleep(backoff.next().unwrap_or(RETRY)).await;
                    continue;
                }
                // kube's watchers do not end.
                None => return,
            },
            () = ca.changed() => {}
            () = sleep(RETRY), if again => {}
        }
        again = false;
        let roots = ca.get().root_pem();
        let Some(patch) = known.as_ref().and_then(|found| patch(found, &roots)) else {
            continue;
        };
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Strategic(patch);
        match timeout(DEADLINE, api.patch(&name, &params, &patch)).await {
            Ok(Ok(found)) => {
                known = Some(found);
                told.clear();
                tracing::info!(
                    name,
                    "the API server knows the webhook by the current roots"
                );
            }
            Ok(Err(error)) => {
                tell(&mut told, explain("patch", RESOURCE, &error));
                again = true;
            }
            Err(_) => {
                tell(&mut told, format!("no answer within {DEADLINE:?}"));
                again = true;
            }
        }
    }
}

/// The same complaint is made once.
fn tell(told: &mut String, complaint: String) {
    if *told != complaint {
        tracing::warn!("webhook: {complaint}");
        *told = complaint;
    }
}

/// What has to be changed, if anything: webhooks are merged by their names.
fn patch(found: &ValidatingWebhookConfiguration, roots: &str) -> Option<Value> {
    let right = ByteString(roots.as_bytes().to_vec());
    let wrong: Vec<_> = found
        .webhooks
        .iter()
        .flatten()
        .filter(|webhook| webhook.client_config.service.is_some())
        .filter(|webhook| webhook.client_config.ca_bundle.as_ref() != Some(&right))
        .map(|webhook| json!({"name": webhook.name, "clientConfig": {"caBundle": right}}))
        .collect();
    match wrong.is_empty() {
        true => None,
        false => Some(json!({"webhooks": wrong})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_is_changed() {
        let found = |bundles: &[(&str, Option<&str>, bool)]| -> ValidatingWebhookConfiguration {
            let webhooks: Vec<_> = bundles
                .iter()
                .map(|(name, bundle, service)| {
                    let mut config = json!({});
                    if *service {
                        config["service"] = json!({"name": "istiod", "namespace": "istio-system"});
                    } else {
                        config["url"] = json!("https://elsewhere");
                    }
                    if let Some(bundle) = bundle {
                        config["caBundle"] = json!(ByteString(bundle.as_bytes().to_vec()));
                    }
                    json!({"name": name, "clientConfig": config, "sideEffects": "None",
                        "admissionReviewVersions": ["v1"]})
                })
                .collect();
            serde_json::from_value(json!({"webhooks": webhooks})).expect("a configuration")
        };
        assert_eq!(patch(&found(&[]), "A"), None);
        assert_eq!(patch(&found(&[("x", Some("A"), true)]), "A"), None);
        let changed = patch(
            &found(&[
                ("x", Some("A"), true),
                ("y", None, true),
                ("z", None, false),
            ]),
            "A",
        )
        .expect("a change");
        assert_eq!(changed["webhooks"].as_array().map(Vec::len), Some(1));
        assert_eq!(changed["webhooks"][0]["name"], "y");
        assert_eq!(changed["webhooks"][0]["clientConfig"]["caBundle"], "QQ==");
    }
}
