//! Text and actions, and an action's tokens.

use super::TemplateError;

/// A piece of a template.
#[derive(Debug)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    /// An action's tokens and the line it begins on.
    Action(Vec<Token>, usize),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// A keyword, a function, `true`, `false`, `nil`.
    Word(String),
    /// `.a.b`; `.` alone is empty. `glued`: no space before it, so it belongs to what is
    /// before it.
    Field {
        path: Vec<String>,
        glued: bool,
    },
    /// `$a`; `$` alone is empty.
    Variable(String),
    Text(String),
    Integer(i64),
    Float(f64),
    Open,
    Close,
    Pipe,
    Comma,
    Declare,
    Assign,
}

/// Cuts a template into its pieces; `{{-` and `-}}` have trimmed the text already.
pub(super) fn pieces<'a>(file: &str, source: &'a str) -> Result<Vec<Piece<'a>>, TemplateError> {
    let mut pieces = Vec::new();
    let mut rest = source;
    let mut trim_left = false;
    loop {
        let (mut text, after) = match rest.split_once("{{") {
            Some((text, after)) => (text, Some(after)),
            None => (rest, None),
        };
        if trim_left {
            text = text.trim_start();
        }
        let Some(after) = after else {
            if !text.is_empty() {
                pieces.push(Piece::Text(text));
            }
            return Ok(pieces);
        };
        let line = 1 + source[..source.len() - after.len()].matches('\n').count();
        let error = |reason: String| TemplateError {
            file: file.to_owned(),
            line,
            reason,
            refused: false,
        };
        let mut action = after;
        if let Some(trimmed) = action.strip_prefix('-')
            && trimmed.starts_with(char::is_whitespace)
        {
            text = text.trim_end();
            action = trimmed;
        }
        if !text.is_empty() {
            pieces.push(Piece::Text(text));
        }
        let end = end_of_action(action).ok_or_else(|| error("an action is not closed".into()))?;
        let mut inner = &action[..end];
        rest = &action[end + 2..];
        trim_left = false;
        if let Some(trimmed) = inner.strip_suffix('-')
            && trimmed.ends_with(char::is_whitespace)
        {
            inner = trimmed;
            trim_left = true;
        }
        let inner = inner.trim();
        if !inner.starts_with("/*") {
            pieces.push(Piece::Action(tokens(inner).map_err(error)?, line));
        }
    }
}

/// Where the `}}` is that ends an action: not inside a text or a comment.
fn end_of_action(action: &str) -> Option<usize> {
    if action.trim_start().starts_with("/*") {
        let comment = action.find("*/")? + 2;
        return Some(comment + action[comment..].find("}}")?);
    }
    let bytes = action.as_bytes();
    let mut quote = None;
    let mut at = 0;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (None, b'"' | b'`') => quote = Some(bytes[at]),
            (None, b'}') if bytes.get(at + 1) == Some(&b'}') => return Some(at),
            (Some(b'"'), b'\\') => at += 1,
            (Some(open), close) if open == close => quote = None,
            _ => {}
        }
        at += 1;
    }
    None
}

fn tokens(action: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = action;
    let mut glued = false;
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            c if c.is_whitespace() => {
                rest = &rest[c.len_utf8()..];
                glued = false;
                continue;
            }
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '|' => (Token::Pipe, 1),
            ',' => (Token::Comma, 1),
            ':' if rest.starts_with(":=") => (Token::Declare, 2),
            '=' => (Token::Assign, 1),
            '"' => quoted(rest)?,
            '`' => {
                let end = rest[1..].find('`').ok_or("a raw text is not closed")?;
                (Token::Text(rest[1..=end].to_owned()), end + 2)
            }
            '.' => {
                let length = word(rest, |c| c.is_alphanumeric() || c == '_' || c == '.');
                let path = rest[..length].split('.').filter(|name| !name.is_empty());
                let path = path.map(str::to_owned).collect();
                (Token::Field { path, glued }, length)
            }
            '$' => {
                let length = 1 + word(&rest[1..], |c| c.is_alphanumeric() || c == '_');
                (Token::Variable(rest[1..length].to_owned()), length)
            }
            '-' | '0'..='9' => {
                let length = 1 + word(&rest[1..], |c| c.is_ascii_digit() || c == '.');
                let number = &rest[..length];
                let token = match (number.parse(), number.parse()) {
                    (Ok(integer), _) => Token::Integer(integer),
                    (_, Ok(float)) => Token::Float(float),
                    _ => return Err(format!("{number} is no number")),
                };
                (token, length)
            }
            c if c.is_alphabetic() || c == '_' => {
                let length = word(rest, |c| c.is_alphanumeric() || c == '_');
                (Token::Word(rest[..length].to_owned()), length)
            }
            other => return Err(format!("{other:?} is not expected")),
        };
        tokens.push(token);
        rest = &rest[length..];
        glued = true;
    }
    Ok(tokens)
}

fn word(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

/// A text in double quotes, with Go's escapes.
fn quoted(rest: &str) -> Result<(Token, usize), String> {
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((Token::Text(text), at + 1)),
            '\\' => match chars.next() {
                Some((_, 'n')) => text.push('\n'),
                Some((_, 't')) => text.push('\t'),
                Some((_, c @ ('"' | '\\'))) => text.push(c),
                other => return Err(format!("the escape {other:?} is not known here")),
            },
            c => text.push(c),
        }
    }
    Err("a text is not closed".into())
}
