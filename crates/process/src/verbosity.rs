//! The options for the text on stderr, flattened into the command lines of both tools.

use std::time::Duration;

use clap::Args;
use log::LevelFilter;

use crate::time::duration;

/// How much to print on stderr.
#[derive(Args, Debug)]
pub struct Verbosity {
    /// Print only errors and reports of possible loss
    #[arg(short, long, overrides_with = "quiet")]
    pub quiet: bool,

    /// Print more on stderr; RUST_LOG=debug prints the most
    #[arg(short, long, conflicts_with = "quiet", overrides_with = "verbose")]
    pub verbose: bool,

    /// Print a status line at this interval, even with --quiet: 10s, 5m
    ///
    /// The line has the broker and the counts. The signal SIGUSR1 prints it at any time.
    #[arg(long, value_name = "DURATION", value_parser = duration, hide_short_help = true)]
    pub status_interval: Option<Duration>,
}

impl Verbosity {
    /// The level of the most detailed messages to print.
    pub fn level(&self) -> LevelFilter {
        match self {
            Verbosity { quiet: true, .. } => LevelFilter::Error,
            Verbosity { verbose: true, .. } => LevelFilter::Debug,
            _ => LevelFilter::Warn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_and_verbose_set_the_level() {
        let level = |quiet, verbose| Verbosity { quiet, verbose, status_interval: None }.level();
        assert_eq!(level(true, false), LevelFilter::Error);
        assert_eq!(level(false, false), LevelFilter::Warn);
        assert_eq!(level(false, true), LevelFilter::Debug);
    }
}
