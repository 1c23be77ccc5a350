//! `amqps://`, with certificates made for the test.

use std::net::TcpStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Connection, ErrorKind, NO_KEY, Properties, Route, Start, Uri};
use logs_tests::raw::{RawBroker, short_string};
use logs_tests::{PATIENCE, TempFile};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::{Peer, fails, logs, open};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert: TempFile,
}

struct Identity {
    cert: TempFile,
    key: TempFile,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = TempFile::with("ca.pem", params.self_signed(&key).unwrap().pem().as_bytes());
        Authority { issuer: Issuer::new(params, key), cert }
    }

    fn issue(&self, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_string()]).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity {
            cert: TempFile::with("cert.pem", cert.as_bytes()),
            key: TempFile::with("key.pem", key.serialize_pem().as_bytes()),
        }
    }
}

/// What a broker with this identity is set up with; it wants clients of `clients`, if any.
fn config(identity: &Identity, clients: Option<&Authority>) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(authority.cert.path()).unwrap()).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        }
    };
    let chain = vec![CertificateDer::from_pem_file(identity.cert.path()).unwrap()];
    let key = PrivateKeyDer::from_pem_file(identity.key.path()).unwrap();
    Arc::new(builder.with_single_cert(chain, key).unwrap())
}

type TlsBroker = RawBroker<StreamOwned<ServerConnection, TcpStream>>;

/// A peer that speaks TLS, and serves a client after the handshake.
fn serve(config: Arc<ServerConfig>, script: impl FnOnce(TlsBroker) + Send + 'static) -> Peer {
    Peer::start(move |mut broker| {
        let mut session = ServerConnection::new(config).unwrap();
        let socket = broker.socket();
        while session.is_handshaking() {
            if session.complete_io(socket).is_err() {
                // The alert has the reason.
                let _ = session.complete_io(socket);
                return;
            }
        }
        let socket = socket.try_clone().unwrap();
        script(RawBroker::new(StreamOwned::new(session, socket)));
    })
}

fn uri(peer: &Peer, parameters: &[(&str, &TempFile)]) -> Uri {
    let files = parameters.iter().map(|(name, file)| format!("{name}={}", file.path().display()));
    let parameters: Vec<_> = files.chain(["heartbeat=0".into()]).collect();
    Uri::parse(&format!("amqps://{}/%2f?{}", peer.address, parameters.join("&"))).unwrap()
}

fn connect(peer: &Peer, parameters: &[(&str, &TempFile)]) -> Result<Connection, amqp::Error> {
    open(&[uri(peer, parameters)])
}

#[test]
fn bytes_go_both_ways_encrypted() {
    let authority = Authority::new("test");
    let body = vec![b'x'; 2 << 20];
    let delivered = body.clone();
    let peer = serve(config(&authority.issue("127.0.0.1"), None), move |mut broker| {
        broker.log_in();
        broker.answer(1, (60, 20), &short_string(b"tag"));
        broker.deliver(1, &delivered);
        broker.expect((60, 80));
        broker.answer(0, (10, 50), b"");
        broker.wait_for_end();
    });
    let connection = connect(&peer, &[("cacertfile", &authority.cert)]).unwrap();
    let mut deliveries = connection.consume("q", None).unwrap();
    let delivery = loop {
        match deliveries.try_next().unwrap() {
            Some(delivery) => break delivery,
            None => deliveries.wait(&[], Some(Instant::now() + PATIENCE)),
        }
    };
    assert_eq!(delivery.body, body);
    deliveries.acknowledge(delivery.tag);
    deliveries.close(Instant::now() + PATIENCE);
    peer.ends();
}

#[test]
fn messages_of_any_size_are_published_encrypted() {
    let authority = Authority::new("test");
    let peer = serve(config(&authority.issue("127.0.0.1"), None), |mut broker| {
        broker.log_in();
        for _ in 0..8 {
            broker.expect((60, 40));
        }
        broker.answer(0, (10, 50), b"");
        broker.wait_for_end();
    });
    let route = Route {
        exchange: logs(),
        declare: false,
        mandatory: false,
        confirms: true,
        start: Start::AtOnce,
    };
    let connection = connect(&peer, &[("cacertfile", &authority.cert)]).unwrap();
    let mut publishing = connection.publish(route).unwrap();
    for size in (0..8).map(|power| 1 << (3 * power)) {
        publishing.publish(NO_KEY, &vec![0; size], &Properties::default());
    }
    publishing.close();
    peer.ends();
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let authority = Authority::new("test");
    let identity = authority.issue("other.example");
    let peer = serve(config(&identity, None), |_| {});
    let ca = [("cacertfile", &authority.cert)];
    let parts = ["certificate of the broker: it is for another name", "other.example"];
    fails(connect(&peer, &ca), ErrorKind::Configuration, &parts);
    peer.ends();
    // Unless that name is asked for.
    let peer = serve(config(&identity, None), |mut broker| {
        broker.log_in();
        broker.wait_for_end();
    });
    let ca = authority.cert.path().display();
    let uri =
        format!("amqps://{}?cacertfile={ca}&server_name_indication=other.example", peer.address);
    drop(open(&[Uri::parse(&uri).unwrap()]).unwrap());
    peer.ends();
}

#[test]
fn a_certificate_of_an_unknown_authority_is_refused() {
    let (known, unknown) = (Authority::new("known"), Authority::new("unknown"));
    let identity = unknown.issue("127.0.0.1");
    let peer = serve(config(&identity, None), |_| {});
    let parts = ["certificate of the broker: its issuer is unknown"];
    fails(connect(&peer, &[("cacertfile", &known.cert)]), ErrorKind::Untrusted, &parts);
    peer.ends();
    // The authorities of the system do not know it either, if there are any.
    let peer = serve(config(&identity, None), |_| {});
    fails(connect(&peer, &[]), ErrorKind::Untrusted, &[]);
    drop(TcpStream::connect(peer.address));
    peer.ends();
}

#[test]
fn a_client_certificate_is_shown_where_it_is_wanted() {
    let authority = Authority::new("test");
    let server = config(&authority.issue("127.0.0.1"), Some(&authority));
    let client = authority.issue("client");
    let peer = serve(Arc::clone(&server), |mut broker| {
        broker.log_in();
        broker.wait_for_end();
    });
    let ca = ("cacertfile", &authority.cert);
    let files = [ca, ("certfile", &client.cert), ("keyfile", &client.key)];
    drop(connect(&peer, &files).unwrap());
    peer.ends();
    // With TLS 1.3 the refusal arrives after the client has completed the handshake.
    let peer = serve(server, |_| {});
    let parts = ["the broker refuses it", "another client certificate"];
    fails(connect(&peer, &[ca]), ErrorKind::ClientCertificate, &parts);
    peer.ends();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new("test");
    let (one, other) = (authority.issue("client"), authority.issue("client"));
    let empty = TempFile::with("empty.pem", b"");
    let damaged = TempFile::with(
        "damaged.pem",
        b"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n",
    );
    let encrypted = TempFile::with("encrypted.pem", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n");
    let missing = TempFile::new("missing.pem");
    let ca = ("cacertfile", &authority.cert);
    for (files, kind, text) in [
        (vec![("cacertfile", &missing)], ErrorKind::File, "missing.pem\": No such file"),
        (vec![("cacertfile", &empty)], ErrorKind::Configuration, "there is none in PEM format"),
        (vec![("cacertfile", &damaged)], ErrorKind::Configuration, "not in PEM format"),
        (
            vec![ca, ("certfile", &one.cert), ("keyfile", &encrypted)],
            ErrorKind::Configuration,
            "it is encrypted",
        ),
        (
            vec![ca, ("certfile", &one.cert), ("keyfile", &empty)],
            ErrorKind::Configuration,
            "private key",
        ),
        (
            vec![ca, ("certfile", &one.cert), ("keyfile", &other.key)],
            ErrorKind::Configuration,
            "they do not belong together",
        ),
    ] {
        let peer = Peer::start(|mut broker| broker.wait_for_end());
        fails(connect(&peer, &files), kind, &[text]);
        peer.ends();
    }
}

#[test]
fn a_peer_without_tls_is_told_from_one_that_is_silent_or_gone() {
    let authority = Authority::new("test");
    let ca = [("cacertfile", &authority.cert)];
    let peer = Peer::start(|mut broker| broker.write(b"AMQP\0\0\x09\x01 and more"));
    fails(connect(&peer, &ca), ErrorKind::Protocol, &["does not speak TLS"]);
    peer.ends();
    let peer = Peer::start(drop);
    fails(connect(&peer, &ca), ErrorKind::Unavailable, &["TLS handshake: "]);
    peer.ends();
    let peer = Peer::start(|mut broker| broker.wait_for_end());
    let mut uri = uri(&peer, &ca).to_string();
    uri = format!(
        "amqps://{uri}?connection_timeout=100&cacertfile={}",
        authority.cert.path().display()
    );
    let parts = ["TLS handshake: no answer within the connection timeout"];
    fails(open(&[Uri::parse(&uri).unwrap()]), ErrorKind::Unreachable, &parts);
    peer.ends();
}

#[test]
fn a_broken_record_after_the_handshake_ends_the_connection() {
    use std::io::Write;
    let authority = Authority::new("test");
    let peer = serve(config(&authority.issue("127.0.0.1"), None), |mut broker| {
        broker.log_in_until(2);
        broker.socket().sock.write_all(b"\x17\x03\x03\0\x05wrong").unwrap();
        // The client may have ended the connection already.
        let _ = broker.socket().sock.shutdown(std::net::Shutdown::Write);
        let _ = std::io::copy(&mut broker.socket().sock, &mut std::io::sink());
    });
    // The request need not wait for the end of the login, and either may meet the record first.
    let outcome = connect(&peer, &[("cacertfile", &authority.cert)])
        .and_then(|connection| connection.consume("q", None));
    fails(outcome, ErrorKind::Configuration, &["log in to", "TLS handshake: "]);
    peer.ends();
}

/// After a while without a look at the socket, the program reads once before it waits.
#[test]
fn deliveries_that_have_left_the_kernel_end_a_wait() {
    const MESSAGES: u64 = 40;
    let authority = Authority::new("test");
    let (go_on, may_go_on) = mpsc::channel();
    let (sender, sent) = mpsc::channel();
    let peer = serve(config(&authority.issue("127.0.0.1"), None), move |mut broker| {
        broker.log_in();
        broker.answer(1, (60, 20), &short_string(b"tag"));
        may_go_on.recv().unwrap();
        (1..=MESSAGES).for_each(|tag| broker.deliver(tag, &[b'x'; 1000]));
        sender.send(()).unwrap();
        broker.wait_for_end();
    });
    let connection = connect(&peer, &[("cacertfile", &authority.cert)]).unwrap();
    let mut deliveries = connection.consume("q", None).unwrap();
    go_on.send(()).unwrap();
    sent.recv_timeout(PATIENCE).unwrap();
    thread::sleep(Duration::from_millis(100));
    let deadline = Instant::now() + PATIENCE / 2;
    let mut taken = 0;
    while taken < MESSAGES && Instant::now() < deadline {
        match deliveries.try_next().unwrap() {
            Some(delivery) => taken = delivery.tag,
            None => deliveries.wait(&[], Some(deadline)),
        }
    }
    assert_eq!(taken, MESSAGES);
    assert!(Instant::now() < deadline, "all are there from the beginning");
    drop(deliveries);
    peer.ends();
}
