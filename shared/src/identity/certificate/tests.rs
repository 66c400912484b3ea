//! What a certificate must be to be taken, and what a handshake under it lets in. The
//! handshakes are real, in memory.

use super::*;
use crate::identity::{CertificateRequest, LocalCa};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, RootCertStore, ServerConnection};

const HOUR: Duration = Duration::from_secs(3600);

fn id(uri: &str) -> SpiffeId {
    uri.parse().expect("legal")
}

fn cart() -> SpiffeId {
    id("spiffe://cluster.local/ns/shop/sa/cart")
}

fn ca() -> LocalCa {
    LocalCa::generate(&TrustDomain::default()).expect("a CA")
}

fn certify(ca: &LocalCa, identity: &SpiffeId) -> WorkloadCertificate {
    let request = CertificateRequest::new(identity).expect("request");
    let signed = ca.sign(request.csr_pem(), identity, HOUR).expect("signed");
    WorkloadCertificate::new(identity, signed, request.into_key(), SystemTime::now())
        .expect("usable")
}

/// A leaf as the caller wants it, under the root of `ca`.
fn odd(ca: &LocalCa, change: impl FnOnce(&mut CertificateParams)) -> (SignedChain, KeyPair) {
    let files = ca.to_files();
    let ca_key = KeyPair::from_pem(&files.key).expect("key");
    let issuer = Issuer::from_ca_cert_pem(&files.certificate, ca_key).expect("issuer");
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    let now = SystemTime::now();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&cart().to_string())];
    params.not_before = (now - HOUR).into();
    params.not_after = (now + HOUR).into();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    change(&mut params);
    let leaf = params.signed_by(&key, &issuer).expect("signed");
    let signed = SignedChain {
        chain: vec![leaf.into()],
        roots: roots(ca),
    };
    (signed, key)
}

fn roots(ca: &LocalCa) -> Vec<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject as _;
    CertificateDer::pem_slice_iter(ca.root_pem().as_bytes())
        .collect::<Result<_, _>>()
        .expect("PEM")
}

fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().expect("ASCII"))
}

fn take(
    (signed, key): (SignedChain, KeyPair),
    now: SystemTime,
) -> Result<WorkloadCertificate, CertificateInvalid> {
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    WorkloadCertificate::new(&cart(), signed, key, now)
}

#[test]
fn takes_only_what_was_asked_for() {
    use CertificateInvalid as Invalid;
    use PeerIdentityError as Identity;
    let (ca, other) = (ca(), ca());
    let now = SystemTime::now();
    take(odd(&ca, |_| ()), now).expect("the plain case is good");

    let leaf = |change: fn(&mut CertificateParams)| take(odd(&ca, change), now);
    let got = leaf(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/other")]);
    assert!(matches!(got, Err(Invalid::Identity { .. })), "{got:?}");
    let got = leaf(|p| p.subject_alt_names = vec![uri("spiffe://elsewhere/ns/shop/sa/cart")]);
    assert!(matches!(got, Err(Invalid::Identity { .. })), "{got:?}");
    let got = leaf(|p| p.subject_alt_names.clear());
    assert!(
        matches!(got, Err(Invalid::NoIdentity(Identity::NoUri))),
        "{got:?}"
    );
    let got = leaf(|p| {
        p.subject_alt_names
            .push(uri("spiffe://cluster.local/ns/a/sa/b"));
    });
    assert!(
        matches!(got, Err(Invalid::NoIdentity(Identity::SeveralUris))),
        "{got:?}"
    );
    let got = leaf(|p| p.subject_alt_names = vec![uri("https://cluster.local/ns/shop/sa/cart")]);
    assert!(
        matches!(got, Err(Invalid::NoIdentity(Identity::NotSpiffe(_)))),
        "{got:?}"
    );
    // Fit for one role only.
    for usage in [
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ] {
        let got = take(odd(&ca, |p| p.extended_key_usages = vec![usage]), now);
        assert!(matches!(got, Err(Invalid::Chain(_))), "{got:?}");
    }
    let got = leaf(|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    assert!(matches!(got, Err(Invalid::Chain(_))), "{got:?}");

    for at in [now - 2 * HOUR, now + 2 * HOUR] {
        let got = take(odd(&ca, |_| ()), at);
        assert!(matches!(got, Err(Invalid::Chain(_))), "{got:?}");
    }

    let (mut signed, key) = odd(&ca, |_| ());
    signed.roots = roots(&other);
    let got = take((signed.clone(), key), now);
    assert!(matches!(got, Err(Invalid::Chain(_))), "{got:?}");
    let (_, key) = odd(&ca, |_| ());
    signed.roots = roots(&ca);
    let got = take((signed.clone(), key), now);
    assert!(matches!(got, Err(Invalid::Key(_))), "{got:?}");

    let (mut signed, key) = odd(&ca, |_| ());
    signed.roots.clear();
    assert!(matches!(take((signed, key), now), Err(Invalid::Root(_))));
    let (mut signed, key) = odd(&ca, |_| ());
    signed.chain.clear();
    assert!(matches!(take((signed, key), now), Err(Invalid::NoLeaf)));
    let (mut signed, key) = odd(&ca, |_| ());
    signed.chain = vec![CertificateDer::from(vec![0x30, 0x03, 1, 2])];
    assert!(matches!(
        take((signed, key), now),
        Err(Invalid::Unreadable(_))
    ));
}

/// Runs a handshake to its end or to the first error of either side.
fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let name = ServerName::try_from("10.0.0.5").expect("an address");
    let mut client = ClientConnection::new(client, name)?;
    let mut server = ServerConnection::new(server)?;
    let mut wire = Vec::new();
    for _ in 0..10 {
        wire.clear();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("memory");
            server.process_new_packets()?;
        }
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("memory");
        }
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("memory");
            client.process_new_packets()?;
        }
        if wire.is_empty() && !client.is_handshaking() && !server.is_handshaking() {
            return Ok((client, server));
        }
    }
    panic!("the handshake does not end");
}

#[test]
fn peers_of_one_domain_meet_and_know_each_other() {
    let ca = ca();
    let till = id("spiffe://cluster.local/ns/bank/sa/till");
    let (a, b) = (certify(&ca, &cart()), certify(&ca, &till));
    let (client, server) =
        handshake(a.client_config().clone(), b.server_config().clone()).expect("handshake");

    let seen = |chain: Option<&[CertificateDer<'static>]>| peer_identity(chain.unwrap_or_default());
    assert_eq!(seen(client.peer_certificates()), Ok(till));
    assert_eq!(seen(server.peer_certificates()), Ok(cart()));

    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(
        client.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    let suite = client.negotiated_cipher_suite().map(|s| s.suite());
    assert_eq!(suite, Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
    assert_eq!(server.server_name(), None, "no SNI");
    assert_eq!(client.tls13_tickets_received(), 0);
    // The record layer takes over from here.
    client.dangerous_extract_secrets().expect("allowed");
    server.dangerous_extract_secrets().expect("allowed");
}

#[test]
fn nothing_is_resumed() {
    let ca = ca();
    let (a, b) = (certify(&ca, &cart()), certify(&ca, &cart()));
    for _ in 0..2 {
        let (client, _) =
            handshake(a.client_config().clone(), b.server_config().clone()).expect("handshake");
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn old_connections_survive_a_renewal() {
    let ca = ca();
    let (first, second) = (certify(&ca, &cart()), certify(&ca, &cart()));
    let peer = certify(&ca, &cart());
    let client = first.client_config().clone();
    drop(first);
    handshake(client, peer.server_config().clone()).expect("still good");
    handshake(second.client_config().clone(), peer.server_config().clone()).expect("good");
}

#[test]
fn strangers_are_refused_by_both_sides() {
    let (ours, theirs) = (ca(), ca());
    let us = certify(&ours, &cart());

    // The same name under another root.
    let impostor = certify(&theirs, &cart());
    // Another trust domain under our root.
    let foreign = certify(&ours, &id("spiffe://elsewhere/ns/shop/sa/cart"));
    for stranger in [&impostor, &foreign] {
        let out = handshake(us.client_config().clone(), stranger.server_config().clone());
        assert!(out.is_err());
        let into = handshake(stranger.client_config().clone(), us.server_config().clone());
        assert!(into.is_err());
    }
}

/// Certificates are public: who shows one has to have its key.
#[test]
fn a_certificate_without_its_key_is_refused_by_both_sides() {
    let ca = ca();
    let us = certify(&ca, &cart());
    let own = KeyPair::generate().expect("key");
    let own = PrivatePkcs8KeyDer::from(own.serialize_der());
    let key = tls::provider()
        .key_provider
        .load_private_key(own.into())
        .expect("a key");
    let stolen = Arc::new(CertifiedKey::new(us.chain().to_vec(), key));
    let verifier = || {
        let verifier = mesh_verifier(us.roots(), &TrustDomain::default());
        Arc::new(verifier.expect("roots"))
    };
    let server = tls::workload_server_config(stolen.clone(), verifier()).expect("a config");
    let client = tls::workload_client_config(stolen, verifier()).expect("a config");
    let out = handshake(us.client_config().clone(), Arc::new(server));
    let into = handshake(Arc::new(client), us.server_config().clone());
    for refused in [out.err(), into.err()] {
        let why = format!("{:?}", refused.expect("the key is another one"));
        assert!(why.contains("BadSignature"), "{why}");
    }
}

/// A client or server that is less strict than ours, so that ours has to refuse.
fn lax_client(certificate: Option<(SignedChain, KeyPair)>) -> Arc<ClientConfig> {
    #[derive(Debug)]
    struct AnyServer;
    impl rustls::client::danger::ServerCertVerifier for AnyServer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let builder = ClientConfig::builder_with_provider(provider.into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match certificate {
        None => builder.with_no_client_auth(),
        Some((signed, key)) => {
            let key = PrivatePkcs8KeyDer::from(key.serialize_der());
            builder
                .with_client_auth_cert(signed.chain, key.into())
                .expect("a pair")
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[test]
fn a_server_refuses_clients_without_a_good_certificate() {
    let ca = ca();
    let server = certify(&ca, &cart());
    let dial = |client| handshake(client, server.server_config().clone()).map(|_| ());

    dial(lax_client(Some(odd(&ca, |_| ())))).expect("the plain case is let in");
    let now = SystemTime::now();
    let refused = [
        ("no certificate", lax_client(None)),
        (
            "expired",
            lax_client(Some(odd(&ca, |p| p.not_after = (now - HOUR / 2).into()))),
        ),
        (
            "not yet valid",
            lax_client(Some(odd(&ca, |p| p.not_before = (now + HOUR / 2).into()))),
        ),
        (
            "server only",
            lax_client(Some(odd(&ca, |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }))),
        ),
        (
            "no SPIFFE id",
            lax_client(Some(odd(&ca, |p| {
                p.subject_alt_names = vec![SanType::DnsName("cart".try_into().expect("DNS"))];
            }))),
        ),
        (
            "two SPIFFE ids",
            lax_client(Some(odd(&ca, |p| {
                p.subject_alt_names
                    .push(uri("spiffe://cluster.local/ns/a/sa/b"));
            }))),
        ),
        (
            "another trust domain",
            lax_client(Some(odd(&ca, |p| {
                p.subject_alt_names = vec![uri("spiffe://cluster.local.evil/ns/shop/sa/cart")];
            }))),
        ),
    ];
    for (what, client) in refused {
        assert!(dial(client).is_err(), "{what} was let in");
    }
}

#[test]
fn a_server_speaks_only_h2() {
    let ca = ca();
    let server = certify(&ca, &cart());
    let mut client = Arc::unwrap_or_clone(lax_client(Some(odd(&ca, |_| ()))));
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert!(handshake(Arc::new(client), server.server_config().clone()).is_err());
}

#[test]
fn names_no_peer_without_a_certificate() {
    assert_eq!(peer_identity(&[]), Err(PeerIdentityError::NoCertificate));
    let garbage = CertificateDer::from(vec![1, 2, 3]);
    assert!(matches!(
        peer_identity(&[garbage]),
        Err(PeerIdentityError::Unreadable(_))
    ));
}

#[test]
fn the_control_plane_is_known_by_name_and_root() {
    use crate::identity::{control_plane_client_config, control_plane_server_config};
    let (ours, theirs) = (ca(), ca());
    let serve = |ca: &LocalCa, address: &str| {
        let address = address.parse().expect("an address");
        let serving = ca
            .issue_serving(&["aditd.example"], &[address], HOUR)
            .expect("issued");
        Arc::new(control_plane_server_config(serving.into_identity()).expect("configuration"))
    };
    let client = |ca: &LocalCa| {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots(ca));
        Arc::new(control_plane_client_config(Arc::new(store)).expect("configuration"))
    };
    let dial = |client: Arc<ClientConfig>, server| handshake(client, server).map(|_| ());
    // `handshake` dials 10.0.0.5.
    dial(client(&ours), serve(&ours, "10.0.0.5")).expect("the right one");
    assert!(dial(client(&ours), serve(&ours, "10.0.0.6")).is_err());
    assert!(dial(client(&ours), serve(&theirs, "10.0.0.5")).is_err());
}
