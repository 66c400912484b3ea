//! Changes that are asked for over the control socket: the overlay of the mesh takes
//! them, and the event loop follows as if a manifest had changed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::reconcile::{Reconciler, now};
use crate::control::{ApplyOutcome, Request};
use crate::error::LocalError;
use crate::manifest::{self, Identity};
use crate::overlay;

impl Reconciler {
    /// Carries out a change; the answer is the request's.
    pub(super) fn change(&mut self, request: Request) -> Result<Value, LocalError> {
        let answer = match request {
            Request::Apply { objects } => self.apply(objects)?,
            Request::Delete {
                kind,
                namespace,
                name,
            } => self.delete(&kind, &namespace, &name)?,
            Request::Label {
                kind,
                namespace,
                name,
                labels,
                overwrite,
            } => {
                let identity = self.identity(&kind, &namespace, &name)?;
                let mut before = overlay::find(&self.sources, &identity);
                if before.is_none() && identity.kind == "Namespace" {
                    // Namespaces are there as soon as anything is in them.
                    before = Some(json!({"apiVersion": "v1", "kind": "Namespace",
                        "metadata": {"name": name}}));
                }
                let overlay = &mut self.overlay;
                json!(overlay.label(&identity, before.as_ref(), &labels, overwrite)?)
            }
            _ => Value::Null,
        };
        self.overlaid = true;
        Ok(answer)
    }

    fn apply(&mut self, objects: Vec<Value>) -> Result<Value, LocalError> {
        // All or nothing, as far as can be known before.
        let mut namespaces = self.namespaces();
        for object in &objects {
            let Some(identity) = Identity::of(object) else {
                let text = "an object needs apiVersion, kind and metadata.name";
                return Err(LocalError::Manifest(text.into()));
            };
            manifest::check_names(&identity).map_err(LocalError::Manifest)?;
            if identity.kind == "Namespace" {
                namespaces.insert(identity.name);
            } else if !identity.namespace.is_empty() && !namespaces.contains(&identity.namespace) {
                let text = format!("namespaces {:?} not found", identity.namespace);
                return Err(LocalError::Refused(text));
            }
        }
        let mut outcomes = Vec::new();
        for object in objects {
            let identity = Identity::of(&object);
            let before = identity
                .as_ref()
                .and_then(|identity| overlay::find(&self.sources, identity));
            self.overlaid = true;
            outcomes.push(ApplyOutcome {
                object: identity.map_or_else(String::new, |identity| identity.to_string()),
                outcome: self.overlay.apply(object, before.as_ref(), now())?,
            });
        }
        Ok(json!(outcomes))
    }

    fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Result<Value, LocalError> {
        let identity = self.identity(kind, namespace, name)?;
        if self.overlay.delete(&identity)? {
            return Ok(Value::Null);
        }
        match overlay::place(&self.sources, &identity) {
            Some((place, _)) => Err(LocalError::Refused(format!(
                "{} {} stands in {}/{place}: remove it there",
                identity.kind,
                identity.path(),
                self.config.manifests.display()
            ))),
            None => Err(overlay::not_found(&identity)),
        }
    }

    /// The object that a user means: its kind may be written in many ways.
    fn identity(&self, kind: &str, namespace: &str, name: &str) -> Result<Identity, LocalError> {
        let values = self.files.values();
        let mut objects = values.flat_map(|(file, _)| manifest::values(file));
        let found = objects.find_map(|(_, value)| {
            let identity = Identity::of(&value)?;
            let same = manifest::is_kind(kind, &identity.group, &identity.kind)
                && identity.name == name
                && (identity.namespace.is_empty() || identity.namespace == namespace);
            same.then_some(identity)
        });
        if let Some(identity) = found {
            return Ok(identity);
        }
        if manifest::is_kind(kind, "", "Namespace") && self.namespaces().contains(name) {
            return Ok(Identity {
                group: String::new(),
                kind: "Namespace".into(),
                namespace: String::new(),
                name: name.into(),
            });
        }
        let cluster_scoped = manifest::is_kind(kind, "", "Namespace");
        Err(overlay::not_found(&Identity {
            group: String::new(),
            kind: kind.trim_end_matches('s').into(),
            namespace: if cluster_scoped { "" } else { namespace }.into(),
            name: name.into(),
        }))
    }

    /// Every namespace that there is, by its object or by what is in it.
    fn namespaces(&self) -> BTreeSet<String> {
        let own = self.desired.namespaces.keys().cloned();
        let pods = self
            .desired
            .pods
            .keys()
            .map(|(namespace, _)| namespace.clone());
        let services = self.desired.services.keys();
        let services = services.map(|(namespace, _)| namespace.clone());
        let fixed = ["default".to_owned(), "istio-system".to_owned()];
        own.chain(pods).chain(services).chain(fixed).collect()
    }
}
