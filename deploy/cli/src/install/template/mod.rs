//! The part of Go's templates and of Helm's functions that the charts of this tree use.
//!
//! The charts are the only description of what is installed, and Helm itself renders them for
//! those who install with it. `adit` has no Helm at hand, so it renders them here;
//! `integration/helm` compares both over a matrix of values. What is not supported is an
//! error that names it, never a silent difference.

mod eval;
mod functions;
mod lexer;
mod parser;
mod yaml;

pub use eval::render;
pub use functions::merge;
pub use parser::{Templates, parse_into};
pub use yaml::to_yaml;

use std::fmt;

/// Where and why a template cannot be read or rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct TemplateError {
    /// Name of the template's file.
    pub file: String,
    /// Line, counted from 1; 0: not known.
    pub line: usize,
    /// A sentence.
    pub reason: String,
    /// The template itself said so (`fail`, `required`): a mistake in the values.
    pub refused: bool,
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.refused {
            // What the chart's author wrote for the user needs no position.
            true => f.write_str(&self.reason),
            false => write!(f, "{}:{}: {}", self.file, self.line, self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn run(source: &str, dot: Value) -> Result<String, TemplateError> {
        let mut templates = Templates::default();
        parse_into(&mut templates, "t.yaml", source)?;
        render(&templates, "t.yaml", &dot)
    }

    #[test]
    fn output_is_that_of_go() {
        let values = json!({
            "a": {"b": "x", "empty": "", "n": 5, "yes": true, "no": false},
            "list": ["one", "two"],
            "map": {"z": 1, "k": "v"},
        });
        // Template, what Go's text/template with Helm's functions prints.
        let cases = [
            ("plain", "plain"),
            ("{{ .a.b }}", "x"),
            ("[{{ .a.missing }}]", "[]"),
            ("{{ .a.n }}", "5"),
            ("  {{- .a.b -}}  y", "xy"),
            ("{{/* nothing */}}x", "x"),
            ("a\n{{- /* c */ -}}\nb", "ab"),
            ("{{ if .a.yes }}1{{ else }}2{{ end }}", "1"),
            (
                "{{ if .a.no }}1{{ else if .a.b }}3{{ else }}2{{ end }}",
                "3",
            ),
            ("{{ if .a.empty }}1{{ end }}", ""),
            ("{{ if and .a.yes (not .a.no) }}1{{ end }}", "1"),
            ("{{ if or .a.no .a.empty }}1{{ else }}0{{ end }}", "0"),
            ("{{ or .a.empty .a.b }}", "x"),
            ("{{ with .a }}{{ .b }}{{ $.list }}{{ end }}", "x[one two]"),
            ("{{ with .nothing }}1{{ else }}2{{ end }}", "2"),
            ("{{ with $x := .a }}{{ $x.b }}{{ end }}", "x"),
            ("{{ range .list }}<{{ . }}>{{ end }}", "<one><two>"),
            (
                "{{ range $i, $v := .list }}{{ $i }}{{ $v }} {{ end }}",
                "0one 1two ",
            ),
            (
                "{{ range $k, $v := .map }}{{ $k }}={{ $v }};{{ end }}",
                "k=v;z=1;",
            ),
            ("{{ range .none }}1{{ else }}none{{ end }}", "none"),
            (
                "{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ end }}{{ $x }}",
                "2",
            ),
            (
                "{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}",
                "21",
            ),
            (
                "{{ define \"h\" }}({{ . }}){{ end }}{{ template \"h\" .a.b }}",
                "(x)",
            ),
            (
                "{{ define \"h\" }}({{ . }}){{ end }}{{ include \"h\" .a.b | quote }}",
                "\"(x)\"",
            ),
            ("{{ .a.empty | default \"d\" }}", "d"),
            ("{{ default \"d\" .a.b }}", "x"),
            ("{{ quote .a.n }} {{ squote .a.b }}", "\"5\" 'x'"),
            ("{{ printf \"%s-%d %v\" .a.b 3 .a.yes }}", "x-3 true"),
            ("{{ .list | join \",\" }}", "one,two"),
            ("{{ toYaml .map }}", "k: v\nz: 1"),
            ("{{ toYaml .map | nindent 2 }}", "\n  k: v\n  z: 1"),
            ("{{ toYaml .map | indent 2 }}", "  k: v\n  z: 1"),
            ("{{ toJson .map }}", "{\"k\":\"v\",\"z\":1}"),
            ("{{ (fromYaml \"a: {b: c}\").a.b }}", "c"),
            (
                "{{ eq .a.b \"y\" \"x\" }} {{ ne .a.b \"x\" }}",
                "true false",
            ),
            (
                "{{ hasKey .a \"no\" }} {{ hasKey .a \"nope\" }}",
                "true false",
            ),
            ("{{ has \"one\" .list }}", "true"),
            (
                "{{ get .a \"b\" }}{{ index .a \"b\" }}{{ index .list 1 }}",
                "xxtwo",
            ),
            ("{{ len .list }}", "2"),
            ("{{ (dict \"k\" .a.b).k }}", "x"),
            ("{{ list 1 2 | len }}", "2"),
            ("{{ ternary \"t\" \"f\" .a.yes }}", "t"),
            (
                "{{ \"a.b.c\" | replace \".\" \"-\" | trimPrefix \"a\" | trimSuffix \"c\" }}",
                "-b-",
            ),
            (
                "{{ contains \"b\" \"abc\" }} {{ hasPrefix \"a\" \"abc\" }}",
                "true true",
            ),
            ("{{ splitList \",\" \"a,b\" | first }}", "a"),
            ("{{ `raw \"x\"` }}", "raw \"x\""),
            ("{{ \"esc\\n\\\"\" }}", "esc\n\""),
            ("{{ int 5 }}{{ int64 \"7\" }}", "57"),
            (
                "{{ kindIs \"map\" .a }} {{ kindIs \"string\" .a.b }}",
                "true true",
            ),
            (
                "{{ (mustMergeOverwrite (dict \"a\" (dict \"x\" 1 \"y\" 2)) (dict \"a\" (dict \"x\" 3))) | toJson }}",
                "{\"a\":{\"x\":3,\"y\":2}}",
            ),
            ("{{ coalesce .nothing .a.empty .a.b }}", "x"),
            ("[{{ (.a.nothing).more.still }}]", "[]"),
            ("{{ gt 3 2 }}{{ lt 3 2 }}", "truefalse"),
        ];
        for (source, expected) in cases {
            let got = run(source, values.clone()).unwrap_or_else(|e| format!("error: {e}"));
            assert_eq!(got, expected, "{source}");
        }
    }

    #[test]
    fn mistakes_say_where() {
        let cases = [
            ("x\n{{ if }}", "t.yaml:2: if needs a condition"),
            ("{{ if .a }}", "t.yaml:1: an {{ end }} is missing"),
            (
                "\n{{ nosuch 1 }}",
                "t.yaml:2: function nosuch is not known here",
            ),
            (
                "{{ .a.b.c }}",
                "t.yaml:1: .a.b is nothing, and has no field c",
            ),
            ("{{ $x }}", "t.yaml:1: variable $x is not declared"),
            ("{{ .a", "t.yaml:1: an action is not closed"),
            (
                "{{ include \"h\" . }}",
                "t.yaml:1: template h is not defined",
            ),
            (
                "{{ define \"h\" }}{{ include \"h\" . }}{{ end }}{{ include \"h\" . }}",
                "t.yaml:1: templates include each other without end",
            ),
            ("{{ fail \"set x\" }}", "set x"),
            ("{{ required \"x is needed\" .x }}", "x is needed"),
            ("{{ end }}", "t.yaml:1: end without a beginning"),
        ];
        for (source, expected) in cases {
            let error = run(source, json!({"a": {}})).map_err(|e| e.to_string());
            assert_eq!(error, Err(expected.to_owned()), "{source}");
        }
    }
}
