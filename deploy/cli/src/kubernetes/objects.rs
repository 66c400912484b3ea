//! Objects: list, get, apply, delete, label.

use adit_local::{Applied, ApplyOutcome, Labels};
use anyhow::{Context as _, bail};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PropagationPolicy};
use serde_json::{Value, json};

use super::discovery::Resource;
use super::error::is_not_found;
use super::{FIELD_MANAGER, Kubernetes};

/// Objects of one answer to a list.
const PAGE: u32 = 500;

impl Kubernetes {
    /// Every object of a kind, as a user names it, in one namespace or in all.
    ///
    /// # Errors
    /// When there is no such kind, no right to list it, or no answer.
    pub fn list(&self, kind: &str, namespace: Option<&str>) -> anyhow::Result<Vec<Value>> {
        self.block_on(async {
            let resource = self.resource(kind).await?;
            self.list_resource(&resource, namespace, None).await
        })
    }

    /// [`Self::list`], only those with some labels (`a=b,c`).
    ///
    /// # Errors
    /// As there.
    pub fn list_labelled(
        &self,
        kind: &str,
        namespace: Option<&str>,
        labels: &str,
    ) -> anyhow::Result<Vec<Value>> {
        self.block_on(async {
            let resource = self.resource(kind).await?;
            self.list_resource(&resource, namespace, Some(labels)).await
        })
    }

    /// The objects of every kind that `wanted` takes, of those that the API server has; kinds
    /// by group and kind.
    ///
    /// # Errors
    /// As for one kind.
    pub fn list_kinds(
        &self,
        wanted: impl Fn(&str, &str) -> bool,
        namespace: Option<&str>,
    ) -> anyhow::Result<Vec<Value>> {
        self.block_on(async {
            let known = self.resources().await?;
            let mut all = Vec::new();
            for resource in known.preferred() {
                if wanted(&resource.api.group, &resource.api.kind) {
                    all.extend(self.list_resource(resource, namespace, None).await?);
                }
            }
            Ok(all)
        })
    }

    /// One object; `None` if it is not there.
    ///
    /// # Errors
    /// When there is no such kind, no right to get it, or no answer.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Option<Value>> {
        self.block_on(async {
            let resource = self.resource(kind).await?;
            self.get_resource(&resource, namespace, name).await
        })
    }

    /// Creates or changes objects by server-side apply; what became of each.
    ///
    /// # Errors
    /// The first that the API server does not take, by its name; those before it are applied.
    pub fn apply(&self, objects: &[Value]) -> anyhow::Result<Vec<ApplyOutcome>> {
        self.block_on(async {
            let mut done = Vec::new();
            for object in objects {
                done.push(self.apply_one(object).await?);
            }
            Ok(done)
        })
    }

    /// Removes an object; what belongs to it goes after it.
    ///
    /// # Errors
    /// When it is not there, or there is no right to delete it.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<()> {
        self.block_on(async {
            let resource = self.resource(kind).await?;
            let api = self.api(&resource, Some(namespace));
            let parameters = DeleteParams {
                propagation_policy: Some(PropagationPolicy::Background),
                ..DeleteParams::default()
            };
            let what = || format!("delete {}", describe(&resource, namespace, name));
            self.call(what, api.delete(name, &parameters)).await?;
            Ok(())
        })
    }

    /// Sets labels, and removes those without a value.
    ///
    /// # Errors
    /// When a label has another value and `overwrite` is not set; when the object is not there.
    pub fn label(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        labels: &Labels,
        overwrite: bool,
    ) -> anyhow::Result<Applied> {
        self.block_on(async {
            let resource = self.resource(kind).await?;
            let described = describe(&resource, namespace, name);
            let found = self.get_resource(&resource, namespace, name).await?;
            let found = found.with_context(|| format!("there is no {described}"))?;
            let Some(metadata) = label_patch(&described, &found, labels, overwrite)? else {
                return Ok(Applied::Unchanged);
            };
            let api = self.api(&resource, Some(namespace));
            let patch = Patch::Merge(json!({"metadata": metadata}));
            let parameters = PatchParams {
                field_manager: Some(FIELD_MANAGER.into()),
                ..PatchParams::default()
            };
            let what = || format!("label {described}");
            self.call(what, api.patch(name, &parameters, &patch))
                .await?;
            Ok(Applied::Configured)
        })
    }

    async fn list_resource(
        &self,
        resource: &Resource,
        namespace: Option<&str>,
        labels: Option<&str>,
    ) -> anyhow::Result<Vec<Value>> {
        let api = self.api(resource, namespace);
        let what = || match namespace.filter(|_| resource.namespaced) {
            Some(namespace) => format!("list {} in namespace {namespace}", plural(resource)),
            None => format!("list {}", plural(resource)),
        };
        let mut parameters = ListParams {
            label_selector: labels.map(str::to_owned),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        let mut all = Vec::new();
        loop {
            let page = self.call(what, api.list(&parameters)).await?;
            for object in page.items {
                all.push(to_value(resource, object)?);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => return Ok(all),
            }
        }
    }

    async fn get_resource(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Option<Value>> {
        let api = self.api(resource, Some(namespace));
        let what = || format!("get {}", describe(resource, namespace, name));
        let get = async {
            match api.get(name).await {
                Ok(found) => Ok(Some(found)),
                Err(error) if is_not_found(&error) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let found = self.call(what, get).await?;
        found.map(|object| to_value(resource, object)).transpose()
    }

    async fn apply_one(&self, object: &Value) -> anyhow::Result<ApplyOutcome> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
        let name = text(&object["metadata"]["name"]);
        if version.is_empty() || kind.is_empty() || name.is_empty() {
            bail!("an object without apiVersion, kind or metadata.name cannot be applied");
        }
        let resource = self.manifest_resource(&version, &kind).await?;
        let namespace = object["metadata"]["namespace"].as_str();
        let namespace = namespace.unwrap_or_else(|| self.default_namespace());
        let before = self.get_resource(&resource, namespace, &name).await?;
        let api = self.api(&resource, Some(namespace));
        let what = || format!("apply {}", describe(&resource, namespace, &name));
        let parameters = PatchParams::apply(FIELD_MANAGER);
        let patch = Patch::Apply(object);
        let after = self
            .call(what, api.patch(&name, &parameters, &patch))
            .await?;
        let outcome = match before {
            None => Applied::Created,
            Some(before)
                if before["metadata"]["resourceVersion"].as_str()
                    == after.metadata.resource_version.as_deref() =>
            {
                Applied::Unchanged
            }
            Some(_) => Applied::Configured,
        };
        Ok(ApplyOutcome {
            object: format!("{}/{name}", singular(&resource)),
            outcome,
        })
    }

    fn api(&self, resource: &Resource, namespace: Option<&str>) -> Api<DynamicObject> {
        let client = self.client().clone();
        match namespace {
            Some(namespace) if resource.namespaced => {
                Api::namespaced_with(client, namespace, &resource.api)
            }
            _ => Api::all_with(client, &resource.api),
        }
    }
}

/// The metadata of a patch; `None` if all labels are as they should be.
fn label_patch(
    described: &str,
    object: &Value,
    labels: &Labels,
    overwrite: bool,
) -> anyhow::Result<Option<Value>> {
    let mut changes = serde_json::Map::new();
    for (key, wanted) in labels {
        let current = object["metadata"]["labels"][key].as_str();
        if current == wanted.as_deref() {
            continue;
        }
        if let (Some(current), Some(_), false) = (current, wanted, overwrite) {
            bail!("{described} has the label {key}={current} already: --overwrite changes it");
        }
        changes.insert(key.clone(), json!(wanted));
    }
    if changes.is_empty() {
        return Ok(None);
    }
    let mut metadata = json!({"labels": changes});
    if !overwrite {
        // Another who labels it meanwhile is not overwritten either.
        metadata["resourceVersion"] = object["metadata"]["resourceVersion"].clone();
    }
    Ok(Some(metadata))
}

/// Items of a list say neither version nor kind.
fn to_value(resource: &Resource, object: DynamicObject) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(object).context("cannot express this as JSON")?;
    value["apiVersion"] = resource.api.api_version.as_str().into();
    value["kind"] = resource.api.kind.as_str().into();
    Ok(value)
}

fn plural(resource: &Resource) -> String {
    match resource.api.group.as_str() {
        "" => resource.api.plural.clone(),
        group => format!("{}.{group}", resource.api.plural),
    }
}

fn singular(resource: &Resource) -> String {
    let kind = resource.api.kind.to_ascii_lowercase();
    match resource.api.group.as_str() {
        "" => kind,
        group => format!("{kind}.{group}"),
    }
}

/// `gateway shop/waypoint`.
fn describe(resource: &Resource, namespace: &str, name: &str) -> String {
    let kind = resource.api.kind.to_ascii_lowercase();
    match resource.namespaced {
        true => format!("{kind} {namespace}/{name}"),
        false => format!("{kind} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_overwritten_only_when_asked() {
        let object = json!({"metadata": {"resourceVersion": "7", "labels": {"a": "1", "b": "2"}}});
        let set = |pairs: &[(&str, Option<&str>)]| -> Labels {
            let owned = pairs.iter();
            owned
                .map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned)))
                .collect()
        };
        let patch = |labels: &Labels, overwrite| {
            label_patch("namespace shop", &object, labels, overwrite).map_err(|e| e.to_string())
        };
        assert_eq!(
            patch(&set(&[("a", Some("1")), ("c", None)]), false),
            Ok(None)
        );
        assert_eq!(
            patch(
                &set(&[("a", Some("1")), ("c", Some("3")), ("b", None)]),
                false
            ),
            Ok(Some(
                json!({"labels": {"c": "3", "b": null}, "resourceVersion": "7"})
            ))
        );
        assert_eq!(
            patch(&set(&[("a", Some("9"))]), true),
            Ok(Some(json!({"labels": {"a": "9"}})))
        );
        let refused = patch(&set(&[("a", Some("9"))]), false);
        assert!(refused.is_err_and(|e| e.starts_with("namespace shop has the label a=1 already")));
    }
}
