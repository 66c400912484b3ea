//! Installing the mesh in a cluster: `install`, `upgrade`, `uninstall`, `verify-install`,
//! `manifest`, and the checks before.
//!
//! The charts of `deploy/charts` say what is installed. They are rendered here
//! (`template`, `charts`) with the values that profile, files and flags make (`spec`), changed
//! where `components.X.k8s` says so (`kubernetes_settings`, `overlay`), and applied with a field manager of our own, so that what the control plane writes into the
//! same objects stays.

pub mod access;
pub mod apply;
pub mod charts;
pub mod crds;
pub mod kubernetes_settings;
pub mod manifest;
pub mod object;
pub mod options;
pub mod overlay;
pub mod owner;
pub mod precheck;
pub mod schema;
pub mod spec;
pub mod state;
pub mod template;
pub mod uninstall;
pub mod verify;
pub mod wait;

use object::Object;
use spec::{Planned, Spec};

/// Every component's objects, in the order in which they are applied.
fn objects(spec: &Spec) -> anyhow::Result<Vec<(Planned, Vec<Object>)>> {
    let mut all = Vec::new();
    for planned in spec.plan().map_err(options::usage)? {
        let chart = planned.component.chart();
        let mut rendered = chart
            .render(chart.release(), &planned.namespace, &planned.values)
            .map_err(options::usage)?;
        planned
            .kubernetes
            .apply(&mut rendered)
            .map_err(options::usage)?;
        all.push((planned, rendered));
    }
    Ok(all)
}
