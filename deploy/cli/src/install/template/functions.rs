//! Go's, Sprig's and Helm's functions, as far as the charts use them.

use serde_json::{Map, Value};

use super::yaml::to_yaml;

/// Why a function cannot answer.
pub(super) struct CallError {
    pub(super) reason: String,
    /// `fail` and `required`: the chart says no.
    pub(super) refused: bool,
}

impl<T: Into<String>> From<T> for CallError {
    fn from(reason: T) -> Self {
        Self {
            reason: reason.into(),
            refused: false,
        }
    }
}

/// Go's truth: false, 0, nothing and what is empty are not.
pub(super) fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(bool) => *bool,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As an action prints it. Helm prints nothing for what is not there.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => {
            let items: Vec<_> = list.iter().map(text).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(map) => {
            let mut items: Vec<_> = map
                .iter()
                .map(|(k, v)| format!("{k}:{}", text(v)))
                .collect();
            items.sort();
            format!("map[{}]", items.join(" "))
        }
        other => other.to_string(),
    }
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            let entries = entries.into_iter();
            Value::Object(entries.map(|(k, v)| (k.clone(), sorted(v))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// Lays `over` on `base`: maps are merged, everything else is replaced.
pub fn merge(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

pub(super) fn call(name: &str, arguments: Vec<Value>) -> Result<Value, CallError> {
    let given = arguments.len();
    let wrong = || CallError::from(format!("{name} cannot take {given} arguments"));
    Ok(match (name, arguments.as_slice()) {
        ("not", [a]) => (!truth(a)).into(),
        ("eq", [a, others @ ..]) if !others.is_empty() => others.iter().any(|b| equal(a, b)).into(),
        ("ne", [a, b]) => (!equal(a, b)).into(),
        ("lt", [a, b]) => (number(a)? < number(b)?).into(),
        ("le", [a, b]) => (number(a)? <= number(b)?).into(),
        ("gt", [a, b]) => (number(a)? > number(b)?).into(),
        ("ge", [a, b]) => (number(a)? >= number(b)?).into(),
        ("empty", [a]) => (!truth(a)).into(),
        ("default", [default, a]) => if truth(a) { a } else { default }.clone(),
        ("coalesce", all) => all.iter().find(|a| truth(a)).cloned().unwrap_or_default(),
        ("ternary", [yes, no, condition]) => if truth(condition) { yes } else { no }.clone(),
        ("fail", [reason]) => return Err(refused(reason)),
        ("required", [reason, a]) => match a {
            Value::Null => return Err(refused(reason)),
            Value::String(text) if text.is_empty() => return Err(refused(reason)),
            a => a.clone(),
        },

        // JSON's escapes are YAML's too; Go's are not all.
        ("quote", all) => quoted(all, |text| Value::from(text).to_string()).into(),
        ("squote", all) => quoted(all, |text| format!("'{text}'")).into(),
        ("toString", [a]) => text(a).into(),
        ("lower", [a]) => text(a).to_lowercase().into(),
        ("upper", [a]) => text(a).to_uppercase().into(),
        ("trim", [a]) => text(a).trim().into(),
        ("trimSuffix", [end, a]) => {
            let (end, a) = (text(end), text(a));
            a.strip_suffix(&end).unwrap_or(&a).into()
        }
        ("trimPrefix", [start, a]) => {
            let (start, a) = (text(start), text(a));
            a.strip_prefix(&start).unwrap_or(&a).into()
        }
        ("hasPrefix", [start, a]) => text(a).starts_with(&text(start)).into(),
        ("hasSuffix", [end, a]) => text(a).ends_with(&text(end)).into(),
        ("contains", [part, a]) => text(a).contains(&text(part)).into(),
        ("replace", [old, new, a]) => text(a).replace(&text(old), &text(new)).into(),
        ("trunc", [length, a]) => {
            let length = usize::try_from(integer(length)?).map_err(|_| wrong())?;
            text(a).chars().take(length).collect::<String>().into()
        }
        ("indent", [spaces, a]) => indented(spaces, &text(a))?.into(),
        ("nindent", [spaces, a]) => format!("\n{}", indented(spaces, &text(a))?).into(),
        ("printf", [format, rest @ ..]) => formatted(&text(format), rest)?.into(),
        ("join", [separator, Value::Array(list)]) => {
            let items: Vec<_> = list.iter().map(text).collect();
            items.join(&text(separator)).into()
        }
        ("splitList", [separator, a]) => {
            let (separator, a) = (text(separator), text(a));
            a.split(separator.as_str()).map(Value::from).collect()
        }
        ("int" | "int64", [a]) => integer(a)?.into(),

        ("toYaml", [a]) => to_yaml(a).into(),
        ("toJson", [a]) => sorted(a).to_string().into(),
        ("fromYaml", [a]) => {
            match serde_yaml_ng::from_str(&text(a)).map_err(|error| format!("fromYaml: {error}"))? {
                Value::Null => Value::Object(Map::new()),
                parsed => parsed,
            }
        }

        ("list", all) => Value::Array(all.to_vec()),
        ("dict", all) if given.is_multiple_of(2) => {
            let pairs = all.chunks_exact(2);
            Value::Object(
                pairs
                    .map(|pair| (text(&pair[0]), pair[1].clone()))
                    .collect(),
            )
        }
        ("deepCopy", [a]) => a.clone(),
        ("hasKey", [map, key]) => object(map)?.contains_key(&text(key)).into(),
        ("get", [map, key]) => object(map)?.get(&text(key)).cloned().unwrap_or("".into()),
        ("omit", [map, keys @ ..]) => {
            let keys: Vec<_> = keys.iter().map(text).collect();
            let kept = object(map)?.iter().filter(|(k, _)| !keys.contains(k));
            Value::Object(kept.map(|(k, v)| (k.clone(), v.clone())).collect())
        }
        ("keys", [map]) => object(map)?
            .keys()
            .map(|key| Value::from(key.as_str()))
            .collect(),
        ("sortAlpha", [Value::Array(list)]) => {
            let mut items: Vec<_> = list.iter().map(text).collect();
            items.sort();
            items.into()
        }
        ("mergeOverwrite" | "mustMergeOverwrite", [base, over @ ..]) => {
            let mut merged = base.clone();
            object(&merged)?;
            for map in over {
                object(map)?;
                merge(&mut merged, map);
            }
            merged
        }
        ("index", [a, path @ ..]) => path.iter().try_fold(a.clone(), |a, at| index(&a, at))?,
        ("has", [a, Value::Array(list)]) => list.iter().any(|b| equal(a, b)).into(),
        ("append", [Value::Array(list), a]) => {
            let mut list = list.clone();
            list.push(a.clone());
            list.into()
        }
        ("concat", lists) => {
            let mut all = Vec::new();
            for list in lists {
                all.extend(list.as_array().ok_or("concat takes lists")?.iter().cloned());
            }
            all.into()
        }
        ("first", [Value::Array(list)]) => list.first().cloned().unwrap_or_default(),
        ("len", [a]) => match a {
            Value::String(text) => text.len(),
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            _ => return Err("len of what has no length".into()),
        }
        .into(),
        ("kindIs", [kind, a]) => (text(kind) == kind_of(a)).into(),
        ("kindOf", [a]) => kind_of(a).into(),
        (known, _) if KNOWN.contains(&known) => return Err(wrong()),
        _ => return Err(format!("function {name} is not known here").into()),
    })
}

/// For a message that tells a wrong call from an unknown function.
const KNOWN: &[&str] = &[
    "append",
    "coalesce",
    "contains",
    "deepCopy",
    "default",
    "dict",
    "empty",
    "eq",
    "fail",
    "first",
    "fromYaml",
    "ge",
    "get",
    "gt",
    "has",
    "hasKey",
    "hasPrefix",
    "hasSuffix",
    "indent",
    "index",
    "int",
    "int64",
    "join",
    "keys",
    "kindIs",
    "kindOf",
    "le",
    "len",
    "lower",
    "lt",
    "mergeOverwrite",
    "mustMergeOverwrite",
    "ne",
    "nindent",
    "not",
    "omit",
    "printf",
    "replace",
    "required",
    "sortAlpha",
    "splitList",
    "ternary",
    "toJson",
    "toString",
    "toYaml",
    "trim",
    "trimPrefix",
    "trimSuffix",
    "trunc",
    "upper",
];

fn refused(reason: &Value) -> CallError {
    CallError {
        reason: text(reason),
        refused: true,
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

fn number(value: &Value) -> Result<f64, CallError> {
    let number = value.as_f64();
    Ok(number.ok_or_else(|| format!("{} is no number", text(value)))?)
}

/// What is no number is 0, as Sprig has it.
fn integer(value: &Value) -> Result<i64, CallError> {
    match value {
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Ok(integer),
            // Truncates, as Go does; the values are small.
            (None, Some(float)) => Ok(float as i64),
            _ => Err("a number is too large".into()),
        },
        Value::String(text) => Ok(text.parse().unwrap_or(0)),
        Value::Bool(bool) => Ok(i64::from(*bool)),
        _ => Ok(0),
    }
}

fn object(value: &Value) -> Result<&Map<String, Value>, CallError> {
    Ok(value
        .as_object()
        .ok_or_else(|| format!("{} is no map", text(value)))?)
}

fn index(value: &Value, at: &Value) -> Result<Value, CallError> {
    match value {
        Value::Object(map) => Ok(map.get(&text(at)).cloned().unwrap_or_default()),
        Value::Array(list) => {
            let found = usize::try_from(integer(at)?)
                .ok()
                .and_then(|at| list.get(at));
            Ok(found.cloned().ok_or("index out of range")?)
        }
        _ => Err("index of what has no elements".into()),
    }
}

fn quoted(values: &[Value], quote: impl Fn(String) -> String) -> String {
    let values = values.iter().filter(|value| !value.is_null());
    values
        .map(|value| quote(text(value)))
        .collect::<Vec<_>>()
        .join(" ")
}

fn indented(spaces: &Value, text: &str) -> Result<String, CallError> {
    let spaces = " ".repeat(usize::try_from(integer(spaces)?).map_err(|_| "indent below 0")?);
    Ok(format!(
        "{spaces}{}",
        text.replace('\n', &format!("\n{spaces}"))
    ))
}

/// `printf` with the verbs that charts use.
fn formatted(format: &str, arguments: &[Value]) -> Result<String, CallError> {
    let mut out = String::new();
    let mut arguments = arguments.iter();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let verb = chars.next().unwrap_or('%');
        if verb == '%' {
            out.push('%');
            continue;
        }
        let argument = arguments.next().ok_or("printf has too few arguments")?;
        match verb {
            's' | 'v' => out += &text(argument),
            'd' => out += &integer(argument)?.to_string(),
            'q' => out += &Value::from(text(argument)).to_string(),
            other => return Err(format!("printf: %{other} is not known here").into()),
        }
    }
    match arguments.next() {
        None => Ok(out),
        Some(_) => Err("printf has too many arguments".into()),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "invalid",
        Value::Bool(_) => "bool",
        // What Helm makes of every number in a values file.
        Value::Number(_) => "float64",
        Value::String(_) => "string",
        Value::Array(_) => "slice",
        Value::Object(_) => "map",
    }
}
