//! Tells what was missed and what came twice.

use std::fmt::{self, Display};
use std::ops::Range;
use std::time::{Duration, Instant};

use amiquip::Delivery;
use logs_common::logging::alert;
use logs_common::message_id::MessageId;
use logs_common::packing::Packing;

use crate::runs::{Heard, Runs};

/// How long to gather what is reported together, where more may come.
const REPORT_AFTER: Duration = Duration::from_secs(1);

/// Gaps reported one by one at a time; more are counted.
const GAPS: usize = 20;

/// Who may have what does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// Nobody: the queue is ours.
    None,
    /// An earlier receiver of the same queue, at most.
    Before,
    /// Those that consume the same queue now.
    Now,
}

/// What became of the records so far.
pub struct Account {
    runs: Runs,
    missed: u64,
    repeated: u64,
    /// What is not reported yet, and when to report it.
    unreported: Unreported,
    report_time: Option<Instant>,
    last_report: Option<Instant>,
}

#[derive(Default)]
struct Unreported {
    /// Run and numbers of the first gaps, and how many records are missing in the others.
    gaps: Vec<(u64, Range<u64>)>,
    in_more_gaps: u64,
    /// Records that were missing and have come.
    late: u64,
    /// Records that an earlier receiver may have written.
    redelivered: u64,
}

impl Account {
    /// Nothing so far.
    pub fn new() -> Account {
        Account {
            runs: Runs::new(),
            missed: 0,
            repeated: 0,
            unreported: Unreported::default(),
            report_time: None,
            last_report: None,
        }
    }

    /// Takes note of a message, and returns how many records it has, or 0 if all of it has been
    /// written before.
    pub fn hear(&mut self, delivery: &Delivery) -> u64 {
        let properties = &delivery.properties;
        let records = Packing::of(properties.type_().as_deref()).count(&delivery.body);
        let unreported = &mut self.unreported;
        if let Some(id) = properties.message_id().as_deref().and_then(MessageId::parse) {
            match self.runs.hear(id, records) {
                Heard::InOrder => {}
                Heard::After(missing) if unreported.gaps.len() < GAPS => {
                    unreported.gaps.push((id.run, missing));
                }
                Heard::After(Range { start, end }) => unreported.in_more_gaps += end - start,
                Heard::Late(late) => unreported.late += late,
                Heard::Repeated => {
                    self.repeated += records;
                    return 0;
                }
            }
        }
        if delivery.redelivered {
            unreported.redelivered += records;
        }
        let Unreported { gaps, late, redelivered, .. } = unreported;
        if !gaps.is_empty() || *late + *redelivered > 0 {
            self.schedule_report(delivery.redelivered);
        }
        records
    }

    /// Soon, unless what may be repeated goes on; but not too often.
    fn schedule_report(&mut self, goes_on: bool) {
        let now = Instant::now();
        let time = match self.last_report {
            _ if goes_on => now + REPORT_AFTER,
            Some(last) => now.max(last + REPORT_AFTER),
            None => now,
        };
        self.report_time = Some(self.report_time.map_or(time, |planned| planned.min(time)));
    }

    /// When to report, if there is anything.
    pub fn report_time(&self) -> Option<Instant> {
        self.report_time
    }

    /// Whether messages are missing that are not reported yet.
    pub fn has_gaps(&self) -> bool {
        !self.unreported.gaps.is_empty()
    }

    /// Reports what there is. What does not come is missed, unless `others` have it now.
    pub fn report(&mut self, others: Others) {
        self.report_time = None;
        self.last_report = Some(Instant::now());
        let Unreported { gaps, in_more_gaps, late, redelivered } =
            std::mem::take(&mut self.unreported);
        let unless = match others {
            Others::None => "",
            Others::Before => ", unless another receiver of the queue has written them",
            Others::Now => return self.report_redelivered(redelivered),
        };
        for (run, Range { start, end }) in gaps {
            let numbers = match end - start {
                1 => start.to_string(),
                _ => format!("{start} to {}", end - 1),
            };
            self.missed += end - start;
            let missed = messages(end - start);
            alert(format!("missed {missed} from run {run:016x} ({numbers}){unless}"));
        }
        if in_more_gaps > 0 {
            self.missed += in_more_gaps;
            alert(format!("missed {} in more gaps{unless}", messages(in_more_gaps)));
        }
        // What others of the queue had may never have been reported as missed.
        if late > 0 && others == Others::None {
            self.missed = self.missed.saturating_sub(late);
            alert(format!("{} reported as missed came late", messages(late)));
        }
        self.report_redelivered(redelivered);
    }

    fn report_redelivered(&self, redelivered: u64) {
        if redelivered > 0 {
            let messages = messages(redelivered);
            alert(format!("{messages} may be repeated: delivered before, and not acknowledged"));
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
