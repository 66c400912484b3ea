//! The kinds that the API server has, and which of them is meant by what a user or a
//! manifest says (pure, but for the fetch).

use std::rc::Rc;

use anyhow::{Context as _, bail};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::core::discovery::ApiResource;
use kube::core::discovery::v2::{APIGroupDiscovery, APIGroupDiscoveryList};

use super::Kubernetes;

/// A kind of object, in one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resource {
    pub(super) api: ApiResource,
    pub(super) namespaced: bool,
    singular: String,
    short_names: Vec<String>,
}

/// All of them: the core first, then the groups by priority; the preferred version of each
/// first.
#[derive(Debug, Default)]
pub(super) struct Resources(Vec<Resource>);

impl Resources {
    /// The kind that is meant: plural, singular, kind or short name, in any case; with a
    /// group, or a version and a group, behind a dot (`gateways.networking.istio.io`).
    pub(super) fn named(&self, name: &str) -> Option<&Resource> {
        let name = name.to_ascii_lowercase();
        let (word, rest) = match name.split_once('.') {
            Some((word, rest)) => (word, Some(rest)),
            None => (name.as_str(), None),
        };
        let belongs = |resource: &&Resource| {
            let api = &resource.api;
            rest.is_none_or(|rest| {
                rest == api.group || rest == format!("{}.{}", api.version, api.group)
            })
        };
        let candidates = || self.0.iter().filter(belongs);
        let full = |r: &&Resource| {
            word == r.api.plural || word == r.singular || word == r.api.kind.to_ascii_lowercase()
        };
        let short = |r: &&Resource| r.short_names.iter().any(|short| short == word);
        candidates().find(full).or_else(|| candidates().find(short))
    }

    /// The kind of a manifest.
    pub(super) fn of_manifest(&self, api_version: &str, kind: &str) -> Option<&Resource> {
        let is_it = |r: &&Resource| r.api.api_version == api_version && r.api.kind == kind;
        self.0.iter().find(is_it)
    }

    /// Every kind of a group, in its preferred version.
    pub(super) fn preferred(&self) -> impl Iterator<Item = &Resource> {
        self.0.iter().enumerate().filter_map(|(index, resource)| {
            let same = |r: &Resource| {
                r.api.group == resource.api.group && r.api.plural == resource.api.plural
            };
            (!self.0[..index].iter().any(same)).then_some(resource)
        })
    }

    fn add_group(&mut self, group: APIGroupDiscovery) {
        let name = group
            .metadata
            .and_then(|meta| meta.name)
            .unwrap_or_default();
        for version in group.versions {
            let version_name = version.version.unwrap_or_default();
            for found in version.resources {
                let kind = found.response_kind.and_then(|kind| kind.kind);
                let (Some(kind), Some(plural)) = (kind, found.resource) else {
                    continue;
                };
                self.0.push(Resource {
                    api: api_resource(&name, &version_name, kind, plural),
                    namespaced: found.scope.as_deref() == Some("Namespaced"),
                    singular: found.singular_resource.unwrap_or_default(),
                    short_names: found.short_names,
                });
            }
        }
    }

    /// What servers before 1.27 have.
    fn add_list(&mut self, list: APIResourceList) {
        let (group, version) = match list.group_version.split_once('/') {
            Some((group, version)) => (group, version),
            None => ("", list.group_version.as_str()),
        };
        for found in list.resources {
            // `pods/log` is no kind.
            if found.name.contains('/') {
                continue;
            }
            self.0.push(Resource {
                api: api_resource(group, version, found.kind, found.name),
                namespaced: found.namespaced,
                singular: found.singular_name,
                short_names: found.short_names.unwrap_or_default(),
            });
        }
    }
}

fn api_resource(group: &str, version: &str, kind: String, plural: String) -> ApiResource {
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: match group {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        },
        kind,
        plural,
    }
}

impl Kubernetes {
    /// The kinds that there are; asked for once.
    pub(super) async fn resources(&self) -> anyhow::Result<Rc<Resources>> {
        if let Some(known) = &*self.0.resources.borrow() {
            return Ok(known.clone());
        }
        let found = Rc::new(self.discover().await?);
        *self.0.resources.borrow_mut() = Some(found.clone());
        Ok(found)
    }

    async fn discover(&self) -> anyhow::Result<Resources> {
        let client = self.client();
        let what = || "ask which kinds of objects there are".to_owned();
        let mut all = Resources::default();
        let core: APIGroupDiscoveryList = self
            .call(what, client.list_core_api_versions_aggregated())
            .await?;
        let groups: APIGroupDiscoveryList =
            self.call(what, client.list_api_groups_aggregated()).await?;
        let aggregated = core.items.into_iter().chain(groups.items);
        for group in aggregated {
            all.add_group(group);
        }
        if !all.0.is_empty() {
            return Ok(all);
        }
        let core = client.list_core_api_resources("v1");
        all.add_list(self.call(what, core).await?);
        for group in self.call(what, client.list_api_groups()).await?.groups {
            let preferred = group.preferred_version.map(|v| v.group_version);
            let others = group.versions.into_iter().map(|v| v.group_version);
            let others: Vec<String> = others.filter(|v| Some(v) != preferred.as_ref()).collect();
            for version in preferred.into_iter().chain(others) {
                // One group whose server is away does not hide the others.
                let list = client.list_api_group_resources(&version);
                if let Ok(list) = self.call(what, list).await {
                    all.add_list(list);
                }
            }
        }
        Ok(all)
    }

    /// The kind that a user names.
    pub(super) async fn resource(&self, name: &str) -> anyhow::Result<Resource> {
        if let Some(found) = well_known(name) {
            return Ok(found);
        }
        let all = self.resources().await?;
        match all.named(name) {
            Some(found) => Ok(found.clone()),
            None if name.ends_with("gateway.networking.k8s.io") => Err(no_gateway_api(self.name())),
            None => bail!("{} has no kind {name:?}", self.name()),
        }
    }

    /// The kind of a manifest.
    pub(super) async fn manifest_resource(
        &self,
        api_version: &str,
        kind: &str,
    ) -> anyhow::Result<Resource> {
        let all = self.resources().await?;
        match all.of_manifest(api_version, kind) {
            Some(found) => Ok(found.clone()),
            None if api_version.starts_with("gateway.networking.k8s.io/") => {
                Err(no_gateway_api(self.name()))
            }
            None => Err(anyhow::anyhow!(
                "{} has no kind {kind} in {api_version}",
                self.name()
            ))
            .context("its CustomResourceDefinition may be missing"),
        }
    }
}

/// Kinds that every cluster has, and that commands ask for all the time.
fn well_known(name: &str) -> Option<Resource> {
    let (kind, singular, namespaced) = match name {
        "pods" => ("Pod", "pod", true),
        "services" => ("Service", "service", true),
        "configmaps" => ("ConfigMap", "configmap", true),
        "secrets" => ("Secret", "secret", true),
        "namespaces" | "namespace" => ("Namespace", "namespace", false),
        "nodes" => ("Node", "node", false),
        _ => return None,
    };
    Some(Resource {
        api: api_resource("", "v1", kind.into(), format!("{singular}s")),
        namespaced,
        singular: singular.into(),
        short_names: Vec::new(),
    })
}

fn no_gateway_api(cluster: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "{cluster} has no Gateway API: install its CustomResourceDefinitions first, for example by \
         kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/\
         download/v1.4.0/standard-install.yaml"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources() -> Resources {
        let mut all = Resources::default();
        for (group, version, kind, plural, short) in [
            ("", "v1", "Namespace", "namespaces", "ns"),
            ("", "v1", "Service", "services", "svc"),
            ("networking.istio.io", "v1", "Gateway", "gateways", "gw"),
            (
                "gateway.networking.k8s.io",
                "v1",
                "Gateway",
                "gateways",
                "gtw",
            ),
            (
                "gateway.networking.k8s.io",
                "v1beta1",
                "Gateway",
                "gateways",
                "gtw",
            ),
            ("serving.knative.dev", "v1", "Service", "services", "ksvc"),
        ] {
            all.0.push(Resource {
                api: api_resource(group, version, kind.into(), plural.into()),
                namespaced: kind != "Namespace",
                singular: kind.to_ascii_lowercase(),
                short_names: vec![short.into()],
            });
        }
        all
    }

    #[test]
    fn kinds_by_all_their_names() {
        let all = resources();
        let table = [
            ("ns", Some("v1 namespaces")),
            ("Namespace", Some("v1 namespaces")),
            ("SERVICES", Some("v1 services")),
            (
                "service.serving.knative.dev",
                Some("serving.knative.dev/v1 services"),
            ),
            ("gtw", Some("gateway.networking.k8s.io/v1 gateways")),
            ("gateway", Some("networking.istio.io/v1 gateways")),
            (
                "gateway.gateway.networking.k8s.io",
                Some("gateway.networking.k8s.io/v1 gateways"),
            ),
            (
                "gateways.v1beta1.gateway.networking.k8s.io",
                Some("gateway.networking.k8s.io/v1beta1 gateways"),
            ),
            ("gateway.example.com", None),
            ("pods", None),
        ];
        for (name, expected) in table {
            let found = all.named(name);
            let found = found.map(|r| format!("{} {}", r.api.api_version, r.api.plural));
            assert_eq!(found.as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn each_kind_once() {
        let all = resources();
        let versions: Vec<&str> = all
            .preferred()
            .map(|r| r.api.api_version.as_str())
            .collect();
        assert_eq!(versions.len(), 5);
        assert!(!versions.contains(&"gateway.networking.k8s.io/v1beta1"));
        let found = all.of_manifest("gateway.networking.k8s.io/v1beta1", "Gateway");
        assert!(found.is_some());
        assert!(all.of_manifest("v1", "Gateway").is_none());
    }
}
