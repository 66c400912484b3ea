use super::*;
use x509_parser::prelude::{GeneralName, ParsedExtension};

const HOUR: Duration = Duration::from_secs(3600);

fn identity() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/cart"
        .parse()
        .expect("legal")
}

fn ca() -> LocalCa {
    LocalCa::generate(&TrustDomain::default()).expect("a CA")
}

/// What a workload does with an authority.
fn certify(ca: &LocalCa) -> Result<WorkloadCertificate, CertificateInvalid> {
    let request = CertificateRequest::new(&identity()).expect("request");
    let signed = ca
        .sign(request.csr_pem(), &identity(), HOUR)
        .expect("signed");
    WorkloadCertificate::new(&identity(), signed, request.into_key(), SystemTime::now())
}

#[test]
fn a_leaf_has_what_the_mesh_needs_and_nothing_from_the_csr() {
    let ca = ca();
    // A request that asks for much more than it may have.
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).expect("params");
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.subject_alt_names.push(SanType::URI(
        "spiffe://td/ns/kube-system/sa/admin"
            .try_into()
            .expect("URI"),
    ));
    let csr = params.serialize_request(&key).expect("CSR");
    let signed = ca
        .sign(&csr.pem().expect("PEM"), &identity(), HOUR)
        .expect("signed");

    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).expect("X.509");
    assert_eq!(leaf.subject().iter().count(), 0);
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    assert!(!leaf.is_ca());
    let serial = leaf.raw_serial();
    assert!(serial.len() == 16 && serial[0] & 0x80 == 0, "{serial:?}");
    let extension = |wanted: fn(&ParsedExtension<'_>) -> bool| {
        let mut found = leaf
            .extensions()
            .iter()
            .filter(|e| wanted(e.parsed_extension()));
        let first = found.next().expect("present");
        assert!(found.next().is_none(), "twice");
        first
    };

    let san = extension(|e| matches!(e, ParsedExtension::SubjectAlternativeName(_)));
    assert!(san.critical, "the subject is empty");
    let ParsedExtension::SubjectAlternativeName(names) = san.parsed_extension() else {
        unreachable!("filtered above")
    };
    let uri = identity().to_string();
    assert_eq!(names.general_names, [GeneralName::URI(&uri)]);

    let usage = leaf.extended_key_usage().expect("valid").expect("present");
    assert!(usage.value.client_auth && usage.value.server_auth && !usage.value.any);
    let usage = leaf.key_usage().expect("valid").expect("present");
    assert!(usage.critical && usage.value.digital_signature() && !usage.value.key_cert_sign());
    extension(|e| matches!(e, ParsedExtension::SubjectKeyIdentifier(_)));

    // Authority and subject key identifiers meet.
    let (_, root) = X509Certificate::from_der(&signed.roots[0]).expect("X.509");
    let root_id = root
        .extensions()
        .iter()
        .find_map(|e| match e.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
    let issuer_id = leaf
        .extensions()
        .iter()
        .find_map(|e| match e.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                Some(id.key_identifier.as_ref().expect("present").0.to_vec())
            }
            _ => None,
        });
    assert!(root_id.is_some());
    assert_eq!(root_id, issuer_id);

    let now = SystemTime::now();
    let facts = CertificateFacts::read(&signed.chain[0]).expect("readable");
    assert!(
        facts.not_before < now - Duration::from_secs(30),
        "backdated"
    );
    assert!(facts.not_after <= now + HOUR && facts.not_after > now + HOUR / 2);
}

#[test]
fn validity_ends_with_the_limit_and_with_the_authority() {
    let root = ca();
    let request = CertificateRequest::new(&identity()).expect("request");
    let end = |ca: &LocalCa, ttl| {
        let signed = ca
            .sign(request.csr_pem(), &identity(), ttl)
            .expect("signed");
        CertificateFacts::read(&signed.chain[0])
            .expect("readable")
            .not_after
    };
    let year = HOUR * 24 * 365;
    assert!(end(&root, year) <= SystemTime::now() + MAX_LEAF_TTL);
    let short = root.intermediate("short", HOUR).expect("intermediate");
    assert!(end(&short, year) <= short.not_after());
    assert!(short.not_after() <= SystemTime::now() + HOUR);
}

#[test]
fn serials_differ() {
    let ca = ca();
    let serial = || certify(&ca).expect("certificate").facts().serial.clone();
    assert_ne!(serial(), serial());
}

#[test]
fn refuses_requests_that_prove_nothing() {
    let ca = ca();
    let request = CertificateRequest::new(&identity()).expect("request");
    let good = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(
        request.csr_pem().as_bytes(),
    )
    .expect("PEM");
    let pem = |der: &[u8]| pem_block("CERTIFICATE REQUEST", der);
    assert!(ca.sign(&pem(&good), &identity(), HOUR).is_ok());

    // A single changed bit in the signature.
    let mut forged = good.to_vec();
    *forged.last_mut().expect("not empty") ^= 1;
    let mut longer = good.to_vec();
    longer.push(0);
    let rsa = {
        let key = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).expect("key");
        let csr = CertificateParams::default().serialize_request(&key);
        csr.expect("CSR").pem().expect("PEM")
    };
    for bad in [
        String::new(),
        "no PEM".into(),
        pem(&[]),
        pem(&[0x30, 0x80]),
        pem(&good[..good.len() / 2]),
        pem(&forged),
        pem(&longer),
        rsa,
    ] {
        let refused = ca.sign(&bad, &identity(), HOUR);
        assert!(matches!(refused, Err(LocalCaError::Request(_))), "{bad}");
    }
}

#[test]
fn is_the_same_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ca");
    let domain = TrustDomain::default();
    let made = LocalCa::load_or_generate(&path, &domain).expect("generated");
    let loaded = LocalCa::load_or_generate(&path, &domain).expect("loaded");
    assert_eq!(made.root_pem(), loaded.root_pem());
    certify(&loaded).expect("works");

    use std::os::unix::fs::PermissionsExt as _;
    let mode = |name| {
        let metadata = std::fs::metadata(path.join(name)).expect("a file");
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("ca-key.pem"), 0o600);

    // Never replaced behind the operator's back.
    std::fs::write(path.join("root-cert.pem"), "garbage").expect("write");
    assert!(LocalCa::load_or_generate(&path, &domain).is_err());
}

#[test]
fn takes_a_plugged_in_intermediate() {
    let root = ca();
    let outer = LocalCa {
        // An intermediate that may have one more below it.
        ..{
            let key = KeyPair::generate().expect("key");
            let params = ca_params("outer", HOUR, BasicConstraints::Constrained(1));
            let signed = params.signed_by(&key, &root.issuer).expect("signed");
            let der = CertificateDer::from(signed);
            LocalCa::assemble(der.clone(), key, vec![der], root.roots.clone()).expect("a CA")
        }
    };
    let inner = outer.intermediate("inner", HOUR).expect("intermediate");
    let files = inner.to_files();
    let loaded = LocalCa::from_files(&files).expect("loaded");
    let certificate = certify(&loaded).expect("verifies");
    assert_eq!(certificate.chain().len(), 3, "leaf, inner, outer");
    assert_eq!(certificate.roots(), root.roots);

    // cert-chain.pem may also hold the root, or lack the signing certificate.
    let with_root = CaFiles {
        chain: files.chain.clone() + &files.roots,
        ..files.clone()
    };
    let without_itself = CaFiles {
        chain: outer.to_files().chain,
        ..files.clone()
    };
    for variant in [with_root, without_itself] {
        let loaded = LocalCa::from_files(&variant).expect("loaded");
        assert_eq!(certify(&loaded).expect("verifies").chain().len(), 3);
    }
}

#[test]
fn names_what_is_wrong_with_plugged_in_files() {
    let good = ca().to_files();
    let other = ca().to_files();
    let leaf = {
        let certificate = certify(&ca()).expect("certificate");
        certificate.facts().pem.clone()
    };
    let case = |change: fn(&mut CaFiles, &CaFiles, &str)| {
        let mut files = good.clone();
        change(&mut files, &other, &leaf);
        LocalCa::from_files(&files)
            .expect_err("refused")
            .to_string()
    };
    let errors = [
        (
            case(|f, o, _| f.key = o.key.clone()),
            "ca-key.pem is not its key",
        ),
        (case(|f, _, _| f.key = "x".into()), "ca-key.pem"),
        (case(|f, _, _| f.certificate = String::new()), "ca-cert.pem"),
        (case(|f, _, leaf| f.certificate = leaf.into()), "not a CA"),
        (
            case(|f, o, _| f.roots = o.roots.clone()),
            "would be refused",
        ),
        (case(|f, _, _| f.roots = String::new()), "root-cert.pem"),
    ];
    for (error, part) in errors {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn survives_the_wire_form() {
    let ca = ca().intermediate("inner", HOUR).expect("intermediate");
    let request = CertificateRequest::new(&identity()).expect("request");
    let signed = ca
        .sign(request.csr_pem(), &identity(), HOUR)
        .expect("signed");
    let parts = signed.to_pem_parts();
    assert_eq!(parts.len(), 3, "leaf, intermediate, roots");
    assert_eq!(SignedChain::from_pem_parts(&parts).expect("read"), signed);

    let leaf = parts[0].clone();
    for bad in [
        vec![],
        vec![leaf.clone()],
        vec![leaf.clone(), String::new()],
        vec![String::new(), leaf.clone()],
        vec![leaf.clone(), leaf.repeat(300)],
        vec![
            "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----".into(),
            leaf,
        ],
    ] {
        assert!(SignedChain::from_pem_parts(&bad).is_err(), "{bad:?}");
    }
}
