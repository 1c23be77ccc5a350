//! The options for the text on stderr, flattened into the command lines of both tools.

use std::time::Duration;

use clap::Args;
use log::LevelFilter;

use crate::time::duration;

/// How much to say on stderr.
#[derive(Args, Debug)]
pub struct Verbosity {
    /// Say nothing but errors, and what may be lost
    #[arg(short, long, overrides_with = "quiet")]
    pub quiet: bool,

    /// Say more on stderr; RUST_LOG=debug says most
    #[arg(short, long, conflicts_with = "quiet", overrides_with = "verbose")]
    pub verbose: bool,

    /// Say on stderr how it goes, again and again, such as every 10s or 5m; with --quiet too
    ///
    /// One line with the broker and the counts; SIGUSR1 asks for the same line at any time.
    #[arg(long, value_name = "DURATION", value_parser = duration, hide_short_help = true)]
    pub status_interval: Option<Duration>,
}

impl Verbosity {
    /// The most detailed notes to show.
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
    fn less_and_more_is_said() {
        let level = |quiet, verbose| Verbosity { quiet, verbose, status_interval: None }.level();
        assert_eq!(level(true, false), LevelFilter::Error);
        assert_eq!(level(false, false), LevelFilter::Warn);
        assert_eq!(level(false, true), LevelFilter::Debug);
    }
}
