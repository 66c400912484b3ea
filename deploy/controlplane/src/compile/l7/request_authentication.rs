//! RequestAuthentications as waypoints enforce them.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;

use super::Part;
use super::coverage::cover;
use super::resource::{Resource, object};
use super::view::View;
use crate::model::{Kind, NamespaceObjects};

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    for policy in objects.request_authentications.values() {
        if !view.mesh.owns(&policy.meta) {
            continue;
        }
        let errors: Vec<_> = policy.errors.iter().map(ToString::to_string).collect();
        let invalid = errors.join("; ");
        let covered = cover(&policy.meta, &policy.scope, view);
        for (waypoint, targets) in &covered.waypoints {
            let resource = wire::RequestAuthentication {
                object: Some(object(&policy.meta, Kind::RequestAuthentication)),
                targets: targets.clone(),
                // Of an invalid one, too: nobody may send the headers that they write.
                rules: policy.rules.clone(),
                invalid: invalid.clone(),
            };
            let resource = Resource::RequestAuthentication(resource);
            part.give(waypoint, &Arc::new(resource));
        }
        let status = covered.status(Some(invalid.as_str()).filter(|of| !of.is_empty()));
        part.status(policy.meta.reference(Kind::RequestAuthentication))
            .merge(status);
    }
}
