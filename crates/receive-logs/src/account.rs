//! Tells what was missed and what came twice.

use std::fmt::{self, Display};
use std::ops::Range;

use amiquip::Delivery;
use logs_common::logging::alert;
use logs_common::message_id::MessageId;
use logs_common::packing::Packing;

use crate::runs::{Heard, Runs};

/// What became of the records so far.
pub struct Account {
    runs: Runs,
    /// Written.
    pub written: u64,
    missed: u64,
    repeated: u64,
    /// Not reported yet: late ones, and those that another receiver may have written.
    late: u64,
    redelivered: u64,
}

impl Account {
    /// Nothing so far.
    pub fn new() -> Account {
        Account { runs: Runs::new(), written: 0, missed: 0, repeated: 0, late: 0, redelivered: 0 }
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
        let is_late = matches!(heard, Heard::Late(1..));
        if !is_late && !delivery.redelivered {
            self.settle();
        }
        match heard {
            Heard::Late(records) if is_late && !is_shared() => self.late += records,
            Heard::After(missing) if !is_shared() => {
                self.report_missing(id.map_or(0, |id| id.run), missing);
            }
            _ => {}
        }
        if delivery.redelivered {
            self.redelivered += records;
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

    /// Reports what is better told once for many messages, now that there are others or none.
    pub fn settle(&mut self) {
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
        let Account { written, missed, repeated, .. } = self;
        write!(f, "{written} messages written, {missed} missed, {repeated} repeated and left out")
    }
}
