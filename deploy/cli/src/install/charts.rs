//! The charts of `deploy/charts`, embedded, and what they render to.

use serde_json::{Value, json};

use super::object::Object;
use super::schema;
use super::template::{Templates, merge, parse_into, render};

/// Path below `deploy/charts`, content.
static FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/charts.rs"));

/// One of the charts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Chart {
    /// Definitions and cluster-wide objects.
    Base,
    /// The control plane.
    Istiod,
    /// The node agent.
    Cni,
    /// The node tunnel.
    Ztunnel,
}

/// What cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// A value that the chart does not know, or that it takes no such thing for.
    #[error("{0}")]
    Value(String),
    /// The template refused the values, or there is a mistake in it.
    #[error("chart {chart}: {error}")]
    Template {
        /// Name of the chart.
        chart: &'static str,
        /// Where and why.
        #[source]
        error: super::template::TemplateError,
    },
    /// A rendered file is no YAML, or no Kubernetes object.
    #[error("chart {chart}: {file} renders to what cannot be read: {reason}")]
    Document {
        /// Name of the chart.
        chart: &'static str,
        /// The template.
        file: String,
        /// Why.
        reason: String,
    },
}

impl Chart {
    /// The folder's and the chart's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Istiod => "istiod",
            Self::Cni => "cni",
            Self::Ztunnel => "ztunnel",
        }
    }

    /// The name of its release, as Istio's guides have it for Helm.
    pub fn release(self) -> &'static str {
        match self {
            Self::Base => "istio-base",
            Self::Istiod => "istiod",
            Self::Cni => "istio-cni",
            Self::Ztunnel => "ztunnel",
        }
    }

    /// A file of the chart.
    pub fn file(self, path: &str) -> &'static str {
        let found = self.files().find(|(name, _)| *name == path);
        found.map_or("", |(_, text)| text)
    }

    /// What values it takes.
    pub fn schema(self) -> Value {
        // A test reads every chart's; what cannot be read would refuse nothing.
        serde_json::from_str(self.file("values.schema.json")).unwrap_or_default()
    }

    fn files(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        FILES.iter().filter_map(move |(path, text)| {
            let inner = path.strip_prefix(self.name())?.strip_prefix('/')?;
            Some((inner, *text))
        })
    }

    /// Renders the chart as Helm would with these values for the release in `namespace`.
    ///
    /// # Errors
    /// [`RenderError`].
    pub fn render(
        self,
        release: &str,
        namespace: &str,
        given: &Value,
    ) -> Result<Vec<Object>, RenderError> {
        let chart = self.name();
        let parsed = |file: &str, text: &str| -> Result<Value, RenderError> {
            serde_yaml_ng::from_str(text).map_err(|error| RenderError::Document {
                chart,
                file: file.to_owned(),
                reason: error.to_string(),
            })
        };
        schema::check(&self.schema(), given, "").map_err(RenderError::Value)?;
        let mut values = parsed("values.yaml", self.file("values.yaml"))?;
        merge(&mut values, given);
        let metadata = parsed("Chart.yaml", self.file("Chart.yaml"))?;
        let files: serde_json::Map<_, _> = self
            .files()
            .map(|(path, text)| (path.to_owned(), text.into()))
            .collect();
        let dot = json!({
            "Values": values,
            "Chart": {
                "Name": metadata["name"],
                "Version": metadata["version"],
                "AppVersion": metadata["appVersion"],
            },
            "Release": {"Name": release, "Namespace": namespace, "Service": "adit"},
            "Files": files,
        });
        let template = |error| RenderError::Template { chart, error };
        let mut templates = Templates::default();
        let sources = self
            .files()
            .filter(|(path, _)| path.starts_with("templates/"));
        let sources: Vec<_> = sources.collect();
        for (path, source) in &sources {
            parse_into(&mut templates, path, source).map_err(template)?;
        }
        let mut objects = Vec::new();
        for (path, _) in sources.iter().filter(|(path, _)| path.ends_with(".yaml")) {
            let text = render(&templates, path, &dot).map_err(template)?;
            for document in serde_yaml_ng::Deserializer::from_str(&text) {
                let document = <Value as serde::Deserialize>::deserialize(document)
                    .map_err(|error| error.to_string())
                    .and_then(|value| match value {
                        Value::Null => Ok(None),
                        value => Object::new(value).map(Some),
                    })
                    .map_err(|reason| RenderError::Document {
                        chart,
                        file: (*path).to_owned(),
                        reason,
                    })?;
                objects.extend(document);
            }
        }
        objects.sort_by(|a, b| a.order().cmp(&b.order()));
        Ok(objects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Chart; 4] = [Chart::Base, Chart::Istiod, Chart::Cni, Chart::Ztunnel];

    #[test]
    fn every_chart_renders_with_its_defaults_and_twice_the_same() {
        for chart in ALL {
            let given = json!({});
            let once = chart.render(chart.release(), "istio-system", &given);
            let once = once.unwrap_or_else(|error| panic!("{}: {error}", chart.name()));
            assert!(!once.is_empty(), "{}", chart.name());
            let twice = chart.render(chart.release(), "istio-system", &given);
            assert_eq!(once, twice.expect("rendered before"), "{}", chart.name());
        }
    }

    #[test]
    fn charts_have_the_version_of_the_program() {
        for chart in ALL {
            let metadata: Value =
                serde_yaml_ng::from_str(chart.file("Chart.yaml")).expect("Chart.yaml");
            assert_eq!(
                metadata["version"],
                env!("CARGO_PKG_VERSION"),
                "{}",
                chart.name()
            );
            assert_eq!(
                metadata["appVersion"],
                env!("CARGO_PKG_VERSION"),
                "{}",
                chart.name()
            );
        }
    }

    #[test]
    fn an_unknown_value_is_named() {
        let error = Chart::Istiod.render("istiod", "istio-system", &json!({"replicaCuont": 2}));
        let error = error.expect_err("no such value").to_string();
        assert_eq!(
            error,
            "replicaCuont is not a known value; did you mean replicaCount?"
        );
        let given = json!({"global": {"logging": {"lvl": "x"}}});
        let error = Chart::Cni.render("cni", "istio-system", &given);
        let error = error.expect_err("no such value").to_string();
        assert!(
            error.starts_with("global.logging.lvl is not a known value"),
            "{error}"
        );
        let error = Chart::Istiod.render("istiod", "istio-system", &json!({"profile": "large"}));
        let error = error.expect_err("no such profile").to_string();
        assert!(error.contains("profile: \"large\" is none of"), "{error}");
    }
}
