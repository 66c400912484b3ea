//! Tables and properties of the headers.

use http::header::{FORWARDED, HeaderMap, HeaderValue};
use http::{Method, Uri};
use proptest::prelude::*;

use super::*;

#[test]
fn authorities_have_exactly_three_forms() {
    let address = |text: &str| Ok(Authority::Address(text.parse().expect("an address")));
    let host = |name: &str, port| {
        Ok(Authority::Host {
            name: name.parse().expect("a host name"),
            port,
        })
    };
    let quoted = |text: &str| text.to_owned();
    let cases: Vec<(&str, Result<Authority, AuthorityError>)> = vec![
        ("10.0.0.5:8080", address("10.0.0.5:8080")),
        ("[fd00::5]:8080", address("[fd00::5]:8080")),
        // The same address in its other family must not pass for another one.
        ("[::ffff:10.0.0.5]:80", address("10.0.0.5:80")),
        (
            "svc.ns.svc.cluster.local:80",
            host("svc.ns.svc.cluster.local", 80),
        ),
        ("Svc.NS:65535", host("svc.ns", 65535)),
        ("my_svc:1", host("my_svc", 1)),
        ("10.0.0.5", Err(AuthorityError::NoPort(quoted("10.0.0.5")))),
        (
            "[fd00::5]",
            Err(AuthorityError::NoPort(quoted("[fd00::5]"))),
        ),
        (
            "[fd00::5]8080",
            Err(AuthorityError::NoPort(quoted("[fd00::5]8080"))),
        ),
        ("[fd00::5", Err(AuthorityError::Ipv6(quoted("[fd00::5")))),
        (
            "[10.0.0.5]:80",
            Err(AuthorityError::Ipv6(quoted("[10.0.0.5]:80"))),
        ),
        (
            "[fe80::1%1]:80",
            Err(AuthorityError::Ipv6(quoted("[fe80::1%1]:80"))),
        ),
        (
            "fd00::5:80",
            Err(AuthorityError::Port(quoted("fd00::5:80"))),
        ),
        ("a:0", Err(AuthorityError::Port(quoted("a:0")))),
        ("a:", Err(AuthorityError::Port(quoted("a:")))),
        ("a:+80", Err(AuthorityError::Port(quoted("a:+80")))),
        ("a:65536", Err(AuthorityError::Port(quoted("a:65536")))),
        ("a:80:80", Err(AuthorityError::Port(quoted("a:80:80")))),
        (":80", Err(HostnameError::Length(0).into())),
        ("", Err(AuthorityError::NoPort(quoted("")))),
        ("a..b:80", Err(HostnameError::Label(quoted("a..b")).into())),
        ("a.:80", Err(HostnameError::Label(quoted("a.")).into())),
        (
            "user@a:80",
            Err(HostnameError::Label(quoted("user@a")).into()),
        ),
        ("a b:80", Err(HostnameError::Label(quoted("a b")).into())),
        (
            "10.0.0.256:80",
            Err(HostnameError::Numeric(quoted("10.0.0.256")).into()),
        ),
        (
            "010.0.0.5:80",
            Err(HostnameError::Numeric(quoted("010.0.0.5")).into()),
        ),
        ("1:80", Err(HostnameError::Numeric(quoted("1")).into())),
    ];
    for (text, expected) in cases {
        assert_eq!(text.parse::<Authority>(), expected, "{text}");
    }
    let long = format!("{}:80", "a.".repeat(130));
    assert_eq!(long.parse::<Authority>(), Err(AuthorityError::TooLong(263)));
}

#[test]
fn forwarded_is_written_as_istio_writes_it_and_read_strictly() {
    let source = "10.1.2.3:4567".parse().expect("an address");
    let plain = Forwarded {
        source,
        host: None,
        principal: None,
    };
    let named = Forwarded {
        source,
        host: Some("svc.ns".parse().expect("a host name")),
        principal: None,
    };
    let spoken_for = Forwarded {
        source,
        host: None,
        principal: Some(
            "spiffe://cluster.local/ns/a/sa/b"
                .parse()
                .expect("an identity"),
        ),
    };
    let v6 = Forwarded {
        source: "[fd00::1]:4567".parse().expect("an address"),
        host: None,
        principal: None,
    };
    assert_eq!(plain.to_header(), "for=\"10.1.2.3:4567\"");
    assert_eq!(named.to_header(), "for=\"10.1.2.3:4567\";host=svc.ns");
    assert_eq!(v6.to_header(), "for=\"[fd00::1]:4567\"");

    let text = "for=\"10.1.2.3:4567\";principal=\"spiffe://cluster.local/ns/a/sa/b\"";
    assert_eq!(spoken_for.to_header(), text);

    let parameter = |text: &str| Err(ForwardedError::Parameter(text.into()));
    let cases: Vec<(&str, Result<Forwarded, ForwardedError>)> = vec![
        ("for=\"10.1.2.3:4567\"", Ok(plain.clone())),
        ("for=10.1.2.3:4567", Ok(plain.clone())),
        (" FOR=\"10.1.2.3:4567\" ; proto=tcp; by=_x ", Ok(plain)),
        (text, Ok(spoken_for)),
        ("for=\"10.1.2.3:4567\";host=svc.ns", Ok(named.clone())),
        ("host=\"svc.ns\";for=\"10.1.2.3:4567\"", Ok(named)),
        ("for=\"[fd00::1]:4567\"", Ok(v6)),
        (
            "for=\"10.1.2.3\"",
            Err(ForwardedError::Source("10.1.2.3".into())),
        ),
        ("for=unknown", Err(ForwardedError::Source("unknown".into()))),
        (
            "for=\"1.1.1.1:1\", for=\"2.2.2.2:2\"",
            Err(ForwardedError::Elements),
        ),
        (
            "for=\"1.1.1.1:1\";for=\"2.2.2.2:2\"",
            Err(ForwardedError::Repeated("for")),
        ),
        (
            "host=a;host=a;for=\"1.1.1.1:1\"",
            Err(ForwardedError::Repeated("host")),
        ),
        (
            "host=svc.ns",
            Err(ForwardedError::NoSource("host=svc.ns".into())),
        ),
        ("", Err(ForwardedError::NoSource(String::new()))),
        ("for", parameter("for")),
        ("for=", parameter("for=")),
        ("=a", parameter("=a")),
        ("for=\"1.1.1.1:1", parameter("for=\\\"1.1.1.1:1")),
        ("for=\"1.1.1.1:1\"x", parameter("for=\\\"1.1.1.1:1\\\"x")),
        (
            "for=\"1.1.1.1:1\";host=a..b",
            Err(ForwardedError::Host(HostnameError::Label("a..b".into()))),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(Forwarded::parse(text.as_bytes()), expected, "{text}");
    }
    assert_eq!(
        Forwarded::parse(&[b'a'; 1025]),
        Err(ForwardedError::TooLong)
    );
}

fn full() -> BaggageFields {
    BaggageFields {
        cluster: "Kubernetes".into(),
        namespace: "shop".into(),
        workload_type: "deployment",
        workload_name: "cart".into(),
        service_name: "cart".into(),
        service_version: "v1".into(),
        region: "eu".into(),
        zone: "eu-1".into(),
    }
}

#[test]
fn baggage_is_written_as_istio_writes_it() {
    assert_eq!(
        Baggage::new(full()).header(),
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,\
         service.name=cart,service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1"
    );
    let sparse = BaggageFields {
        workload_type: "pod",
        workload_name: "a,b=c d".into(),
        ..BaggageFields::default()
    };
    assert_eq!(Baggage::new(sparse).header(), "k8s.pod.name=a%2Cb%3Dc%20d");
    assert_eq!(Baggage::new(BaggageFields::default()).header(), "");
    let unknown_type = BaggageFields {
        workload_type: "daemonset",
        ..full()
    };
    assert!(!format!("{:?}", Baggage::new(unknown_type).header()).contains("daemonset"));
}

#[test]
fn baggage_is_read_strictly() {
    let only = |name: &str| {
        Ok(BaggageFields {
            service_name: name.into(),
            ..BaggageFields::default()
        })
    };
    let member = |text: &str| Err(BaggageError::Member(text.into()));
    let value = Err(BaggageError::Value("service.name"));
    let cases: Vec<(&[u8], Result<BaggageFields, BaggageError>)> = vec![
        (b"service.name=a", only("a")),
        (b" service.name = a ; property=1 , other.key=b", only("a")),
        (b"service.name=a%20b%C3%A9", only("a b\u{e9}")),
        (b"service.name=a=b", only("a=b")),
        (b"service.name=", only("")),
        (b"", only("")),
        (b"service.name", member("service.name")),
        (b"=a", member("=a")),
        (b"service.name=a,,", member("")),
        (
            b"service.name=a,service.name=b",
            Err(BaggageError::Repeated("service.name")),
        ),
        (
            b"k8s.pod.name=a,k8s.job.name=b",
            Err(BaggageError::Repeated("k8s.job.name")),
        ),
        (b"service.name=%", value.clone()),
        (b"service.name=%2", value.clone()),
        (b"service.name=%zz", value.clone()),
        (b"service.name=%FF", value.clone()),
        (b"service.name=%0A", value.clone()),
        (b"service.name=\xff", value.clone()),
    ];
    for (text, expected) in cases {
        assert_eq!(
            BaggageFields::parse(text),
            expected,
            "{}",
            text.escape_ascii()
        );
    }
    let long = format!("service.name={}", "a".repeat(257));
    assert_eq!(BaggageFields::parse(long.as_bytes()), value);
    assert_eq!(
        BaggageFields::parse(&[b'a'; 8193]),
        Err(BaggageError::TooLong)
    );
    let many = vec!["a=b"; 65].join(",");
    assert_eq!(
        BaggageFields::parse(many.as_bytes()),
        Err(BaggageError::TooMany)
    );
}

#[test]
fn traceparent_follows_w3c_trace_context() {
    let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let parsed = Traceparent::parse(text.as_bytes()).expect("the specification's example");
    assert_eq!(parsed.flags, 1);
    assert_eq!(parsed.to_header(), text);

    let ids = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
    let upper = "0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331";
    let cases = [
        (
            format!("cc-{ids}-00"),
            Ok(Traceparent { flags: 0, ..parsed }),
        ),
        (
            format!("cc-{ids}-00-more"),
            Ok(Traceparent { flags: 0, ..parsed }),
        ),
        (format!("00-{ids}-00-more"), Err("form")),
        (format!("cc-{ids}-00more"), Err("form")),
        (format!("ff-{ids}-00"), Err("version")),
        (format!("00-{upper}-00"), Err("hex")),
        (format!("00-{ids}-0"), Err("form")),
        (format!("00_{ids}-00"), Err("form")),
        (
            format!("00-{}-b7ad6b7169203331-00", "0".repeat(32)),
            Err("zero"),
        ),
        (
            format!("00-0af7651916cd43dd8448eb211c80319c-{}-00", "0".repeat(16)),
            Err("zero"),
        ),
        (String::new(), Err("form")),
    ];
    for (text, expected) in cases {
        let result = Traceparent::parse(text.as_bytes()).map_err(|error| match error {
            TraceparentError::Form(_) => "form",
            TraceparentError::Hex(_) => "hex",
            TraceparentError::Version => "version",
            TraceparentError::Zero => "zero",
        });
        assert_eq!(result, expected, "{text}");
    }
    assert_ne!(Traceparent::random(), Traceparent::random());
}

#[test]
fn a_request_survives_the_way_to_http_and_back() {
    let request = ConnectRequest {
        authority: "10.0.0.5:8080".parse().expect("an authority"),
        forwarded: Some(Forwarded {
            source: "10.1.2.3:4567".parse().expect("an address"),
            host: None,
            principal: None,
        }),
        baggage: Some(Baggage::new(full())),
        traceparent: Some(Traceparent::random()),
    };
    let http = request.to_http().expect("it can be written");
    assert_eq!(http.method(), Method::CONNECT);
    assert_eq!(http.uri().to_string(), "10.0.0.5:8080");
    let known = request.baggage.clone().expect("just set");
    let (read, ignored) =
        ConnectRequest::from_http(http.uri(), http.headers(), Some(&known)).expect("it is fine");
    assert_eq!(read, request);
    assert!(ignored.is_empty());
}

#[test]
fn only_a_bad_authority_fails_a_request() {
    let mut headers = HeaderMap::new();
    headers.insert(BAGGAGE, HeaderValue::from_static("nonsense"));
    headers.append(FORWARDED, HeaderValue::from_static("for=\"1.1.1.1:1\""));
    headers.append(FORWARDED, HeaderValue::from_static("for=\"2.2.2.2:2\""));
    headers.insert(TRACEPARENT, HeaderValue::from_static("1"));
    let uri = Uri::from_static("10.0.0.5:8080");
    let (request, ignored) =
        ConnectRequest::from_http(&uri, &headers, None).expect("the authority is fine");
    let bare = ConnectRequest::new("10.0.0.5:8080".parse::<Authority>().expect("an authority"));
    assert_eq!(request, bare);
    assert_eq!(
        ignored,
        [
            HeaderError::Repeated(FORWARDED),
            BaggageError::Member("nonsense".into()).into(),
            TraceparentError::Form("1".into()).into(),
        ]
    );
    let error = ConnectRequest::from_http(&Uri::from_static("/path"), &headers, None);
    assert_eq!(
        error.expect_err("no authority"),
        HeaderError::AuthorityMissing
    );
}

#[test]
fn a_refusal_names_its_error_and_nothing_else_is_read_from_it() {
    let value = proxy_status("connection_refused").expect("a token");
    assert_eq!(value, "adit; error=connection_refused");
    assert_eq!(
        proxy_status_error(&value).as_deref(),
        Some("connection_refused")
    );
    assert_eq!(proxy_status("no token"), None);
    assert_eq!(proxy_status(""), None);
    let read = |text| proxy_status_error(&HeaderValue::from_static(text));
    assert_eq!(
        read("envoy; error=dns_error; details=x").as_deref(),
        Some("dns_error")
    );
    assert_eq!(read("envoy"), None);
    assert_eq!(read("envoy; error="), None);
    let long = HeaderValue::from_str(&format!("a; error={}", "a".repeat(65))).expect("ASCII");
    assert_eq!(proxy_status_error(&long), None);
}

proptest! {
    #[test]
    fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), text in ".{0,80}") {
        let _ = text.parse::<Authority>();
        let _ = Forwarded::parse(&bytes);
        let _ = BaggageFields::parse(&bytes);
        let _ = Traceparent::parse(&bytes);
        let _ = HeaderValue::from_bytes(&bytes).map(|value| proxy_status_error(&value));
    }

    /// Mutations of valid input reach further than noise.
    #[test]
    fn no_near_miss_panics(at in 0_usize..80, byte in any::<u8>(), cut in 0_usize..80) {
        for valid in [
            "for=\"10.1.2.3:4567\";host=svc.ns",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "k8s.cluster.name=a%20b,service.name=b;p=1,cloud.region=c",
            "[fd00::5]:8080",
        ] {
            let mut bytes = valid.as_bytes().to_vec();
            let len = bytes.len();
            bytes[at % len] = byte;
            bytes.truncate(len - cut % len);
            let _ = Forwarded::parse(&bytes);
            let _ = BaggageFields::parse(&bytes);
            let _ = Traceparent::parse(&bytes);
            let _ = String::from_utf8_lossy(&bytes).parse::<Authority>();
        }
    }

    #[test]
    fn authorities_round_trip(ip in any::<std::net::IpAddr>(), port in 1_u16.., name in "[a-z][a-z0-9-]{0,20}(\\.[a-z][a-z0-9]{0,9}){0,3}") {
        let address = Authority::from(std::net::SocketAddr::new(ip, port));
        prop_assert_eq!(address.to_string().parse::<Authority>(), Ok(address.clone()));
        prop_assert!(address.to_http().is_ok());
        let host = Authority::Host { name: name.parse().expect("legal by construction"), port };
        prop_assert_eq!(host.to_string().parse::<Authority>(), Ok(host.clone()));
        prop_assert!(host.to_http().is_ok());
    }

    #[test]
    fn baggage_round_trips(values in prop::collection::vec("\\PC{1,80}", 7), kind in 0_usize..4) {
        let mut values = values.into_iter().map(|v| {
            // Longer values are not written.
            let end = v.char_indices().map(|(i, _)| i).take_while(|i| *i <= 250).last();
            v[..end.unwrap_or(0)].into()
        });
        let mut next = || values.next().unwrap_or_default();
        let mut fields = BaggageFields {
            cluster: next(),
            namespace: next(),
            workload_type: ["deployment", "cronjob", "pod", "job"][kind],
            workload_name: next(),
            service_name: next(),
            service_version: next(),
            region: next(),
            zone: next(),
        };
        let written = Baggage::new(fields.clone());
        if fields.workload_name.is_empty() {
            fields.workload_type = "";
        }
        prop_assert_eq!(BaggageFields::parse(written.header().as_bytes()), Ok(fields));
    }

    #[test]
    fn traceparents_round_trip(trace_id in any::<[u8; 16]>(), parent_id in any::<[u8; 8]>(), flags in any::<u8>()) {
        prop_assume!(trace_id != [0; 16] && parent_id != [0; 8]);
        let written = Traceparent { trace_id, parent_id, flags };
        prop_assert_eq!(Traceparent::parse(written.to_header().as_bytes()), Ok(written));
    }
}
