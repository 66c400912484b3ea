//! The table against an oracle that reads the wire form, tries every match of every rule and
//! compares them pair by pair in the words of the specification. They share no code.

use proptest::prelude::*;

use super::*;

/// Patterns with what an invalid one still tells of its matches.
const PATTERNS: [(&str, Option<&str>); 8] = [
    ("/a/.*", None),
    ("/a(/b)?", None),
    (".*", None),
    ("/a/b|/b", None),
    ("/[ab]/a", None),
    ("/ab?/a", None),
    ("/a/[", Some("/a/")),
    ("(", Some("")),
];

const SEGMENTS: [&str; 5] = ["a", "b", "ab", "", "c"];
const HEADERS: [&str; 4] = ["x-a", "X-B", "x-c", "host"];
const VALUES: [&str; 5] = ["1", "2", "1,2", "", "12"];
const PARAMS: [&str; 3] = ["q", "r", "a b"];
const METHODS: [&str; 3] = ["GET", "POST", ""];

fn any_of<const N: usize>(texts: [&'static str; N]) -> impl Strategy<Value = String> + Clone {
    proptest::sample::select(texts.to_vec()).prop_map(str::to_owned)
}

fn a_path() -> impl Strategy<Value = String> {
    prop::collection::vec(any_of(SEGMENTS), 0..4).prop_map(|parts| format!("/{}", parts.join("/")))
}

fn a_match() -> impl Strategy<Value = proto::HttpMatch> {
    use proto::http_match::Path;
    let path = prop_oneof![
        Just(None),
        a_path().prop_map(|path| Some(Path::Exact(path))),
        a_path().prop_map(|path| Some(Path::Prefix(path))),
        proptest::sample::select(PATTERNS.to_vec())
            .prop_map(|(pattern, _)| Some(Path::PathRegex(pattern.to_owned()))),
    ];
    let headers = prop::collection::vec(a_name_match(HEADERS), 0..3);
    let params = prop::collection::vec(a_name_match(PARAMS), 0..3);
    (path, headers, params, any_of(METHODS)).prop_map(|(path, headers, query_params, method)| {
        proto::HttpMatch {
            path,
            headers,
            query_params,
            method,
            claims: Vec::new(),
        }
    })
}

fn a_name_match<const N: usize>(
    names: [&'static str; N],
) -> impl Strategy<Value = proto::NameMatch> {
    use proto::string_match::Kind;
    let kind = prop_oneof![
        6 => any_of(VALUES).prop_map(Kind::Exact),
        1 => any_of(VALUES).prop_map(Kind::Prefix),
        1 => any_of(VALUES).prop_map(Kind::Suffix),
        1 => Just(Kind::Regex("[12]".to_owned())),
        1 => Just(Kind::Regex("[".to_owned())),
        1 => Just(Kind::Present(true)),
    ];
    let invert = proptest::bool::weighted(0.1);
    (any_of(names), kind, invert).prop_map(|(name, kind, invert)| proto::NameMatch {
        name,
        value: Some(text(kind)),
        invert,
    })
}

fn routes(rules: usize) -> impl Strategy<Value = Vec<proto::Route>> {
    let rule = prop::collection::vec(a_match(), 0..4);
    let route = (
        prop::collection::vec(rule, 0..rules),
        0..3_i64,
        any_of(["m", "m-n"]),
    );
    prop::collection::vec(route, 0..5).prop_map(|routes| {
        let of = |(index, (rules, created, namespace)): (usize, (Vec<_>, i64, String))| {
            let rules = rules
                .into_iter()
                .map(|matches| super::rule("", matches))
                .collect();
            let mut route = http_route("", rules);
            route.object = Some(proto::ObjectRef {
                kind: "HTTPRoute".into(),
                namespace,
                name: format!("r{index}"),
                created,
            });
            route
        };
        routes.into_iter().enumerate().map(of).collect()
    })
}

fn a_request() -> impl Strategy<Value = Sent> {
    let headers = prop::collection::vec((any_of(["x-a", "x-b", "x-c"]), any_of(VALUES)), 0..4);
    let pair = (
        any_of(["q", "r", "a+b", "%61%20b", "%71", "a b", "%"]),
        any_of(["1", "%31", "2", "1%2C2", "1,2", "", "12", "1%"]),
    );
    let query = prop::option::of(prop::collection::vec(pair, 0..4));
    let host = any_of(["1", "2", "echo", ""]);
    (
        a_path(),
        headers,
        query,
        any_of(["GET", "POST", "PUT"]),
        host,
    )
        .prop_map(|(path, headers, query, method, authority)| {
            let mut sent = Sent {
                authority,
                query: query.map(|pairs| {
                    let pairs = pairs.iter().map(|(name, value)| format!("{name}={value}"));
                    pairs.collect::<Vec<_>>().join("&")
                }),
                ..get(&path)
            };
            for (name, value) in &headers {
                sent = sent.header(name, value);
            }
            sent.method(&method)
        })
}

/// Decoded pairs of a query, by another decoder.
fn decoded_pairs(query: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let decode = |raw: &str| {
        let spaced = raw.replace('+', " ");
        percent_encoding::percent_decode_str(&spaced).collect::<Vec<u8>>()
    };
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn test_value(of: &proto::NameMatch, value: Option<Vec<u8>>) -> bool {
    use proto::string_match::Kind;
    let kind = of.value.as_ref().and_then(|value| value.kind.as_ref());
    let holds = match kind {
        Some(Kind::Regex(pattern)) if pattern == "[" => return true,
        Some(Kind::Exact(text)) => value.is_some_and(|value| value == text.as_bytes()),
        Some(Kind::Prefix(text)) => value.is_some_and(|value| value.starts_with(text.as_bytes())),
        Some(Kind::Suffix(text)) => value.is_some_and(|value| value.ends_with(text.as_bytes())),
        Some(Kind::Regex(_)) => value.is_some_and(|value| value == b"1" || value == b"2"),
        _ => value.is_some(),
    };
    holds != of.invert
}

/// Of equal names only the first counts.
fn first_of_each(matches: &[proto::NameMatch], fold: bool) -> Vec<&proto::NameMatch> {
    let mut firsts: Vec<&proto::NameMatch> = Vec::new();
    for of in matches {
        let same = |other: &&proto::NameMatch| {
            let names = match fold {
                true => other.name.eq_ignore_ascii_case(&of.name),
                false => other.name == of.name,
            };
            names && other.invert == of.invert
        };
        if !firsts.iter().any(same) {
            firsts.push(of);
        }
    }
    firsts
}

fn oracle_matches(of: &proto::HttpMatch, sent: &Sent) -> bool {
    use proto::http_match::Path;
    let path = match &of.path {
        None => true,
        Some(Path::Exact(path)) => *path == sent.path,
        Some(Path::Prefix(prefix)) => {
            // Element by element.
            let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
            let wanted: Vec<&str> = prefix.split('/').collect();
            let had: Vec<&str> = sent.path.split('/').collect();
            had.starts_with(&wanted)
        }
        Some(Path::PathRegex(pattern)) => {
            let known = PATTERNS.iter().find(|(text, _)| text == pattern);
            match known.expect("one of them").1 {
                Some(certain) => sent.path.starts_with(certain),
                None => {
                    let regex = regex::Regex::new(&format!("^(?:{pattern})$")).expect("valid");
                    regex.is_match(&sent.path)
                }
            }
        }
    };
    let header = |name: &str| {
        if name == "host" {
            return (!sent.authority.is_empty()).then(|| sent.authority.clone().into_bytes());
        }
        let lines: Vec<&[u8]> = sent
            .headers
            .get_all(name)
            .iter()
            .map(|v| v.as_bytes())
            .collect();
        (!lines.is_empty()).then(|| lines.join(&b","[..]))
    };
    let param = |name: &str| {
        let pairs = decoded_pairs(sent.query.as_deref()?);
        let mut pairs = pairs.into_iter();
        pairs
            .find(|(found, _)| found == name.as_bytes())
            .map(|(_, value)| value)
    };
    path && (of.method.is_empty() || of.method == sent.method.as_str())
        && first_of_each(&of.headers, true)
            .into_iter()
            .all(|of| test_value(of, header(&of.name)))
        && first_of_each(&of.query_params, false)
            .into_iter()
            .all(|of| test_value(of, param(&of.name)))
}

/// Route, rule, match.
type Place = (usize, usize, usize);

fn of_place(routes: &[proto::Route], (route, rule, alternative): Place) -> proto::HttpMatch {
    let Some(proto::route::Kind::Http(rules)) = &routes[route].kind else {
        panic!("HTTPRoutes only");
    };
    let matches = &rules.rules[rule].matches;
    matches.get(alternative).cloned().unwrap_or_default()
}

/// Whether `one` goes before `two`.
fn precedes(routes: &[proto::Route], one: Place, two: Place) -> bool {
    use proto::http_match::Path;
    let (a, b) = (of_place(routes, one), of_place(routes, two));
    // Exact, pattern, prefix; patterns and prefixes by length.
    let kind = |of: &proto::HttpMatch| match &of.path {
        Some(Path::Exact(_)) => (2, 0),
        Some(Path::PathRegex(pattern)) => (1, pattern.len()),
        Some(Path::Prefix(prefix)) => (0, prefix.strip_suffix('/').unwrap_or(prefix).len()),
        None => (0, 0),
    };
    if kind(&a) != kind(&b) {
        return kind(&a) > kind(&b);
    }
    if a.method.is_empty() != b.method.is_empty() {
        return b.method.is_empty();
    }
    let headers = |of: &proto::HttpMatch| first_of_each(&of.headers, true).len();
    if headers(&a) != headers(&b) {
        return headers(&a) > headers(&b);
    }
    let params = |of: &proto::HttpMatch| first_of_each(&of.query_params, false).len();
    if params(&a) != params(&b) {
        return params(&a) > params(&b);
    }
    let object = |place: Place| routes[place.0].object.clone().expect("object");
    let (x, y) = (object(one), object(two));
    if x.created != y.created {
        // 0: not known.
        return y.created == 0 || (x.created != 0 && x.created < y.created);
    }
    let name = |o: &proto::ObjectRef| format!("{}/{}", o.namespace, o.name);
    if name(&x) != name(&y) {
        return name(&x) < name(&y);
    }
    (one.1, one.2) < (two.1, two.2)
}

fn oracle(routes: &[proto::Route], sent: &Sent) -> Option<Place> {
    let mut best = None;
    for (route, of) in routes.iter().enumerate() {
        let Some(proto::route::Kind::Http(rules)) = &of.kind else {
            continue;
        };
        for (rule, of) in rules.rules.iter().enumerate() {
            for alternative in 0..of.matches.len().max(1) {
                let place = (route, rule, alternative);
                if oracle_matches(&of_place(routes, place), sent)
                    && best.is_none_or(|best| precedes(routes, place, best))
                {
                    best = Some(place);
                }
            }
        }
    }
    best
}

fn compare(routes: &[proto::Route], requests: &[Sent]) -> Result<(), TestCaseError> {
    let read: Vec<Route> = routes.iter().map(Route::from_proto).collect();
    let table = HttpTable::new(&read);
    for sent in requests {
        let found = match table.find(&sent.view()) {
            Lookup::NoMatch => None,
            Lookup::Matched(matched) => {
                let id = matched.rule.route();
                let route = read.iter().position(|route| route.id() == id);
                let place = route.expect("known");
                Some((place, matched.rule.index(), matched.alternative()))
            }
        };
        prop_assert_eq!(found, oracle(routes, sent), "{:?}", sent);
        let view = sent.view();
        let first = table.explain(&view).next();
        let first = first.map(|matched| (matched.rule.index(), matched.alternative()));
        prop_assert_eq!(
            found.map(|(_, rule, alternative)| (rule, alternative)),
            first
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn few_rules(routes in routes(4), requests in prop::collection::vec(a_request(), 8)) {
        compare(&routes, &requests)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    /// So many that every bucket is keyed by values.
    #[test]
    fn many_rules(routes in routes(60), requests in prop::collection::vec(a_request(), 12)) {
        compare(&routes, &requests)?;
    }
}

fn a_call() -> impl Strategy<Value = (String, String, bool)> {
    let name = any_of(["a", "b", "", "a.B", "[", ".*"]);
    (name.clone(), name, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    /// gRPC: service and method alone, the rank written out.
    #[test]
    fn grpc_names(calls in prop::collection::vec(a_call(), 1..12), path in a_path()) {
        let rules = calls.iter().map(|(service, method, regex)| proto::GrpcRule {
            matches: vec![proto::GrpcMatch {
                service: service.clone(),
                method: method.clone(),
                regex: *regex,
                headers: Vec::new(),
            }],
            ..Default::default()
        });
        let route = Route::from_proto(&grpc_route("g", rules.collect()));
        let table = HttpTable::new([&route]);
        let sent = get(&path.replace("ab", "a.B"));
        let found = match table.find(&sent.view()) {
            Lookup::NoMatch => None,
            Lookup::Matched(matched) => Some(matched.rule.index()),
        };

        let parts: Vec<&str> = sent.path.split('/').collect();
        let holds = |text: &str, regex: bool, name: &str| {
            text.is_empty() || text == name || (regex && (text == "[" || text == ".*"
                || (text == "a.B" && name.len() == 3 && name.starts_with('a') && name.ends_with('B'))))
        };
        let rank = |text: &str, regex: bool| match text {
            "" => (0, 0),
            text => (if regex { 1 } else { 2 }, text.len()),
        };
        let mut best: Option<(usize, [(usize, usize); 2])> = None;
        for (index, (service, method, regex)) in calls.iter().enumerate() {
            let any = service.is_empty() && method.is_empty();
            let named = parts.len() == 3
                && holds(service, *regex, parts[1])
                && holds(method, *regex, parts[2]);
            let ranks = [rank(service, *regex), rank(method, *regex)];
            if (any || named) && best.is_none_or(|(_, other)| ranks > other) {
                best = Some((index, ranks));
            }
        }
        prop_assert_eq!(found, best.map(|(index, _)| index), "{}", sent.path);
    }
}
