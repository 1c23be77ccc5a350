//! Fewer wake-ups under load.
//!
//! A thread that waits for each message is woken for each, and in a steady stream that costs more than all
//! the work on the messages. After a pause of a millisecond the thread finds several at once. Messages at
//! less than a thousand a second are not delayed.

use std::thread;
use std::time::{Duration, Instant};

/// How long to let messages gather.
const PAUSE: Duration = Duration::from_millis(1);

/// Twenty consecutive empty reads less than 500 µs apart mean a steady stream; pausing then costs no one
/// latency. No login has as many.
const SOON: Duration = Duration::from_micros(500);
const STEADY: u32 = 20;

/// How often a thread runs out of work.
#[derive(Debug)]
pub struct Coalescer {
    last: Instant,
    /// How often in a row the thread has run out of work again so soon.
    in_a_row: u32,
}

impl Coalescer {
    /// Before the first message.
    pub fn new() -> Coalescer {
        Coalescer { last: Instant::now(), in_a_row: 0 }
    }

    /// Notes that the thread has run out of work, and pauses in a steady stream. Returns whether it did.
    pub fn pause(&mut self) -> bool {
        let is_soon = self.last.elapsed() < SOON;
        self.in_a_row = if is_soon { self.in_a_row.saturating_add(1) } else { 0 };
        let is_steady = self.in_a_row > STEADY;
        if is_steady {
            thread::sleep(PAUSE);
        }
        self.last = Instant::now();
        is_steady
    }
}

impl Default for Coalescer {
    fn default() -> Coalescer {
        Coalescer::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_pauses_only_in_a_steady_stream() {
        let mut coalescer = Coalescer::new();
        assert_eq!((0..100).position(|_| coalescer.pause()), Some(STEADY as usize));
        thread::sleep(SOON);
        assert!(!coalescer.pause());
    }
}
