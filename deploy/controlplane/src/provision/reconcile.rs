//! Makes everything of one Gateway as it should be, from what the API server has now.
//!
//! What is not there is created, what is there and ours is applied, what is somebody else's is
//! left alone.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::core::ApiResource;
use kube::{Api, Client, Resource};
use serde_json::{Value, json};

use super::class::{self, Class};
use super::controller::{Known, Shared};
use super::gateway::WaypointGateway;
use super::generate::{Generated, MANAGED, MESH_CONTROLLER, generate};
use super::parameters::{map_of_class, map_of_gateway};
use super::settings::WaypointSettings;
use crate::compile::l7::{GATEWAY_NAME, WAYPOINT_CLASS};
use crate::kubernetes::GATEWAY_MANAGER;
use crate::kubernetes::apply::{Failure, RequestError, request};
use crate::model::{Kind, ObjectRef};
use crate::status::Condition;

/// Why a Gateway has no waypoint, or not the one that it should have.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProvisionError {
    /// `parametersRef` or a class's defaults.
    #[error("{0}")]
    Parameters(String),
    /// Something of that name belongs to somebody else.
    #[error(
        "{kind} {name} is there already and is not this Gateway's (it has no label {MANAGED}={MESH_CONTROLLER} and the Gateway does not own it): delete it, or give the Gateway another name"
    )]
    NotOurs { kind: String, name: String },
    /// A request about an object of this kind.
    #[error("{kind}: {error}")]
    Request {
        verb: &'static str,
        kind: String,
        error: RequestError,
    },
}

impl ProvisionError {
    /// What stands at the Gateway, or at the class.
    pub(super) fn conditions(&self) -> Vec<Condition> {
        match self {
            Self::Parameters(why) => vec![
                Condition::new("Accepted", false, "InvalidParameters", why),
                Condition::new("Programmed", false, "Invalid", why),
            ],
            Self::NotOurs { .. } => vec![Condition::new("Programmed", false, "Invalid", self)],
            Self::Request { error, .. } if error.failure() == Failure::Refused => {
                vec![Condition::new("Programmed", false, "Invalid", self)]
            }
            // Of what may be over in a moment nobody needs to hear.
            Self::Request { .. } => Vec::new(),
        }
    }
}

/// Makes everything of one Gateway as it should be, or looks whether what a class asks for can
/// be had.
pub(super) async fn reconcile(
    shared: Arc<Shared>,
    of: ObjectRef,
) -> (ObjectRef, Result<(), ProvisionError>) {
    let work = Work {
        shared: &shared,
        of: &of,
    };
    let result = match of.kind {
        Kind::GatewayClass => work.class().await,
        _ => work.gateway().await,
    };
    (of, result)
}

struct Work<'a> {
    shared: &'a Shared,
    of: &'a ObjectRef,
}

impl Work<'_> {
    async fn class(&self) -> Result<(), ProvisionError> {
        let class = self.look(&self.of.name).await?;
        let map = class.as_ref().filter(|class| class.is_ours());
        let Some(map) = map.and_then(map_of_class) else {
            self.shared.know(self.of, None);
            return Ok(());
        };
        let known = Known {
            class: self.of.name.clone(),
            parameters: map.iter().cloned().collect(),
        };
        self.shared.know(self.of, Some(known));
        self.shared.check_class(&self.of.name, map).await
    }

    async fn gateway(&self) -> Result<(), ProvisionError> {
        let ObjectRef {
            namespace, name, ..
        } = self.of;
        let resource = class::resource("Gateway", "gateways");
        let gateways: Api<DynamicObject> =
            Api::namespaced_with(self.client(), namespace, &resource);
        let gateway = self.ask("get", "Gateway", gateways.get_opt(name)).await?;
        let gateway = match gateway {
            Some(gateway) => WaypointGateway::read(&gateway, &self.shared.settings.revision).ok(),
            None => None,
        };
        let Some(gateway) = gateway else {
            self.shared.know(self.of, None);
            return Ok(());
        };
        let class = self.look(&gateway.class).await?;
        let is_waypoint = match &class {
            Some(class) => class.is_ours(),
            None => gateway.class == WAYPOINT_CLASS,
        };
        if !is_waypoint {
            self.shared.know(self.of, None);
            return Ok(());
        }
        let class = class.unwrap_or_default();
        let maps = [map_of_class(&class), map_of_gateway(&gateway)];
        let known = Known {
            class: gateway.class.as_str().into(),
            parameters: maps.into_iter().flatten().flatten().collect(),
        };
        self.shared.know(self.of, Some(known));
        let overlays = self.shared.overlays(&gateway, &class).await?;
        let made = generate(&gateway, &self.shared.settings, &overlays)
            .map_err(|error| ProvisionError::Parameters(error.to_string()))?;
        if let Some(account) = trusted_account(&made.deployment, &self.shared.settings) {
            return Err(ProvisionError::Parameters(format!(
                "a waypoint cannot run as ServiceAccount {namespace}/{account}: whoever has that is believed about all pods of its node"
            )));
        }
        self.apply(&gateway, &made).await
    }

    async fn look(&self, class: &str) -> Result<Option<Class>, ProvisionError> {
        self.shared.pace.wait().await;
        let class = Class::look(&self.shared.client, class).await;
        class.map_err(|error| ProvisionError::Request {
            verb: "get",
            kind: "GatewayClass".into(),
            error,
        })
    }

    async fn apply(
        &self,
        gateway: &WaypointGateway,
        made: &Generated,
    ) -> Result<(), ProvisionError> {
        let objects = [
            (
                api_resource::<ServiceAccount>(),
                made.service_account.as_ref(),
            ),
            (api_resource::<Service>(), Some(&made.service)),
            (api_resource::<Deployment>(), Some(&made.deployment)),
            (
                api_resource::<PodDisruptionBudget>(),
                made.disruption_budget.as_ref(),
            ),
            (
                api_resource::<HorizontalPodAutoscaler>(),
                made.autoscaler.as_ref(),
            ),
        ];
        // All of them first: half of a waypoint beside somebody else's is none.
        let mut there = Vec::with_capacity(objects.len());
        for (resource, object) in &objects {
            let api = self.api(resource);
            let meta = self.ask("get", &resource.kind, api.get_metadata_opt(&gateway.name));
            let meta = meta.await?.map(|of| of.metadata);
            let is_ours = meta.as_ref().is_some_and(|meta| is_ours(meta, gateway));
            if object.is_some() && meta.is_some() && !is_ours {
                return Err(ProvisionError::NotOurs {
                    kind: resource.kind.clone(),
                    name: format!("{}/{}", gateway.namespace, gateway.name),
                });
            }
            there.push(meta.filter(|_| is_ours));
        }
        for ((resource, object), meta) in objects.iter().zip(there) {
            let api = self.api(resource);
            match (object, meta) {
                (Some(object), Some(meta)) => {
                    self.claim(&api, &resource.kind, &meta).await?;
                    let mut object: Value = (*object).clone();
                    // Whatever took its place meanwhile is not what was looked at.
                    object["metadata"]["uid"] = meta.uid.into();
                    let params = PatchParams::apply(GATEWAY_MANAGER).force();
                    let patch = Patch::Apply(&object);
                    let applied = api.patch(&gateway.name, &params, &patch);
                    self.ask("patch", &resource.kind, applied).await?;
                }
                (Some(object), None) => self.create(&api, &resource.kind, object).await?,
                (None, Some(meta)) => self.remove(&api, &resource.kind, meta).await?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// Creates what was not there. Applying would also make it, but if somebody else has done
    /// so since we looked, it would make theirs ours.
    async fn create(
        &self,
        api: &Api<DynamicObject>,
        kind: &str,
        object: &Value,
    ) -> Result<(), ProvisionError> {
        let object: DynamicObject = serde_json::from_value(object.clone())
            .map_err(|error| ProvisionError::Parameters(format!("{kind}: {error}")))?;
        let params = PostParams {
            field_manager: Some(GATEWAY_MANAGER.into()),
            ..PostParams::default()
        };
        let made = self
            .ask("create", kind, api.create(&params, &object))
            .await?;
        self.claim(api, kind, &made.metadata).await
    }

    /// Makes what we have created ours as if we had applied it: else a field would stay when
    /// applying leaves it out (client-go's csaupgrade).
    async fn claim(
        &self,
        api: &Api<DynamicObject>,
        kind: &str,
        meta: &ObjectMeta,
    ) -> Result<(), ProvisionError> {
        let (mut entries, mut version) = (as_applied(meta), meta.resource_version.clone());
        let name = meta.name.as_deref().unwrap_or_default();
        // Controllers write about a new object at once.
        for last in [false, false, false, true] {
            let Some(fields) = entries else {
                return Ok(());
            };
            let patch = json!({"metadata": {"managedFields": fields, "resourceVersion": version}});
            let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
            let patched = api.patch_metadata(name, &params, &patch);
            match self.ask("patch", kind, patched).await {
                Err(ProvisionError::Request { error, .. })
                    if error.failure() == Failure::Conflict && !last => {}
                result => return result.map(|_| ()),
            }
            let now = self.ask("get", kind, api.get_metadata_opt(name)).await?;
            // Whatever has taken its place is looked at another time.
            let now = now.filter(|now| now.metadata.uid == meta.uid);
            entries = now.as_ref().and_then(|now| as_applied(&now.metadata));
            version = now.and_then(|now| now.metadata.resource_version);
        }
        Ok(())
    }

    /// Removes what an overlay asked for before.
    async fn remove(
        &self,
        api: &Api<DynamicObject>,
        kind: &str,
        meta: ObjectMeta,
    ) -> Result<(), ProvisionError> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: meta.uid,
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let name = meta.name.unwrap_or_default();
        match self.ask("delete", kind, api.delete(&name, &params)).await {
            Err(ProvisionError::Request { error, .. }) if error.failure() == Failure::Gone => {
                Ok(())
            }
            result => result.map(|_| ()),
        }
    }

    fn client(&self) -> Client {
        self.shared.client.clone()
    }

    fn api(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client(), &self.of.namespace, resource)
    }

    async fn ask<T>(
        &self,
        verb: &'static str,
        kind: &str,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ProvisionError> {
        self.shared.ask(verb, kind, answer).await
    }
}

impl Shared {
    /// A request, when it may be made.
    pub(super) async fn ask<T>(
        &self,
        verb: &'static str,
        kind: &str,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ProvisionError> {
        self.pace.wait().await;
        request(answer)
            .await
            .map_err(|error| ProvisionError::Request {
                verb,
                kind: kind.into(),
                error,
            })
    }
}

fn api_resource<K: Resource<DynamicType = ()>>() -> ApiResource {
    ApiResource::erase::<K>(&())
}

/// The ServiceAccount of a waypoint's pods, if it is one that node proxies are known by.
fn trusted_account<'a>(deployment: &'a Value, settings: &WaypointSettings) -> Option<&'a str> {
    let pod = deployment.pointer("/spec/template/spec")?;
    let namespace = deployment.pointer("/metadata/namespace")?.as_str()?;
    // The second is the older name of the first (core/v1 PodSpec).
    let accounts = ["serviceAccountName", "serviceAccount"].map(|field| pod.get(field));
    let mut accounts = accounts.into_iter().flatten().filter_map(Value::as_str);
    accounts.find(|account| settings.node_accounts.names(namespace, account))
}

/// Who manages the fields of an object, with what we have created as if we had applied it;
/// `None`: there is nothing to change.
fn as_applied(meta: &ObjectMeta) -> Option<Vec<ManagedFieldsEntry>> {
    let ours = |entry: &ManagedFieldsEntry, operation: &str| {
        entry.manager.as_deref() == Some(GATEWAY_MANAGER)
            && entry.operation.as_deref() == Some(operation)
            && entry.subresource.as_deref().unwrap_or_default().is_empty()
    };
    let entries = meta.managed_fields.as_ref()?;
    let applied = entries.iter().any(|entry| ours(entry, "Apply"));
    if applied || !entries.iter().any(|entry| ours(entry, "Update")) {
        return None;
    }
    let changed = entries.iter().cloned().map(|mut entry| {
        if ours(&entry, "Update") {
            entry.operation = Some("Apply".into());
        }
        entry
    });
    Some(changed.collect())
}

/// Whether an object was generated for this Gateway: it is labelled so, or the Gateway owns
/// it. One whose owner is another Gateway of the same name, from before, counts: that one is
/// gone.
fn is_ours(meta: &ObjectMeta, gateway: &WaypointGateway) -> bool {
    let label = |key| meta.labels.as_ref().and_then(|labels| labels.get(key));
    let labelled = label(MANAGED).map(String::as_str) == Some(MESH_CONTROLLER)
        && label(GATEWAY_NAME).is_none_or(|name| *name == gateway.name);
    let mut owners = meta.owner_references.iter().flatten();
    labelled || owners.any(|owner| owner.kind == "Gateway" && owner.uid == gateway.uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway() -> WaypointGateway {
        let gateway = json!({"metadata": {"name": "w", "namespace": "a", "uid": "u"},
            "spec": {"gatewayClassName": WAYPOINT_CLASS}});
        let gateway = serde_json::from_value(gateway).expect("an object");
        WaypointGateway::read(&gateway, "default").expect("a waypoint")
    }

    #[test]
    fn what_belongs_to_others_is_told_apart() {
        let table = [
            (json!({}), false),
            (json!({"labels": {GATEWAY_NAME: "w"}}), false),
            (
                json!({"labels": {MANAGED: MESH_CONTROLLER, GATEWAY_NAME: "w"}}),
                true,
            ),
            (
                json!({"labels": {MANAGED: MESH_CONTROLLER, GATEWAY_NAME: "other"}}),
                false,
            ),
            (json!({"labels": {MANAGED: "somebody"}}), false),
            (
                json!({"ownerReferences": [
                    {"apiVersion": "x/v1", "kind": "Gateway", "name": "w", "uid": "u"}]}),
                true,
            ),
            (
                json!({"ownerReferences": [
                    {"apiVersion": "x/v1", "kind": "Gateway", "name": "w", "uid": "before"}]}),
                false,
            ),
        ];
        for (meta, expected) in table {
            let text = meta.to_string();
            let meta = serde_json::from_value(meta).expect("metadata");
            assert_eq!(is_ours(&meta, &gateway()), expected, "{text}");
        }
    }

    #[test]
    fn what_was_created_counts_as_applied() {
        let meta = |entries: Value| {
            let meta = json!({"managedFields": entries});
            serde_json::from_value::<ObjectMeta>(meta).expect("metadata")
        };
        let entry = |manager: &str, operation: &str, subresource: &str| {
            json!({"manager": manager, "operation": operation, "subresource": subresource,
                "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:data": {}}})
        };
        let status = entry(GATEWAY_MANAGER, "Update", "status");
        let other = entry("kubectl", "Update", "");
        let created = entry(GATEWAY_MANAGER, "Update", "");
        let applied = entry(GATEWAY_MANAGER, "Apply", "");
        let found = as_applied(&meta(json!([other, created, status]))).expect("a change");
        let expected = meta(json!([other, applied, status]));
        assert_eq!(Some(found), expected.managed_fields);
        for entries in [
            json!([]),
            json!([other, status]),
            json!([applied, other]),
            json!([applied, created]),
        ] {
            assert_eq!(as_applied(&meta(entries.clone())), None, "{entries}");
        }
    }

    #[test]
    fn accounts_of_node_proxies_are_not_for_waypoints() {
        let settings = crate::provision::settings::tests::settings();
        let account = |namespace: &str, spec: Value| {
            let deployment = json!({"metadata": {"namespace": namespace},
                "spec": {"template": {"spec": spec}}});
            trusted_account(&deployment, &settings).is_some()
        };
        for (namespace, spec, expected) in [
            (
                "istio-system",
                json!({"serviceAccountName": "ztunnel"}),
                true,
            ),
            ("istio-system", json!({"serviceAccount": "ztunnel"}), true),
            ("istio-system", json!({"serviceAccountName": "w"}), false),
            ("istio-system", json!({}), false),
            ("shop", json!({"serviceAccountName": "ztunnel"}), false),
        ] {
            let context = format!("{namespace} {spec}");
            assert_eq!(account(namespace, spec), expected, "{context}");
        }
    }
}
