//! What a publisher knows of its broker from one connection to the next.

use std::time::Instant;

use amqp::retry::{Backoff, RetryFor};

use crate::window::Window;

/// What a publisher knows of its broker.
#[derive(Debug, Default)]
pub struct Health {
    /// Whether a message was confirmed, or an earlier connection was complete: later refusals may pass.
    pub has_worked: bool,
    /// The start of an outage that has not ended with a confirmation yet.
    pub failing_since: Option<Instant>,
    /// From the first message that a queue refuses until all refused messages are confirmed.
    pub refusal: Option<Refusal>,
}

/// A queue refuses messages, which are sent again after pauses in which the queue may get room.
#[derive(Debug)]
pub struct Refusal {
    /// The pauses.
    pub backoff: Backoff,
    /// When a message was last confirmed, or first refused.
    pub last_progress: Instant,
    /// The delivery tag of the last message that was sent again.
    pub last_tag: u64,
}

impl Health {
    /// A confirmation ends an outage, and ends a refusal if it is that of the last message sent again. A refusal that
    /// goes on has `more` time.
    pub fn confirm(&mut self, window: &Window, more: RetryFor) {
        (self.has_worked, self.failing_since) = (true, None);
        if let Some(refusal) = &mut self.refusal {
            refusal.last_progress = Instant::now();
            refusal.backoff.extend(more);
            if window.first_to_resend().is_none() && window.is_past(refusal.last_tag) {
                self.refusal = None;
            }
        }
    }
}
