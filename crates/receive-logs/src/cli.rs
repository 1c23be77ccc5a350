//! The command line of `receive-logs`.

use std::path::PathBuf;
use std::time::Duration;

use amqp::check_length;
use bytesize::ByteSize;
use clap::{Args, ColorChoice, Parser, ValueEnum};
use logs_common::cli::{ConnectionArgs, ExchangeArgs, Verbosity};
use logs_common::exit::{Failure, Status};

/// Write every log message broadcast through RabbitMQ to standard output or a file
///
/// Every running receive-logs gets every message. It says on stderr when it is waiting: from then
/// on nothing is missed, until it is stopped. If the broker is lost, it subscribes again by itself
/// and says what it has missed. SIGINT (CTRL+C) and SIGTERM stop it once all that it has received
/// is written.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// How to write a message
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    format: Format,

    /// Short for --format raw
    #[arg(short, long, conflicts_with = "format")]
    raw: bool,

    /// Begin text and raw records with the time of arrival (RFC 3339)
    #[arg(short, long)]
    pub timestamp: bool,

    /// End raw records with NUL in place of a newline
    #[arg(short = '0', long)]
    pub null: bool,

    /// Append to FILE, which SIGHUP opens anew (for logrotate)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Colour the severity that a message begins with: error, warning, info, debug ...
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,

    /// Stop after N messages
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// Stop when no message has come for this long: 500ms, 30s, 5m
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub idle_timeout: Option<Duration>,

    /// Stop this long after the waiting began
    #[arg(long = "timeout", value_name = "DURATION", value_parser = duration)]
    pub total_timeout: Option<Duration>,

    /// Create FILE, with the process id in it, once nothing is missed; removed at the end
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) queue: QueueArgs,

    /// How much to say on stderr
    #[command(flatten)]
    pub verbosity: Verbosity,

    #[command(flatten)]
    pub(crate) exchange: ExchangeArgs,

    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

/// Which queue, and its limits.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Queue options")]
pub struct QueueArgs {
    /// Use a durable queue that stays when receive-logs ends, in place of one of its own
    ///
    /// Messages wait in it while nobody runs, and are taken out once they are written (a batch as
    /// a whole). Several receivers of one queue share its messages. Goes with --durable, here and in
    /// emit-log: without it, a restart of the broker cuts the queue off the exchange. With
    /// --passive the queue is used as it is. Nobody removes it but rabbitmqctl delete_queue NAME.
    #[arg(id = "queue", long = "queue", value_name = "NAME", value_parser = queue_name)]
    pub name: Option<String>,

    /// Type of the queue, where it does not exist yet
    #[arg(id = "queue_type", long = "queue-type", value_name = "TYPE", requires = "queue")]
    #[arg(value_enum, default_value_t = QueueType::Quorum)]
    pub kind: QueueType,

    /// Let the broker drop the oldest messages when more than SIZE are waiting: 500KB, 10MB, 1GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_backlog: Option<ByteSize>,
}

/// Where the broker keeps the messages of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QueueType {
    /// Replicated over the nodes of a cluster
    Quorum,
    /// On one node
    Classic,
}

/// How to write a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `[x] "info: hi"`, one line a message; what is not visible text is escaped
    Text,
    /// The exact bytes and a newline; escaped only on a terminal
    Raw,
    /// One object a line, with all that the broker says of the message
    Json,
}

const EXAMPLES: &str = "\
Examples:
  receive-logs > logs_from_rabbit.log
  receive-logs --raw | grep --line-buffered error
  receive-logs -n 1 --timeout 5s || echo \"nothing came\"
  receive-logs -o /var/log/rabbit/all.log --queue archive --durable

Exit status: 0 stopped as asked; 2 wrong usage; 69 no broker (--retry); 74 output;
75 time limit before --count; 76 not AMQP; 77 login or permission; 78 configuration;
1 anything else.";

impl Cli {
    /// The format, be it from `--format` or `--raw`.
    pub fn format(&self) -> Format {
        if self.raw { Format::Raw } else { self.format }
    }

    /// Checks rules that the parser has no words for.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] for options that do not go together.
    pub fn check(&self) -> Result<(), Failure> {
        if self.null && self.format() != Format::Raw {
            return Err(Failure::new(Status::Usage, "--null goes with --raw only"));
        }
        Ok(())
    }
}

fn queue_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with("amq.") {
        return Err("a name of your own, please: the broker keeps amq.* to itself".into());
    }
    check_length(text, "name")?;
    Ok(text.into())
}

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than nothing".into()),
        Err(error) => Err(format!("{error}; write it as 500ms, 30s or 5m")),
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
    fn records_end_in_nul_with_raw_only() {
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
    fn values_that_make_no_sense_are_refused() {
        for options in [
            &["--queue", ""][..],
            &["--queue", "amq.mine"],
            &["--queue", &"q".repeat(256)],
            &["--max-backlog", "0"],
            &["--max-backlog", "much"],
            &["--count", "0"],
            &["--idle-timeout", "0s"],
            &["--queue-type", "classic"],
        ] {
            let parsed = Cli::try_parse_from([&["receive-logs"], options].concat());
            assert!(parsed.is_err(), "{options:?}");
        }
        let parsed = Cli::try_parse_from(["receive-logs", "--queue", "q", "--max-backlog", "1GiB"]);
        assert_eq!(parsed.unwrap().queue.max_backlog, Some(ByteSize::gib(1)));
    }
}
