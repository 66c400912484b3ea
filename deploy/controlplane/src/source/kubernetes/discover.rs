//! Which of the kinds there are, and in which version: custom resources come and go with
//! their CRDs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::api::Api;
use kube::core::metadata::PartialObjectMeta;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::kinds::{FOLLOWED, Resource, custom_groups, is_followed_crd};
use crate::kubernetes::explain;
use crate::model::Kind;

/// For one answer.
const DEADLINE: Duration = Duration::from_secs(15);

/// What was found out about the custom kinds. A kind that is not in it may be there or not.
pub(super) type Discovered = BTreeMap<Kind, Option<&'static str>>;

/// Asks for the groups that we know and for what is in them.
///
/// # Errors
/// In words, if not even the groups can be had.
pub(super) async fn discover(client: &kube::Client) -> Result<Discovered, String> {
    let groups = within(client.list_api_groups())
        .await
        .map_err(|reason| format!("which APIs there are: {reason}"))?;
    let mut found = Discovered::new();
    for name in custom_groups() {
        let served: Vec<String> = groups
            .groups
            .iter()
            .filter(|group| group.name == name)
            .flat_map(|group| group.versions.iter().map(|version| version.version.clone()))
            .collect();
        let mut lists = BTreeMap::new();
        let mut complete = true;
        for version in served {
            match within(client.list_api_group_resources(&format!("{name}/{version}"))).await {
                Ok(list) => {
                    lists.insert(version, list);
                }
                Err(reason) => {
                    tracing::warn!(group = name, version, reason, "what is in an API group");
                    complete = false;
                }
            }
        }
        for resource in FOLLOWED.iter().filter(|resource| resource.group == name) {
            match best(resource, &lists) {
                // An unknown version may have been a better one: wait for the whole answer.
                version if complete => {
                    found.insert(resource.kind, version);
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

fn best(resource: &Resource, lists: &BTreeMap<String, APIResourceList>) -> Option<&'static str> {
    resource.versions.iter().copied().find(|version| {
        lists.get(*version).is_some_and(|list| {
            list.resources.iter().any(|served| {
                served.name == resource.plural && served.verbs.iter().any(|verb| verb == "watch")
            })
        })
    })
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(explain("get", "the discovery API", &error)),
        Err(_) => Err(format!("no answer within {DEADLINE:?}")),
    }
}

/// Wakes `changed` when one of our CRDs comes, changes or goes. Without permission to look
/// at CRDs only the regular rounds find out.
pub(super) async fn watch_crds(client: kube::Client, changed: Arc<Notify>) {
    let crds: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(client);
    let mut stream = std::pin::pin!(watcher::watcher(crds, watcher::Config::default()));
    let mut backoff = DefaultBackoff::default();
    let mut told = false;
    while let Some(event) = stream.next().await {
        let name = match event {
            Ok(watcher::Event::Apply(crd) | watcher::Event::Delete(crd)) => crd.metadata.name,
            Ok(watcher::Event::InitDone) => {
                backoff.reset();
                told = false;
                changed.notify_one();
                continue;
            }
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        %error,
                        "customresourcedefinitions.apiextensions.k8s.io cannot be watched; new ones are found more slowly"
                    );
                }
                sleep(backoff.next().unwrap_or(DEADLINE)).await;
                continue;
            }
        };
        if name.is_some_and(|name| is_followed_crd(&name)) {
            changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResource;

    use super::*;

    fn list(plurals: &[&str]) -> APIResourceList {
        let resource = |name: &&str| APIResource {
            name: (*name).to_owned(),
            verbs: vec!["list".into(), "watch".into()],
            ..APIResource::default()
        };
        APIResourceList {
            resources: plurals.iter().map(resource).collect(),
            ..APIResourceList::default()
        }
    }

    #[test]
    fn the_best_version_that_is_served_wins() {
        let tls = FOLLOWED
            .iter()
            .find(|resource| resource.kind == Kind::TlsRoute)
            .expect("followed");
        let served = |versions: &[(&str, &[&str])]| {
            let lists = versions
                .iter()
                .map(|(version, plurals)| ((*version).to_owned(), list(plurals)))
                .collect();
            best(tls, &lists)
        };
        assert_eq!(served(&[]), None);
        assert_eq!(served(&[("v1", &["gateways"])]), None);
        assert_eq!(
            served(&[("v1", &["gateways"]), ("v1alpha2", &["tlsroutes"])]),
            Some("v1alpha2")
        );
        assert_eq!(
            served(&[
                ("v1", &["tlsroutes", "tlsroutes/status"]),
                ("v1alpha2", &["tlsroutes"])
            ]),
            Some("v1")
        );
        assert_eq!(served(&[("v2", &["tlsroutes"])]), None);
    }
}
