//! A bound on the bytes that the broker has sent and the program has not taken yet.
//!
//! amiquip keeps deliveries in a queue without bounds. The prefetch count bounds the queue in messages, of
//! any size; the backlog bounds it in bytes: while there are too many, the socket is not read.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// In bytes; log lines never come near. RabbitMQ closes the connection of a receiver that leaves its socket
/// unread for half a minute; that is better than to fill the memory.
const LIMIT: usize = 64 * 1024 * 1024;

/// Bytes, counted up by the thread that reads the socket, and down by the thread that takes deliveries. A
/// program that takes no deliveries must note now and then that it has taken all: until then, each read
/// waits a moment for it, but goes on.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: AtomicUsize,
    /// The program has taken a delivery, and not yet found that no other is there.
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

    /// Notes that no delivery is left to be taken: the program waits for the next, which may be larger than
    /// the limit.
    pub fn all_taken(&self) {
        self.bytes.store(0, Ordering::Relaxed);
        self.busy.store(false, Ordering::Relaxed);
    }

    /// Whether no bytes wait to be taken. During the login, which takes no deliveries: whether the peer has
    /// sent none.
    pub fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) == 0
    }

    /// Whether there are so many bytes that the program should have a moment to take deliveries.
    pub fn is_large(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > LIMIT
    }

    /// Whether the socket should not be read for now.
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
