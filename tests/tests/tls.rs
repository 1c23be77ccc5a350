//! `amqps://`: the certificates of brokers and clients.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;

use logs_tests::{
    Broker, SECRET, TempFile, Tool, binary, emit_log, free_port, receive_logs, wait_until,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};

/// A PEM file that exists until the tests end.
fn pem(name: &str, content: &str) -> PathBuf {
    let file = TempFile::with(name, content.as_bytes());
    let path = file.path().to_path_buf();
    std::mem::forget(file);
    path
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert: PathBuf,
}

/// A certificate and its key.
#[derive(Clone)]
struct Identity {
    cert: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = pem("ca.pem", &params.self_signed(&key).unwrap().pem());
        Authority { issuer: Issuer::new(params, key), cert }
    }

    fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "guest");
        change(&mut params);
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { cert: pem("cert.pem", &cert), key: pem("key.pem", &key.serialize_pem()) }
    }
}

fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| Authority::new("test"))
}

/// Starts a node with a TLS port, and returns both.
fn broker(options: &str) -> (Broker, u16) {
    broker_with_plugins(options, "")
}

fn broker_with_plugins(options: &str, plugins: &str) -> (Broker, u16) {
    let identity = authority().issue(&["localhost", "127.0.0.1"], |_| {});
    let port = free_port();
    let config = format!(
        "listeners.ssl.test = 127.0.0.1:{port}\nssl_options.cacertfile = {}\n\
         ssl_options.certfile = {}\nssl_options.keyfile = {}\n{options}",
        authority().cert.display(),
        identity.cert.display(),
        identity.key.display(),
    );
    let config = TempFile::with("rabbitmq.conf", config.as_bytes());
    let options = |tool: Tool| tool.arg("--config").arg(config.path()).args(["--plugins", plugins]);
    (Broker::start_by(options), port)
}

fn url(port: u16) -> String {
    format!("amqps://guest:guest@127.0.0.1:{port}/%2f?connection_timeout=5000")
}

fn trusting(tool: Tool, port: u16) -> Tool {
    tool.args(["-u", &url(port), "--cacert"]).arg(&authority().cert)
}

fn with(tool: Tool, identity: &Identity) -> Tool {
    tool.arg("--cert").arg(&identity.cert).arg("--key").arg(&identity.key)
}

/// The node opens its ports one after another, the TLS port last. RabbitMQ 4, unlike 3.10, answers on the first port
/// before the last one is open.
#[test]
fn a_started_node_listens_on_every_port() {
    let more = (0..50).map(|name| format!("listeners.tcp.{name} = 127.0.0.1:{}\n", free_port()));
    let (_broker, port) = broker(&more.collect::<String>());
    TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[test]
fn lines_arrive_byte_for_byte() {
    let (_broker, port) = broker("");
    let input: Vec<u8> =
        (1..=100_000).flat_map(|n| format!("line {n} \u{1f600}\n").into_bytes()).collect();
    for batch in [None, Some("--batch")] {
        let receiver = trusting(receive_logs().arg("-r"), port).start().ready();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let text = input.clone();
        let feeder = thread::spawn(move || writer.write_all(&text));
        let emitter = trusting(emit_log().arg("-l").args(batch), port).stdin(reader);
        emitter.run().success();
        feeder.join().unwrap().unwrap();
        wait_until("all lines are received", || receiver.stdout_so_far().len() >= input.len());
        assert!(receiver.stop().success().stdout == input, "other bytes");
    }
    let receiver = trusting(receive_logs().args(["-r", "-n", "1"]), port).start().ready();
    let large = TempFile::with("large", &vec![b'x'; 10_000_000]);
    let large_input = fs::File::open(large.path()).unwrap();
    trusting(emit_log().arg("-l"), port).stdin(large_input).run().success();
    assert_eq!(receiver.wait().success().stdout.len(), 10_000_001);
}

#[test]
fn system_authorities_are_trusted_and_the_name_can_be_set() {
    let (broker, port) = broker("");
    let system = |url: &str| {
        emit_log().env("SSL_CERT_FILE", &authority().cert).args(["-u", url, "hi"]).run()
    };
    system(&url(port)).success();
    let verbose = trusting(emit_log().args(["-v", "hi"]), port).run().success().stderr_text();
    assert!(verbose.contains(" TLSv1_3, TLS13_"), "{verbose}");
    system(&url(port).replace("127.0.0.1", "localhost")).success();
    let ca = authority().cert.display();
    let named = format!("{}&cacertfile={ca}&server_name_indication=localhost", url(port));
    emit_log().args(["-u", &named, "hi"]).run().success();
    let other = format!("{}&server_name_indication=elsewhere", url(port));
    system(&other).fails_with(78, &["another name"]);
    let unknown = emit_log().args(["-u", &url(port), "hi"]).run();
    unknown.fails_with(78, &["connect to 127.0.0.1:", "issuer is unknown", "--cacert"]);
    // TLS to the plain port, and plain AMQP to the TLS port.
    let without = url(port).replace("amqps:", "amqp:");
    let refused = emit_log().args(["-u", &without, "hi"]).run();
    // The connection may end before its alert is read.
    match refused.status.code() {
        Some(69) => refused.fails_with(69, &["closed without an answer", "amqps://"]),
        _ => refused.fails_with(76, &["a TLS server", "amqps://"]),
    };
    let plain = broker.url().replace("amqp:", "amqps:");
    let refused = emit_log().args(["-u", &plain, "hi"]).run();
    refused.fails_with(76, &["does not speak TLS"]);
}

#[test]
fn a_password_stays_in_the_session() {
    let (broker, port) = broker("");
    broker.ctl(["add_user", "user", SECRET]);
    broker.ctl(["set_permissions", "user", ".*", ".*", ".*"]);
    let filter = "trace,amiquip=trace,rustls=trace";
    for (password, status) in [(SECRET, 0), ("s3cr3t-p4ss-not", 77)] {
        let url = url(port).replace("guest:guest", &format!("user:{password}"));
        let emit = emit_log().env("RUST_LOG", filter).args(["-u", &url, "--cacert"]);
        emit.arg(&authority().cert).run().exits_with(status);
    }
}

#[test]
fn a_client_certificate_is_presented_to_the_broker() {
    let (_broker, port) =
        broker("ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n");
    let emit = || trusting(emit_log().arg("hi"), port);
    let good = authority().issue(&["client"], |_| {});
    with(emit(), &good).run().success();
    emit().run().fails_with(78, &["refuses it", "--cert"]);
    let wrong = Authority::new("nobody").issue(&["client"], |_| {});
    with(emit(), &wrong).run().fails_with(78, &["refuses it", "--cert"]);
    let mismatched = Identity { cert: good.cert.clone(), key: wrong.key };
    let parts = ["certificate \"", "and key \"", "do not belong together"];
    with(emit(), &mismatched).run().fails_with(78, &parts);
}

#[test]
fn a_certificate_replaces_a_password() {
    let (broker, port) = broker_with_plugins(
        "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
         auth_mechanisms.1 = EXTERNAL\nauth_mechanisms.2 = PLAIN\n\
         ssl_cert_login_from = common_name\n",
        "rabbitmq_auth_mechanism_ssl",
    );
    let url = format!("amqps://127.0.0.1:{port}?auth_mechanism=external");
    let trusting = |tool: Tool| tool.args(["-u", &url, "--cacert"]).arg(&authority().cert);
    let guest = authority().issue(&["client"], |_| {});
    let receiver = with(trusting(receive_logs()), &guest).start().ready();
    with(trusting(emit_log().arg("hi")), &guest).run().success();
    receiver.wait_for_stdout(b" [x] \"hi\"\n");
    assert!(broker.ctl(["list_connections", "auth_mechanism"]).contains("EXTERNAL"));
    receiver.stop().success();

    let stranger = authority().issue(&["client"], |params| {
        params.distinguished_name.push(DnType::CommonName, "stranger");
    });
    let ended = with(trusting(emit_log().arg("hi")), &stranger).run();
    ended.fails_with(77, &["log in to", "ACCESS_REFUSED"]);
    trusting(emit_log().arg("hi")).run().fails_with(78, &["refuses it", "--cert"]);
}

#[test]
fn a_broker_with_only_old_tls_is_rejected() {
    let (_broker, port) = broker("ssl_options.versions.1 = tlsv1.1\n");
    trusting(emit_log().arg("hi"), port)
        .run()
        .fails_with(78, &["TLS handshake", "neither TLS 1.2 nor 1.3"]);
}

/// Starts a TLS server with this certificate, and returns its port.
fn server(identity: &Identity) -> u16 {
    let chain = vec![CertificateDer::from_pem_file(&identity.cert).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
    let config = ServerConfig::builder().with_no_client_auth();
    let config = Arc::new(config.with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let mut session = ServerConnection::new(Arc::clone(&config)).unwrap();
            while session.complete_io(&mut socket).is_ok_and(|(read, _)| read > 0) {}
        }
    });
    port
}

#[test]
fn a_broker_with_a_wrong_certificate_is_rejected() {
    let expired = authority().issue(&["127.0.0.1"], |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let early = authority().issue(&["127.0.0.1"], |params| {
        params.not_before = date_time_ymd(2100, 1, 1);
        params.not_after = date_time_ymd(2101, 1, 1);
    });
    let other = authority().issue(&["localhost", "127.0.0.2"], |_| {});
    let forged = Authority::new("test").issue(&["127.0.0.1"], |_| {});
    let unknown = Authority::new("nobody").issue(&["127.0.0.1"], |_| {});
    let nameless = authority().issue(&[], |_| {});
    let for_clients = authority().issue(&["127.0.0.1"], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    for (identity, reason) in [
        (nameless, "it is for no name at all"),
        (for_clients, "it is not for servers"),
        (expired, "it has expired"),
        (early, "not valid yet"),
        (other, "it is for another name"),
        (forged, "its signature is wrong"),
        (unknown, "its issuer is unknown"),
    ] {
        let port = server(&identity);
        for tool in [emit_log().arg("hi"), receive_logs()] {
            trusting(tool, port).run().fails_with(78, &["certificate of the broker", reason]);
        }
    }
}

#[test]
fn a_self_signed_certificate_is_trusted_as_cacert() {
    type Change<'a> = &'a dyn Fn(&mut CertificateParams);
    let key = KeyPair::generate().unwrap();
    let self_signed = |name: &str, change: Change| {
        let mut params = CertificateParams::new(vec![name.into()]).unwrap();
        change(&mut params);
        let cert = params.self_signed(&key).unwrap().pem();
        Identity { cert: pem("self.pem", &cert), key: pem("key.pem", &key.serialize_pem()) }
    };
    // `openssl req -x509` creates such certificates by default.
    let authority: Change = &|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let emit = |server_has: &Identity, given: &Identity| {
        let url = url(server(server_has));
        emit_log().args(["-u", &url, "--cacert"]).arg(&given.cert).arg("hi").run()
    };
    let plain = self_signed("127.0.0.1", &|params| params.is_ca = IsCa::ExplicitNoCa);
    let own = self_signed("127.0.0.1", authority);
    let both = [&plain, &own].map(|identity| fs::read_to_string(&identity.cert).unwrap()).concat();
    let both = Identity { cert: pem("both.pem", &both), key: own.key.clone() };
    for (server_has, given) in [(&plain, &plain), (&own, &own), (&own, &both)] {
        // The server only speaks TLS, so the login fails after the handshake.
        emit(server_has, given).fails_with(69, &["log in to"]);
    }

    let again = self_signed("127.0.0.1", &|params| {
        authority(params);
        params.serial_number = Some(7.into());
    });
    let refused = emit(&own, &again);
    refused.fails_with(78, &["certificate of the broker: it is that of an authority", "--cacert"]);
    let other = self_signed("127.0.0.2", authority);
    emit(&other, &other).fails_with(78, &["certificate of the broker: it is for another name"]);
    for (years, reason) in [((2020, 2021), "it has expired"), ((2100, 2101), "not valid yet")] {
        let wrong = self_signed("127.0.0.1", &|params| {
            authority(params);
            params.not_before = date_time_ymd(years.0, 1, 1);
            params.not_after = date_time_ymd(years.1, 1, 1);
        });
        emit(&wrong, &wrong).fails_with(78, &["certificate of the broker", reason]);
    }
}

/// The memory is limited, because a reader without a limit would fill it.
#[test]
fn an_endless_certificate_or_key_file_is_rejected() {
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = url(listening.local_addr().unwrap().port());
    let good = authority().issue(&["client"], |_| {});
    let (cert, key) = (good.cert.to_str().unwrap(), good.key.to_str().unwrap());
    for options in [
        &["--cacert", "/dev/zero"][..],
        &["--cert", "/dev/zero", "--key", key],
        &["--cert", cert, "--key", "/dev/zero"],
    ] {
        let limited = Tool::new("bash").args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\""]);
        let emitter = limited.arg(binary("emit-log")).args(["-u", &url, "hi"]).args(options);
        emitter.run().fails_with(78, &["read \"/dev/zero\": larger than 16 MiB"]);
    }
}

#[test]
fn unusable_certificates_are_named() {
    let emit = |options: &[&str]| emit_log().args(["-u", "amqps://127.0.0.1:1"]).args(options);
    let garbage = pem("garbage.pem", &format!("password={SECRET}\n"));
    let garbage = garbage.to_str().unwrap();
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = url(listening.local_addr().unwrap().port());
    let there = |options: &[&str]| emit_log().args(["-u", &url, "hi"]).args(options).run();
    there(&["--cacert", garbage]).fails_with(78, &["garbage.pem", "none in PEM format"]);
    there(&["--cacert", "/nonexistent"]).fails_with(74, &["read \"/nonexistent\""]);
    let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let damaged = pem("damaged.pem", damaged);
    there(&["--cacert", damaged.to_str().unwrap()]).fails_with(78, &["damaged.pem", "is damaged"]);
    let good = authority().cert.to_str().unwrap();
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let encrypted = pem("encrypted.pem", encrypted);
    let encrypted = ["--cert", good, "--key", encrypted.to_str().unwrap()];
    there(&encrypted).fails_with(78, &["private key", "encrypted.pem", "it is encrypted"]);
    there(&["--cert", good, "--key", garbage]).fails_with(78, &["private key", "garbage.pem"]);
    emit(&["--cert", good]).run().exits_with(2);
    emit_log().args(["-u", "amqp://127.0.0.1:1", "--cacert", good]).run().fails_with(2, &["amqps"]);
    let half = format!("{url}&certfile={good}");
    emit_log().args(["-u", &half]).run().fails_with(2, &["certfile and keyfile"]);
    let plain = format!("amqp://127.0.0.1:1/?cacertfile={good}");
    emit_log().args(["-u", &plain]).run().fails_with(2, &["amqps"]);
}
