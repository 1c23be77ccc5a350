//! Fewer wake-ups under load.
//!
//! A thread that waits for each message is woken for each, and where they come one after another
//! that costs more than all that is done with them. So it rests for a moment before it looks
//! again, and finds several. What comes less than a thousand times a second is not kept waiting.

use std::thread;
use std::time::{Duration, Instant};

/// How long to let messages gather.
const MOMENT: Duration = Duration::from_millis(1);

/// Nothing was left so soon after the last time, so many times in a row: then messages come one
/// after another. No login takes as many.
const SOON: Duration = Duration::from_micros(500);
const STEADY: u32 = 20;

/// How often a thread runs out of work.
#[derive(Debug)]
pub struct Coalescer {
    last: Instant,
    /// Times in a row.
    often: u32,
}

impl Coalescer {
    /// Nothing has come yet.
    pub fn new() -> Coalescer {
        Coalescer { last: Instant::now(), often: 0 }
    }

    /// Notes that all that came since the last time is done, and rests for a moment if that happens
    /// all the time. Returns whether it did.
    pub fn pause(&mut self) -> bool {
        let is_soon = self.last.elapsed() < SOON;
        self.often = if is_soon { self.often.saturating_add(1) } else { 0 };
        let rests = self.often > STEADY;
        if rests {
            thread::sleep(MOMENT);
        }
        self.last = Instant::now();
        rests
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
    fn it_rests_only_where_there_is_always_more() {
        let mut coalescer = Coalescer::new();
        assert_eq!((0..100).position(|_| coalescer.pause()), Some(STEADY as usize));
        thread::sleep(SOON);
        assert!(!coalescer.pause());
    }
}
