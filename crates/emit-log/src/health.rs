//! The state of a broker that outlives its connections.

use std::time::Instant;

use amqp::retry::{Backoff, RetryFor};

use crate::window::Window;

/// The state of a broker that outlives its connections.
#[derive(Debug, Default)]
pub struct Health {
    /// Whether a message was confirmed or a login completed. A later refusal may then be temporary.
    pub has_worked: bool,
    /// The start of an outage, until a confirm ends it.
    pub failing_since: Option<Instant>,
    /// From the first nack until all nacked messages are confirmed.
    pub nacking: Option<Nacking>,
}

/// A queue nacks messages. They are sent again after pauses, because the queue may have room then.
#[derive(Debug)]
pub struct Nacking {
    /// The pauses.
    pub backoff: Backoff,
    /// The time of the last confirm, or of the first nack.
    pub last_progress: Instant,
    /// The delivery tag of the last message that was sent again.
    pub last_tag: u64,
}

impl Health {
    /// A confirm ends an outage. It also ends the nacking if it is the confirm of the last message sent again;
    /// otherwise the nacking may last for `more` time.
    pub fn confirm(&mut self, window: &Window, more: RetryFor) {
        (self.has_worked, self.failing_since) = (true, None);
        if let Some(nacking) = &mut self.nacking {
            nacking.last_progress = Instant::now();
            nacking.backoff.extend(more);
            if window.first_to_resend().is_none() && window.is_past(nacking.last_tag) {
                self.nacking = None;
            }
        }
    }
}
