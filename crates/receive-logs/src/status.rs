//! The status line.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use amqp::Waiting;
use logs_common::broker::Broker;
use logs_process::metrics::Metrics;
use logs_process::time::now_millis;

use crate::cli::Cli;

/// What a receiver has done. Only the receiver changes it; any thread may read it.
pub struct StatusLine {
    /// The connection.
    pub broker: Broker,
    reads_stream: bool,
    written: AtomicU64,
    /// When a record was last written or filtered, in milliseconds since 1970; 0 for never.
    handled_at: AtomicU64,
    buffered: AtomicU64,
    missed: AtomicU64,
    /// Records that are not selected; `None` without a filter.
    filtered: Option<AtomicU64>,
    offset: Mutex<Option<u64>>,
    waiting: Mutex<Option<Waiting>>,
}

impl StatusLine {
    /// Starts without a broker and with all counts 0.
    pub fn new(cli: &Cli) -> StatusLine {
        StatusLine {
            broker: Broker::new(cli.first_retry()),
            reads_stream: cli.stream.name.is_some(),
            written: AtomicU64::new(0),
            handled_at: AtomicU64::new(0),
            buffered: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            filtered: (!cli.filter.select_all()).then(|| AtomicU64::new(0)),
            offset: Mutex::new(None),
            waiting: Mutex::new(None),
        }
    }

    /// Sets the number of records that are written, that are only buffered, and that are missed.
    pub fn set_counts(&self, written: u64, buffered: u64, missed: u64) {
        self.set_handled(&self.written, written);
        self.buffered.store(buffered, Ordering::Relaxed);
        self.missed.store(missed, Ordering::Relaxed);
    }

    /// Sets the number of records that the filter has not selected.
    pub fn set_filtered(&self, filtered: u64) {
        if let Some(count) = &self.filtered {
            self.set_handled(count, filtered);
        }
    }

    /// Sets a count of handled records and, if it changes, the time.
    fn set_handled(&self, count: &AtomicU64, records: u64) {
        if count.load(Ordering::Relaxed) != records {
            count.store(records, Ordering::Relaxed);
            self.handled_at.store(now_millis(), Ordering::Relaxed);
        }
    }

    /// Sets the counter of the received messages of the present connection.
    pub fn set_waiting(&self, waiting: Waiting) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
    }

    /// The number of messages that are received and not written.
    pub fn unwritten(&self) -> u64 {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = waiting.as_ref().map_or(0, |waiting| waiting.count() as u64);
        // One more message is being processed.
        waiting + self.buffered.load(Ordering::Relaxed).max(1)
    }

    /// Adds the counts for Prometheus.
    pub fn describe(&self, metrics: &mut Metrics) {
        self.broker.describe(metrics);
        let written = self.written.load(Ordering::Relaxed);
        metrics.counter("records_written_total", "Records written to the output.", written);
        let at = self.handled_at.load(Ordering::Relaxed);
        let help = "When a received record was last written or filtered, or 0.";
        metrics.time("last_delivery_timestamp_seconds", help, at);
        let buffered = self.buffered.load(Ordering::Relaxed);
        metrics.gauge("records_buffered", "Records received and not written yet.", buffered);
        if let Some(filtered) = &self.filtered {
            let help = "Records that the options do not select.";
            metrics.counter("records_filtered_total", help, filtered.load(Ordering::Relaxed));
        }
        let help = "Records reported as missed, and not received since.";
        metrics.gauge("records_missed", help, self.missed.load(Ordering::Relaxed));
        let offset = *self.offset.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(offset) = offset {
            let help = "Offset in the stream of the last written message.";
            metrics.gauge("stream_offset", help, offset);
        }
    }

    /// Sets the offset of the last written message of a stream.
    pub fn set_offset(&self, offset: u64) {
        *self.offset.lock().unwrap_or_else(PoisonError::into_inner) = Some(offset);
    }
}

/// Always prints the same names with their values: `broker localhost:5672, written 7, missed 0, reconnections 0`
impl Display for StatusLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, written {}", self.broker, self.written.load(Ordering::Relaxed))?;
        if let Some(filtered) = &self.filtered {
            write!(f, ", filtered {}", filtered.load(Ordering::Relaxed))?;
        }
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
