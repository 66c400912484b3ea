//! Peers that break the rules in the middle of a stream: what we return, and which alert they
//! are told.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::AlertDescription as Alert;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::timeout;

use super::stream::{Plain, plain_pair};
use super::tls::{HANDSHAKE, Pki, SUITES, name};
use crate::hbone::record::{RecordError, TlsError, TlsStream};

/// A record with any content from `peer`, as its next one.
fn forge(peer: &mut Plain, inner: &[u8]) -> Vec<u8> {
    super::protect(peer.tx.sealer.key(), inner)
}

/// Sends `bytes` past the record layer of `peer`; what our side says, and what `peer` is told.
async fn outcome(peer: &mut Plain, ours: &mut Plain, bytes: &[u8]) -> (RecordError, Option<Alert>) {
    peer.io.write_all(bytes).await.expect("written");
    let error = ours.read(&mut [0; 64]).await.expect_err("an error");
    let error = RecordError::of(&error).expect("a record error");
    // Final, for both directions.
    let again = ours.read(&mut [0; 64]).await.expect_err("an error");
    assert_eq!(RecordError::of(&again), Some(error));
    let again = ours.write(b"data").await.expect_err("an error");
    assert_eq!(RecordError::of(&again), Some(error));
    ours.shutdown().await.expect("the socket can be shut down");
    let told = peer.read(&mut [0; 64]).await.expect_err("an error");
    match RecordError::of(&told) {
        Some(RecordError::AlertReceived(alert)) => (error, Some(alert)),
        Some(RecordError::Truncated) => (error, None),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_peer_is_told_what_it_did_wrong() {
    let forged: [(&str, &[u8], Alert); 7] = [
        ("unknown content type", b"a\x63", Alert::UnexpectedMessage),
        ("no content type", b"\0\0", Alert::UnexpectedMessage),
        ("too long", &[1; (1 << 14) + 2], Alert::RecordOverflow),
        ("short alert", b"\x02\x15", Alert::DecodeError),
        (
            "post-handshake Certificate",
            b"\x0b\0\0\x01a\x16",
            Alert::UnexpectedMessage,
        ),
        (
            "odd KeyUpdate",
            b"\x18\0\0\x01\x09\x16",
            Alert::IllegalParameter,
        ),
        (
            "long KeyUpdate",
            b"\x18\0\0\x02\0\0\x16",
            Alert::DecodeError,
        ),
    ];
    for (what, inner, alert) in forged {
        for client_forges in [true, false] {
            let (client, server) = plain_pair().await;
            let (mut peer, mut ours) = if client_forges {
                (client, server)
            } else {
                (server, client)
            };
            let record = forge(&mut peer, inner);
            let (error, told) = outcome(&mut peer, &mut ours, &record).await;
            assert_eq!((error.alert(), told), (Some(alert), Some(alert)), "{what}");
        }
    }
    let raw: [(&str, &[u8], Alert); 5] = [
        ("garbage", b"GET / HTTP/1.1\r\n", Alert::UnexpectedMessage),
        (
            "change_cipher_spec",
            &[20, 3, 3, 0, 1, 1],
            Alert::UnexpectedMessage,
        ),
        (
            "alert in plaintext",
            &[21, 3, 3, 0, 2, 1, 0],
            Alert::UnexpectedMessage,
        ),
        ("length", &[23, 3, 3, 0xff, 0xff], Alert::RecordOverflow),
        (
            "forged record",
            &[&[23, 3, 3, 0, 20][..], &[0; 20]].concat(),
            Alert::BadRecordMac,
        ),
    ];
    for (what, bytes, alert) in raw {
        let (mut peer, mut ours) = plain_pair().await;
        let (error, told) = outcome(&mut peer, &mut ours, bytes).await;
        assert_eq!((error.alert(), told), (Some(alert), Some(alert)), "{what}");
    }
}

#[tokio::test]
async fn data_before_a_bad_record_is_delivered_and_data_after_it_is_not() {
    let (mut peer, mut ours) = plain_pair().await;
    let mut bytes = forge(&mut peer, b"good\x17");
    let mut bad = forge(&mut peer, b"bad\x17");
    bad[7] ^= 1;
    bytes.extend(bad);
    bytes.extend(forge(&mut peer, b"late\x17"));
    peer.io.write_all(&bytes).await.expect("written");
    let mut got = [0; 64];
    assert_eq!(ours.read(&mut got).await.expect("read"), 4);
    assert_eq!(&got[..4], b"good");
    let error = ours.read(&mut got).await.expect_err("an error");
    assert_eq!(RecordError::of(&error), Some(RecordError::BadRecordMac));
}

#[tokio::test]
async fn a_fatal_alert_is_named_and_not_answered() {
    let (mut peer, mut ours) = plain_pair().await;
    let record = forge(&mut peer, b"\x02\x31\x15");
    let (error, told) = outcome(&mut peer, &mut ours, &record).await;
    assert_eq!(error, RecordError::AlertReceived(Alert::AccessDenied));
    assert_eq!(told, None);
}

#[tokio::test]
async fn a_ticket_from_a_client_is_refused_and_a_broken_one_from_a_server_too() {
    let ticket = b"\x04\0\0\x03abc\x16";
    let (mut client, mut server) = plain_pair().await;
    let record = forge(&mut client, ticket);
    let (error, _) = outcome(&mut client, &mut server, &record).await;
    assert_eq!(error, RecordError::UnexpectedMessage("NewSessionTicket"));
    let (mut client, mut server) = plain_pair().await;
    let record = forge(&mut server, ticket);
    let (error, _) = outcome(&mut server, &mut client, &record).await;
    assert_eq!(error, RecordError::Decode("NewSessionTicket"));
}

#[tokio::test]
async fn what_follows_close_notify_is_ignored() {
    let (mut peer, mut ours) = plain_pair().await;
    let mut bytes = forge(&mut peer, b"data\x17");
    bytes.extend(forge(&mut peer, b"\x01\x00\x15"));
    bytes.extend(b"anything");
    peer.io.write_all(&bytes).await.expect("written");
    let mut got = Vec::new();
    ours.read_to_end(&mut got).await.expect("a clean end");
    assert_eq!(got, b"data");
    assert_eq!(ours.memory(), 0);
}

#[tokio::test]
async fn a_key_update_is_answered_once_before_the_next_data() {
    let (mut peer, mut ours) = plain_pair().await;
    // Five in a row, each with the next key.
    for _ in 0..5 {
        let record = forge(&mut peer, b"\x18\0\0\x01\x01\x16");
        peer.io.write_all(&record).await.expect("written");
        let secrets = peer.schedule.next_tx().expect("a key");
        peer.tx.sealer.rekey(secrets).expect("a key");
    }
    peer.write_all(b"new key").await.expect("written");
    let mut got = [0; 7];
    ours.read_exact(&mut got).await.expect("read");
    assert_eq!(&got, b"new key");
    ours.write_all(b"answer").await.expect("written");
    peer.read_exact(&mut got[..6]).await.expect("read");
    let mut raw = [0; 64];
    let rest = timeout(Duration::from_millis(20), peer.io.read(&mut raw)).await;
    assert!(rest.is_err(), "nothing else was sent");
}

#[tokio::test]
async fn a_stranger_is_refused_at_its_first_bytes() {
    for (what, hello) in [
        ("HTTP", &b"GET / HTTP/1.1\r\n\r\n"[..]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\n"),
        ("a huge record", &[22, 3, 1, 0xff, 0xff, 1, 0, 0]),
        ("an empty record", &[22, 3, 1, 0, 0]),
        ("application data", &[23, 3, 3, 0, 5, 1, 2, 3, 4, 5]),
        (
            "a message that never ends",
            &[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        ),
    ] {
        let (mut stranger, ours) = duplex(1 << 16);
        stranger.write_all(hello).await.expect("written");
        let server = Arc::new(Pki::new().server(SUITES[0]));
        let refused = TlsStream::accept(ours, server, HANDSHAKE).await;
        assert!(
            matches!(refused, Err(TlsError::Handshake(_))),
            "{what}: {refused:?}"
        );
        let mut answer = Vec::new();
        stranger.read_to_end(&mut answer).await.expect("an answer");
        // rustls has no alert for an oversized message.
        let mute = what == "a message that never ends";
        assert!(mute || answer.first() == Some(&21), "{what}: an alert");
    }
}

#[tokio::test]
async fn a_peer_that_leaves_amid_the_handshake_is_named_so() {
    let (stranger, ours) = duplex(1 << 16);
    drop(stranger);
    let server = Arc::new(Pki::new().server(SUITES[0]));
    let refused = TlsStream::accept(ours, server, HANDSHAKE).await;
    assert!(matches!(refused, Err(TlsError::Closed)));
    let error = io::Error::from(TlsError::Closed);
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_both_sides() {
    let (one, other) = (Pki::new(), Pki::new());
    let (a, b) = duplex(1 << 16);
    let (client, server) = tokio::join!(
        TlsStream::connect(a, Arc::new(one.client(SUITES[0])), name(), HANDSHAKE),
        TlsStream::accept(b, Arc::new(other.server(SUITES[0])), HANDSHAKE),
    );
    assert!(matches!(client, Err(TlsError::Handshake(_))), "{client:?}");
    let Err(TlsError::Handshake(rustls::Error::AlertReceived(alert))) = server else {
        panic!("{server:?}");
    };
    assert!(is_about_trust(alert), "{alert:?}");

    // The other way round the client has finished its handshake when it is refused.
    let (a, b) = duplex(1 << 16);
    let mut stranger = one.client(SUITES[0]);
    stranger.client_auth_cert_resolver = other.client(SUITES[0]).client_auth_cert_resolver;
    let (client, server) = tokio::join!(
        TlsStream::connect(a, Arc::new(stranger), name(), HANDSHAKE),
        TlsStream::accept(b, Arc::new(one.server(SUITES[0])), HANDSHAKE),
    );
    assert!(matches!(server, Err(TlsError::Handshake(_))), "{server:?}");
    let mut client = client.expect("the client does not know yet");
    let error = client.read(&mut [0]).await.expect_err("refused");
    let Some(RecordError::AlertReceived(alert)) = RecordError::of(&error) else {
        panic!("{error}");
    };
    assert!(is_about_trust(alert), "{alert:?}");
}

/// Both authorities have the same name, so a wrong signature may be noticed first.
fn is_about_trust(alert: Alert) -> bool {
    matches!(alert, Alert::UnknownCA | Alert::DecryptError)
}

/// Flips one byte of a handshake after another, in each direction: an error, never a panic.
#[tokio::test]
async fn no_flipped_byte_of_a_handshake_survives() {
    let pki = Pki::new();
    // Tickets would follow the handshake, and nobody reads here.
    let mut server = pki.server(SUITES[0]);
    server.send_tls13_tickets = 0;
    let (client, server) = (Arc::new(pki.client(SUITES[0])), Arc::new(server));
    let mut touched = 0;
    for flipped in (0..1600).step_by(11) {
        for direction in 0..2 {
            let (a, to_a) = duplex(1 << 16);
            let (b, to_b) = duplex(1 << 16);
            let (stream, client, server) = tokio::join!(
                relay([to_a, to_b], direction, flipped),
                TlsStream::connect(a, client.clone(), name(), HANDSHAKE),
                TlsStream::accept(b, server.clone(), HANDSHAKE),
            );
            if stream.len() <= flipped {
                continue;
            }
            touched += 1;
            // RFC 8446 5.1: the version of a record in plaintext is to be ignored.
            if !is_version(&stream, flipped) {
                assert!(
                    client.is_err() || server.is_err(),
                    "byte {flipped} of {direction}"
                );
            }
        }
    }
    assert!(touched > 120, "the handshake is longer than that");
}

/// Passes bytes between two sockets and flips one of those that come from `ends[direction]`;
/// returns what came from there. It ends when nothing moves any more.
async fn relay(mut ends: [DuplexStream; 2], direction: usize, flipped: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    let [one, two] = &mut ends;
    let (mut from_one, mut from_two) = ([0; 4096], [0; 4096]);
    loop {
        let (from, len) = tokio::select! {
            len = one.read(&mut from_one) => (0, len.unwrap_or(0)),
            len = two.read(&mut from_two) => (1, len.unwrap_or(0)),
            () = tokio::time::sleep(Duration::from_millis(15)) => break,
        };
        let bytes = if from == 0 {
            &mut from_one[..len]
        } else {
            &mut from_two[..len]
        };
        if from == direction {
            let start = stream.len();
            stream.extend_from_slice(bytes);
            if (start..start + len).contains(&flipped) {
                bytes[flipped - start] ^= 0x15;
            }
        }
        let sent = if from == 0 {
            two.write_all(bytes).await
        } else {
            one.write_all(bytes).await
        };
        if sent.is_err() || len == 0 {
            break;
        }
    }
    stream
}

/// Whether `at` is a byte of the version in a record header.
fn is_version(stream: &[u8], at: usize) -> bool {
    let mut start = 0;
    while let Some(&[_, _, _, high, low]) = stream.get(start..).and_then(|s| s.first_chunk()) {
        if (start + 1..start + 3).contains(&at) {
            return true;
        }
        start += 5 + usize::from(u16::from_be_bytes([high, low]));
    }
    false
}
