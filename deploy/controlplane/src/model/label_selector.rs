//! Kubernetes label selectors with expressions.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::field::{At, FieldError};
use super::meta::{Labels, selects};
use super::raw::{Map, nullable};

/// Labels that must be there and expressions that must hold, all of them. The empty one
/// picks everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    labels: Labels,
    expressions: Vec<Expression>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Expression {
    key: String,
    operator: Operator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawLabelSelector {
    #[serde(deserialize_with = "nullable")]
    match_labels: Labels,
    #[serde(deserialize_with = "nullable")]
    match_expressions: Vec<Map<RawExpression>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawExpression {
    #[serde(deserialize_with = "nullable")]
    key: String,
    #[serde(deserialize_with = "nullable")]
    operator: String,
    #[serde(deserialize_with = "nullable")]
    values: Vec<String>,
}

impl LabelSelector {
    pub(super) fn read(raw: &RawLabelSelector, at: At<'_>, errors: &mut Vec<FieldError>) -> Self {
        let list = at.key("matchExpressions");
        let mut expressions = Vec::new();
        for (index, raw) in raw.match_expressions.iter().enumerate() {
            let at = list.index(index);
            if raw.key.is_empty() {
                errors.push(at.key("key").error("is required"));
            }
            let values = || raw.values.iter().cloned().collect();
            let operator = match raw.operator.as_str() {
                "In" => Operator::In(values()),
                "NotIn" => Operator::NotIn(values()),
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => {
                    let message = format!("{other:?} is not In, NotIn, Exists or DoesNotExist");
                    errors.push(at.key("operator").error(message));
                    continue;
                }
            };
            let needs_values = matches!(operator, Operator::In(_) | Operator::NotIn(_));
            if needs_values == raw.values.is_empty() {
                let message = if needs_values {
                    "is required with this operator"
                } else {
                    "must be empty with this operator"
                };
                errors.push(at.key("values").error(message));
            }
            expressions.push(Expression {
                key: raw.key.clone(),
                operator,
            });
        }
        Self {
            labels: raw.match_labels.clone(),
            expressions,
        }
    }

    /// Whether it picks an object with `labels`.
    pub fn selects(&self, labels: &Labels) -> bool {
        selects(&self.labels, labels)
            && self.expressions.iter().all(|expression| {
                let value = labels.get(&expression.key);
                match &expression.operator {
                    Operator::In(values) => value.is_some_and(|value| values.contains(value)),
                    Operator::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_kubernetes() {
        let table = [
            ("{}", true),
            ("{matchLabels: {env: prod}}", true),
            ("{matchLabels: {env: test}}", false),
            (
                "{matchExpressions: [{key: env, operator: In, values: [prod, test]}]}",
                true,
            ),
            (
                "{matchExpressions: [{key: env, operator: NotIn, values: [prod]}]}",
                false,
            ),
            (
                "{matchExpressions: [{key: team, operator: NotIn, values: [a]}]}",
                true,
            ),
            ("{matchExpressions: [{key: env, operator: Exists}]}", true),
            (
                "{matchExpressions: [{key: env, operator: DoesNotExist}]}",
                false,
            ),
            (
                "{matchLabels: {env: prod}, matchExpressions: [{key: team, operator: Exists}]}",
                false,
            ),
        ];
        let labels: Labels = [("env".to_owned(), "prod".to_owned())].into();
        for (yaml, expected) in table {
            let raw: RawLabelSelector = serde_yaml_ng::from_str(yaml).expect("YAML");
            let mut errors = Vec::new();
            let selector = LabelSelector::read(&raw, At::ROOT, &mut errors);
            assert!(errors.is_empty(), "{yaml}: {errors:?}");
            assert_eq!(selector.selects(&labels), expected, "{yaml}");
        }
    }
}
