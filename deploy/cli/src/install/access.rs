//! The API server, as the installer uses it: every request has a deadline, and every error
//! names the object.

use std::time::Duration;

use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use serde_json::Value;
use tokio::time::timeout;

use super::object::{Object, ObjectId};

/// Who writes what is installed. Not the control plane's name: an apply without a field that
/// the same manager has written takes the field away.
pub const FIELD_MANAGER: &str = "adit-install";
/// An API server that has not answered by then will not.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// Objects per page of a list.
const PAGE: u32 = 500;

/// What an apply did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// There was none.
    Created,
    /// Something was different.
    Changed,
    /// Nothing was.
    Unchanged,
}

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[error("{object}: cannot {action}: {reason}{hint}")]
pub struct AccessError {
    /// Of what.
    pub object: String,
    /// `apply`, `read`, `delete`, `list`.
    action: &'static str,
    reason: String,
    hint: &'static str,
    /// The HTTP status, if there was an answer.
    pub code: Option<u16>,
}

/// A cluster to install into.
#[derive(Clone)]
pub struct Access {
    client: Client,
    /// What the user calls it.
    pub name: String,
    /// Nothing is written.
    pub dry_run: bool,
}

impl Access {
    /// A cluster.
    pub fn new(client: Client, name: String) -> Self {
        Self {
            client,
            name,
            dry_run: false,
        }
    }

    /// The client, for what is not about objects.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Objects of a kind; of all namespaces if it has one and none is given.
    pub fn api(&self, api_version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        match namespace {
            "" => Api::all_with(self.client.clone(), &resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, &resource),
        }
    }

    fn of(&self, id: &ObjectId) -> Api<DynamicObject> {
        self.api(&id.api_version, &id.kind, &id.namespace)
    }

    /// Applies an object, whoever else has written it.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn apply(&self, object: &Object) -> Result<Applied, AccessError> {
        let api = self.of(&object.id);
        let before = self.get(&object.id).await?;
        let mut params = PatchParams::apply(FIELD_MANAGER)
            .force()
            .validation_strict();
        params.dry_run = self.dry_run;
        let patch = Patch::Apply(&object.manifest);
        let applied = api.patch(&object.id.name, &params, &patch);
        let applied = ask(&object.id, "apply", applied).await?;
        Ok(match before {
            None => Applied::Created,
            Some(before) if before.resource_version() == applied.resource_version() => {
                Applied::Unchanged
            }
            Some(_) => Applied::Changed,
        })
    }

    /// An object, or `None`; also if the cluster does not know the kind.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn get(&self, id: &ObjectId) -> Result<Option<DynamicObject>, AccessError> {
        let api = self.of(id);
        ask(id, "read", api.get_opt(&id.name)).await
    }

    /// An object as JSON.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn get_json(&self, id: &ObjectId) -> Result<Option<Value>, AccessError> {
        let object = self.get(id).await?;
        Ok(object.map(|object| serde_json::to_value(object).unwrap_or_default()))
    }

    /// Objects of a kind by label; none if the cluster does not know the kind.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn list(
        &self,
        api_version: &str,
        kind: &str,
        namespace: &str,
        labels: &str,
    ) -> Result<Vec<DynamicObject>, AccessError> {
        let api = self.api(api_version, kind, namespace);
        let mut params = ListParams::default().labels(labels).limit(PAGE);
        let mut objects = Vec::new();
        loop {
            let page = match ask(&format!("{kind} objects"), "list", api.list(&params)).await {
                Ok(page) => page,
                Err(error) if error.code == Some(404) => return Ok(objects),
                Err(error) => return Err(error),
            };
            objects.extend(page.items);
            match page.metadata.continue_ {
                Some(next) if !next.is_empty() => params = params.continue_token(&next),
                _ => return Ok(objects),
            }
        }
    }

    /// Deletes an object and what belongs to it. `false`: it was not there.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn delete(&self, id: &ObjectId) -> Result<bool, AccessError> {
        let api = self.of(id);
        let mut params = DeleteParams::background();
        params.dry_run = self.dry_run;
        match ask(id, "delete", api.delete(&id.name, &params)).await {
            Ok(_) => Ok(true),
            Err(error) if error.code == Some(404) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A merge patch.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn merge(&self, id: &ObjectId, patch: &Value) -> Result<(), AccessError> {
        let api = self.of(id);
        let params = PatchParams {
            dry_run: self.dry_run,
            ..PatchParams::default()
        };
        let patch = Patch::Merge(patch);
        let patched = api.patch(&id.name, &params, &patch);
        match ask(id, "change", patched).await {
            Ok(_) => Ok(()),
            Err(error) if error.code == Some(404) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Which object this is.
pub fn id_of(object: &DynamicObject, api_version: &str, kind: &str) -> ObjectId {
    ObjectId {
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

/// Waits for an answer, but not for ever, and says of what it was.
pub async fn ask<T>(
    object: &impl std::fmt::Display,
    action: &'static str,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, AccessError> {
    let failed = |reason: String, code: Option<u16>, hint: &'static str| AccessError {
        object: object.to_string(),
        action,
        reason,
        hint,
        code,
    };
    match timeout(REQUEST_DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            let hint = match status.code {
                403 => "; installing needs the rights of a cluster administrator",
                _ => "",
            };
            let reason = match status.message.as_str() {
                "" => status.reason.clone(),
                message => message.to_owned(),
            };
            Err(failed(reason, Some(status.code), hint))
        }
        Ok(Err(error)) => {
            let error = anyhow::Error::from(error);
            Err(failed(crate::output::sentence(&error), None, ""))
        }
        Err(_) => {
            let reason = format!("the API server has not answered within {REQUEST_DEADLINE:?}");
            Err(failed(reason, None, ""))
        }
    }
}
