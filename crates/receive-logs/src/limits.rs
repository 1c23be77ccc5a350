//! When a receiver has enough: of messages, of time, or of waiting.

use std::time::{Duration, Instant};

use crate::cli::Cli;

/// The limits on the command line.
pub struct Limits {
    /// Records to write.
    pub count: Option<u64>,
    end: Option<Instant>,
    idle_timeout: Option<Duration>,
    /// When the queue was found empty, unless a message was received since.
    pub idle_since: Option<Instant>,
}

impl Limits {
    /// The time starts now.
    pub fn new(cli: &Cli) -> Limits {
        Limits {
            count: cli.count,
            end: cli.total_timeout.and_then(|limit| Instant::now().checked_add(limit)),
            idle_timeout: cli.idle_timeout,
            idle_since: None,
        }
    }

    /// Whether this is the number of records to write.
    pub fn is_reached_by(&self, written: u64) -> bool {
        self.count.is_some_and(|count| written >= count)
    }

    /// Whether the time is over.
    pub fn is_past_end(&self) -> bool {
        self.end.is_some_and(is_past)
    }

    /// Whether there was no message for too long.
    pub fn is_past_idle_end(&self) -> bool {
        self.idle_end().is_some_and(is_past)
    }

    /// When the time is over, if no message is received before.
    pub fn next_time(&self) -> Option<Instant> {
        self.end.into_iter().chain(self.idle_end()).min()
    }

    fn idle_end(&self) -> Option<Instant> {
        self.idle_since?.checked_add(self.idle_timeout?)
    }
}

/// Whether this time has passed.
pub fn is_past(time: Instant) -> bool {
    Instant::now() >= time
}
