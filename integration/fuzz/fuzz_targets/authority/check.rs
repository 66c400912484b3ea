//! What reading a CONNECT promises for any bytes. The fuzz target and the replay of its corpus
//! in plain tests both call [`check`].

use adit_shared::hbone::Authority;
use adit_shared::hbone::headers::{Baggage, BaggageFields, Forwarded, Traceparent};

/// Reads the input as each of the things that come with a CONNECT. Panics if a promise is
/// broken.
pub fn check(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        authority(text);
    }
    if let Ok(forwarded) = Forwarded::parse(input) {
        assert_ne!(forwarded.source.to_string(), "", "a source");
    }
    if let Ok(traceparent) = Traceparent::parse(input) {
        let header = traceparent.to_header();
        assert_eq!(
            Traceparent::parse(header.as_bytes()),
            Ok(traceparent),
            "it is passed on as it was read"
        );
    }
    if let Ok(fields) = BaggageFields::parse(input) {
        // What it says can be said again.
        let baggage = Baggage::new(fields);
        assert!(
            baggage.namespace.len() <= input.len(),
            "nothing is invented"
        );
    }
}

fn authority(text: &str) {
    let Ok(authority) = text.parse::<Authority>() else {
        return;
    };
    assert_ne!(authority.port(), 0, "a port");
    let written = authority.to_string();
    assert_eq!(
        written.parse().as_ref(),
        Ok(&authority),
        "it reads what it writes"
    );
    match &authority {
        Authority::Address(address) => {
            // Two ways to write an address are one address.
            assert_eq!(address.ip(), address.ip().to_canonical(), "canonical");
        }
        Authority::Host { name, .. } => {
            let name = name.as_str();
            assert!(name.parse::<std::net::IpAddr>().is_err(), "no address");
            assert!(!name.bytes().any(|b| b.is_ascii_uppercase()), "lower case");
            assert!(
                !name.ends_with('.') && !name.starts_with('.'),
                "no empty label"
            );
            let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            assert!(
                name.bytes().all(legal),
                "nothing that ends a name elsewhere"
            );
        }
    }
}
