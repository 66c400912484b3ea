//! Texts of CNI configurations: which form one has, and what it says with the plugin and
//! without. Pure.

use serde_json::{Map, Value, json};

use crate::plugin::{PLUGIN_TYPE, SUPPORTED_VERSIONS};

/// Why a configuration cannot take the plugin.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// It is not what it should be.
    #[error("is not a CNI configuration: {0}")]
    Malformed(String),
    /// Our plugin does not speak its version.
    #[error("has cniVersion {0:?}; chained plugins need 0.3.0 or newer")]
    Version(String),
}

/// The two forms of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A list of plugins (`.conflist`).
    List,
    /// One plugin (`.conf`, `.json`).
    Single,
}

/// The form of a text; `None` for one that a runtime passes over.
pub(super) fn form(text: &[u8]) -> Option<Form> {
    let conf: Value = serde_json::from_slice(text).ok()?;
    match conf.get("plugins") {
        Some(plugins) => {
            let first = plugins.as_array()?.first()?;
            // A list of nothing but ours is what an owner left who is gone.
            let foreign = plugins.as_array()?.iter().any(|plugin| !is_ours(plugin));
            (first.get("type").is_some() && foreign).then_some(Form::List)
        }
        None => conf.get("type")?.as_str().map(|_| Form::Single),
    }
}

/// The list with the plugin as its last one; `None` if that is what it is.
pub(super) fn join(text: &[u8], entry: &Value) -> Result<Option<String>, ConfigurationError> {
    let mut conf = parse(text)?;
    check_version(&conf)?;
    let plugins = plugins(&mut conf)?;
    let ours = plugins.iter().filter(|plugin| is_ours(plugin)).count();
    if ours == 1 && plugins.last() == Some(entry) {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry.clone());
    Ok(Some(print(&conf)))
}

/// A single plugin as a list, with ours behind it.
pub(super) fn to_list(text: &[u8], entry: &Value) -> Result<String, ConfigurationError> {
    let conf = parse(text)?;
    check_version(&conf)?;
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        if let Some(value) = conf.get(key) {
            list.insert(key.to_owned(), value.clone());
        }
    }
    list.insert("plugins".to_owned(), json!([Value::Object(conf), entry]));
    Ok(print(&list))
}

/// Whether a list is what [`to_list`] makes of a single plugin, whatever our entry says.
pub(super) fn is_made_of(list: &[u8], single: &[u8]) -> bool {
    let foreign = |list: &[u8]| {
        let mut conf = parse(list).ok()?;
        plugins(&mut conf).ok()?.retain(|plugin| !is_ours(plugin));
        Some(conf)
    };
    let made = to_list(single, &json!({"type": PLUGIN_TYPE})).ok();
    made.and_then(|made| foreign(made.as_bytes()))
        .is_some_and(|made| foreign(list) == Some(made))
}

/// The list without the plugin; `None` if it is not in it.
pub(super) fn leave(text: &[u8]) -> Option<String> {
    let mut conf = parse(text).ok()?;
    let plugins = plugins(&mut conf).ok()?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    (plugins.len() < before).then(|| print(&conf))
}

fn parse(text: &[u8]) -> Result<Map<String, Value>, ConfigurationError> {
    match serde_json::from_slice(text) {
        Ok(Value::Object(conf)) => Ok(conf),
        Ok(_) => Err(ConfigurationError::Malformed("not an object".into())),
        Err(e) => Err(ConfigurationError::Malformed(e.to_string())),
    }
}

fn plugins(conf: &mut Map<String, Value>) -> Result<&mut Vec<Value>, ConfigurationError> {
    conf.get_mut("plugins")
        .and_then(Value::as_array_mut)
        .ok_or_else(|| ConfigurationError::Malformed("`plugins` is no list".into()))
}

fn check_version(conf: &Map<String, Value>) -> Result<(), ConfigurationError> {
    let version = conf.get("cniVersion").and_then(Value::as_str);
    let version = version.unwrap_or_default();
    if SUPPORTED_VERSIONS.contains(&version) {
        return Ok(());
    }
    Err(ConfigurationError::Version(version.to_owned()))
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN_TYPE)
}

fn print(conf: &Map<String, Value>) -> String {
    // A map of strings and values always has a text.
    let mut text = serde_json::to_string_pretty(conf).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Value {
        json!({"type": PLUGIN_TYPE, "agentSocket": "/a"})
    }

    fn types(text: &str) -> Vec<String> {
        let conf: Value = serde_json::from_str(text).expect("JSON");
        let plugins = conf["plugins"].as_array().expect("a list");
        let name = |plugin: &Value| plugin["type"].as_str().expect("text").to_owned();
        plugins.iter().map(name).collect()
    }

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "net", "disableCheck": true,
        "plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}, {"type": "portmap"}]}"#;

    #[test]
    fn the_plugin_joins_at_the_end_and_leaves_no_trace() {
        let joined = join(LIST.as_bytes(), &ours()).expect("fits").expect("new");
        assert_eq!(types(&joined), ["bridge", "portmap", PLUGIN_TYPE]);
        assert!(joined.contains("disableCheck"));
        assert_eq!(join(joined.as_bytes(), &ours()).expect("fits"), None);
        let left = leave(joined.as_bytes()).expect("it was in");
        let (before, after): (Value, Value) = (
            serde_json::from_str(LIST).expect("JSON"),
            serde_json::from_str(&left).expect("JSON"),
        );
        assert_eq!(before, after);
        assert_eq!(leave(left.as_bytes()), None);
    }

    #[test]
    fn settings_and_place_are_put_right() {
        let joined = join(LIST.as_bytes(), &json!({"type": PLUGIN_TYPE}))
            .expect("fits")
            .expect("new");
        let other = join(joined.as_bytes(), &ours())
            .expect("fits")
            .expect("other settings");
        assert_eq!(types(&other), ["bridge", "portmap", PLUGIN_TYPE]);
        assert!(other.contains("agentSocket"));
        let first = format!(
            r#"{{"cniVersion": "1.0.0", "plugins": [{}, {{"type": "bridge"}}]}}"#,
            ours()
        );
        let moved = join(first.as_bytes(), &ours())
            .expect("fits")
            .expect("moved");
        assert_eq!(types(&moved), ["bridge", PLUGIN_TYPE]);
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single = br#"{"cniVersion": "0.3.1", "name": "net", "type": "bridge", "mtu": 1400}"#;
        assert_eq!(form(single), Some(Form::Single));
        let list = to_list(single, &ours()).expect("fits");
        assert_eq!(form(list.as_bytes()), Some(Form::List));
        assert_eq!(types(&list), ["bridge", PLUGIN_TYPE]);
        let list: Value = serde_json::from_str(&list).expect("JSON");
        assert_eq!(list["name"], "net");
        assert_eq!(list["cniVersion"], "0.3.1");
        assert_eq!(list["plugins"][0]["mtu"], 1400);
    }

    #[test]
    fn what_a_runtime_passes_over_has_no_form() {
        for text in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"plugins": []}"#,
            r#"{"plugins": {}}"#,
            r#"{"plugins": [{"type": "adit-cni"}]}"#,
            r#"{"cniVersion": "1.0.0"}"#,
        ] {
            assert_eq!(form(text.as_bytes()), None, "{text}");
        }
        assert_eq!(form(LIST.as_bytes()), Some(Form::List));
    }

    #[test]
    fn old_versions_are_refused_by_name() {
        for text in [
            r#"{"cniVersion": "0.2.0", "plugins": [{"type": "bridge"}]}"#,
            r#"{"plugins": [{"type": "bridge"}]}"#,
        ] {
            let error = join(text.as_bytes(), &ours()).expect_err(text);
            assert!(matches!(error, ConfigurationError::Version(_)), "{error}");
        }
        let error = join(b"{\"cniVersion\": \"1.0.0\"}", &ours()).expect_err("no list");
        assert!(matches!(error, ConfigurationError::Malformed(_)), "{error}");
    }
}
