//! A tree and a value become text.

use serde_json::Value;

use super::TemplateError;
use super::functions;
use super::parser::{Node, Operand, Pipeline, Templates};

/// Templates that include each other deeper than this do so without end.
const MAX_DEPTH: usize = 32;

/// Renders a file with `dot` as `.` and `$`.
///
/// # Errors
/// What the template asks for and cannot have, and where.
pub fn render(templates: &Templates, name: &str, dot: &Value) -> Result<String, TemplateError> {
    let mut evaluation = Evaluation {
        templates,
        depth: 0,
        file: name.to_owned(),
        line: 0,
    };
    evaluation.named(name, dot.clone())
}

pub(super) struct Evaluation<'a> {
    templates: &'a Templates,
    depth: usize,
    file: String,
    line: usize,
}

/// `.`, and the variables that are in sight, innermost last; the first one is `$`.
struct Scope {
    dot: Value,
    variables: Vec<(String, Value)>,
}

impl Evaluation<'_> {
    fn error(&self, reason: impl Into<String>) -> TemplateError {
        TemplateError {
            file: self.file.clone(),
            line: self.line,
            reason: reason.into(),
            refused: false,
        }
    }

    /// A named template's text: `include` and `template`.
    fn named(&mut self, name: &str, dot: Value) -> Result<String, TemplateError> {
        let Some(body) = self.templates.0.get(name) else {
            return Err(self.error(format!("template {name} is not defined")));
        };
        if self.depth >= MAX_DEPTH {
            return Err(self.error("templates include each other without end"));
        }
        self.depth += 1;
        let caller = (
            std::mem::replace(&mut self.file, body.file.clone()),
            self.line,
        );
        let mut scope = Scope {
            variables: vec![(String::new(), dot.clone())],
            dot,
        };
        let mut text = String::new();
        self.nodes(&body.nodes, &mut scope, &mut text)?;
        (self.file, self.line) = caller;
        self.depth -= 1;
        Ok(text)
    }

    fn nodes(
        &mut self,
        nodes: &[Node],
        scope: &mut Scope,
        out: &mut String,
    ) -> Result<(), TemplateError> {
        let visible = scope.variables.len();
        for node in nodes {
            self.node(node, scope, out)?;
        }
        scope.variables.truncate(visible);
        Ok(())
    }

    fn node(
        &mut self,
        node: &Node,
        scope: &mut Scope,
        out: &mut String,
    ) -> Result<(), TemplateError> {
        let visible = scope.variables.len();
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Output(pipeline) => {
                let value = self.pipeline(pipeline, scope)?;
                // A declaration stays in sight after its action.
                if pipeline.variables.is_empty() {
                    out.push_str(&functions::text(&value));
                }
                return Ok(());
            }
            Node::If(branches, other) => {
                let mut taken = other;
                for (condition, body) in branches {
                    if functions::truth(&self.pipeline(condition, scope)?) {
                        taken = body;
                        break;
                    }
                }
                self.nodes(taken, scope, out)?;
            }
            Node::With(pipeline, body, other) => {
                let value = self.pipeline(pipeline, scope)?;
                match functions::truth(&value) {
                    true => self.inside(value, body, scope, out)?,
                    false => self.nodes(other, scope, out)?,
                }
            }
            Node::Range(pipeline, body, other) => {
                let value = self.value_of(pipeline, scope)?;
                let items = self.items(value)?;
                if items.is_empty() {
                    self.nodes(other, scope, out)?;
                }
                for (key, item) in items {
                    match pipeline.variables.as_slice() {
                        [] => {}
                        [one] => scope.variables.push((one.clone(), item.clone())),
                        [index, one, ..] => {
                            scope.variables.push((index.clone(), key));
                            scope.variables.push((one.clone(), item.clone()));
                        }
                    }
                    self.inside(item, body, scope, out)?;
                    scope.variables.truncate(visible);
                }
            }
            Node::Template(name, argument, line) => {
                self.line = *line;
                let dot = match argument {
                    Some(pipeline) => self.pipeline(pipeline, scope)?,
                    None => Value::Null,
                };
                out.push_str(&self.named(name, dot)?);
            }
        }
        scope.variables.truncate(visible);
        Ok(())
    }

    fn inside(
        &mut self,
        dot: Value,
        body: &[Node],
        scope: &mut Scope,
        out: &mut String,
    ) -> Result<(), TemplateError> {
        let outer = std::mem::replace(&mut scope.dot, dot);
        self.nodes(body, scope, out)?;
        scope.dot = outer;
        Ok(())
    }

    /// What `range` walks over; a map in the order of its keys.
    fn items(&self, value: Value) -> Result<Vec<(Value, Value)>, TemplateError> {
        match value {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => {
                let numbered = list.into_iter().enumerate();
                Ok(numbered.map(|(i, v)| (Value::from(i), v)).collect())
            }
            Value::Object(map) => {
                let mut entries: Vec<_> = map.into_iter().collect();
                entries.sort_by(|a, b| a.0.cmp(&b.0));
                Ok(entries.into_iter().map(|(k, v)| (k.into(), v)).collect())
            }
            other => Err(self.error(format!("range over {other} is not possible"))),
        }
    }

    /// A pipeline's value, which its variables have got.
    fn pipeline(&mut self, pipeline: &Pipeline, scope: &mut Scope) -> Result<Value, TemplateError> {
        let value = self.value_of(pipeline, scope)?;
        for name in &pipeline.variables {
            if pipeline.declares {
                scope.variables.push((name.clone(), value.clone()));
                continue;
            }
            let declared = scope.variables.iter_mut().rev().find(|v| v.0 == *name);
            match declared {
                Some((_, assigned)) => *assigned = value.clone(),
                None => return Err(self.error(format!("variable ${name} is not declared"))),
            }
        }
        Ok(value)
    }

    fn value_of(&mut self, pipeline: &Pipeline, scope: &mut Scope) -> Result<Value, TemplateError> {
        self.line = pipeline.line;
        let mut piped = None;
        for command in &pipeline.commands {
            piped = Some(self.command(command, piped, scope)?);
        }
        Ok(piped.unwrap_or_default())
    }

    fn command(
        &mut self,
        command: &[Operand],
        piped: Option<Value>,
        scope: &mut Scope,
    ) -> Result<Value, TemplateError> {
        let Some((first, rest)) = command.split_first() else {
            return Ok(Value::Null);
        };
        if let Operand::Function(name) = first {
            return self.call(name, rest, piped, scope);
        }
        // The two methods that charts call on Helm's own objects.
        if let Operand::Field(path) | Operand::Variable(_, path) = first
            && let [.., object, method] = path.as_slice()
            && matches!(
                (object.as_str(), method.as_str()),
                ("Files", "Get") | ("APIVersions", "Has")
            )
        {
            let start = match first {
                Operand::Variable(name, _) => self.variable(name, scope)?,
                _ => scope.dot.clone(),
            };
            let object = self.walk(start, &path[..path.len() - 1])?;
            let [argument] = rest else {
                return Err(self.error(format!("{method} takes one argument")));
            };
            let wanted = functions::text(&self.operand(argument, scope)?);
            return Ok(match object {
                Value::Object(files) => files.get(&wanted).cloned().unwrap_or_else(|| "".into()),
                Value::Array(known) => known.contains(&Value::String(wanted)).into(),
                _ => Value::Null,
            });
        }
        if !rest.is_empty() || piped.is_some() {
            return Err(self.error("a value is no function, and takes no arguments"));
        }
        self.operand(first, scope)
    }

    fn call(
        &mut self,
        name: &str,
        operands: &[Operand],
        piped: Option<Value>,
        scope: &mut Scope,
    ) -> Result<Value, TemplateError> {
        if matches!(name, "and" | "or") {
            // Lazily: what comes later may only be meaningful if what came before holds.
            let mut value = Value::Null;
            let last = operands.len() + usize::from(piped.is_some());
            for at in 0..last {
                value = match operands.get(at) {
                    Some(operand) => self.operand(operand, scope)?,
                    None => piped.clone().unwrap_or_default(),
                };
                if functions::truth(&value) == (name == "or") {
                    break;
                }
            }
            return Ok(value);
        }
        let mut arguments = Vec::with_capacity(operands.len() + 1);
        for operand in operands {
            arguments.push(self.operand(operand, scope)?);
        }
        arguments.extend(piped);
        if name == "include" {
            let [Value::String(template), dot] = arguments.as_slice() else {
                return Err(self.error("include takes a name and a value"));
            };
            return Ok(self.named(template, dot.clone())?.into());
        }
        functions::call(name, arguments).map_err(|error| {
            let mut placed = self.error(error.reason);
            placed.refused = error.refused;
            placed
        })
    }

    fn operand(&mut self, operand: &Operand, scope: &mut Scope) -> Result<Value, TemplateError> {
        match operand {
            Operand::Literal(value) => Ok(value.clone()),
            Operand::Field(path) => self.walk(scope.dot.clone(), path),
            Operand::Variable(name, path) => {
                let value = self.variable(name, scope)?;
                self.walk(value, path)
            }
            Operand::Function(name) => self.call(name, &[], None, scope),
            Operand::Group(pipeline, path) => {
                let value = self.value_of(pipeline, scope)?;
                self.walk(value, path)
            }
        }
    }

    fn variable(&self, name: &str, scope: &Scope) -> Result<Value, TemplateError> {
        let found = scope.variables.iter().rev().find(|v| v.0 == name);
        found
            .map(|v| v.1.clone())
            .ok_or_else(|| self.error(format!("variable ${name} is not declared")))
    }

    /// A field of a field. A field that a map does not have is nothing, whose own fields are
    /// a mistake; Go lets it pass only where a chain begins with nothing (`(.a).b`).
    fn walk(&self, start: Value, path: &[String]) -> Result<Value, TemplateError> {
        if start.is_null() {
            return Ok(start);
        }
        let mut value = start;
        for (depth, name) in path.iter().enumerate() {
            value = match value {
                Value::Object(mut map) => map.remove(name).unwrap_or_default(),
                other => {
                    let what = if other.is_null() { "nothing" } else { "no map" };
                    let whose = match depth {
                        0 => "what is before it".to_owned(),
                        _ => format!(".{}", path[..depth].join(".")),
                    };
                    return Err(self.error(format!("{whose} is {what}, and has no field {name}")));
                }
            };
        }
        Ok(value)
    }
}
