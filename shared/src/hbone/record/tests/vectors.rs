//! RFC 8448 section 3: the records of the simple 1-RTT handshake under application keys.

use std::io::IoSlice;

use aws_lc_rs::aead::AES_128_GCM;
use rustls::AlertDescription;

use crate::hbone::record::key::TrafficKey;
use crate::hbone::record::{Content, Message, Opener, Sealer, record_len};

const SERVER_KEY: &str = "9f02283b6c9c07efc26bb9f2ac92e356";
const SERVER_IV: &str = "cf782b88dd83549aadf1e984";
const CLIENT_KEY: &str = "17422dda596ed5d9acd890e3c63f5051";
const CLIENT_IV: &str = "5b78923dee08579033e523d9";

const SERVER_TICKET: &str = "17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d41d\
    6af8f6b580dcf3d11d63c758db289a015940252f55713e061dc13e078891a38efbcf5753ad8ef170ad3c7353d16d\
    9da773b9ca7f2b9fa1b6c0d4a3d03f75e09c30ba1e62972ac46f75f7b981be63439b2999ce13064615139891d5e4\
    c5b406f16e3fc181a77ca475840025db2f0a77f81b5ab05b94c01346755f69232c86519d86cbeeac87aac347d143\
    f9605d64f650db4d023e70e952ca49fe5137121c74bc2697687e248746d6df353005f3bce18696129c8153556b3b\
    6c6779b37bf15985684f";
const CLIENT_DATA: &str = "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b98\
    19a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4";
const SERVER_DATA: &str = "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30e\
    faf97d90e6dffc602dcb501a59a8fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d";
const CLIENT_CLOSE: &str = "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3";
const SERVER_CLOSE: &str = "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9";

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("ASCII");
            u8::from_str_radix(pair, 16).expect("hexadecimal")
        })
        .collect()
}

fn key(key: &str, iv: &str) -> TrafficKey {
    TrafficKey::from_parts(&AES_128_GCM, &hex(key), &hex(iv), 0, u64::MAX).expect("a key")
}

fn payload() -> Vec<u8> {
    (0..50).collect()
}

#[test]
fn the_servers_records_open() {
    let mut opener = Opener::with_key(key(SERVER_KEY, SERVER_IV));
    let mut record = hex(SERVER_TICKET);
    assert_eq!(record_len(&record), Ok(Some(record.len())));
    assert_eq!(opener.open(&mut record), Ok(Content::Handshake));
    let Ok(Some(Message::NewSessionTicket(ticket))) = opener.next_message() else {
        panic!("the ticket was not recognised");
    };
    assert_eq!(ticket.len(), 0xc9);
    assert_eq!(ticket[..4], hex("0000001e"), "ticket_lifetime");
    assert_eq!(opener.next_message(), Ok(None));

    let mut record = hex(SERVER_DATA);
    assert_eq!(opener.open(&mut record), Ok(Content::Data(5..55)));
    assert_eq!(record[5..55], payload());

    let mut record = hex(SERVER_CLOSE);
    assert_eq!(opener.open(&mut record), Ok(Content::CloseNotify));
}

#[test]
fn the_clients_records_open_into_foreign_memory() {
    let mut opener = Opener::with_key(key(CLIENT_KEY, CLIENT_IV));
    let mut out = [0; 51];
    assert_eq!(
        opener.open_into(&hex(CLIENT_DATA), &mut out),
        Ok(Content::Data(0..50))
    );
    assert_eq!(out[..50], payload());
    assert_eq!(
        opener.open_into(&hex(CLIENT_CLOSE), &mut out),
        Ok(Content::CloseNotify)
    );
}

#[test]
fn the_clients_records_are_sealed_alike_from_one_slice_and_from_several() {
    let payload = payload();
    let several: Vec<_> = payload.chunks(7).map(IoSlice::new).collect();
    for slices in [vec![IoSlice::new(&payload)], several] {
        let mut sealer = Sealer::with_key(key(CLIENT_KEY, CLIENT_IV));
        let mut out = [0; 100];
        let sealed = sealer.seal_data(&slices, usize::MAX, &mut out);
        assert_eq!(sealed, Ok((50, 72)));
        assert_eq!(out[..72], hex(CLIENT_DATA));
        assert_eq!(
            sealer.seal_alert(AlertDescription::CloseNotify, &mut out),
            Ok(24)
        );
        assert_eq!(out[..24], hex(CLIENT_CLOSE));
    }
}
