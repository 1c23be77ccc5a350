//! What became of the records.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Counts records; threads may add to it and read it at the same time.
#[derive(Debug)]
pub struct Tally {
    has_confirmations: bool,
    read: AtomicU64,
    /// Confirmed or, without confirmations, sent.
    done: AtomicU64,
    in_doubt: AtomicU64,
    unheard: AtomicU64,
    away: Mutex<Option<Away>>,
}

/// There is no broker.
#[derive(Clone, Copy, Debug)]
pub struct Away {
    /// From when on.
    pub since: Instant,
    /// Until when one is looked for, unless for ever.
    pub until: Option<Instant>,
}

impl Tally {
    /// Nothing yet. Without confirmations, what is sent is in doubt until the broker has answered to
    /// something that was sent after it.
    pub fn new(has_confirmations: bool) -> Tally {
        Tally {
            has_confirmations,
            read: AtomicU64::new(0),
            done: AtomicU64::new(0),
            in_doubt: AtomicU64::new(0),
            unheard: AtomicU64::new(0),
            away: Mutex::new(None),
        }
    }

    /// Notes that records are read, which are going to be sent.
    pub fn add_read(&self, records: u64) {
        self.read.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes that the broker has confirmed records or, without confirmations, that they are sent.
    pub fn add_done(&self, records: u64) {
        self.done.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes that no receiver's queue has taken records (known with `--mandatory` only).
    pub fn add_unheard(&self, records: u64) {
        self.unheard.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes how many records are sent of which it is not known whether the broker has them.
    pub fn set_in_doubt(&self, records: u64) {
        self.in_doubt.store(records, Ordering::Relaxed);
    }

    /// Notes that there is no broker, or that there is one again.
    pub fn set_away(&self, away: Option<Away>) {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = away;
    }

    /// Whether there is a broker.
    pub fn away(&self) -> Option<Away> {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the broker has confirmed or, without confirmations, that were sent.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Records that were sent, and that the broker may not have.
    pub fn in_doubt(&self) -> u64 {
        self.in_doubt.load(Ordering::Relaxed)
    }

    /// Records that no receiver's queue has taken.
    pub fn unheard(&self) -> u64 {
        self.unheard.load(Ordering::Relaxed)
    }

    /// Records that were sent at least once.
    pub fn sent(&self) -> u64 {
        match self.has_confirmations {
            true => self.done() + self.in_doubt(),
            false => self.done().max(self.in_doubt()),
        }
    }

    /// Records that were read, and not sent.
    pub fn not_sent(&self) -> u64 {
        self.read.load(Ordering::Relaxed).saturating_sub(self.sent())
    }

    /// What to call those that are done with.
    pub fn verdict(&self) -> &'static str {
        match self.has_confirmations {
            true => "confirmed",
            false => "sent without confirmation",
        }
    }
}

/// `5 confirmed, 2 in doubt`, and what else there is to say.
impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = if self.has_confirmations { self.done() } else { self.sent() };
        write!(f, "{done} {}, {} in doubt", self.verdict(), self.in_doubt())?;
        match self.not_sent() {
            0 => {}
            not_sent => write!(f, ", {not_sent} read and not sent")?,
        }
        match self.unheard() {
            0 => Ok(()),
            unheard => write!(f, ", {unheard} heard by nobody"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_there_is_to_say() {
        let tally = Tally::new(true);
        tally.add_done(5);
        tally.set_in_doubt(2);
        assert_eq!(tally.to_string(), "5 confirmed, 2 in doubt");
        tally.add_read(10);
        tally.add_unheard(1);
        let all = "5 confirmed, 2 in doubt, 3 read and not sent, 1 heard by nobody";
        assert_eq!(tally.to_string(), all);
    }

    #[test]
    fn without_confirmations_what_is_sent_may_be_in_doubt_all_the_same() {
        let tally = Tally::new(false);
        tally.add_read(6);
        tally.add_done(5);
        tally.set_in_doubt(2);
        let all = "5 sent without confirmation, 2 in doubt, 1 read and not sent";
        assert_eq!(tally.to_string(), all);
    }
}
