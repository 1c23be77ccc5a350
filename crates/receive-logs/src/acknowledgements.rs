//! When written messages are acknowledged.

use std::time::{Duration, Instant};

use crate::written::Written;

/// Messages that the broker sends ahead of their acknowledgement. They bound the memory; a larger
/// number is not faster.
pub const PREFETCH: u16 = 2000;

/// How long a received message may stay unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// When deliveries are acknowledged, which makes the broker send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credit {
    /// Repeatedly, so that there are always deliveries on their way.
    Renewed,
    /// At the end, as `--count` asks for no more messages than these; before, if repeats use them up.
    Once(u16),
}

impl Credit {
    /// How many unacknowledged deliveries there can be.
    pub fn prefetch(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH,
            Credit::Once(count) => count,
        }
    }

    /// The number of deliveries to acknowledge together.
    fn acknowledged_after(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH / 2,
            // Only repeats leave --count short of its messages here. Acknowledged earlier, deliveries without
            // repeats would make the broker send messages beyond --count.
            Credit::Once(count) => count,
        }
    }
}

/// Which deliveries are written and not acknowledged.
pub struct Acknowledgements {
    /// When to acknowledge.
    pub credit: Credit,
    /// The tag of the last message that is written and not acknowledged.
    last_written: Option<u64>,
    /// How many deliveries were received since the last acknowledgement, and when the next one is due.
    received: u16,
    due_at: Option<Instant>,
}

impl Acknowledgements {
    /// No delivery yet.
    pub fn new(credit: Credit) -> Acknowledgements {
        Acknowledgements { credit, last_written: None, received: 0, due_at: None }
    }

    /// A delivery was received.
    pub fn record_received(&mut self) {
        self.received += 1;
        self.due_at.get_or_insert_with(|| Instant::now() + ACK_AFTER);
    }

    /// Adds messages to those to acknowledge.
    pub fn add(&mut self, written: &Written) {
        self.last_written = written.last_tag().or(self.last_written);
    }

    /// Whether there is a message to acknowledge.
    pub fn is_pending(&self) -> bool {
        self.last_written.is_some()
    }

    /// Whether enough deliveries were received to write and acknowledge them now, before the broker has no more
    /// credit to send.
    pub fn is_full(&self) -> bool {
        self.received >= self.credit.acknowledged_after()
    }

    /// When to acknowledge at the latest.
    pub fn due_at(&self) -> Option<Instant> {
        self.due_at
    }

    /// The tag to acknowledge now, if any.
    pub fn take(&mut self) -> Option<u64> {
        (self.received, self.due_at) = (0, None);
        self.last_written.take()
    }
}
