//! From pieces to a tree.

use std::collections::BTreeMap;

use serde_json::Value;

use super::TemplateError;
use super::lexer::{Piece, Token, pieces};

/// Named templates: a file's own name, and what it defines.
#[derive(Debug, Default)]
pub struct Templates(pub(super) BTreeMap<String, Body>);

#[derive(Debug)]
pub(super) struct Body {
    pub(super) file: String,
    pub(super) nodes: Vec<Node>,
}

#[derive(Debug)]
pub(super) enum Node {
    Text(String),
    Output(Pipeline),
    /// Branches in order, then `else`.
    If(Vec<(Pipeline, Vec<Node>)>, Vec<Node>),
    With(Pipeline, Vec<Node>, Vec<Node>),
    Range(Pipeline, Vec<Node>, Vec<Node>),
    Template(String, Option<Pipeline>, usize),
}

#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) line: usize,
    /// Variables that get the value.
    pub(super) variables: Vec<String>,
    /// They are new, and not assigned to.
    pub(super) declares: bool,
    pub(super) commands: Vec<Vec<Operand>>,
}

#[derive(Debug)]
pub(super) enum Operand {
    Literal(Value),
    Field(Vec<String>),
    Variable(String, Vec<String>),
    Function(String),
    Group(Box<Pipeline>, Vec<String>),
}

/// Reads a file and everything that it defines.
///
/// # Errors
/// What cannot be read, and where.
pub fn parse_into(
    templates: &mut Templates,
    file: &str,
    source: &str,
) -> Result<(), TemplateError> {
    let pieces = pieces(file, source)?;
    let mut parser = Parser {
        file,
        pieces: pieces.into_iter(),
        templates,
        line: 1,
    };
    let (nodes, end) = parser.block()?;
    match end {
        End::File => {}
        End::Action => return Err(parser.error("end without a beginning")),
        End::Else(_) => return Err(parser.error("else without a beginning")),
    }
    let file = file.to_owned();
    templates.0.insert(file.clone(), Body { file, nodes });
    Ok(())
}

/// What ended a block.
enum End {
    File,
    /// `end`.
    Action,
    /// With what follows `else`: `if ...` or nothing.
    Else(Vec<Token>),
}

struct Parser<'a, P> {
    file: &'a str,
    pieces: P,
    templates: &'a mut Templates,
    line: usize,
}

impl<'a, P: Iterator<Item = Piece<'a>>> Parser<'a, P> {
    fn error(&self, reason: impl Into<String>) -> TemplateError {
        TemplateError {
            file: self.file.to_owned(),
            line: self.line,
            reason: reason.into(),
            refused: false,
        }
    }

    fn block(&mut self) -> Result<(Vec<Node>, End), TemplateError> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let tokens = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text.to_owned()));
                    continue;
                }
                Piece::Action(tokens, line) => {
                    self.line = line;
                    tokens
                }
            };
            let keyword = match tokens.first() {
                Some(Token::Word(word)) => word.as_str(),
                _ => "",
            };
            let after = || tokens[1..].to_vec();
            match keyword {
                "end" => return Ok((nodes, End::Action)),
                "else" => return Ok((nodes, End::Else(after()))),
                "if" => nodes.push(self.conditional(after())?),
                "with" => {
                    let (pipeline, body, other) = self.scoped("with", after())?;
                    nodes.push(Node::With(pipeline, body, other));
                }
                "range" => {
                    let (pipeline, body, other) = self.scoped("range", after())?;
                    nodes.push(Node::Range(pipeline, body, other));
                }
                "define" => self.define(&tokens)?,
                "template" => {
                    let Some(Token::Text(name)) = tokens.get(1) else {
                        return Err(self.error("template needs a name"));
                    };
                    let argument = match tokens.len() > 2 {
                        true => Some(self.pipeline(tokens[2..].to_vec())?),
                        false => None,
                    };
                    nodes.push(Node::Template(name.clone(), argument, self.line));
                }
                "block" | "break" | "continue" => {
                    return Err(self.error(format!("{keyword} is not known here")));
                }
                _ => nodes.push(Node::Output(self.pipeline(tokens)?)),
            }
        }
        Ok((nodes, End::File))
    }

    fn conditional(&mut self, tokens: Vec<Token>) -> Result<Node, TemplateError> {
        if tokens.is_empty() {
            return Err(self.error("if needs a condition"));
        }
        let mut branches = Vec::new();
        let mut condition = self.pipeline(tokens)?;
        loop {
            let (body, end) = self.block()?;
            branches.push((condition, body));
            match end {
                End::Action => return Ok(Node::If(branches, Vec::new())),
                End::Else(tokens) if tokens.is_empty() => {
                    let other = self.until_end()?;
                    return Ok(Node::If(branches, other));
                }
                End::Else(tokens) if tokens[0] == Token::Word("if".into()) => {
                    condition = self.pipeline(tokens[1..].to_vec())?;
                }
                End::Else(_) => return Err(self.error("only if may follow else")),
                End::File => return Err(self.error("an {{ end }} is missing")),
            }
        }
    }

    fn scoped(
        &mut self,
        keyword: &str,
        tokens: Vec<Token>,
    ) -> Result<(Pipeline, Vec<Node>, Vec<Node>), TemplateError> {
        if tokens.is_empty() {
            return Err(self.error(format!("{keyword} needs a value")));
        }
        let pipeline = self.pipeline(tokens)?;
        let (body, end) = self.block()?;
        let other = match end {
            End::Action => Vec::new(),
            End::Else(tokens) if tokens.is_empty() => self.until_end()?,
            End::Else(_) => return Err(self.error(format!("{keyword} has no else if"))),
            End::File => return Err(self.error("an {{ end }} is missing")),
        };
        Ok((pipeline, body, other))
    }

    fn until_end(&mut self) -> Result<Vec<Node>, TemplateError> {
        match self.block()? {
            (nodes, End::Action) => Ok(nodes),
            (_, End::Else(_)) => Err(self.error("a second else")),
            (_, End::File) => Err(self.error("an {{ end }} is missing")),
        }
    }

    fn define(&mut self, tokens: &[Token]) -> Result<(), TemplateError> {
        let [_, Token::Text(name)] = tokens else {
            return Err(self.error("define needs a name"));
        };
        let nodes = self.until_end()?;
        let file = self.file.to_owned();
        let body = Body { file, nodes };
        self.templates.0.insert(name.clone(), body);
        Ok(())
    }

    fn pipeline(&self, tokens: Vec<Token>) -> Result<Pipeline, TemplateError> {
        let mut tokens = tokens.into_iter().peekable();
        let pipeline = self.pipeline_of(&mut tokens)?;
        match tokens.next() {
            None => Ok(pipeline),
            Some(token) => Err(self.error(format!("{token:?} is not expected"))),
        }
    }

    fn pipeline_of(
        &self,
        tokens: &mut std::iter::Peekable<std::vec::IntoIter<Token>>,
    ) -> Result<Pipeline, TemplateError> {
        let (variables, declares) = self.variables(tokens)?;
        let mut commands = Vec::new();
        let mut command = Vec::new();
        loop {
            match tokens.peek() {
                None | Some(Token::Close) => break,
                Some(Token::Pipe) => {
                    tokens.next();
                    if command.is_empty() {
                        return Err(self.error("nothing before |"));
                    }
                    commands.push(std::mem::take(&mut command));
                }
                Some(_) => {
                    // Peeked, so it is there.
                    let Some(token) = tokens.next() else { break };
                    self.operand(token, tokens, &mut command)?;
                }
            }
        }
        if command.is_empty() {
            return Err(self.error("a value is expected"));
        }
        commands.push(command);
        Ok(Pipeline {
            line: self.line,
            variables,
            declares,
            commands,
        })
    }

    /// `$x :=`, `$x =`, `$i, $x :=`.
    fn variables(
        &self,
        tokens: &mut std::iter::Peekable<std::vec::IntoIter<Token>>,
    ) -> Result<(Vec<String>, bool), TemplateError> {
        let ahead: Vec<Token> = tokens.clone().take(4).collect();
        let (names, declares) = match ahead.as_slice() {
            [Token::Variable(x), Token::Declare, ..] => (vec![x.clone()], true),
            [Token::Variable(x), Token::Assign, ..] => (vec![x.clone()], false),
            [
                Token::Variable(i),
                Token::Comma,
                Token::Variable(x),
                Token::Declare,
            ] => (vec![i.clone(), x.clone()], true),
            _ => return Ok((Vec::new(), false)),
        };
        for _ in 0..names.len() * 2 {
            tokens.next();
        }
        Ok((names, declares))
    }

    fn operand(
        &self,
        token: Token,
        tokens: &mut std::iter::Peekable<std::vec::IntoIter<Token>>,
        command: &mut Vec<Operand>,
    ) -> Result<(), TemplateError> {
        let operand = match token {
            Token::Text(text) => Operand::Literal(text.into()),
            Token::Integer(number) => Operand::Literal(number.into()),
            Token::Float(number) => Operand::Literal(number.into()),
            Token::Word(word) => match word.as_str() {
                "true" => Operand::Literal(true.into()),
                "false" => Operand::Literal(false.into()),
                "nil" => Operand::Literal(Value::Null),
                _ => Operand::Function(word),
            },
            Token::Field { path, .. } => Operand::Field(path),
            Token::Variable(name) => Operand::Variable(name, glued_path(tokens)),
            Token::Open => {
                let inner = self.pipeline_of(tokens)?;
                if tokens.next() != Some(Token::Close) {
                    return Err(self.error("a ) is missing"));
                }
                Operand::Group(Box::new(inner), glued_path(tokens))
            }
            other => return Err(self.error(format!("{other:?} is not expected"))),
        };
        command.push(operand);
        Ok(())
    }
}

/// `.a.b` directly after a variable or a group.
fn glued_path(tokens: &mut std::iter::Peekable<std::vec::IntoIter<Token>>) -> Vec<String> {
    match tokens.next_if(|token| matches!(token, Token::Field { glued: true, .. })) {
        Some(Token::Field { path, .. }) => path,
        _ => Vec::new(),
    }
}
