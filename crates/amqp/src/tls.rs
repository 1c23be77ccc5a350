//! TLS on a socket.

mod verifier;

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, OtherError,
    PeerIncompatible, RootCertStore,
};
use rustls_platform_verifier::BuilderVerifierExt;

use crate::error::{Error, ErrorKind as Kind};
use crate::within::Within;
use verifier::Verifier;

/// Encrypted bytes per read; rustls by itself reads 4 KiB.
const READ_BUFFER: usize = 64 * 1024;

/// The largest file of certificates, in bytes. The limit is for files without an end; the authorities of a system take
/// less than 1 MiB.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// How the broker and this client identify themselves.
#[derive(Clone, Debug, Default)]
pub struct TlsSettings {
    /// Authorities to trust, or the certificate of the broker itself, in PEM; by default the system's authorities.
    pub ca: Option<PathBuf>,
    /// Certificate of the client with the chain to its authority, in PEM.
    pub cert: Option<PathBuf>,
    /// Private key of that certificate, in PEM.
    pub key: Option<PathBuf>,
    /// The name that the certificate of the broker must be for; by default the host.
    pub server_name: Option<String>,
}

/// Opens a TLS session on a non-blocking socket by the `deadline`, with a broker of this name.
///
/// # Errors
///
/// [`Kind::Untrusted`], [`Kind::ClientCertificate`] or [`Kind::Configuration`] for a certificate, [`Kind::File`] for a file that cannot
/// be read, [`Kind::Protocol`] where no TLS is spoken, [`Kind::Unreachable`] when the time is up, [`Kind::Unavailable`] for a
/// lost connection.
pub fn handshake(
    settings: &TlsSettings,
    host: &str,
    socket: TcpStream,
    deadline: Instant,
) -> Result<TlsStream, Error> {
    let name = settings.server_name.as_deref().unwrap_or(host);
    let server_name = ServerName::try_from(name.to_string())
        .map_err(|_| config(format!("TLS: '{name}' is no name that a certificate can be for")))?;
    let config = Arc::new(client_config(settings)?);
    let mut session = ClientConnection::new(config, server_name).map_err(|e| failure(&e))?;
    let mut within = Within::new(&socket, deadline);
    while session.is_handshaking() {
        session.complete_io(&mut within).map_err(|error| match error.kind() {
            ErrorKind::TimedOut => {
                Error::unreachable("TLS handshake: no answer within the connection timeout")
            }
            _ => failure_of(&error)
                .unwrap_or_else(|| Error::unavailable(format!("TLS handshake: {error}"))),
        })?;
    }
    Ok(TlsStream::new(session, socket))
}

fn client_config(settings: &TlsSettings) -> Result<ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| failure(&error))?;
    let builder = match &settings.ca {
        Some(path) => {
            let named = |reason| config(format!("CA certificate {path:?}: {reason}"));
            let trusted = certificates(path)?;
            let mut roots = RootCertStore::empty();
            for certificate in &trusted {
                roots.add(certificate.clone()).map_err(|error| named(explain(&error)))?;
            }
            let verifier = Verifier::new(trusted, roots, provider)
                .map_err(|error| named(error.to_string()))?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        None => builder.with_platform_verifier().map_err(|error| {
            let reason = explain(&error);
            let text = format!("authorities of the system: {reason} (install ca-certificates)");
            Error::new(Kind::Untrusted, text)
        })?,
    };
    match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert)?;
            let private = private_key(key)?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                config(format!("certificate {cert:?} and key {key:?}: {}", explain(&error)))
            })
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let text = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => {
            Err(config(format!("certificate {path:?}: there is none in PEM format")))
        }
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(config(format!("certificate {path:?}: {}", describe(&error)))),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let text = read(path)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        let reason = match text.windows(9).any(|word| word == b"ENCRYPTED") {
            true => "it is encrypted; openssl pkey -in FILE -out OTHER decrypts it",
            false => describe(&error),
        };
        config(format!("private key {path:?}: {reason}"))
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    let opened = File::open(path);
    let read = opened.and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text));
    match read {
        Ok(length) if length as u64 > MAX_FILE => {
            Err(config(format!("read {path:?}: larger than 16 MiB")))
        }
        Ok(_) => Ok(text),
        Err(error) => Err(Error::new(Kind::File, format!("read {path:?}: {error}"))),
    }
}

fn describe(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::NoItemsFound => "there is none in PEM format",
        // The text of the error may quote the file.
        _ => "not in PEM format",
    }
}

fn config(text: String) -> Error {
    Error::new(Kind::Configuration, text)
}

/// The error of TLS inside an I/O error, if any.
pub fn failure_of(error: &io::Error) -> Option<Error> {
    error.get_ref()?.downcast_ref().map(failure)
}

/// The error for the user.
fn failure(error: &rustls::Error) -> Error {
    use rustls::Error as E;
    match error {
        E::InvalidMessage(_) => Error::new(
            Kind::Protocol,
            "TLS handshake: the peer does not speak TLS (for a port without TLS, use amqp://)",
        ),
        E::InvalidCertificate(_) => {
            Error::new(kind_of(error), format!("certificate of the broker: {}", explain(error)))
        }
        _ => Error::new(kind_of(error), format!("TLS handshake: {}", explain(error))),
    }
}

fn kind_of(error: &rustls::Error) -> Kind {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => Kind::Untrusted,
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(error)))
            if error.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity) =>
        {
            Kind::Untrusted
        }
        rustls::Error::AlertReceived(alert) if refuses_client(*alert) => Kind::ClientCertificate,
        _ => Kind::Configuration,
    }
}

/// Whether a broker that requires a client certificate refuses another, or none, like this.
fn refuses_client(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::CertificateRequired
            | A::BadCertificate
            | A::UnknownCA
            | A::CertificateUnknown
            | A::CertificateExpired
            | A::HandshakeFailure
    )
}

/// The reason in words. rustls itself prints many errors as their names in its source code.
fn explain(error: &rustls::Error) -> String {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(reason) => explain_certificate(reason),
        E::InconsistentKeys(_) => "they do not belong together".into(),
        E::AlertReceived(alert) if refuses_client(*alert) => {
            format!("the broker refuses it ({alert:?}); it may require another client certificate")
        }
        E::AlertReceived(AlertDescription::ProtocolVersion)
        | E::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13) => {
            "the broker offers neither TLS 1.2 nor 1.3".into()
        }
        // Erlang 27 sends this if its old versions of TLS share no cipher suite with this client.
        E::AlertReceived(AlertDescription::InsufficientSecurity) => {
            "the broker offers neither TLS 1.2 nor 1.3, or none of the cipher suites".into()
        }
        E::General(text) => text.clone(),
        _ => error.to_string(),
    }
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError as C;
    let text = match reason {
        C::BadEncoding => "it is damaged",
        C::Expired | C::ExpiredContext { .. } => "it has expired",
        C::NotValidYet | C::NotValidYetContext { .. } => {
            "it is not valid yet (is the clock of this machine right?)"
        }
        C::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            "it is for no name at all (it needs a subjectAltName; a common name does not count)"
        }
        C::NotValidForName | C::NotValidForNameContext { .. } => {
            return format!(
                "it is for another name: {reason} (?server_name_indication=NAME in the URI)"
            );
        }
        C::UnknownIssuer => "its issuer is unknown",
        C::BadSignature => "its signature is wrong, or its key too short (RSA: 2048 bits at least)",
        C::UnsupportedSignatureAlgorithmContext { .. }
        | C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "it is signed in a way that is not supported, such as with SHA-1 (SHA-256 is)"
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "it is not for servers (its extended key usage must have serverAuth)"
        }
        C::Other(OtherError(error)) => match error.downcast_ref() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                "it is that of an authority, which should sign one for the broker"
            }
            Some(webpki::Error::EndEntityUsedAsCa) => {
                "the one that it is signed with is not that of an authority (basicConstraints \
                 CA:TRUE)"
            }
            Some(webpki::Error::UnsupportedCertVersion) => {
                "it is of X.509 version 1, as openssl makes them without extensions (give it a \
                 subjectAltName, which makes it version 3)"
            }
            Some(webpki::Error::UnsupportedCriticalExtension) => {
                "it has a critical extension that is not supported"
            }
            _ => return error.to_string(),
        },
        _ => return reason.to_string(),
    };
    text.into()
}

/// A TLS session on a non-blocking socket.
pub struct TlsStream {
    session: ClientConnection,
    /// The socket below.
    pub socket: TcpStream,
    /// Bytes from the socket, of which `taken` are decrypted.
    received: Vec<u8>,
    taken: usize,
    /// Bytes that are encrypted already, and whose writer got `WouldBlock`.
    pending: usize,
}

impl TlsStream {
    /// After the handshake.
    fn new(session: ClientConnection, socket: TcpStream) -> TlsStream {
        let received = Vec::with_capacity(READ_BUFFER);
        TlsStream { session, socket, received, taken: 0, pending: 0 }
    }

    /// The version of TLS and the cipher suite.
    pub fn describe(&self) -> String {
        let version = self.session.protocol_version().map(|version| format!("{version:?}"));
        let suite =
            self.session.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
        [version, suite].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// Whether a read may return bytes although the socket has none.
    pub fn has_more(&self) -> bool {
        self.taken < self.received.len() || !self.session.wants_read()
    }

    /// Reads from the socket, if need be, and decrypts. Returns 0 at the end of the stream.
    fn receive(&mut self) -> io::Result<usize> {
        if self.taken == self.received.len() {
            self.received.resize(READ_BUFFER, 0);
            let read = self.socket.read(&mut self.received);
            self.received.truncate(*read.as_ref().unwrap_or(&0));
            self.taken = 0;
            read?;
        }
        let taken = self.session.read_tls(&mut &self.received[self.taken..])?;
        self.taken += taken;
        let processed = self.session.process_new_packets();
        // An alert, or the answer to a new key, which may wait.
        let _ = self.send();
        processed.map_err(io::Error::other)?;
        Ok(taken)
    }

    /// Sends what is encrypted.
    fn send(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(out) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // The peer has left without close_notify, which TCP does not know either.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            self.receive()?;
        }
    }
}

impl Write for TlsStream {
    /// Takes bytes only once the kernel has them, so that a writer without more to write need not come
    /// again. If the kernel takes only a part of the encrypted bytes, the writer has to come again with the
    /// same bytes, as to any non-blocking stream; then only the rest is sent.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send()?;
        if self.pending == 0 {
            self.pending = self.session.writer().write(bytes)?;
            self.send()?;
        }
        Ok(std::mem::take(&mut self.pending))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors that a test could not bring about without other tools.
    #[test]
    fn an_error_is_explained_in_words() {
        use CertificateError as C;
        use rustls::Error as E;
        let webpki = |error: webpki::Error| C::Other(OtherError(Arc::new(error)));
        let no_name = || C::NotValidForNameContext {
            expected: ServerName::try_from("broker").unwrap(),
            presented: vec![],
        };
        let sha1 = C::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: vec![],
            supported_algorithms: vec![],
        };
        for (reason, words) in [
            (webpki(webpki::Error::CaUsedAsEndEntity), "that of an authority"),
            (webpki(webpki::Error::EndEntityUsedAsCa), "not that of an authority"),
            (webpki(webpki::Error::UnsupportedCertVersion), "version 1"),
            (webpki(webpki::Error::UnsupportedCriticalExtension), "a critical extension"),
            (webpki(webpki::Error::BadDer), "BadDer"),
            (sha1, "SHA-1"),
            (no_name(), "no name at all"),
            (C::BadEncoding, "damaged"),
            (C::Expired, "expired"),
            (C::NotValidYet, "is the clock of this machine right"),
            (C::BadSignature, "its signature is wrong"),
            (C::InvalidPurpose, "serverAuth"),
            (C::Revoked, "Revoked"),
        ] {
            let error = failure(&E::InvalidCertificate(reason));
            let kind = match words {
                "that of an authority" => Kind::Untrusted,
                _ => Kind::Configuration,
            };
            assert_eq!(error.kind(), kind, "{words}");
            let text = error.to_string();
            assert!(text.starts_with("certificate of the broker: "), "{text}");
            assert!(text.contains(words), "{words:?} is not in {text:?}");
        }
        for (error, words) in [
            (E::AlertReceived(AlertDescription::ProtocolVersion), "neither TLS 1.2 nor 1.3"),
            (E::AlertReceived(AlertDescription::InsufficientSecurity), "neither TLS 1.2 nor 1.3"),
            (E::AlertReceived(AlertDescription::UnknownCA), "another client certificate"),
            (E::AlertReceived(AlertDescription::InternalError), "InternalError"),
            (E::General("words of a verifier".into()), "words of a verifier"),
        ] {
            let text = failure(&error).to_string();
            assert!(text.starts_with("TLS handshake: "), "{text}");
            assert!(text.contains(words), "{words:?} is not in {text:?}");
        }
    }
}
