//! The command line of `receive-logs`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use amqp::check_length;
use amqp::retry::RetryFor;
use bytesize::ByteSize;
use clap::{Args, ColorChoice, Parser, ValueEnum};
use logs_common::cli::{CONNECTION, EXCHANGE, check_name, exchange_name};
use logs_common::{ConnectionArgs, ExchangeArgs, ExchangeConfig};
use logs_process::args::{Tips, WORD};
use logs_process::exit::{Failure, Status};
use logs_process::time::duration;
use logs_process::verbosity::Verbosity;
use logs_severity::Severity;
use regex::bytes::Regex;

/// Write every log message broadcast through RabbitMQ to standard output or a file
///
/// Every running receive-logs gets every message that is sent after it prints "Waiting for logs" to stderr.
/// After a lost connection, it subscribes again and reports what it has missed. At SIGINT (CTRL+C) or
/// SIGTERM, it writes the messages that it has received, and exits.
#[derive(Debug, Parser)]
#[command(version, override_usage = "receive-logs [OPTIONS]", after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    format: Format,

    /// Short for --format raw
    #[arg(short, long, conflicts_with = "format")]
    raw: bool,

    /// Begin text and raw records with the time of arrival; -t=sent: of sending
    ///
    /// Times are in UTC, as in RFC 3339. The time of sending is the header timestamp_in_ms, which emit-log --tag
    /// sets, else the property timestamp, which has no milliseconds. A message with neither has "-".
    #[arg(short, long, value_enum, value_name = "TIME", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "arrival", hide_possible_values = true)]
    pub timestamp: Option<RecordTime>,

    /// Print the time of --timestamp in the local time zone, or in that of TZ
    #[arg(long, requires = "timestamp")]
    pub local_time: bool,

    /// Begin text and raw records with the sender: app_id, else header Host
    ///
    /// emit-log --tag sets both; JSON has both without this option. A message with neither has "-". A name of
    /// more than 64 characters is cut and ends in "...".
    #[arg(long)]
    pub prefix: bool,

    /// End raw records with NUL instead of a newline
    #[arg(short = '0', long)]
    pub null: bool,

    /// Append to FILE instead of stdout; SIGHUP reopens FILE
    ///
    /// logrotate sends SIGHUP after it has renamed FILE. "-" is stdout. Example: /var/log/rabbit/all.log
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Colour the severity and matches of --grep, and show messages in colour
    ///
    /// The severity is the first word, or stands after a time or a tag, in brackets, or as the value of
    /// "level". A message that has colours of its own keeps them. With --color never, a terminal shows no
    /// colours.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,

    /// How much to print on stderr
    #[command(flatten)]
    pub verbosity: Verbosity,

    /// Stop after N records
    ///
    /// A message of emit-log --batch counts as the records in it. Example: 100
    #[arg(short = 'n', long, value_name = "N", value_parser = number, help_heading = ENDING)]
    pub count: Option<u64>,

    /// Stop when no message arrives for this long: 500ms, 30s, 5m
    ///
    /// If no broker can be reached at the start, this also limits --retry.
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = ENDING)]
    pub idle_timeout: Option<Duration>,

    /// Stop this long after "Waiting for logs": 500ms, 30s, 5m
    ///
    /// If no broker can be reached at the start, this also limits --retry.
    #[arg(long = "timeout", value_name = "DURATION", value_parser = duration, help_heading = ENDING)]
    pub total_timeout: Option<Duration>,

    /// Create FILE with the process id when messages are received
    ///
    /// The file exists from the moment when the queue is bound and consumed until receive-logs exits.
    /// Example: /run/receive-logs.ready
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub ready_file: Option<PathBuf>,

    /// Receive only messages whose routing key matches: '*.error'; repeatable
    ///
    /// In the pattern of a topic exchange, * is one word between dots and # any number of words; the default
    /// is '#'. For a direct exchange, PATTERN is the whole key. A named queue or a stream keeps the bindings of
    /// earlier runs; to remove one: rabbitmqadmin delete binding
    #[arg(short, long = "bind", value_name = "PATTERN", value_parser = pattern, help_heading = SELECTION)]
    pub(crate) bind: Vec<String>,

    #[command(flatten)]
    pub(crate) filter: FilterArgs,

    #[command(flatten)]
    pub(crate) queue: QueueArgs,

    #[command(flatten)]
    pub(crate) stream: StreamArgs,

    /// Exchange; repeatable, to receive from several exchanges
    #[arg(short, long = "exchange", value_name = "NAME", default_value = EXCHANGE)]
    #[arg(value_parser = exchange_name, help_heading = CONNECTION)]
    exchanges: Vec<String>,

    #[command(flatten)]
    pub(crate) declaration: ExchangeArgs,

    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

/// Which of the received records are written.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = SELECTION)]
pub struct FilterArgs {
    /// Write only records that match: 'timeout|refused'; repeatable
    ///
    /// A regular expression of Rust's regex crate; (?i) at its start ignores case. If the option is repeated,
    /// one must match. Records that are not selected are received and acknowledged, even from a named queue.
    #[arg(long, value_name = "REGEX", value_parser = regex)]
    pub grep: Vec<Regex>,

    /// Do not write records that match: '/health'; repeatable
    #[arg(long, value_name = "REGEX", value_parser = regex)]
    pub exclude: Vec<Regex>,

    /// Write only records of this severity or a worse one: warning
    ///
    /// From trace, debug, info, notice, warning and error to critical. A record without a severity is not
    /// written.
    #[arg(long, value_name = "LEVEL", value_parser = level)]
    pub level: Option<Severity>,

    /// Write only messages of this sender: app_id or header Host; repeatable
    ///
    /// emit-log --tag sets both. Example: backup
    #[arg(long, value_name = "TAG")]
    pub from: Vec<String>,
}

/// The queue, and its limits.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Queue options")]
pub struct QueueArgs {
    /// Use a durable queue, which remains when receive-logs exits
    ///
    /// Messages wait in it while no receiver runs, and several receivers share them. Use --durable here and
    /// in emit-log: a restart of the broker deletes an exchange that is not durable, with the binding of the
    /// queue. To delete the queue: rabbitmqctl delete_queue NAME
    #[arg(id = "queue", long = "queue", value_name = "NAME", value_parser = queue_name)]
    pub name: Option<String>,

    /// Type of a queue that does not exist yet
    #[arg(id = "queue_type", long = "queue-type", value_name = "TYPE", requires = "queue")]
    #[arg(value_enum, default_value_t = QueueType::Quorum, hide_short_help = true)]
    pub kind: QueueType,

    /// Limit the messages that wait in the broker: 500KB, 10MB, 1GiB
    ///
    /// The broker drops the oldest messages when more than SIZE wait for this receiver.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_backlog: Option<ByteSize>,
}

/// The stream, where reading begins in it, and where it ends.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Stream options")]
pub struct StreamArgs {
    /// Read from a stream: a log on the broker that keeps messages
    ///
    /// Any number of receivers read it, each from its own position; a missing stream is created. Use
    /// --durable here and in emit-log: a restart of the broker deletes an exchange that is not durable, with
    /// the binding of the stream. Requires RabbitMQ 3.9 or later; to delete the stream:
    /// rabbitmqctl delete_queue NAME
    #[arg(id = "stream", long = "stream", value_name = "NAME", value_parser = queue_name)]
    #[arg(conflicts_with_all = ["queue", "max_backlog"])]
    pub name: Option<String>,

    /// Begin at a time (2026-01-31T09:30:00Z) or this long ago (10m)
    ///
    /// Exact to the second for messages of emit-log; messages without the property timestamp may be a few
    /// seconds older. Without --since, --tail, --from-start and --resume, receive-logs begins with the next
    /// message.
    #[arg(long, value_name = "AGO|TIME", requires = "stream", value_parser = since)]
    #[arg(group = "start", allow_hyphen_values = true)]
    pub since: Option<u64>,

    /// Begin with the last N records
    ///
    /// A message of emit-log --batch counts as the records in it. Example: 100
    #[arg(long, value_name = "N", requires = "stream", group = "start")]
    #[arg(value_parser = number)]
    pub tail: Option<u64>,

    /// Begin with the oldest message
    #[arg(long, requires = "stream", group = "start")]
    pub from_start: bool,

    /// Stop at the message that is the last one at the start
    #[arg(long, requires = "stream")]
    pub no_follow: bool,

    /// Keep the stream position in FILE, and continue from it the next time
    ///
    /// The first time, --since, --tail or --from-start set the position. With --output, the file gets each
    /// message exactly once, even after a kill; no other program may write to it. Remove FILE when you delete
    /// the stream, because a new stream can be mistaken for the deleted one.
    #[arg(long, value_name = "FILE", requires = "stream")]
    pub resume: Option<PathBuf>,

    /// Limit a new stream: 24h, 7d, 500MB, 10GiB [default: 24h and 1GiB]
    ///
    /// Repeat the option to limit both age and size. An existing stream keeps its limits. The broker removes the oldest messages in segments of a tenth of
    /// the size, or of 50 MB without a size.
    #[arg(long, value_name = "LIMIT", requires = "stream", value_parser = keep)]
    pub keep: Vec<Keep>,
}

/// A limit of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The age of the oldest message.
    Age(Duration),
    /// The size of all messages together.
    Size(ByteSize),
}

/// Where the broker keeps the messages of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QueueType {
    /// Replicated over the nodes of a cluster
    Quorum,
    /// On one node
    Classic,
}

/// A time at the start of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecordTime {
    /// When the record is written
    Arrival,
    /// When the message was sent
    Sent,
}

/// The output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `[x] "info: hi"`, one line per record; invisible characters are escaped
    Text,
    /// The exact bytes and a newline; escaped only on a terminal
    Raw,
    /// One object per record, with all properties of its message
    Json,
}

const ENDING: &str = "When to stop";
const SELECTION: &str = "Selection options";

const EXAMPLES: &str = "\
Examples:
  receive-logs > logs_from_rabbit.log
  receive-logs --raw | grep --line-buffered error
  receive-logs -n 1 --timeout 5s || echo \"no message\"
  receive-logs -o /var/log/rabbit/all.log --queue archive --durable
  receive-logs --stream logs-history --since 10m
  receive-logs --stream logs-history --tail 100 --no-follow

Exit status: 0 stopped as requested; 2 wrong usage; 69 no broker (--retry);
74 output error; 75 time limit before --count; 76 not AMQP; 77 login or permission;
78 configuration; 1 any other error.";

impl Tips for Cli {
    const TIPS: &[(&[&str], &str)] = &[
        (&["--json", "-j"], "--format json writes JSON"),
        (&["--no-color", "--no-colour"], "colours are off with --color never"),
        (
            &["--follow", "-F"],
            "receive-logs waits for new messages by default; --count or --no-follow ends it",
        ),
        (
            &["--severity", "--priority", "--filter", "--include", "-g", WORD],
            "--grep REGEX and --level LEVEL select records, and --bind PATTERN selects routing keys",
        ),
        (&["--topic", "--routing-key", "-k"], "--bind PATTERN selects the routing keys to receive"),
        (
            &["--stream <NAME>"],
            "only a stream keeps earlier messages: --stream NAME creates or reads one",
        ),
        (
            &["--lines"],
            "--count N stops after N records; --stream NAME --tail N begins with the last N",
        ),
    ];
}

impl Cli {
    /// The format of `--format` or `--raw`.
    pub fn format(&self) -> Format {
        if self.raw { Format::Raw } else { self.format }
    }

    /// The file to write to; `None` is standard output.
    pub fn output(&self) -> Option<&Path> {
        self.output.as_deref().filter(|path| path.as_os_str() != "-")
    }

    /// The exchanges to receive from, each once.
    pub(crate) fn exchanges(&self) -> Vec<ExchangeConfig> {
        let mut names: Vec<_> = self.exchanges.iter().collect();
        names.sort();
        names.dedup();
        names.into_iter().map(|name| self.declaration.of(name)).collect()
    }

    /// How long to retry the first connection. The time limits begin after it, so they limit the retry as well.
    pub(crate) fn first_retry(&self) -> Option<RetryFor> {
        let limits = [self.idle_timeout, self.total_timeout].into_iter().flatten();
        let shortest = limits.map(RetryFor::AtMost).min().unwrap_or(RetryFor::Ever);
        self.connection.retry.map(|retry| retry.min(shortest))
    }

    /// Whether the broker delivers a message that is not written as a whole again, to this or another receiver.
    pub fn keeps_messages(&self) -> bool {
        self.queue.name.is_some() || self.stream.resume.is_some()
    }

    /// A warning about an output file that has the name of a format.
    pub(crate) fn format_warning(&self) -> Option<String> {
        let path = self.output()?;
        let format = Format::from_str(path.to_str()?, true).ok()?.to_possible_value()?;
        let format = format.get_name();
        let is_meant = self.format() == Format::Text;
        is_meant
            .then(|| format!("-o names the file to write to, {path:?}; the format is -f {format}"))
    }

    /// Checks the rules that clap cannot express.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] for options that exclude or require each other.
    pub fn check(&self) -> Result<(), Failure> {
        if self.null && self.format() != Format::Raw {
            return Err(Failure::new(Status::Usage, "--null requires --raw"));
        }
        let StreamArgs { since, tail, from_start, no_follow, resume, .. } = &self.stream;
        let begins = since.is_some() || tail.is_some() || *from_start || resume.is_some();
        if *no_follow && !begins {
            let text = "--no-follow requires --since, --tail, --from-start or --resume: without them, there \
                        is nothing to read";
            return Err(Failure::new(Status::Usage, text));
        }
        Ok(())
    }
}

fn pattern(text: &str) -> Result<String, String> {
    check_length(text, "pattern")?;
    Ok(text.into())
}

fn regex(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| error.to_string())
}

fn level(text: &str) -> Result<Severity, String> {
    Severity::parse(text)
        .ok_or_else(|| "write it as trace, debug, info, notice, warning, error or critical".into())
}

/// Parses a number of at least 1.
fn number(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(number @ 1..) => Ok(number),
        _ => Err("must be a number, at least 1".into()),
    }
}

fn queue_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with("amq.") {
        return Err("must not be empty or begin with \"amq.\", which the broker reserves".into());
    }
    check_name(text)?;
    Ok(text.into())
}

/// Parses a time, or a duration before now. Returns seconds since 1970.
fn since(text: &str) -> Result<u64, String> {
    let now = SystemTime::now();
    let time = match humantime::parse_duration(text) {
        Ok(ago) => now.checked_sub(ago),
        Err(_) => Some(time(text)?),
    };
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok();
    match time {
        Some(time) if time > now => Err("the time is in the future".into()),
        Some(time) => Ok(seconds(time).map_or(0, |passed| passed.as_secs())),
        None => Ok(0),
    }
}

/// Parses a time of RFC 3339, in UTC or with an offset.
fn time(text: &str) -> Result<SystemTime, String> {
    let error = || "write it as 10m, 2h30m or 2026-01-31T09:30:00Z".to_string();
    if let Ok(time) = humantime::parse_rfc3339(text) {
        return Ok(time);
    }
    // `2026-01-31T09:30:00+01:00`
    let (local, offset) = text.split_at_checked(text.len().wrapping_sub(6)).ok_or_else(error)?;
    let local = humantime::parse_rfc3339(&format!("{local}Z")).map_err(|_| error())?;
    let number = |range| offset.get(range).and_then(|digits: &str| digits.parse::<u8>().ok());
    let (Some(hours @ ..24), Some(":"), Some(minutes @ ..60)) =
        (number(1..3), offset.get(3..4), number(4..6))
    else {
        return Err(error());
    };
    let difference = Duration::from_secs(60 * (60 * u64::from(hours) + u64::from(minutes)));
    let utc = match &offset[..1] {
        "+" => local.checked_sub(difference),
        "-" => local.checked_add(difference),
        _ => None,
    };
    utc.ok_or_else(error)
}

fn keep(text: &str) -> Result<Keep, String> {
    if let Ok(age) = humantime::parse_duration(text) {
        return match age.as_secs() {
            0 => Err("must be at least 1s".into()),
            _ => Ok(Keep::Age(age)),
        };
    }
    match size(text) {
        Ok(size) => Ok(Keep::Size(size)),
        Err(_) => Err("write it as 24h, 7d, 500MB or 10GiB".into()),
    }
}

fn size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size > ByteSize::b(0) => Ok(size),
        _ => Err("write it as 500KB, 10MB or 1GiB".into()),
    }
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
    fn null_requires_raw() {
        for (options, is_right) in [
            (&["--null", "--raw"][..], true),
            (&["--null", "--format", "raw"], true),
            (&["--null"], false),
            (&["--null", "--format", "json"], false),
        ] {
            let cli = Cli::parse_from([&["receive-logs"], options].concat());
            assert_eq!(cli.check().is_ok(), is_right, "{options:?}");
        }
    }

    #[test]
    fn an_output_named_like_a_format_gives_a_warning() {
        let format_warning = |options: &[&str]| {
            Cli::parse_from([&["receive-logs"], options].concat()).format_warning()
        };
        let text = "-o names the file to write to, \"JSON\"; the format is -f json";
        assert_eq!(format_warning(&["-o", "JSON"]), Some(text.into()));
        for options in
            [&[][..], &["-o", "a.json"], &["-o", "json", "-f", "json"], &["-o", "raw", "-r"]]
        {
            assert_eq!(format_warning(options), None, "{options:?}");
        }
    }

    #[test]
    fn a_dash_is_standard_output() {
        let cli = |options: &[&str]| Cli::parse_from([&["receive-logs"], options].concat());
        assert_eq!(cli(&["-o", "-"]).output(), None);
        assert_eq!(cli(&["-o", "./-"]).output(), Some(Path::new("./-")));
    }

    #[test]
    fn time_limits_limit_the_first_connection() {
        let retry =
            |options: &[&str]| Cli::parse_from([&["receive-logs"], options].concat()).first_retry();
        let seconds = |seconds| Some(RetryFor::AtMost(Duration::from_secs(seconds)));
        assert_eq!(retry(&["--timeout", "5s"]), None);
        assert_eq!(retry(&["--retry", "forever"]), Some(RetryFor::Ever));
        assert_eq!(
            retry(&["--retry", "forever", "--timeout", "5s", "--idle-timeout", "3s"]),
            seconds(3)
        );
        assert_eq!(retry(&["--retry", "2s", "--timeout", "5s"]), seconds(2));
    }

    #[test]
    fn invalid_values_are_rejected() {
        for options in [
            &["--queue", ""][..],
            &["--queue", "amq.mine"],
            &["--queue", &"q".repeat(256)],
            &["--max-backlog", "0"],
            &["--max-backlog", "much"],
            &["--count", "0"],
            &["--idle-timeout", "0s"],
            &["--queue-type", "classic"],
            &["--since", "10m"],
            &["--stream", "s", "--queue", "q"],
            &["--stream", "s", "--tail", "0"],
            &["--stream", "s", "--tail", "5", "--from-start"],
            &["--stream", "s", "--since", "yesterday"],
            &["--stream", "s", "--since", "2999-01-01T00:00:00Z"],
            &["--stream", "s", "--since", "2026-01-31T09:30:00+25:00"],
            &["--stream", "s", "--since", "2026-01-31 09:30:00"],
            &["--stream", "s", "--since", "+01:00"],
            &["--stream", "s", "--since", "é01:00"],
            &["--stream", "s", "--since", "-10m"],
            &["--stream", "s", "--keep", "0s"],
            &["--stream", "s", "--keep", "long"],
        ] {
            let parsed = Cli::try_parse_from([&["receive-logs"], options].concat());
            assert!(parsed.is_err(), "{options:?}");
        }
        let parsed = Cli::try_parse_from(["receive-logs", "--queue", "q", "--max-backlog", "1GiB"]);
        assert_eq!(parsed.unwrap().queue.max_backlog, Some(ByteSize::gib(1)));
    }

    #[test]
    fn a_time_may_have_an_offset_from_utc() {
        for text in [
            "2026-01-31T09:30:00Z",
            "2026-01-31T10:30:00+01:00",
            "2026-01-31T04:00:00-05:30",
            "2026-01-31T09:30:00.7Z",
        ] {
            assert_eq!(since(text), Ok(1_769_851_800), "{text}");
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!((now - 1..=now).contains(&(since("2h").unwrap() + 7200)));
        assert_eq!(since("1000years"), Ok(0));
    }

    #[test]
    fn a_limit_is_an_age_or_a_size() {
        assert_eq!(keep("7d"), Ok(Keep::Age(Duration::from_secs(7 * 86400))));
        assert_eq!(keep("10GiB"), Ok(Keep::Size(ByteSize::gib(10))));
    }

    #[test]
    fn no_follow_requires_a_start() {
        let cli = |options: &[&str]| {
            Cli::parse_from([&["receive-logs", "--stream", "s"], options].concat())
        };
        assert!(cli(&["--no-follow"]).check().is_err());
        assert!(cli(&["--no-follow", "--from-start"]).check().is_ok());
        assert!(cli(&["--no-follow", "--resume", "f", "--tail", "3"]).check().is_ok());
    }
}
