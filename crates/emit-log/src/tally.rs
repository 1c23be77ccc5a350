//! What became of the records.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts records; threads may add to it and read it at the same time.
#[derive(Debug)]
pub struct Tally {
    has_confirmations: bool,
    read: AtomicU64,
    confirmed: AtomicU64,
    in_doubt: AtomicU64,
    unheard: AtomicU64,
}

impl Tally {
    /// Nothing yet. Without confirmations, whatever is sent counts as if it were confirmed, but
    /// is not called so.
    pub fn new(has_confirmations: bool) -> Tally {
        Tally {
            has_confirmations,
            read: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            in_doubt: AtomicU64::new(0),
            unheard: AtomicU64::new(0),
        }
    }

    /// Notes that records are read, which are going to be sent.
    pub fn add_read(&self, records: u64) {
        self.read.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes that the broker has confirmed records.
    pub fn add_confirmed(&self, records: u64) {
        self.confirmed.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes that no receiver's queue has taken records (known with `--mandatory` only).
    pub fn add_unheard(&self, records: u64) {
        self.unheard.fetch_add(records, Ordering::Relaxed);
    }

    /// Notes how many records are sent and not confirmed.
    pub fn set_in_doubt(&self, records: u64) {
        self.in_doubt.store(records, Ordering::Relaxed);
    }

    /// Records that the broker has confirmed.
    pub fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Records that were sent and are not confirmed.
    pub fn in_doubt(&self) -> u64 {
        self.in_doubt.load(Ordering::Relaxed)
    }

    /// Records that no receiver's queue has taken.
    pub fn unheard(&self) -> u64 {
        self.unheard.load(Ordering::Relaxed)
    }

    /// What to call those that are confirmed.
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
        let (confirmed, in_doubt) = (self.confirmed(), self.in_doubt());
        write!(f, "{confirmed} {}, {in_doubt} in doubt", self.verdict())?;
        let sent = confirmed + in_doubt;
        let not_sent = self.read.load(Ordering::Relaxed).saturating_sub(sent);
        if not_sent > 0 {
            write!(f, ", {not_sent} read and not sent")?;
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
        tally.add_confirmed(5);
        tally.set_in_doubt(2);
        assert_eq!(tally.to_string(), "5 confirmed, 2 in doubt");
        tally.add_read(10);
        tally.add_unheard(1);
        let all = "5 confirmed, 2 in doubt, 3 read and not sent, 1 heard by nobody";
        assert_eq!(tally.to_string(), all);
    }
}
