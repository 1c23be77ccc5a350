//! The options that name a broker and an exchange, flattened into the command lines of both tools.

use std::env;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use amqp::retry::RetryFor;
use amqp::{ExchangeKind, Uri, check_length};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use logs_process::{Failure, Status};

use crate::password::{self, Brokers};

/// The heading of these options in the help.
pub const CONNECTION: &str = "Connection options";

const DEFAULT_URI: &str = "amqp://guest:guest@localhost:5672/%2f";

/// The broker, and how long to try to reach it.
#[derive(Args, Debug)]
#[command(next_help_heading = CONNECTION)]
pub struct ConnectionArgs {
    /// Broker ($AMQP_URL): amqp://user:password@host:port/vhost
    ///
    /// Without --uri and AMQP_URL, the broker is amqp://guest:guest@localhost:5672/%2f. For the nodes of a cluster,
    /// repeat the option or separate the URIs by spaces. amqps:// uses TLS, special characters are percent-encoded (the
    /// vhost "/" is %2f), and parameters such as ?heartbeat=5 may follow.
    #[arg(id = "uri", short, long, visible_alias = "url", value_name = "URI")]
    uris: Vec<String>,

    /// Read the password from the first line of FILE
    ///
    /// The file is read again at each attempt to connect, so a new password needs no restart. /dev/stdin is
    /// standard input, which emit-log --lines needs for its messages. Example: /etc/app/password
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,

    /// With amqps://, trust the authorities in FILE (PEM), not the system's
    ///
    /// FILE may hold the broker's own certificate, such as a self-signed one. Example: ca.pem
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    cacert: Option<PathBuf>,

    /// With amqps://, present the client certificate in FILE (PEM)
    #[arg(long, value_name = "FILE", requires = "key", hide_short_help = true)]
    cert: Option<PathBuf>,

    /// Private key of the client certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "cert", hide_short_help = true)]
    key: Option<PathBuf>,

    /// Keep trying this long if no broker can be reached: 30s, 5m, forever
    ///
    /// The default is one attempt at first (emit-log --lines: 60s); after a lost connection, 60s for emit-log and
    /// forever for receive-logs. emit-log waits as long, at least 5s, for a broker that confirms nothing. A
    /// login, permission or vhost that has worked before is retried as well.
    #[arg(long, value_name = "DURATION", value_parser = retry_for)]
    pub retry: Option<RetryFor>,
}

impl ConnectionArgs {
    /// The brokers to try.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] for a malformed URI, [`Status::Io`] when the password file cannot be
    /// read, [`Status::Config`] when that file holds no password. Of a URI, an error repeats only the names of unknown
    /// parameters, so that it never has the password.
    pub fn brokers(&self) -> Result<Brokers, Failure> {
        if self.names_password_by_dash() {
            let text = "--password-file -: write /dev/stdin for standard input";
            return Err(Failure::new(Status::Usage, text));
        }
        let password = self.password_file.as_deref().map(password::read).transpose()?;
        let (source, text) = match self.uris.is_empty() {
            false => ("--uri", self.uris.join(" ")),
            true => {
                let text = env::var_os("AMQP_URL").unwrap_or_default();
                ("AMQP_URL", text.to_string_lossy().into_owned())
            }
        };
        let hint = match text.contains("verify=verify_none") {
            true => " (--cacert does the same)",
            false => "",
        };
        let usage = |error| Failure::new(Status::Usage, format!("{source}: {error}{hint}"));
        if text.contains(",amqp://") || text.contains(",amqps://") {
            return Err(usage("several URIs are separated by spaces, not by commas".into()));
        }
        let uris: Result<Vec<_>, _> = text.split_whitespace().map(Uri::parse).collect();
        let mut uris = uris.map_err(usage)?;
        if uris.is_empty() {
            if !self.uris.is_empty() {
                return Err(usage("it is empty".into()));
            }
            uris.push(Uri::parse(DEFAULT_URI).map_err(usage)?);
        }
        for uri in &mut uris {
            if let Some(password) = &password {
                uri.password = password.clone();
            }
            self.set_certificates(uri)?;
        }
        Ok(Brokers { uris, password_file: self.password_file.clone() })
    }

    /// Whether the password file is standard input, so that standard input has no messages.
    pub fn password_is_stdin(&self) -> bool {
        if self.names_password_by_dash() {
            return true;
        }
        let id = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        let stdin = io::stdin().as_fd().try_clone_to_owned().map(File::from);
        let stdin = stdin.and_then(|file| file.metadata());
        let file = self.password_file.as_ref().map(|path| path.metadata());
        matches!((stdin, file), (Ok(stdin), Some(Ok(file))) if id(&stdin) == id(&file))
    }

    fn names_password_by_dash(&self) -> bool {
        self.password_file.as_ref().is_some_and(|path| path.as_os_str() == "-")
    }

    fn set_certificates(&self, uri: &mut Uri) -> Result<(), Failure> {
        let usage = |text: &str| Failure::new(Status::Usage, text);
        match &mut uri.tls {
            Some(tls) => {
                tls.ca = self.cacert.clone().or(tls.ca.take());
                tls.cert = self.cert.clone().or(tls.cert.take());
                tls.key = self.key.clone().or(tls.key.take());
                if tls.cert.is_some() != tls.key.is_some() {
                    return Err(usage(
                        "--uri or AMQP_URL: certfile and keyfile require each other",
                    ));
                }
            }
            None if self.cacert.is_some() || self.cert.is_some() => {
                return Err(usage("--cacert, --cert and --key require amqps://"));
            }
            None => {}
        }
        Ok(())
    }
}

/// The exchange of the publish/subscribe example.
pub const EXCHANGE: &str = "logs";

/// How an exchange is declared.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = CONNECTION)]
pub struct ExchangeArgs {
    /// Type of the exchange: fanout, direct or topic
    ///
    /// A fanout exchange sends each message to every receiver. A direct or topic exchange sends it to the
    /// receivers whose --bind matches its routing key.
    #[arg(id = "exchange_type", long = "exchange-type", value_name = "TYPE")]
    #[arg(default_value = "fanout", hide_short_help = true, hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(ExchangeKind::ALL.map(ExchangeKind::name)).map(exchange_kind))]
    pub(crate) kind: ExchangeKind,

    /// Declare the exchange durable, so that it survives a broker restart
    ///
    /// With --durable, emit-log also sends persistent messages. An existing exchange is used as it is.
    #[arg(long)]
    pub durable: bool,

    /// Use the exchange as it is and declare nothing
    ///
    /// The user then needs no configure permission.
    #[arg(long, conflicts_with = "durable", hide_short_help = true)]
    pub passive: bool,
}

fn exchange_kind(name: String) -> ExchangeKind {
    let kind = ExchangeKind::ALL.into_iter().find(|kind| kind.name() == name);
    kind.unwrap_or(ExchangeKind::Fanout)
}

/// Parses the name of an exchange.
///
/// # Errors
///
/// The fault of the name, as text.
pub fn exchange_name(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err(
            "the default exchange delivers only to the queue that the routing key names".into()
        );
    }
    if text.contains("://") {
        return Err("this is a URI, not a name; use --uri for the broker".into());
    }
    check_name(text)?;
    Ok(text.into())
}

/// Checks the name of an exchange, a queue or a stream. RabbitMQ removes CR and LF from the name in a declaration only,
/// so later requests would not find the declared object.
///
/// # Errors
///
/// The fault of the name, as text.
pub fn check_name(text: &str) -> Result<(), String> {
    if text.contains(['\r', '\n']) {
        return Err("the name has a line break, which the broker removes".into());
    }
    check_length(text, "name")
}

fn retry_for(text: &str) -> Result<RetryFor, String> {
    match text {
        "forever" => Ok(RetryFor::Ever),
        _ => humantime::parse_duration(text)
            .map(RetryFor::AtMost)
            .map_err(|error| format!("{error}; write it as 30s, 5m or forever")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        connection: ConnectionArgs,
    }

    fn uris(args: &[&str]) -> Result<Vec<Uri>, Failure> {
        Ok(Cli::parse_from(["test"].iter().chain(args)).connection.brokers()?.uris)
    }

    #[test]
    fn several_uris_keep_their_order() {
        let uris = uris(&["-u", "amqp://a amqp://b", "--url", "amqp://c"]).unwrap();
        let uris: Vec<_> = uris.iter().map(Uri::to_string).collect();
        assert_eq!(uris, ["a:5672", "b:5672", "c:5672"]);
    }

    #[test]
    fn certificates_require_tls() {
        let tls = |args: &[&str]| uris(args).map(|mut uris| uris.remove(0).tls);
        let given = ["-u", "amqps://h?cacertfile=a", "--cert", "c", "--key", "k"];
        let settings = tls(&given).unwrap().unwrap();
        assert_eq!(settings.ca, Some(PathBuf::from("a")), "the one in the URI");
        assert_eq!(settings.cert, Some(PathBuf::from("c")));
        let both = ["-u", "amqps://h?cacertfile=a", "--cacert", "b"];
        assert_eq!(tls(&both).unwrap().unwrap().ca, Some(PathBuf::from("b")));
        for (args, text) in [
            (
                &["-u", "amqp://h", "--cacert", "b"][..],
                "--cacert, --cert and --key require amqps://",
            ),
            (
                &["-u", "amqps://h?certfile=c"],
                "--uri or AMQP_URL: certfile and keyfile require each other",
            ),
            (&["-u", "nonsense"], "--uri: "),
            (&["-u", "amqp://u:p@a,amqp://b"], "--uri: several URIs are separated by spaces"),
            (&["-u", " "], "--uri: it is empty"),
        ] {
            let failure = uris(args).unwrap_err();
            assert_eq!(failure.status, Status::Usage);
            assert!(failure.to_string().starts_with(text), "{failure}");
        }
    }

    #[test]
    fn the_parser_checks_values() {
        assert_eq!(retry_for("forever"), Ok(RetryFor::Ever));
        assert_eq!(retry_for("90s"), Ok(RetryFor::AtMost(Duration::from_secs(90))));
        assert!(retry_for("long").unwrap_err().ends_with("write it as 30s, 5m or forever"));
        assert_eq!(exchange_name("logs"), Ok("logs".into()));
        for name in ["", &"x".repeat(256), "amqp://h", "a\nb", "a\r", "\n"] {
            assert!(exchange_name(name).is_err(), "{name}");
        }
    }
}
