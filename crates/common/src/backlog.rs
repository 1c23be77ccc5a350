//! Bytes that the broker has sent and the program has not taken yet.
//!
//! amiquip keeps what is delivered in a queue without bounds. The prefetch count bounds it in
//! messages, but these may be of any size; this bounds it in bytes, as nothing more is read from
//! the socket while there are too many.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const LIMIT: usize = 4 * 1024 * 1024;

/// Counted up by the thread that reads the socket, and down by the one that takes deliveries.
/// The count need not be exact, as it starts anew whenever all is taken.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: AtomicUsize,
    disregarded: AtomicBool,
}

impl Backlog {
    /// Notes that so many bytes are read from the socket.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes that so many bytes are taken.
    pub fn take(&self, bytes: usize) {
        let less = |count: usize| Some(count.saturating_sub(bytes));
        let _ = self
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Notes that all is taken.
    pub fn clear(&self) {
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// Lets everything in from now on, as nothing of it will be taken.
    pub fn disregard(&self) {
        self.disregarded.store(true, Ordering::Relaxed);
    }

    /// Whether nothing more should be read for now.
    pub fn is_full(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > LIMIT && !self.disregarded.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_full_between_too_much_and_enough_taken() {
        let backlog = Backlog::default();
        backlog.add(LIMIT);
        assert!(!backlog.is_full());
        backlog.add(1);
        assert!(backlog.is_full());
        backlog.take(1);
        assert!(!backlog.is_full());
        backlog.take(2 * LIMIT);
        backlog.add(LIMIT + 1);
        assert!(backlog.is_full());
        backlog.clear();
        assert!(!backlog.is_full());
        backlog.add(LIMIT + 1);
        backlog.disregard();
        assert!(!backlog.is_full());
    }
}
