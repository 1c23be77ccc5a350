//! Tells what was missed and what came twice.

use std::fmt::{self, Display};
use std::ops::Range;
use std::time::{Duration, Instant};

use amiquip::Delivery;
use logs_common::logging::alert;
use logs_common::message_id::MessageId;
use logs_common::packing::Packing;

use crate::runs::{Heard, Runs};

/// How long to gather what is told once for many messages.
const REPORT_AFTER: Duration = Duration::from_secs(1);

/// What became of the records so far.
pub struct Account {
    runs: Runs,
    missed: u64,
    repeated: u64,
    /// Not reported yet: late ones, and those that an earlier receiver may have written.
    late: u64,
    redelivered: u64,
    /// When the first of these came.
    unreported_since: Option<Instant>,
}

impl Account {
    /// Nothing so far.
    pub fn new() -> Account {
        Account {
            runs: Runs::new(),
            missed: 0,
            repeated: 0,
            late: 0,
            redelivered: 0,
            unreported_since: None,
        }
    }

    /// Takes note of a message, and returns how many records it has, or 0 if all of it has been
    /// written before. A gap in the numbers before it is reported, unless the queue `is_shared`:
    /// then others have what is missing.
    pub fn hear(&mut self, delivery: &Delivery, mut is_shared: impl FnMut() -> bool) -> u64 {
        let properties = &delivery.properties;
        let records = Packing::of(properties.type_().as_deref()).records(&delivery.body).count();
        let records = records as u64;
        let id = properties.message_id().as_deref().and_then(MessageId::parse);
        let heard = id.map_or(Heard::InOrder, |id| self.runs.hear(id, records));
        if heard == Heard::Repeated {
            self.repeated += records;
            return 0;
        }
        match heard {
            Heard::Late(records @ 1..) if !is_shared() => self.late += records,
            Heard::After(missing) if !is_shared() => {
                self.report_missing(id.map_or(0, |id| id.run), missing);
            }
            _ => {}
        }
        if delivery.redelivered {
            self.redelivered += records;
        }
        if self.late + self.redelivered > 0 {
            self.unreported_since.get_or_insert_with(Instant::now);
            self.report_if_due();
        }
        records
    }

    fn report_missing(&mut self, run: u64, Range { start, end }: Range<u64>) {
        let count = end - start;
        self.missed = self.missed.saturating_add(count);
        let numbers = match count {
            1 => start.to_string(),
            _ => format!("{start} to {}", end - 1),
        };
        alert(format!("missed {} from run {run:016x} ({numbers})", messages(count)));
    }

    /// When to report what is better told once for many messages, if there is anything.
    pub fn report_time(&self) -> Option<Instant> {
        Some(self.unreported_since? + REPORT_AFTER)
    }

    /// Reports it if it is time.
    pub fn report_if_due(&mut self) {
        if self.report_time().is_some_and(|time| time <= Instant::now()) {
            self.report();
        }
    }

    /// Reports it.
    pub fn report(&mut self) {
        self.unreported_since = None;
        if self.late > 0 {
            let late = self.late;
            self.missed = self.missed.saturating_sub(late);
            alert(format!("{} reported as missed came late", messages(late)));
            self.late = 0;
        }
        if self.redelivered > 0 {
            let count = self.redelivered;
            let messages = messages(count);
            alert(format!("{messages} may be repeated: delivered before, and not acknowledged"));
            self.redelivered = 0;
        }
    }
}

fn messages(count: u64) -> String {
    match count {
        1 => "1 message".into(),
        _ => format!("{count} messages"),
    }
}

impl Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} missed, {} repeated and left out", self.missed, self.repeated)
    }
}
