//! The command line of `emit-log`.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use amqp::{ExchangeKind, Properties, Table, Value, check_length};
use bytesize::ByteSize;
use clap::{ArgGroup, Parser};
use logs_common::cli::{CONNECTION, EXCHANGE, exchange_name};
use logs_common::wire::HOST;
use logs_common::{ConnectionArgs, ExchangeArgs, ExchangeConfig};
use logs_process::args::Tips;
use logs_process::time::duration;
use logs_process::verbosity::Verbosity;
use logs_process::{Failure, Status};
use regex::bytes::Regex;
use rustix::system::uname;

use crate::batch::Batch;
use crate::cutter::Cutter;
use crate::join::Join;
use crate::keys::Keys;
use crate::spool::WhenFull;

const PERSISTENT: u8 = 2;

/// Limit for the headers of a message, in bytes. All its properties share one frame, of 128 KiB by default.
const MAX_HEADERS: usize = 64 * 1024;

/// Limit for --linger with --spool. A lingering line is only in memory, which the guarantees allow for 100 ms.
const LONGEST_LINGER: Duration = Duration::from_millis(50);

const FOLLOW: &str = "Options to follow files";
const SPOOL: &str = "Spool options";
const PROPERTIES: &str = "Message properties";

/// Publish log messages to every running receive-logs, through RabbitMQ
///
/// The words are joined by spaces into one message. With --lines, each line of standard input is a message.
/// Exit status 0 means that the broker has confirmed every message.
///
/// Without words, or with a single "-", the message is "info: Hello World!". If standard input has data in
/// this case, --lines is missing, and emit-log exits with status 2. With words, emit-log ignores standard
/// input.
#[derive(Debug, Parser)]
#[command(version, override_usage = USAGE, after_help = EXAMPLES, max_term_width = 100)]
#[command(group = ArgGroup::new("records").args(["lines", "follow"]))]
pub struct Cli {
    /// Message; its bytes are published unchanged
    #[arg(value_name = "MESSAGE")]
    words: Vec<OsString>,

    /// Publish each line of standard input as soon as it is complete
    #[arg(short, long)]
    pub lines: bool,

    /// Records end in NUL instead of newline
    #[arg(short = '0', long, requires = "records")]
    null: bool,

    /// Pack lines into shared messages of up to 64 KiB
    ///
    /// Lines that are read together share a message. While an earlier message is unconfirmed, a line waits up
    /// to 5ms for others. receive-logs splits the messages into lines again.
    #[arg(long, requires = "records")]
    batch: bool,

    /// With --batch, let each line wait this long for others: 20ms
    ///
    /// Larger batches cost every receiver less. The line waits even if no earlier message is unconfirmed;
    /// with --spool, it waits at most 50ms. With 0s, lines do not wait.
    #[arg(long, value_name = "DURATION", requires = "batch")]
    #[arg(value_parser = humantime::parse_duration, hide_short_help = true)]
    linger: Option<Duration>,

    /// Skip empty lines
    #[arg(long, requires = "records", hide_short_help = true)]
    pub skip_empty: bool,

    /// Limit for a record: 500KB, 16MiB
    ///
    /// A larger record ends emit-log with status 65. With --join, it is split between two lines.
    #[arg(long, value_name = "SIZE", requires = "records", default_value = "16MiB")]
    #[arg(value_parser = record_size, hide_short_help = true)]
    pub max_record: ByteSize,

    /// Join the lines of a stack trace with their message into one record
    ///
    /// A record begins with a line that neither begins with white space nor continues a stack trace of Java,
    /// Python, Go, Rust, Node or C#. With --join=REGEX, it begins with a line that matches.
    #[arg(long, value_name = "REGEX", num_args = 0..=1, require_equals = true, requires = "records")]
    #[arg(default_missing_value = "", conflicts_with = "null")]
    join: Option<String>,

    /// With --join, how long a record waits for its next line
    #[arg(long, value_name = "DURATION", requires = "join", default_value = "500ms")]
    #[arg(value_parser = duration, hide_short_help = true)]
    join_timeout: Duration,

    /// Publish each line of files as they grow, across rotations and restarts
    ///
    /// emit-log remembers in a position file up to which line the broker has confirmed, and continues from
    /// there. A file without a position is followed from its end; a file that appears later, from its
    /// beginning. Example: /var/log/app.log
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = FOLLOW)]
    #[arg(conflicts_with_all = ["spool", "no_confirm", "words"])]
    pub follow: Vec<PathBuf>,

    /// Keep the positions in the followed files in FILE
    ///
    /// By default, the file is in $STATE_DIRECTORY or ~/.local/state/emit-log, and is named after the first
    /// followed file. Example: /var/lib/emit-log/position
    #[arg(long, value_name = "FILE", requires = "follow", help_heading = FOLLOW)]
    pub position: Option<PathBuf>,

    /// Begin files that have no position at their beginning
    #[arg(long, requires = "follow", help_heading = FOLLOW)]
    pub from_start: bool,

    /// Stop at the end of the files
    ///
    /// Files that have no position are read from their beginning.
    #[arg(long, requires = "follow", help_heading = FOLLOW)]
    pub no_follow: bool,

    /// Send a line that has no end yet after this time without growth: 5s
    ///
    /// By default, such a line waits until it is complete, or the file is rotated away.
    #[arg(long, value_name = "DURATION", requires = "follow", help_heading = FOLLOW)]
    #[arg(value_parser = duration, hide_short_help = true)]
    idle: Option<Duration>,

    /// Exit with status 67 if a message is not routed to any queue
    ///
    /// A stream counts as a queue, even if no receiver reads it. With --follow, emit-log sends the message again
    /// until it is routed, within --retry.
    #[arg(short, long)]
    pub mandatory: bool,

    /// Do not wait for the broker's confirms
    ///
    /// A lost connection is then an error.
    #[arg(long)]
    pub no_confirm: bool,

    /// Keep unconfirmed lines on disk in DIR; do not block the producer
    ///
    /// emit-log writes to DIR each line that the broker does not confirm within 100 ms, and sends the lines of
    /// an earlier run first. --retry counts from the end of the input; then, unconfirmed lines stay in DIR.
    /// Example: /var/spool/app-logs
    #[arg(long, value_name = "DIR", requires = "lines", conflicts_with = "no_confirm")]
    #[arg(help_heading = SPOOL)]
    pub spool: Option<PathBuf>,

    /// Limit for the size of the spool: 64MiB, 10GiB
    #[arg(long, value_name = "SIZE", requires = "spool", default_value = "1GiB")]
    #[arg(value_parser = spool_size, hide_short_help = true, help_heading = SPOOL)]
    pub spool_size: ByteSize,

    /// What to do when the spool is full
    #[arg(long, value_enum, value_name = "POLICY", requires = "spool", default_value = "block")]
    #[arg(hide_short_help = true, help_heading = SPOOL)]
    pub when_full: WhenFull,

    /// Set the routing key, for a direct or topic exchange: kern.critical
    ///
    /// {severity} and {tag} are replaced: -k '{tag}.{severity}' with --tag app gives app.error, or app.none for
    /// a message without a severity. With --follow, {file} is the name of the file without its extension. With
    /// --batch, a message has the lines of one key.
    #[arg(short = 'k', long, value_name = "KEY", help_heading = PROPERTIES)]
    routing_key: Option<String>,

    /// Add a header, as "Name: value"; repeatable
    #[arg(short = 'H', long = "header", value_name = "HEADER", value_parser = header)]
    #[arg(help_heading = PROPERTIES)]
    headers: Vec<(String, String)>,

    /// Set the property content_type: text/plain
    #[arg(long, value_name = "TYPE", value_parser = short_string, help_heading = PROPERTIES)]
    content_type: Option<String>,

    /// Set the property app_id: backup
    #[arg(long, value_name = "ID", value_parser = short_string, help_heading = PROPERTIES)]
    app_id: Option<String>,

    /// Name the sender: sets app_id, and the header Host to this machine
    ///
    /// -H "Host: NAME" sets another host. Example: backup
    #[arg(short, long, value_name = "NAME", value_parser = short_string, conflicts_with = "app_id")]
    #[arg(help_heading = PROPERTIES)]
    pub tag: Option<String>,

    #[command(flatten)]
    pub verbosity: Verbosity,

    /// Exchange
    #[arg(short, long, value_name = "NAME", default_value = EXCHANGE, value_parser = exchange_name)]
    #[arg(help_heading = CONNECTION)]
    exchange: String,

    #[command(flatten)]
    declaration: ExchangeArgs,

    #[command(flatten)]
    pub connection: ConnectionArgs,
}

const USAGE: &str = "\
emit-log [OPTIONS] [MESSAGE]...
       emit-log [OPTIONS] --lines < FILE
       emit-log [OPTIONS] --follow FILE...";

const EXAMPLES: &str = "\
Examples:
  emit-log \"warning: disk is 91 % full\"
  app 2>&1 | emit-log --lines
  app 2>&1 | emit-log --lines --spool /var/spool/app-logs
  emit-log --follow /var/log/app.log --join --tag app
  emit-log -m \"error: disk is full\" || page-admin
  emit-log -u amqp://app:secret@broker.example.com/logs info: started

Exit status: 0 all confirmed; 2 wrong usage; 65 too large; 67 not routed to any
queue (-m); 69 no broker (with --spool: records are left in DIR, or were dropped);
74 input or output error; 76 not AMQP; 77 login or permission; 78 configuration;
1 any other error.";

impl Tips for Cli {
    const TIPS: &[(&[&str], &str)] = &[
        (
            &["-f", "--file", "-F", "--tail"],
            "--follow FILE publishes each line of a file as it grows, --lines < FILE each line that is there",
        ),
        (&["--stdin", "-i"], "--lines publishes each line of standard input"),
        (
            &["--severity", "--level", "--priority", "--topic"],
            "write the severity into the message, and route by it: -k '{severity}' \"error: disk is full\"",
        ),
        (
            &["--lines"],
            "--lines reads the messages from standard input: echo \"info: hi\" | emit-log --lines",
        ),
        (&["--json"], "any text is a message; --content-type application/json declares its type"),
    ];
}

impl Cli {
    /// The words of the message. A single `-` means standard input to users of other tools, so it is not a word.
    pub fn words(&self) -> &[OsString] {
        match self.words.as_slice() {
            [word] if word == "-" => &[],
            words => words,
        }
    }

    /// Whether the messages are records of an input, not words.
    pub fn has_records(&self) -> bool {
        self.lines || !self.follow.is_empty()
    }

    /// Whether to print a note if the message reaches no queue: for a user at a terminal.
    pub fn notes_unroutable(&self) -> bool {
        !self.has_records() && io::stderr().is_terminal() && !self.verbosity.quiet
    }

    /// How the records of files, or of joined lines, are cut.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] for an invalid regular expression.
    pub fn cutter(&self) -> Result<Cutter, Failure> {
        let usage = |error: regex::Error| Failure::new(Status::Usage, format!("--join: {error}"));
        let join = match self.join.as_deref() {
            None => None,
            Some("") => Some(Join::Traces),
            Some(pattern) => Some(Join::At(Regex::new(pattern).map_err(usage)?)),
        };
        Ok(Cutter {
            separator: self.separator(),
            join,
            join_timeout: self.join_timeout,
            batch: self.batch(),
            idle: self.idle,
            max_record: self.max_record.as_u64() as usize,
            skip_empty: self.skip_empty,
        })
    }

    /// How lines are packed into messages.
    pub fn batch(&self) -> Batch {
        match self.linger {
            _ if !self.batch => Batch::Off,
            None => Batch::WhileUnconfirmed,
            Some(linger) if self.spool.is_some() => Batch::Within(linger.min(LONGEST_LINGER)),
            Some(linger) => Batch::Within(linger),
        }
    }

    /// The byte that ends a record of standard input.
    pub fn separator(&self) -> u8 {
        if self.null { b'\0' } else { b'\n' }
    }

    /// The exchange to publish to.
    pub fn exchange(&self) -> ExchangeConfig {
        self.declaration.of(&self.exchange)
    }

    /// The routing keys of the records of a file, or of other messages.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] for a key that is invalid, or missing for this type of exchange.
    pub fn keys(&self, file: Option<&Path>) -> Result<Keys, Failure> {
        let usage = |text: String| Failure::new(Status::Usage, text);
        let kind = self.exchange().kind();
        let template = match (kind, &self.routing_key) {
            (ExchangeKind::Fanout, None) => "",
            (_, None) if self.declaration.passive => "",
            (_, None) => {
                let kind = kind.name();
                return Err(usage(format!(
                    "a {kind} exchange requires --routing-key: -k app.error"
                )));
            }
            (_, Some(key)) => key,
        };
        let stem = file.and_then(Path::file_stem).map(OsStr::to_string_lossy);
        Keys::new(template, self.tag.as_deref(), stem.as_deref())
            .map_err(|error| usage(format!("--routing-key: {error}")))
    }

    /// A warning about a routing key that has no effect.
    pub fn key_warning(&self) -> Option<String> {
        let exchange = self.exchange();
        let is_ignored = exchange.kind() == ExchangeKind::Fanout && exchange.is_declared();
        let name = &self.exchange;
        (is_ignored && self.routing_key.is_some()).then(|| {
            format!(
                "exchange '{name}' has type fanout, which ignores routing keys (--exchange-type)"
            )
        })
    }

    /// The properties of each message.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] when the headers are too large for a frame.
    pub fn properties(&self) -> Result<Properties, Failure> {
        let length = |(name, value): &(String, String)| name.len() + value.len();
        if self.headers.iter().map(length).sum::<usize>() > MAX_HEADERS {
            let text = "--header: more than 64 KiB of headers";
            return Err(Failure::new(Status::Usage, text));
        }
        let mut properties = Properties::default();
        if self.declaration.durable {
            properties = properties.with_delivery_mode(PERSISTENT);
        }
        if let Some(content_type) = &self.content_type {
            properties = properties.with_content_type(content_type.clone());
        }
        if let Some(app_id) = self.app_id.as_ref().or(self.tag.as_ref()) {
            properties = properties.with_app_id(app_id.clone());
        }
        let mut table = Table::new();
        if self.tag.is_some() {
            let host = uname().nodename().to_string_lossy().into_owned();
            table.insert(HOST.into(), Value::LongString(host));
        }
        for (name, value) in &self.headers {
            table.insert(name.clone(), Value::LongString(value.clone()));
        }
        if !table.is_empty() {
            properties = properties.with_headers(table);
        }
        Ok(properties)
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write it as \"Name: value\"")?;
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    check_length(name, "name")?;
    Ok((name.into(), value.trim_start().into()))
}

fn record_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size > ByteSize::gib(1) => Err("larger than any broker accepts".into()),
        Ok(size) if size > ByteSize::b(0) => Ok(size),
        _ => Err("write it as 500KB, 16MiB or 1GiB".into()),
    }
}

fn spool_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size >= ByteSize::mib(1) => Ok(size),
        Ok(_) => Err("smaller than 1MiB".into()),
        Err(_) => Err("write it as 64MiB or 1GiB".into()),
    }
}

fn short_string(text: &str) -> Result<String, String> {
    check_length(text, "value")?;
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_header_is_a_name_and_a_value() {
        assert_eq!(header("Host: web1:80"), Ok(("Host".into(), "web1:80".into())));
        assert_eq!(header("Empty:"), Ok(("Empty".into(), "".into())));
        assert!(header("no colon").is_err());
        assert!(header(": no name").is_err());
        assert!(header(&format!("{}: long", "n".repeat(256))).is_err());
    }

    fn properties(args: &[&str]) -> Result<Properties, Failure> {
        Cli::parse_from([&["emit-log"], args].concat()).properties()
    }

    #[test]
    fn options_set_the_properties() {
        let none = properties(&[]).unwrap();
        assert_eq!((none.delivery_mode(), none.headers()), (&None, &None));
        let args = ["--durable", "--content-type", "text/plain", "--app-id", "backup"];
        let headers = ["-H", "Host: web1", "-H", "Zone:"];
        let all = properties(&[&args[..], &headers].concat()).unwrap();
        assert_eq!(*all.delivery_mode(), Some(PERSISTENT));
        assert_eq!(all.content_type().as_deref(), Some("text/plain"));
        assert_eq!(all.app_id().as_deref(), Some("backup"));
        let headers = all.headers().as_ref().unwrap();
        assert_eq!(headers.get("Host"), Some(&Value::LongString("web1".into())));
        assert_eq!(headers.get("Zone"), Some(&Value::LongString(String::new())));
    }

    #[test]
    fn a_tag_sets_the_app_id_and_the_host() {
        let tagged = properties(&["--tag", "backup"]).unwrap();
        assert_eq!(tagged.app_id().as_deref(), Some("backup"));
        let host = uname().nodename().to_string_lossy().into_owned();
        assert_eq!(tagged.headers().as_ref().unwrap().get(HOST), Some(&Value::LongString(host)));
        let tagged = properties(&["-H", "Host: web1", "-t", "backup"]).unwrap();
        let host = Value::LongString("web1".into());
        assert_eq!(tagged.headers().as_ref().unwrap().get(HOST), Some(&host));
        assert!(Cli::try_parse_from(["emit-log", "--tag", "a", "--app-id", "b"]).is_err());
    }

    #[test]
    fn a_single_dash_is_not_a_word() {
        let words =
            |args: &[&str]| Cli::parse_from([&["emit-log"], args].concat()).words().to_vec();
        assert!(words(&[]).is_empty() && words(&["-"]).is_empty());
        assert_eq!(words(&["-", "-"]), ["-", "-"]);
        assert_eq!(words(&[""]), [""]);
    }

    #[test]
    fn headers_must_fit_into_a_frame() {
        let half = format!("H: {}", "x".repeat(MAX_HEADERS / 2 - 1));
        assert!(properties(&["-H", &half, "-H", &half]).is_ok());
        let failure = properties(&["-H", &half, "-H", &half, "-H", "A:"]).unwrap_err();
        assert_eq!(failure.status, Status::Usage);
    }

    #[test]
    fn short_strings_and_sizes_have_limits() {
        assert!(short_string(&"x".repeat(255)).is_ok());
        assert!(short_string(&"x".repeat(256)).is_err());
        assert_eq!(record_size("1KB"), Ok(ByteSize::kb(1)));
        for text in ["0", "much", "2GiB", ""] {
            assert!(record_size(text).is_err(), "{text}");
        }
    }
}
