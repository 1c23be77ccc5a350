//! The status line.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use amqp::Waiting;
use logs_common::broker::Broker;

use crate::cli::Cli;

/// What a receiver has done so far. The receiver alone changes this; any thread may read it.
pub struct StatusLine {
    /// The connection.
    pub broker: Broker,
    reads_stream: bool,
    written: AtomicU64,
    buffered: AtomicU64,
    missed: AtomicU64,
    offset: Mutex<Option<u64>>,
    waiting: Mutex<Option<Waiting>>,
}

impl StatusLine {
    /// There is no broker yet, and nothing is written.
    pub fn new(cli: &Cli) -> StatusLine {
        StatusLine {
            broker: Broker::new(cli.first_retry()),
            reads_stream: cli.stream.name.is_some(),
            written: AtomicU64::new(0),
            buffered: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            offset: Mutex::new(None),
            waiting: Mutex::new(None),
        }
    }

    /// Sets how many records are written, how many are formatted and not written, and how many are known to be missing.
    pub fn set_counts(&self, written: u64, buffered: u64, missed: u64) {
        self.written.store(written, Ordering::Relaxed);
        self.buffered.store(buffered, Ordering::Relaxed);
        self.missed.store(missed, Ordering::Relaxed);
    }

    /// Sets where the received messages of the present connection are counted.
    pub fn set_waiting(&self, waiting: Waiting) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
    }

    /// How many messages have been received and not been written.
    pub fn unwritten(&self) -> u64 {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = waiting.as_ref().map_or(0, |waiting| waiting.count() as u64);
        // The program is busy with one more.
        waiting + self.buffered.load(Ordering::Relaxed).max(1)
    }

    /// Notes the offset of the last message of a stream that is written.
    pub fn set_offset(&self, offset: u64) {
        *self.offset.lock().unwrap_or_else(PoisonError::into_inner) = Some(offset);
    }
}

/// Always the same names, each with its value: `broker localhost:5672, written 7, missed 0, reconnections 0`
impl Display for StatusLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, written {}", self.broker, self.written.load(Ordering::Relaxed))?;
        if self.reads_stream {
            match *self.offset.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(offset) => write!(f, ", offset {offset}")?,
                None => f.write_str(", offset none")?,
            }
        }
        let (missed, again) = (self.missed.load(Ordering::Relaxed), self.broker.reconnections());
        write!(f, ", missed {missed}, reconnections {again}")
    }
}
