//! The counts of records in errors, the status line and the progress.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Error;
use bytesize::ByteSize;
use logs_common::broker::Broker;
use logs_process::metrics::Metrics;
use logs_process::time::now_millis;

/// Counts of records. Only the [`Window`](crate::window::Window) changes the counts of sent records; any
/// thread may read them.
#[derive(Debug)]
pub struct Counts {
    has_confirms: bool,
    /// Read from the input.
    read: AtomicU64,
    /// When a record was last done, in milliseconds since 1970; 0 for never.
    done_at: AtomicU64,
    /// 1 if the input has a partial record, which `read` does not count yet; otherwise 0.
    partial: AtomicU64,
    /// Confirmed or, without confirms, handed to the connection.
    done: AtomicU64,
    /// Sent and not done.
    unconfirmed: AtomicU64,
    /// Sent without confirms, and known to have reached the broker.
    flushed: AtomicU64,
    /// Done, and not routed to any queue.
    unroutable: AtomicU64,
    outage: Mutex<Option<Outage>>,
    /// The connection, for the status line.
    pub broker: Broker,
    /// The directory of the spool; `None` if unconfirmed records are only in memory.
    spool: Option<PathBuf>,
    /// In the spool and not confirmed.
    spooled: AtomicU64,
    /// The size of the spool in bytes.
    spool_bytes: AtomicU64,
    /// Dropped, because the spool could not store them or the broker does not accept them.
    dropped: AtomicU64,
    /// Bytes of the dropped records.
    dropped_bytes: AtomicU64,
    /// Bytes of followed files that are not confirmed; [`NOT_FOLLOWING`] without such files.
    behind: AtomicU64,
}

/// The value of [`Counts::behind`] without followed files.
const NOT_FOLLOWING: u64 = u64::MAX;

/// A time without a broker.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// When the broker was lost.
    pub since: Instant,
    /// When the attempts to reach a broker end; `None` for never.
    pub until: Option<Instant>,
}

impl Counts {
    /// Counts of zero. Without confirms, records are in doubt until a [`flush`](Counts::flush).
    pub fn new(has_confirms: bool) -> Counts {
        Counts {
            has_confirms,
            read: AtomicU64::new(0),
            done_at: AtomicU64::new(0),
            partial: AtomicU64::new(0),
            done: AtomicU64::new(0),
            unconfirmed: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            unroutable: AtomicU64::new(0),
            outage: Mutex::new(None),
            broker: Broker::new(None),
            spool: None,
            spooled: AtomicU64::new(0),
            spool_bytes: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            dropped_bytes: AtomicU64::new(0),
            behind: AtomicU64::new(NOT_FOLLOWING),
        }
    }

    /// Counts of zero that include the spool in this directory. Records that are in the spool at the start must be
    /// added as read.
    pub fn with_spool(dir: &Path) -> Counts {
        Counts { spool: Some(dir.into()), ..Counts::new(true) }
    }

    /// Counts records that are added to the spool.
    pub fn add_spooled(&self, records: u64) {
        self.spooled.fetch_add(records, Ordering::Relaxed);
    }

    /// Counts records that are confirmed or dropped, and therefore not in the spool any more.
    pub fn remove_spooled(&self, records: u64) {
        subtract(&self.spooled, records);
    }

    /// Sets the size of the spool in bytes.
    pub fn set_spool_bytes(&self, bytes: u64) {
        self.spool_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Counts records that are dropped.
    pub fn add_dropped(&self, records: u64, bytes: u64) {
        self.dropped.fetch_add(records, Ordering::Relaxed);
        self.dropped_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Records that are in the spool and not confirmed.
    pub fn spooled(&self) -> u64 {
        self.spooled.load(Ordering::Relaxed)
    }

    /// Records that are dropped, and their bytes.
    pub fn dropped(&self) -> (u64, u64) {
        (self.dropped.load(Ordering::Relaxed), self.dropped_bytes.load(Ordering::Relaxed))
    }

    /// With a spool: records that were read and are only in memory.
    fn in_memory(&self) -> u64 {
        let elsewhere = self.done() + self.spooled() + self.dropped().0;
        self.read.load(Ordering::Relaxed).saturating_sub(elsewhere)
    }

    /// Sets how many bytes of followed files are not confirmed.
    pub fn set_behind(&self, bytes: u64) {
        self.behind.store(bytes, Ordering::Relaxed);
    }

    /// Counts records that are read from the input.
    pub fn add_read(&self, records: u64) {
        self.read.fetch_add(records, Ordering::Relaxed);
    }

    /// Sets whether the input has a partial record. It counts as read and not sent.
    pub fn set_partial(&self, is_partial: bool) {
        self.partial.store(is_partial.into(), Ordering::Relaxed);
    }

    /// Counts records that are sent for the first time.
    pub fn add_sent(&self, records: u64) {
        self.unconfirmed.fetch_add(records, Ordering::Relaxed);
    }

    /// Counts sent records as not sent, because the broker has rejected them.
    pub fn withdraw(&self, records: u64) {
        subtract(&self.unconfirmed, records);
    }

    /// Counts sent records as confirmed or, without confirms, as handed to the connection.
    pub fn add_done(&self, records: u64) {
        // In this order, so that no other thread reads a sum that is too small.
        self.done.fetch_add(records, Ordering::Relaxed);
        subtract(&self.unconfirmed, records);
        self.done_at.store(now_millis(), Ordering::Relaxed);
    }

    /// Counts records that are not routed to any queue, which is only known with `--mandatory`.
    pub fn add_unroutable(&self, records: u64) {
        self.unroutable.fetch_add(records, Ordering::Relaxed);
    }

    /// Without confirms: the broker has read all records that were sent.
    pub fn flush(&self) {
        self.flushed.store(self.sent(), Ordering::Relaxed);
    }

    /// Begins an outage, or changes the current one.
    pub fn set_outage(&self, outage: Outage) {
        *self.outage.lock().unwrap_or_else(PoisonError::into_inner) = Some(outage);
    }

    /// Ends the outage, and returns whether there was an outage.
    pub fn end_outage(&self) -> bool {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// The current outage.
    pub fn outage(&self) -> Option<Outage> {
        *self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that are confirmed or, without confirms, handed to the connection.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Records that were sent, and that the broker may not have.
    pub fn in_doubt(&self) -> u64 {
        match self.has_confirms {
            true => self.unconfirmed.load(Ordering::Relaxed),
            false => self.sent().saturating_sub(self.flushed.load(Ordering::Relaxed)),
        }
    }

    /// Records that are not routed to any queue.
    pub fn unroutable(&self) -> u64 {
        self.unroutable.load(Ordering::Relaxed)
    }

    /// Records that were sent at least once.
    pub fn sent(&self) -> u64 {
        self.done() + self.unconfirmed.load(Ordering::Relaxed)
    }

    /// Records that were read and not sent.
    pub fn not_sent(&self) -> u64 {
        let read = self.read.load(Ordering::Relaxed) + self.partial.load(Ordering::Relaxed);
        read.saturating_sub(self.sent())
    }

    /// The counts in the status line. The names are always the same, so that scripts can find the values.
    pub fn status(&self) -> String {
        let mut text = format!("{}, sent {}", self.broker, self.sent());
        if self.has_confirms {
            text += &format!(", confirmed {}", self.done());
        }
        text += &match self.spool {
            None => format!(", in doubt {}", self.in_doubt()),
            Some(_) => format!(
                ", in doubt {}, in the spool {}, dropped {}",
                self.in_memory(),
                self.spooled(),
                self.dropped().0
            ),
        };
        match self.behind.load(Ordering::Relaxed) {
            NOT_FOLLOWING => {}
            behind => text += &format!(", bytes behind {behind}"),
        }
        text + &format!(", reconnections {}", self.broker.reconnections())
    }

    /// Adds the counts for Prometheus.
    pub fn describe(&self, metrics: &mut Metrics) {
        self.broker.describe(metrics);
        let help = "1 while the broker is connected and accepts no messages, otherwise 0.";
        metrics.gauge("paused", help, u8::from(self.broker.is_paused()));
        let read = self.read.load(Ordering::Relaxed);
        metrics.counter("records_read_total", "Records read from the input or the spool.", read);
        metrics.counter("records_sent_total", "Records sent at least once.", self.sent());
        if self.has_confirms {
            let help = "Records that the broker has confirmed.";
            metrics.counter("records_confirmed_total", help, self.done());
            let help = "When the broker last confirmed a record, or 0.";
            let at = self.done_at.load(Ordering::Relaxed);
            metrics.time("last_confirm_timestamp_seconds", help, at);
        }
        let help = "Records that are not routed to any queue; needs --mandatory.";
        metrics.counter("records_unroutable_total", help, self.unroutable());
        let in_doubt = if self.spool.is_some() { self.in_memory() } else { self.in_doubt() };
        metrics.gauge("records_in_doubt", "Records sent and not confirmed.", in_doubt);
        if self.spool.is_some() {
            let help = "Records that are dropped, and not sent.";
            metrics.counter("records_dropped_total", help, self.dropped().0);
            let help = "Records in the spool that are not confirmed.";
            metrics.gauge("spool_records", help, self.spooled());
            let bytes = self.spool_bytes.load(Ordering::Relaxed);
            metrics.gauge("spool_bytes", "Size of the spool, limited by --spool-size.", bytes);
        }
        match self.behind.load(Ordering::Relaxed) {
            NOT_FOLLOWING => {}
            behind => {
                let help = "Bytes of the followed files that are not confirmed.";
                metrics.gauge("follow_behind_bytes", help, behind);
            }
        }
    }

    /// Adds the counts to an `error`, unless there are no records.
    pub fn add_to(&self, error: Error) -> Error {
        match self.spool.is_some() || self.sent() + self.not_sent() > 0 {
            true => error.context(self.to_string()),
            false => error,
        }
    }

    /// The word for records that are done.
    pub fn verdict(&self) -> &'static str {
        match self.has_confirms {
            true => "confirmed",
            false => "sent without confirmation",
        }
    }
}

/// Subtracts from a count, which never wraps.
fn subtract(count: &AtomicU64, records: u64) {
    let result = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
        debug_assert!(count >= records, "{count} - {records}");
        Some(count.saturating_sub(records))
    });
    debug_assert!(result.is_ok());
}

/// `5 confirmed, 2 in doubt`, and further counts that are not zero. A record in the spool is not in doubt.
impl Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(dir) = &self.spool {
            write!(f, "{} confirmed, {} in doubt", self.done(), self.in_memory())?;
            match self.spooled() {
                0 => {}
                spooled => write!(f, ", {spooled} left in the spool {}", dir.display())?,
            }
            match self.dropped() {
                (0, _) => {}
                (records, bytes) => write!(f, ", {records} dropped ({})", ByteSize::b(bytes))?,
            }
        } else {
            let done = if self.has_confirms { self.done() } else { self.sent() };
            write!(f, "{done} {}, {} in doubt", self.verdict(), self.in_doubt())?;
            match self.not_sent() {
                0 => {}
                not_sent => write!(f, ", {not_sent} read and not sent")?,
            }
        }
        match self.unroutable() {
            0 => Ok(()),
            unroutable => write!(f, ", {unroutable} unroutable"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_are_zero_are_left_out() {
        let counts = Counts::new(true);
        counts.add_sent(7);
        counts.add_done(5);
        assert_eq!(counts.to_string(), "5 confirmed, 2 in doubt");
        counts.add_read(10);
        counts.add_unroutable(1);
        let all = "5 confirmed, 2 in doubt, 3 read and not sent, 1 unroutable";
        assert_eq!(counts.to_string(), all);
        counts.withdraw(2);
        let withdrawn = "5 confirmed, 0 in doubt, 5 read and not sent, 1 unroutable";
        assert_eq!(counts.to_string(), withdrawn);
    }

    #[test]
    fn without_confirms_records_are_in_doubt_until_a_flush() {
        let counts = Counts::new(false);
        counts.add_read(6);
        counts.add_sent(5);
        counts.add_done(3);
        let sent = "5 sent without confirmation, 5 in doubt, 1 read and not sent";
        assert_eq!(counts.to_string(), sent);
        counts.flush();
        let flushed = "5 sent without confirmation, 0 in doubt, 1 read and not sent";
        assert_eq!(counts.to_string(), flushed);
        counts.add_sent(1);
        assert_eq!(counts.to_string(), "6 sent without confirmation, 1 in doubt");
    }

    #[test]
    fn an_outage_lasts_until_it_is_ended() {
        let counts = Counts::new(true);
        assert!(!counts.end_outage());
        counts.set_outage(Outage { since: Instant::now(), until: None });
        assert!(counts.outage().is_some());
        assert!(counts.end_outage());
        assert!(counts.outage().is_none());
    }
}
