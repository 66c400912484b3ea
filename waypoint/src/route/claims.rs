//! JWT claims as routes see them: Istio's `@request.auth.claims.<path>`.

use serde_json::Value;

/// The verified claims of a request.
pub trait Claims {
    /// Whether the claim at `path` exists and `test` holds for its value, or for one of its
    /// values where it is a list. Values that are not strings are tested as JSON writes them.
    fn any(&self, path: &[Box<str>], test: &mut dyn FnMut(&str) -> bool) -> bool;
}

/// A request without a verified token.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoClaims;

impl Claims for NoClaims {
    fn any(&self, _path: &[Box<str>], _test: &mut dyn FnMut(&str) -> bool) -> bool {
        false
    }
}

impl Claims for Value {
    fn any(&self, path: &[Box<str>], test: &mut dyn FnMut(&str) -> bool) -> bool {
        let mut value = self;
        for step in path {
            match value.get(&**step) {
                Some(inner) => value = inner,
                None => return false,
            }
        }
        match value {
            Value::Array(values) => values.iter().any(|value| test_scalar(value, test)),
            value => test_scalar(value, test),
        }
    }
}

fn test_scalar(value: &Value, test: &mut dyn FnMut(&str) -> bool) -> bool {
    match value {
        Value::String(text) => test(text),
        Value::Bool(true) => test("true"),
        Value::Bool(false) => test("false"),
        Value::Number(number) => test(&number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// The steps of a claim's name: `@request.auth.claims.realm.roles`,
/// `@request.auth.claims[realm][roles]`, or without the leading words. `None`: not a claim.
pub(super) fn parse_path(name: &str) -> Option<Box<[Box<str>]>> {
    let rest = name.strip_prefix("@request.auth.claims").unwrap_or(name);
    let steps: Box<[Box<str>]> = if rest.starts_with('[') {
        // A step in brackets may hold dots: a claim named by a URL.
        let inner = rest.strip_prefix('[')?.strip_suffix(']')?;
        inner.split("][").map(Into::into).collect()
    } else {
        let rest = rest.strip_prefix('.').unwrap_or(rest);
        rest.split('.').map(Into::into).collect()
    };
    (!steps.iter().any(|step| step.is_empty())).then_some(steps)
}
