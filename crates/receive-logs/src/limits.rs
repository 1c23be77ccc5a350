//! Limits on the number of records, on the time, and on the time without a message.

use std::time::{Duration, Instant};

use crate::cli::Cli;

/// The limits of the command line.
pub struct Limits {
    /// Records to write.
    pub count: Option<u64>,
    end: Option<Instant>,
    idle_timeout: Option<Duration>,
    /// When the queue was found empty; `None` if a message was received since.
    pub idle_since: Option<Instant>,
}

impl Limits {
    /// Starts the time limit.
    pub fn new(cli: &Cli) -> Limits {
        Limits {
            count: cli.count,
            end: cli.total_timeout.and_then(|limit| Instant::now().checked_add(limit)),
            idle_timeout: cli.idle_timeout,
            idle_since: None,
        }
    }

    /// Whether `written` records are enough.
    pub fn is_reached_by(&self, written: u64) -> bool {
        self.count.is_some_and(|count| written >= count)
    }

    /// Whether the time limit has passed.
    pub fn is_past_end(&self) -> bool {
        self.end.is_some_and(is_past)
    }

    /// Whether the time without a message is too long.
    pub fn is_past_idle_end(&self) -> bool {
        self.idle_end().is_some_and(is_past)
    }

    /// When the first of the time limits passes if no message is received.
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
