//! The pure parser: what it accepts, what it refuses and with which error.

use std::io::IoSlice;

use aws_lc_rs::aead::AES_128_GCM;
use proptest::prelude::*;
use rustls::AlertDescription;

use super::{ALGORITHMS, key, protect};
use crate::hbone::record::RecordError::{self, *};
use crate::hbone::record::{
    AES_GCM_RECORD_LIMIT, Content, MAX_IDLE_RECORDS, Message, Opener, Sealer, inner_len, record_len,
};

fn opener() -> Opener {
    Opener::with_key(key(&AES_128_GCM, 0))
}

/// Feeds inner plaintexts as records; what the last of them yields.
fn open_all(inners: &[&[u8]]) -> Result<Content, RecordError> {
    let mut peer = key(&AES_128_GCM, 0);
    let (mut in_place, mut apart) = (opener(), opener());
    let mut last = Ok(Content::Nothing);
    for inner in inners {
        let mut record = protect(&mut peer, inner);
        let mut out = vec![0; inner_len(record.len())];
        last = step(&mut apart, |opener| opener.open_into(&record, &mut out));
        let again = step(&mut in_place, |opener| opener.open(&mut record));
        match (&last, &again) {
            (Ok(Content::Data(a)), Ok(Content::Data(b))) => {
                assert_eq!(out[a.clone()], record[b.clone()]);
            }
            (a, b) => assert_eq!(a, b),
        }
        last.as_ref().map_err(|error| *error)?;
    }
    last
}

fn step(
    opener: &mut Opener,
    open: impl FnOnce(&mut Opener) -> Result<Content, RecordError>,
) -> Result<Content, RecordError> {
    let content = open(opener)?;
    while opener.next_message()?.is_some() {}
    Ok(content)
}

#[test]
fn what_a_record_may_hold() {
    let full = [&[1; 1 << 14][..], &[23]].concat();
    let padded = [&[1; 100][..], &[23], &[0; 1000]].concat();
    let ticket = [&[22 - 18, 0, 0, 3, 1, 2, 3][..], &[22]].concat();
    let cases: [(&str, &[&[u8]], Content); 9] = [
        ("data", &[b"a\x17"], Content::Data(0..1)),
        ("a full record", &[&full], Content::Data(0..1 << 14)),
        ("padding", &[&padded], Content::Data(0..100)),
        (
            "zeros that are data",
            &[b"a\0\0\x17\0"],
            Content::Data(0..3),
        ),
        ("no data", &[b"\x17"], Content::Nothing),
        ("close_notify", &[b"\x01\x00\x15"], Content::CloseNotify),
        (
            "close_notify of any level",
            &[b"\xff\x00\x15"],
            Content::CloseNotify,
        ),
        ("user_canceled", &[b"\x01\x5a\x15"], Content::Nothing),
        ("a ticket", &[&ticket], Content::Handshake),
    ];
    for (what, inners, expected) in cases {
        assert_eq!(open_all(inners), Ok(expected), "{what}");
    }
}

#[test]
fn what_a_record_may_not_hold() {
    use AlertDescription as A;
    let too_long = [&[1; (1 << 14) + 1][..], &[23]].concat();
    let too_padded = [&[1; 1 << 14][..], &[23, 0]].concat();
    let cases: [(&str, &[&[u8]], A); 19] = [
        ("no content type", &[b""], A::UnexpectedMessage),
        ("zeros only", &[b"\0\0\0"], A::UnexpectedMessage),
        ("unknown content type", &[b"a\x18"], A::UnexpectedMessage),
        (
            "protected change_cipher_spec",
            &[b"\x01\x14"],
            A::UnexpectedMessage,
        ),
        ("plaintext too long", &[&too_long], A::RecordOverflow),
        (
            "plaintext and padding too long",
            &[&too_padded],
            A::RecordOverflow,
        ),
        ("empty alert", &[b"\x15"], A::UnexpectedMessage),
        ("short alert", &[b"\x01\x15"], A::DecodeError),
        ("long alert", &[b"\x01\x00\x00\x15"], A::DecodeError),
        ("empty handshake", &[b"\x16"], A::UnexpectedMessage),
        ("ClientHello", &[b"\x01\x16"], A::UnexpectedMessage),
        ("Finished", &[b"\x14\0\0\x01a\x16"], A::UnexpectedMessage),
        (
            "CertificateRequest",
            &[b"\x0d\0\0\x01a\x16"],
            A::UnexpectedMessage,
        ),
        (
            "KeyUpdate without body",
            &[b"\x18\0\0\0\x16"],
            A::DecodeError,
        ),
        (
            "KeyUpdate too long",
            &[b"\x18\0\0\x02\0\0\x16"],
            A::DecodeError,
        ),
        (
            "KeyUpdate of 2",
            &[b"\x18\0\0\x01\x02\x16"],
            A::IllegalParameter,
        ),
        (
            "KeyUpdate not last",
            &[b"\x18\0\0\x01\0\x04\x16"],
            A::UnexpectedMessage,
        ),
        (
            "data amid a message",
            &[b"\x04\0\x16", b"a\x17"],
            A::UnexpectedMessage,
        ),
        (
            "a ticket of 16 MiB",
            &[b"\x04\xff\xff\xff\x16"],
            A::DecodeError,
        ),
    ];
    for (what, inners, expected) in cases {
        let error = open_all(inners).expect_err(what);
        assert_eq!(error.alert(), Some(expected), "{what}: {error}");
    }
    assert_eq!(
        open_all(&[b"\x02\x28\x15"]),
        Err(AlertReceived(A::HandshakeFailure))
    );
    assert_eq!(
        open_all(&[b"\x01\x64\x15"]),
        Err(AlertReceived(A::NoRenegotiation))
    );
    assert_eq!(
        open_all(&[b"\x01\xee\x15"]),
        Err(AlertReceived(A::Unknown(0xee)))
    );
}

#[test]
fn what_a_header_may_say() {
    type Len = Result<Option<usize>, RecordError>;
    let cases: [(&[u8], Len); 9] = [
        (&[], Ok(None)),
        (&[23], Ok(None)),
        (&[23, 3, 3, 0], Ok(None)),
        (&[23, 3, 3, 0, 17], Ok(Some(22))),
        (&[23, 3, 3, 0x41, 0x00], Ok(Some(5 + 16640))),
        (&[23, 3, 3, 0x41, 0x01], Err(RecordOverflow)),
        (&[23, 3, 3, 0, 15], Err(BadRecordMac)),
        (
            &[20],
            Err(UnexpectedMessage("change_cipher_spec after the handshake")),
        ),
        (
            b"GET /",
            Err(UnexpectedMessage("record without protection")),
        ),
    ];
    for (header, expected) in cases {
        assert_eq!(record_len(header), expected, "{header:?}");
    }
}

#[test]
fn a_message_may_come_in_fragments() {
    let mut peer = key(&AES_128_GCM, 0);
    let mut opener = opener();
    let ticket: Vec<u8> = (0..=255).cycle().take(40_000).collect();
    let len = u32::try_from(ticket.len()).expect("short").to_be_bytes();
    let message = [&[4], &len[1..], &ticket].concat();
    let chunks: Vec<_> = message.chunks(9_999).collect();
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(opener.next_message(), Ok(None));
        let mut record = protect(&mut peer, &[chunk, &[22][..]].concat());
        assert_eq!(opener.open(&mut record), Ok(Content::Handshake), "{index}");
    }
    assert_eq!(
        opener.next_message(),
        Ok(Some(Message::NewSessionTicket(ticket)))
    );
    let mut record = protect(&mut peer, b"\x18\0\0\x01\x01\x16");
    assert_eq!(opener.open(&mut record), Ok(Content::Handshake));
    assert_eq!(
        opener.next_message(),
        Ok(Some(Message::KeyUpdate { requested: true }))
    );
}

#[test]
fn idle_records_in_a_row_are_bounded_and_data_resets_the_count() {
    for idle in [
        &b"\x17"[..],
        b"\x01\x5a\x15",
        b"\x04\0\0\x01a\x16",
        b"\x18\0\0\x01\x01\x16",
    ] {
        let bound = usize::from(MAX_IDLE_RECORDS);
        let mut inners = vec![idle; bound];
        inners.push(b"data\x17");
        inners.extend(vec![idle; bound]);
        assert!(open_all(&inners).is_ok());
        inners.push(idle);
        let error = open_all(&inners).expect_err("one too many");
        assert_eq!(error.alert(), Some(AlertDescription::UnexpectedMessage));
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    for algorithm in ALGORITHMS {
        let record = protect(&mut key(algorithm, 0), b"some data\x17");
        for bit in 0..record.len() * 8 {
            let mut bad = record.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut opener = Opener::with_key(key(algorithm, 0));
            let outcome = match record_len(&bad) {
                // A longer length waits for bytes that are not of this record.
                Ok(Some(len)) if len > bad.len() => {
                    bad.resize(len, 0);
                    opener.open(&mut bad)
                }
                Ok(Some(len)) => opener.open(&mut bad[..len]),
                Ok(None) => panic!("the header is all there"),
                Err(error) => Err(error),
            };
            assert!(outcome.is_err(), "bit {bit} of {algorithm:?}");
        }
        for len in 0..record.len() {
            let mut cut = record[..len].to_vec();
            match record_len(&cut) {
                Ok(None) => assert!(len < 5),
                Ok(Some(whole)) => assert!(whole == record.len() && len < whole),
                Err(error) => panic!("{error}"),
            }
            // Even a caller who does not measure gets an error.
            let mut opener = Opener::with_key(key(algorithm, 0));
            assert!(opener.open(&mut cut).is_err());
        }
    }
}

#[test]
fn records_cannot_be_dropped_repeated_or_swapped() {
    let mut peer = key(&AES_128_GCM, 0);
    let records = [protect(&mut peer, b"0\x17"), protect(&mut peer, b"1\x17")];
    for order in [&[1][..], &[0, 0], &[1, 0]] {
        let mut opener = opener();
        let outcome = order
            .iter()
            .try_for_each(|index| opener.open(&mut records[*index].clone()).map(|_| ()));
        assert_eq!(outcome, Err(BadRecordMac), "{order:?}");
    }
}

#[test]
fn a_sequence_number_never_wraps() {
    let mut peer = key(&AES_128_GCM, u64::MAX - 1);
    let mut opener = Opener::with_key(key(&AES_128_GCM, u64::MAX - 1));
    let mut record = protect(&mut peer, b"a\x17");
    assert!(opener.open(&mut record).is_ok());
    assert_eq!(
        opener.open(&mut record),
        Err(Internal("sequence numbers are used up"))
    );
    let mut sealer = Sealer::with_key(key(&AES_128_GCM, u64::MAX));
    let mut out = [0; 64];
    assert!(
        sealer
            .seal_alert(AlertDescription::CloseNotify, &mut out)
            .is_err()
    );
    let sealed = sealer.seal_data(&[IoSlice::new(b"a")], usize::MAX, &mut out);
    assert_eq!(sealed, Ok((0, 0)), "the key is worn out");
}

#[test]
fn the_last_record_of_a_key_is_kept_for_the_key_update() {
    assert_eq!(AES_GCM_RECORD_LIMIT, 2f64.powf(24.5) as u64);
    let mut sealer = Sealer::with_key(key(&AES_128_GCM, 0));
    sealer.lower_limit(3);
    let data = [0; 4 << 14];
    let mut out = vec![0; 5 << 14];
    let (taken, _) = sealer
        .seal_data(&[IoSlice::new(&data)], usize::MAX, &mut out)
        .expect("sealed");
    assert_eq!((taken, sealer.remaining()), (2 << 14, 1));
    assert!(sealer.seal_key_update(&mut out).is_ok());
    assert_eq!(sealer.remaining(), 0);
}

proptest! {
    #[test]
    fn whatever_is_sealed_from_any_slices_opens_to_the_same_bytes(
        lens in proptest::collection::vec(0usize..20_000, 0..8),
        room in 0usize..80_000,
        limit in 0usize..80_000,
        algorithm in 0usize..3,
    ) {
        let algorithm = ALGORITHMS[algorithm];
        let data: Vec<Vec<u8>> = lens.iter().enumerate().map(|(i, len)| vec![i as u8; *len]).collect();
        let slices: Vec<_> = data.iter().map(|data| IoSlice::new(data)).collect();
        let mut out = vec![0; room];
        let mut sealer = Sealer::with_key(key(algorithm, 5));
        let (taken, written) = sealer.seal_data(&slices, limit, &mut out).expect("sealed");
        let all = data.concat();
        prop_assert!(taken <= all.len().min(limit) && written <= room);
        // It stops for a reason only.
        prop_assert!(taken == all.len().min(limit) || room - written <= 22);
        let mut opener = Opener::with_key(key(algorithm, 5));
        let (mut opened, mut at) = (Vec::new(), 0);
        while at < written {
            let len = record_len(&out[at..written]).expect("a header").expect("whole");
            let record = &mut out[at..at + len];
            let Ok(Content::Data(range)) = opener.open(record) else { panic!("no data") };
            prop_assert!(!range.is_empty() && range.len() <= 1 << 14);
            opened.extend_from_slice(&record[range]);
            at += len;
        }
        prop_assert_eq!(&opened[..], &all[..taken]);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut opener = opener();
        let mut bytes = bytes;
        if let Ok(Some(len)) = record_len(&bytes) {
            prop_assert!(len > bytes.len() || opener.open(&mut bytes[..len]).is_err());
        }
        prop_assert!(opener.open(&mut bytes).is_err());
    }

    #[test]
    fn no_inner_plaintexts_make_the_parser_panic(
        inners in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..40), 20u8..25), 0..6),
    ) {
        let inners: Vec<Vec<u8>> = inners.into_iter().map(|(mut inner, kind)| { inner.push(kind); inner }).collect();
        let inners: Vec<&[u8]> = inners.iter().map(Vec::as_slice).collect();
        let _ = open_all(&inners);
    }
}
