//! The options of what a program reports about itself, flattened into the command lines of both tools.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use log::LevelFilter;

use crate::exit::Failure;
use crate::metrics::{Metrics, MetricsFile};
use crate::time::duration;

/// How much to print on stderr, and metrics.
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

    /// Write counts for Prometheus to FILE every 10s and at the end
    ///
    /// The node exporter reads FILE if it is in its directory and ends in .prom. Each process needs a FILE of its own;
    /// the name of FILE is the label "name" of its metrics. Example: /var/lib/node_exporter/app.prom
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub metrics_file: Option<PathBuf>,
}

impl Verbosity {
    /// Starts to write the file of `--metrics-file`, if it is given.
    ///
    /// # Errors
    ///
    /// As for [`MetricsFile::start`].
    pub fn start_metrics(
        &self,
        program: &'static str,
        describe: impl Fn(&mut Metrics) + Send + Sync + 'static,
    ) -> Result<Option<MetricsFile>, Failure> {
        let path = self.metrics_file.as_deref();
        path.map(|path| MetricsFile::start(program, path, describe)).transpose()
    }

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
        let level = |quiet, verbose| {
            Verbosity { quiet, verbose, status_interval: None, metrics_file: None }.level()
        };
        assert_eq!(level(true, false), LevelFilter::Error);
        assert_eq!(level(false, false), LevelFilter::Warn);
        assert_eq!(level(false, true), LevelFilter::Debug);
    }
}
