//! Bytes that the broker has sent and the program has not taken yet.
//!
//! amiquip keeps what is delivered in a queue without bounds. The prefetch count bounds it in
//! messages, but these may be of any size; this bounds it in bytes, as nothing more is read from
//! the socket while there are too many.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Log lines never come near it. Where they do, and stay there, the broker loses patience with a
/// receiver that leaves its socket unread for half a minute, and closes the connection; that is
/// better than to fill the memory.
const LIMIT: usize = 64 * 1024 * 1024;

/// Counted up by the thread that reads the socket, and down by the one that takes deliveries. A
/// program that takes none never has too many, but is left a moment at each read, unless it notes
/// now and then that it has taken all.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: AtomicUsize,
    /// The program has taken something, and not yet found that there is nothing more.
    busy: AtomicBool,
}

impl Backlog {
    /// Notes that so many bytes are read from the socket.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes that a delivery of so many bytes is taken.
    pub fn take(&self, bytes: usize) {
        self.busy.store(true, Ordering::Relaxed);
        let less = |count: usize| Some(count.saturating_sub(bytes));
        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Notes that nothing is left to be taken: the program waits for whatever comes, be it one
    /// message larger than any limit.
    pub fn all_taken(&self) {
        self.bytes.store(0, Ordering::Relaxed);
        self.busy.store(false, Ordering::Relaxed);
    }

    /// Whether nothing waits to be taken. During the login, which takes nothing, it means that
    /// nothing has come from the peer.
    pub fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) == 0
    }

    /// Whether there are so many bytes that the program should have a moment to take some.
    pub fn is_large(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > LIMIT
    }

    /// Whether nothing more should be read for now.
    pub fn is_full(&self) -> bool {
        self.is_large() && self.busy.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_full_while_too_much_waits_for_a_busy_program() {
        let backlog = Backlog::default();
        backlog.add(2 * LIMIT);
        assert!(!backlog.is_full(), "nothing is taken: the program may wait for a large message");
        backlog.take(1);
        assert!(backlog.is_full());
        backlog.take(LIMIT - 1);
        assert!(!backlog.is_full());
        backlog.add(1);
        assert!(backlog.is_full());
        backlog.all_taken();
        assert!(!backlog.is_full());
    }
}
