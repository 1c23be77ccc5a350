//! Which records share a message.

use std::time::Duration;

/// How long a record waits for others at most while an earlier message is unconfirmed.
pub const LONGEST_WAIT: Duration = Duration::from_millis(5);

/// Which records share a message, of at most 64 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// Each record is a message of its own.
    Off,
    /// Records that are read together, or within this time after the first.
    Within(Duration),
    /// Records that are read together, or within [`LONGEST_WAIT`] after the first while an earlier message is
    /// unconfirmed.
    WhileUnconfirmed,
}

impl Batch {
    /// How long a record may wait for others at most.
    pub fn linger(self) -> Duration {
        match self {
            Batch::Off => Duration::ZERO,
            Batch::Within(linger) => linger,
            Batch::WhileUnconfirmed => LONGEST_WAIT,
        }
    }
}
