//! A route lookup allocates nothing, whether it finds a rule or none.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use adit_shared::proto::waypoint as proto;
use adit_waypoint::route::{HttpTable, Lookup, NoClaims, RequestView, Route};
use http::{HeaderMap, HeaderValue, Method};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; the counter is of this thread
// and needs no allocation itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as required of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as required of the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn exact(name: &str, value: String) -> proto::NameMatch {
    proto::NameMatch {
        name: name.into(),
        value: Some(proto::StringMatch {
            kind: Some(proto::string_match::Kind::Exact(value)),
        }),
        invert: false,
    }
}

/// Rules of every kind, so many that the index is used.
fn route() -> Route {
    use proto::http_match::Path;
    let of = |path| proto::HttpMatch {
        path: Some(path),
        ..Default::default()
    };
    let matches = (0..100).flat_map(|i| {
        [
            of(Path::Exact(format!("/exact/{i}"))),
            of(Path::Prefix(format!("/prefix/{i}"))),
            of(Path::PathRegex(format!("/pattern/{i}/[0-9]+"))),
            proto::HttpMatch {
                headers: vec![exact("x-user", i.to_string())],
                ..of(Path::Prefix("/headers".into()))
            },
            proto::HttpMatch {
                query_params: vec![exact("user", i.to_string())],
                ..of(Path::Prefix("/query".into()))
            },
        ]
    });
    let rules = matches.map(|of| proto::HttpRule {
        matches: vec![of],
        ..Default::default()
    });
    Route::from_proto(&proto::Route {
        object: Some(proto::ObjectRef {
            kind: "HTTPRoute".into(),
            namespace: "mesh".into(),
            name: "r".into(),
            created: 1,
        }),
        kind: Some(proto::route::Kind::Http(proto::HttpRules {
            rules: rules.collect(),
        })),
        ..Default::default()
    })
}

#[test]
fn a_lookup_allocates_nothing() {
    let route = route();
    assert!(route.problems().is_empty());
    let table = HttpTable::new([&route]);
    let mut headers = HeaderMap::new();
    headers.append("accept", HeaderValue::from_static("*/*"));
    headers.append("x-user", HeaderValue::from_static("42"));
    let mut repeated = headers.clone();
    repeated.append("x-user", HeaderValue::from_static("43"));
    let find = |path: &str, query: Option<&str>, headers: &HeaderMap| {
        let request = RequestView {
            method: &Method::GET,
            authority: "echo",
            path,
            query,
            headers,
            claims: &NoClaims,
            is_grpc: false,
        };
        matches!(table.find(&request), Lookup::Matched(_))
    };
    for (path, query, headers, expected) in [
        ("/exact/42", None, &headers, true),
        ("/prefix/42/and/more", None, &headers, true),
        ("/pattern/42/7", None, &headers, true),
        ("/headers/x", None, &headers, true),
        ("/headers/x", None, &repeated, false),
        ("/query", Some("a=%20&user=%34%32"), &headers, true),
        ("/query", Some("user=x"), &headers, false),
        ("/nowhere", Some("user=42"), &headers, false),
    ] {
        // A regular expression makes its scratch space when a thread first uses it.
        assert_eq!(find(path, query, headers), expected, "{path}");
        let before = ALLOCATIONS.get();
        assert_eq!(find(path, query, headers), expected, "{path}");
        assert_eq!(ALLOCATIONS.get() - before, 0, "{path}");
    }
}
