//! Where the address of the end user is taken from.

use std::net::IpAddr;

use ::http::{HeaderMap, HeaderValue};

use crate::policy::http::remote_address;

#[test]
fn forwarded_for() {
    let peer: IpAddr = [10, 0, 0, 1].into();
    for (lines, trusted, expected) in [
        (&[][..], 1, "10.0.0.1"),
        (&["203.0.113.9"][..], 0, "10.0.0.1"),
        (&["203.0.113.9"], 1, "203.0.113.9"),
        (&["203.0.113.9"], 2, "10.0.0.1"),
        (&["1.1.1.1, 203.0.113.9"], 1, "203.0.113.9"),
        (&["1.1.1.1, 203.0.113.9"], 2, "1.1.1.1"),
        // Lines are one list.
        (&["1.1.1.1", "203.0.113.9"], 1, "203.0.113.9"),
        (&["1.1.1.1,2.2.2.2", "203.0.113.9"], 2, "2.2.2.2"),
        (&["2001:db8::1"], 1, "2001:db8::1"),
        (&["[2001:db8::1]:80"], 1, "2001:db8::1"),
        (&["203.0.113.9:1234"], 1, "203.0.113.9"),
        (&["::ffff:203.0.113.9"], 1, "203.0.113.9"),
        (&["unknown"], 1, "10.0.0.1"),
        (&["203.0.113.9, "], 1, "10.0.0.1"),
        (&["203.0.113.9"], u32::MAX, "10.0.0.1"),
    ] {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", HeaderValue::from_static(line));
        }
        let found = remote_address(peer, &headers, trusted).to_string();
        assert_eq!(found, expected, "{lines:?} {trusted}");
    }
}
