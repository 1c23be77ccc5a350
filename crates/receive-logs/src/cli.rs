//! The command line of `receive-logs`.

use std::time::Duration;

use clap::{Parser, ValueEnum};
use logs_common::cli::{ConnectionArgs, ExchangeArgs, Verbosity, duration};

/// Write every log message broadcast through RabbitMQ to standard output
///
/// Every running receive-logs gets every message. It says on stderr when it is waiting: from then
/// on nothing is missed, until it is stopped. SIGINT (CTRL+C) and SIGTERM stop it once all that
/// it has received is written.
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

    /// Stop after N messages
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// Stop when no message has come for this long: 500ms, 30s, 5m
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub idle_timeout: Option<Duration>,

    /// Stop this long after the waiting began
    #[arg(long = "timeout", value_name = "DURATION", value_parser = duration)]
    pub total_timeout: Option<Duration>,

    #[command(flatten)]
    pub verbosity: Verbosity,

    #[command(flatten)]
    pub exchange: ExchangeArgs,

    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// How to write a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// \[x\] "info: hi", one line a message; what is not visible text is escaped
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

Exit status: 0 stopped as asked; 2 wrong usage; 69 no broker, or it was lost; 74 output;
75 time limit before --count; 76 not AMQP; 77 login or permission; 78 configuration;
1 anything else.";

impl Cli {
    /// The format, by whichever option it was given.
    pub fn format(&self) -> Format {
        if self.raw { Format::Raw } else { self.format }
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
}
