//! What a verified token says, in the form in which policies ask.

use serde_json::{Map, Value};

/// The claims of a token whose signature, issuer and lifetime have been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Claims {
    payload: Map<String, Value>,
    /// Claims whose text is a list of words, already taken apart.
    words: Vec<(Box<str>, Vec<Box<str>>)>,
}

impl Claims {
    /// Claims that are words separated by spaces unless a rule says otherwise (Istio
    /// JWTRule `spaceDelimitedClaims`).
    pub const SPACE_DELIMITED: [&'static str; 2] = ["scope", "permission"];

    /// Wraps the payload of a verified token. `space_delimited` are claims that are
    /// split besides [`Self::SPACE_DELIMITED`].
    pub fn new<'a>(
        payload: Map<String, Value>,
        space_delimited: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let mut words: Vec<(Box<str>, Vec<Box<str>>)> = Vec::new();
        for name in Self::SPACE_DELIMITED.into_iter().chain(space_delimited) {
            if words.iter().any(|(known, _)| **known == *name) {
                continue;
            }
            if let Some(Value::String(text)) = payload.get(name) {
                words.push((
                    name.into(),
                    text.split_whitespace().map(Box::from).collect(),
                ));
            }
        }
        Self { payload, words }
    }

    /// The payload.
    pub fn payload(&self) -> &Map<String, Value> {
        &self.payload
    }

    /// `iss` and `sub`, which are the request principal `iss/sub`; without both there is
    /// none.
    pub fn principal(&self) -> Option<(&str, &str)> {
        match (self.text("iss")?, self.text("sub")?) {
            ("", _) | (_, "") => None,
            both => Some(both),
        }
    }

    /// `azp`.
    pub fn presenter(&self) -> Option<&str> {
        self.text("azp")
    }

    /// Whether `hit` holds for one of the audiences.
    pub fn any_audience(&self, hit: impl Fn(&str) -> bool) -> bool {
        any_text(self.payload.get("aud"), &hit)
    }

    /// Whether `hit` holds for the claim at `path`, or for an element of it when it is a
    /// list. Other than text nothing matches (Istio).
    pub fn any_value<S: AsRef<str>>(&self, path: &[S], hit: impl Fn(&str) -> bool) -> bool {
        match self.words(path) {
            Some(words) => words.iter().any(|word| hit(word)),
            None => any_text(self.at(path), &hit),
        }
    }

    /// The words of the claim at `path`, if it is one whose text is a list of words.
    pub fn words<S: AsRef<str>>(&self, path: &[S]) -> Option<&[Box<str>]> {
        let [name] = path else { return None };
        let mut all = self.words.iter();
        let (_, words) = all.find(|(known, _)| **known == *name.as_ref())?;
        Some(words)
    }

    /// The claim at `path`.
    pub fn at<S: AsRef<str>>(&self, path: &[S]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        let mut value = self.payload.get(first.as_ref())?;
        for name in rest {
            value = value.as_object()?.get(name.as_ref())?;
        }
        Some(value)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.payload.get(name)?.as_str()
    }
}

fn any_text(value: Option<&Value>, hit: &impl Fn(&str) -> bool) -> bool {
    match value {
        Some(Value::String(text)) => hit(text),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(hit),
        _ => false,
    }
}
