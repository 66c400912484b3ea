//! Which ConfigMaps are laid over what is made of a Gateway: those that are for all Gateways of
//! its class (by a label, in the root namespace), the one that its class names, and its own.
//! A later one has precedence.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::ListParams;

use super::class::Class;
use super::controller::{Key, Shared};
use super::gateway::{Parameters, WaypointGateway};
use super::generate::generate;
use super::overlay::Overlay;
use super::reconcile::ProvisionError;
use super::settings::WaypointSettings;

/// Names the class whose Gateways an overlay is for, on a ConfigMap in the root namespace.
pub(super) const DEFAULTS_FOR_CLASS: &str = "gateway.istio.io/defaults-for-class";

/// The ConfigMap that a class names: there is none, it is that one, or why it can be none.
pub(super) fn map_of_class(class: &Class) -> Option<Result<Key, String>> {
    let map = |parameters: &Result<_, String>| {
        let parameters: &crate::model::ClassParameters =
            parameters.as_ref().map_err(Clone::clone)?;
        let (namespace, name) = parameters.config_map()?;
        Ok((Arc::from(namespace), Arc::from(name)))
    };
    class.parameters.as_ref().map(map)
}

/// The ConfigMap that a Gateway names: one of its own namespace.
pub(super) fn map_of_gateway(gateway: &WaypointGateway) -> Option<Result<Key, String>> {
    let map = |parameters: &Parameters| {
        if !parameters.group.is_empty() || parameters.kind != "ConfigMap" {
            return Err(format!(
                "spec.infrastructure.parametersRef names a {} of group {:?}; it can be a ConfigMap",
                parameters.kind, parameters.group
            ));
        }
        let namespace = gateway.namespace.as_str().into();
        Ok((namespace, parameters.name.as_str().into()))
    };
    gateway.parameters.as_ref().map(map)
}

impl Shared {
    /// What is laid over what is made of a Gateway, in that order.
    pub(super) async fn overlays(
        &self,
        gateway: &WaypointGateway,
        class: &Class,
    ) -> Result<Vec<Overlay>, ProvisionError> {
        let maps: Api<ConfigMap> =
            Api::namespaced(self.client.clone(), &self.settings.root_namespace);
        let labels = format!("{DEFAULTS_FOR_CLASS}={}", gateway.class);
        let params = ListParams::default().labels(&labels);
        let mut defaults = self
            .ask("list", "ConfigMap", maps.list(&params))
            .await?
            .items;
        // The same order every time, oldest first.
        defaults.sort_by_key(|map| {
            let meta = &map.metadata;
            (meta.creation_timestamp.clone(), meta.name.clone())
        });
        let mut overlays = defaults.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if let Some(map) = map_of_class(class) {
            let of = format!("GatewayClass {}: ", gateway.class);
            overlays.push(self.overlay(map, &of, "spec.parametersRef").await?);
        }
        if let Some(map) = map_of_gateway(gateway) {
            let field = "spec.infrastructure.parametersRef";
            overlays.push(self.overlay(map, "", field).await?);
        }
        Ok(overlays)
    }

    /// Whether what a class names can be laid over a waypoint.
    pub(super) async fn check_class(
        &self,
        name: &str,
        map: Result<Key, String>,
    ) -> Result<(), ProvisionError> {
        let overlay = self.overlay(map.clone(), "", "spec.parametersRef").await?;
        let (namespace, map) = map.map_err(ProvisionError::Parameters)?;
        fits(overlay, name, &self.settings).map_err(|why| {
            ProvisionError::Parameters(format!("ConfigMap {namespace}/{map}: {why}"))
        })
    }

    /// Reads one that `of` names in `field`.
    async fn overlay(
        &self,
        map: Result<Key, String>,
        of: &str,
        field: &str,
    ) -> Result<Overlay, ProvisionError> {
        let (namespace, name) =
            map.map_err(|why| ProvisionError::Parameters(format!("{of}{why}")))?;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &namespace);
        let map = self.ask("get", "ConfigMap", maps.get_opt(&name)).await?;
        match map {
            Some(map) => read(&map),
            None => Err(ProvisionError::Parameters(format!(
                "{of}{field}: there is no ConfigMap {namespace}/{name}"
            ))),
        }
    }
}

fn read(map: &ConfigMap) -> Result<Overlay, ProvisionError> {
    let data = map.data.clone().unwrap_or_default();
    Overlay::read(&data).map_err(|error| {
        let meta = &map.metadata;
        ProvisionError::Parameters(format!(
            "ConfigMap {}/{}: {error}",
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        ))
    })
}

/// Lays an overlay over the plainest waypoint.
fn fits(overlay: Overlay, class: &str, settings: &WaypointSettings) -> Result<(), String> {
    let gateway = WaypointGateway {
        name: "waypoint".into(),
        namespace: "default".into(),
        uid: String::new(),
        api_version: "gateway.networking.k8s.io/v1".into(),
        class: class.into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        parameters: None,
        service_account: None,
        service_type: None,
        image: None,
        log_level: None,
    };
    let made = generate(&gateway, settings, &[overlay]);
    made.map(|_| ()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provision::settings::tests::settings;

    #[test]
    fn an_overlay_of_a_class_has_to_fit_a_waypoint() {
        for (text, fault) in [
            ("spec: {replicas: 2}", None),
            ("spec: []", Some("deployment.spec: is an object")),
            (
                "spec: {template: {spec: {containers: [{image: x}]}}}",
                Some("an item needs name"),
            ),
        ] {
            let data = BTreeMap::from([("deployment".to_owned(), text.to_owned())]);
            let overlay = Overlay::read(&data).expect("an overlay");
            match (fits(overlay, "istio-waypoint", &settings()), fault) {
                (Ok(()), None) => {}
                (Err(why), Some(fault)) => assert!(why.contains(fault), "{why}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }
}
