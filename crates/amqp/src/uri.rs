//! AMQP URIs, as the [RabbitMQ URI specification](https://www.rabbitmq.com/docs/uri-spec) and
//! its [query parameters](https://www.rabbitmq.com/docs/uri-query-parameters) have them.

use std::fmt::{self, Display};
use std::time::Duration;

use fluent_uri::Uri as Rfc3986;
use fluent_uri::component::Host;
use fluent_uri::pct_enc::encoder::Query;
use fluent_uri::pct_enc::{EStr, Encoder};

use crate::frame::SMALLEST_FRAME_MAX;
use crate::secret::Secret;
use crate::tls::TlsSettings;

const DEFAULT_PORT: u16 = 5672;
const DEFAULT_TLS_PORT: u16 = 5671;
const DEFAULT_HEARTBEAT: u16 = 10;
const DEFAULT_CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The parameters of a URI, as in messages.
const PARAMETERS: &str = "heartbeat, connection_timeout, auth_mechanism, channel_max, frame_max, cacertfile, \
                          certfile, keyfile, verify, server_name_indication";

/// Where a broker is, and how to log in there.
#[derive(Clone, Debug)]
pub struct Uri {
    /// Host name or IP address, without brackets.
    pub(crate) host: String,
    /// TCP port.
    pub(crate) port: u16,
    /// For `amqps`.
    pub tls: Option<TlsSettings>,
    /// User name, for PLAIN.
    pub(crate) user: String,
    /// Password, for PLAIN.
    pub password: Secret,
    /// SASL mechanism.
    pub(crate) mechanism: Mechanism,
    /// Virtual host.
    pub(crate) vhost: String,
    /// Seconds between heartbeats; 0 for none.
    pub(crate) heartbeat: u16,
    /// For everything up to the opened connection.
    pub(crate) connection_timeout: Duration,
    /// The most channels to agree on with the broker; 0 for as many as the broker allows.
    pub(crate) channel_max: u16,
    /// The largest frame to agree on with the broker, in bytes; 0 for as large as both allow.
    pub(crate) frame_max: u32,
}

/// How to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    /// User and password.
    Plain,
    /// Facts that the broker knows of the connection, such as a client certificate.
    External,
}

/// Host and port, as in messages.
impl Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Uri {
    /// The virtual host.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Parses a URI.
    ///
    /// # Errors
    ///
    /// The fault, without a quote of any part of the URI that could be a password. Every unknown parameter is named.
    pub fn parse(text: &str) -> Result<Uri, String> {
        if text.starts_with(['"', '\'']) || text.ends_with('"') {
            return Err("the quotes around it are a part of the value: leave them out".into());
        }
        if !text.contains("://") {
            return Err("not a URI, as amqp://host:5672 is, or amqps://host with TLS".into());
        }
        let parsed = Rfc3986::parse(text).map_err(|_| {
            "not a URI of the form amqp://host or amqp://user:password@host:port/vhost (characters \
             other than letters, digits and -._~ must be percent-encoded in user, password and vhost; in a \
             crontab, write % as \\%)"
        })?;
        let no_scheme = "the URI must begin with amqp:// or amqps://, as amqp://host:5672 does";
        let (tls, default_port) = match parsed.scheme().as_str().to_ascii_lowercase().as_str() {
            "amqp" => (None, DEFAULT_PORT),
            "amqps" => (Some(TlsSettings::default()), DEFAULT_TLS_PORT),
            _ => return Err(no_scheme.into()),
        };
        let authority = parsed.authority().ok_or(no_scheme)?;
        let path = parsed.path().as_str();
        let query = parsed.query().map_or("", |query| query.as_str());
        // A '/', '?' or '#' in a password ends the authority early: the rest of the password then
        // stands in for a path or a query, and must neither be used nor shown.
        if parsed.has_fragment() || path.contains('@') || query.contains('@') {
            return Err("'/', '?', '#' and '@' must be percent-encoded in user, password and \
                        vhost (%2f, %3f, %23 and %40)"
                .into());
        }

        let mut uri = Uri {
            host: match authority.host_parsed() {
                Host::Ipv4(address) => address.to_string(),
                Host::Ipv6(address) => address.to_string(),
                Host::RegName(name) if name.is_empty() => "localhost".into(),
                Host::RegName(name) => decode(name, "host")?,
                _ => return Err("the host is neither a name nor an IP address".into()),
            },
            port: authority
                .port_to_u16()
                .map_err(|_| "the port must be a number up to 65535")?
                .unwrap_or(default_port),
            tls,
            user: "guest".into(),
            password: Secret::new("guest"),
            mechanism: Mechanism::Plain,
            vhost: match parsed.path().segments_if_absolute() {
                None => "/".into(),
                Some(mut segments) => {
                    let vhost =
                        segments.next().map_or(Ok(String::new()), |s| decode(s, "vhost"))?;
                    if segments.next().is_some() {
                        return Err("a '/' in the vhost must be written %2f".into());
                    }
                    vhost
                }
            },
            heartbeat: DEFAULT_HEARTBEAT,
            connection_timeout: DEFAULT_CONNECTION_TIMEOUT,
            channel_max: 0,
            frame_max: 0,
        };
        if let Some(userinfo) = authority.userinfo() {
            let (user, password) = match userinfo.split_once(':') {
                Some((user, password)) => (user, Some(password)),
                None => (userinfo, None),
            };
            uri.user = decode(user, "user")?;
            if let Some(password) = password {
                uri.password = Secret::new(decode(password, "password")?);
            }
        }
        let mut unknown = Vec::new();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            if !uri.set(parameter)? {
                unknown.push(name_of(parameter));
            }
        }
        if !unknown.is_empty() {
            let names = unknown.join(", ");
            return Err(format!("unknown after '?': {names} (known: {PARAMETERS})"));
        }
        check_length(&uri.vhost, "vhost")?;
        Ok(uri)
    }

    /// Takes one query parameter, `name=value`. Returns whether the name is known.
    fn set(&mut self, parameter: &str) -> Result<bool, String> {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "heartbeat" => {
                self.heartbeat = value
                    .parse()
                    .map_err(|_| "heartbeat must be a number of seconds up to 65535")?;
            }
            "connection_timeout" => {
                self.connection_timeout = match value.parse() {
                    Ok(milliseconds) if milliseconds > 0 => Duration::from_millis(milliseconds),
                    _ => return Err("connection_timeout must be a number of milliseconds".into()),
                };
            }
            "auth_mechanism" => {
                self.mechanism = match value.to_ascii_lowercase().as_str() {
                    "plain" => Mechanism::Plain,
                    "external" => Mechanism::External,
                    _ => return Err("auth_mechanism must be plain or external".into()),
                };
            }
            "cacertfile" => self.tls()?.ca = Some(decode_value(value)?.into()),
            "certfile" => self.tls()?.cert = Some(decode_value(value)?.into()),
            "keyfile" => self.tls()?.key = Some(decode_value(value)?.into()),
            "server_name_indication" if value == "disable" => {
                return Err(
                    "server_name_indication=disable: the name in the broker's certificate \
                            is always checked; server_name_indication=NAME names another than \
                            the host"
                        .into(),
                );
            }
            "server_name_indication" => self.tls()?.server_name = Some(decode_value(value)?),
            "verify" => {
                self.tls()?;
                match value {
                    "verify_peer" => {}
                    "verify_none" => {
                        return Err("verify=verify_none: the broker's certificate is always \
                                    checked; cacertfile names the authority to trust, or the \
                                    certificate itself if it is self-signed"
                            .into());
                    }
                    _ => return Err("verify must be verify_peer".into()),
                }
            }
            "channel_max" => {
                self.channel_max =
                    value.parse().map_err(|_| "channel_max must be a number up to 65535")?;
            }
            "frame_max" => {
                self.frame_max = match value.parse() {
                    Ok(bytes @ (0 | SMALLEST_FRAME_MAX..)) => bytes,
                    _ => return Err("frame_max must be 0 or a number of bytes from 4096".into()),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn tls(&mut self) -> Result<&mut TlsSettings, String> {
        self.tls.as_mut().ok_or_else(|| "certificates go with amqps:// only".into())
    }
}

/// The name of an unknown parameter, unless that could be a part of a password that was not percent-encoded.
fn name_of(parameter: &str) -> &str {
    let is_name_char = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '-');
    match parameter.split_once('=') {
        Some((name, _)) if !name.is_empty() && name.chars().all(is_name_char) => name,
        _ => "a parameter that is not NAME=VALUE",
    }
}

fn decode_value(value: &str) -> Result<String, String> {
    let value = EStr::<Query>::new(value).ok_or("a parameter is not percent-encoded")?;
    decode(value, "parameter")
}

fn decode<E: Encoder>(part: &EStr<E>, what: &str) -> Result<String, String> {
    let bytes = part.decode().to_bytes().into_owned();
    String::from_utf8(bytes).map_err(|_| format!("the {what} is not UTF-8"))
}

/// Checks that `text` fits an AMQP short string, which holds at most 255 bytes.
pub fn check_length(text: &str, what: &str) -> Result<(), String> {
    if text.len() > 255 {
        return Err(format!("the {what} is longer than 255 bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// host, port, user, password, vhost
    fn parts(text: &str) -> (String, u16, String, String, String) {
        let uri = Uri::parse(text).unwrap();
        let password = uri.password.expose().to_string();
        (uri.host, uri.port, uri.user, password, uri.vhost)
    }

    /// Appendix A of the specification, with this project's defaults where a part is missing.
    #[test]
    fn the_examples_of_the_specification() {
        for (text, host, port, user, password, vhost) in [
            ("amqp://user:pass@host:10000/vhost", "host", 10000, "user", "pass", "vhost"),
            (
                "amqp://user%61:%61pass@ho%61st:10000/v%2fhost",
                "hoast",
                10000,
                "usera",
                "apass",
                "v/host",
            ),
            ("amqp://", "localhost", 5672, "guest", "guest", "/"),
            ("amqp://:@/", "localhost", 5672, "", "", ""),
            ("amqp://user@", "localhost", 5672, "user", "guest", "/"),
            ("amqp://user:pass@", "localhost", 5672, "user", "pass", "/"),
            ("amqp://host", "host", 5672, "guest", "guest", "/"),
            ("amqp://:10000", "localhost", 10000, "guest", "guest", "/"),
            ("amqp:///vhost", "localhost", 5672, "guest", "guest", "vhost"),
            ("amqp://host/", "host", 5672, "guest", "guest", ""),
            ("amqp://host/%2f", "host", 5672, "guest", "guest", "/"),
            ("amqp://[::1]", "::1", 5672, "guest", "guest", "/"),
        ] {
            let expected = (host.into(), port, user.into(), password.into(), vhost.into());
            assert_eq!(parts(text), expected, "{text}");
        }
    }

    #[test]
    fn parameters() {
        let uri =
            Uri::parse("amqp://h?heartbeat=5&connection_timeout=2500&auth_mechanism=EXTERNAL")
                .unwrap();
        assert_eq!(uri.heartbeat, 5);
        assert_eq!(uri.connection_timeout, Duration::from_millis(2500));
        assert_eq!(uri.mechanism, Mechanism::External);
    }

    #[test]
    fn certificates_go_with_tls() {
        let uri = "amqps://h/?cacertfile=%2fca%20s.pem&certfile=c&keyfile=k&\
                   server_name_indication=other";
        let uri = Uri::parse(uri).unwrap();
        assert_eq!(uri.port, 5671);
        let tls = uri.tls.unwrap();
        let path = |name: &str| Some(name.into());
        assert_eq!((tls.ca, tls.cert, tls.key), (path("/ca s.pem"), path("c"), path("k")));
        assert_eq!(tls.server_name.as_deref(), Some("other"));
        assert!(Uri::parse("amqp://h").unwrap().tls.is_none());
        assert_eq!(Uri::parse("amqps://h:1").unwrap().port, 1);
    }

    #[test]
    fn limits_to_agree_on_with_the_broker() {
        let uri = |query: &str| Uri::parse(&format!("amqp://h?{query}"));
        let limits = |query| uri(query).map(|uri| (uri.channel_max, uri.frame_max));
        assert_eq!(limits(""), Ok((0, 0)));
        assert_eq!(limits("channel_max=2047&frame_max=131072"), Ok((2047, 131_072)));
        assert_eq!(limits("channel_max=0&frame_max=0"), Ok((0, 0)));
        for query in ["channel_max=", "channel_max=65536", "frame_max=4095", "frame_max=x"] {
            let name = query.split('=').next().unwrap();
            assert!(uri(query).unwrap_err().starts_with(&format!("{name} must be ")), "{query}");
        }
    }

    #[test]
    fn each_unknown_parameter_is_named_without_its_value() {
        let query = "retries=s3cr3t&heartbeat=5&ssl_options=s3cr3t&s3cr3t&s3cr3t=1&=s3cr3t";
        let error = Uri::parse(&format!("amqp://h?{query}")).unwrap_err();
        let other = "a parameter that is not NAME=VALUE";
        let names = format!("unknown after '?': retries, ssl_options, {other}, {other}, {other} (");
        assert!(error.starts_with(&names), "{error}");
        assert!(error.ends_with("server_name_indication)") && !error.contains("s3cr3t"), "{error}");
    }

    #[test]
    fn the_check_of_a_certificate_cannot_be_skipped() {
        assert!(Uri::parse("amqps://h?verify=verify_peer").is_ok());
        for (query, reason) in [
            ("verify=verify_none", "always checked; cacertfile names"),
            ("server_name_indication=disable", "always checked; server_name_indication=NAME"),
            ("verify=no", "must be verify_peer"),
        ] {
            let error = Uri::parse(&format!("amqps://h?{query}")).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let error = Uri::parse("amqp://h?verify=verify_peer").unwrap_err();
        assert!(error.contains("amqps:// only"), "{error}");
    }

    #[test]
    fn nothing_of_a_wrong_uri_is_repeated() {
        for text in [
            "amqp://u:s3cr3t^@h",
            "amqp://u:s3c/r3t@h",
            "amqp://u:12/s3cr3t@h",
            "amqp://u:12?s3cr3t@h",
            "amqp://u:12?s3cr3t",
            "amqp://u:12#s3cr3t@h",
            "amqp://u:s3cr3t@h:99999",
            "amqp://u:s3cr3t@h/a/b",
            "amqp://u:s3cr3t@h?heartbeat=s3cr3t",
            "amqp://u:%ffs3cr3t@h",
            "u:s3cr3t@h",
            "s3cr3t",
            "http://u:s3cr3t@h",
            "amqps://u:s3cr3t@h/?keyfile=%ff",
            "amqps://u:s3cr3t@h/?keyfile=s3cr3t&x",
            "amqp://u:s3cr3t@h/?keyfile=s3cr3t",
            "",
        ] {
            let error = Uri::parse(text).unwrap_err();
            assert!(!error.contains("s3c") && !error.contains("r3t"), "{text}: {error}");
        }
    }

    #[test]
    fn a_secret_is_not_printed() {
        let uri = Uri::parse("amqp://u:s3cr3t@h:1/v").unwrap();
        assert!(!format!("{uri:?} {uri}").contains("s3cr3t"));
        assert_eq!(uri.to_string(), "h:1");
        assert_eq!(Uri::parse("amqp://[::1]:1").unwrap().to_string(), "[::1]:1");
    }
}
