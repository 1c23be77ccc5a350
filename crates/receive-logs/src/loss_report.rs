//! Reports missed and repeated messages.

use std::fmt::{self, Display};
use std::mem;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::environment::Alert;
use crate::message::Message;
use crate::sequence::run::{Observation, total};
use crate::sequence::{Gaps, Missing, SequenceTracker};

/// How long to collect messages for a common report.
const REPORT_AFTER: Duration = Duration::from_secs(1);

/// How long the gaps of a durable queue have to close. The broker delivers messages that a receiver returns to the
/// queue again; a quorum queue delivers them in another order.
pub const GAP_DELAY: Duration = Duration::from_secs(5);

/// Gaps that a report lists; further gaps are only counted.
const GAPS: usize = 20;

/// Runs of several messages that are remembered across a restart, and the same number of runs of a single message.
const RUNS: usize = 256;

/// Which receivers may consume the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only this receiver, so messages that are not delivered in order are lost.
    Exclusive,
    /// Every receiver that knows the name of the queue.
    Shared,
}

/// Records to report.
#[derive(Default)]
struct Pending {
    /// Reported as missing, and received later.
    late: u64,
    /// Redelivered, so an earlier receiver may have written them.
    redelivered: u64,
    /// Dropped because of their numbers alone.
    unverified: u64,
    /// With the number of another record.
    conflicting: u64,
}

impl Pending {
    fn is_any(&self) -> bool {
        self.late > 0 || self.redelivered > 0 || self.unverified > 0 || self.conflicting > 0
    }
}

/// Counts lost and repeated records, and reports them when it is time.
pub struct LossReport {
    access: Access,
    runs: SequenceTracker,
    /// Records reported as missed and not received since, and records dropped as duplicates.
    missed: u64,
    repeated: u64,
    pending: Pending,
    /// When to report the pending records.
    report_time: Option<Instant>,
    /// When to report the gaps in the snapshot.
    gap_time: Option<Instant>,
    reported_at: Option<Instant>,
    alert: Alert,
}

impl LossReport {
    /// Starts with the messages of `runs`, which were written before a restart.
    pub fn new(access: Access, runs: &[(u64, Range<u64>)], alert: Alert) -> LossReport {
        let mut tracker = SequenceTracker::new();
        for (run, numbers) in runs.iter().rev() {
            tracker.restore(*run, numbers.clone());
        }
        LossReport {
            access,
            runs: tracker,
            missed: 0,
            repeated: 0,
            pending: Pending::default(),
            report_time: None,
            gap_time: None,
            reported_at: None,
            alert,
        }
    }

    /// Observes a message. Returns whether the message is new, so that it must be written.
    pub fn observe(&mut self, message: &Message) -> bool {
        let records = message.layout.records;
        let pending = &mut self.pending;
        let mut is_new = true;
        match self.runs.observe_message(message) {
            Observation::InOrder => {}
            Observation::Gap => self.expect_gaps_to_close(),
            Observation::Late(late) => pending.late = pending.late.saturating_add(late),
            Observation::Conflict => pending.conflicting += records,
            Observation::Duplicate => is_new = false,
            Observation::Unverified => {
                pending.unverified += records;
                is_new = false;
            }
        }
        if !is_new {
            self.repeated += records;
        } else if message.delivery.redelivered {
            self.pending.redelivered += records;
        }
        if self.pending.is_any() {
            self.report_time.get_or_insert_with(|| Instant::now() + REPORT_AFTER);
        }
        is_new
    }

    /// The runs that were active last, and the last numbers received of each: at most [`RUNS`] runs of several
    /// messages, and at most [`RUNS`] of a single message.
    pub fn latest_runs(&self) -> Vec<(u64, Range<u64>)> {
        let singles = self.runs.latest_singles().take(RUNS);
        self.runs.latest().take(RUNS).chain(singles).collect()
    }

    /// From now on, records before the first record of a new run count as missing, because messages may have been
    /// sent while the receiver was disconnected.
    pub fn expect_beginnings(&mut self) {
        self.runs.expect_beginnings();
    }

    /// Gives the present gaps time to close. Gaps that open meanwhile get their time afterwards.
    fn expect_gaps_to_close(&mut self) {
        if self.gap_time.is_none() {
            let now = Instant::now();
            self.runs.take_snapshot();
            self.gap_time = Some(match (self.access, self.reported_at) {
                (Access::Shared, _) => now + GAP_DELAY,
                (Access::Exclusive, Some(last)) => now.max(last + REPORT_AFTER),
                (Access::Exclusive, None) => now,
            });
        }
    }

    /// When to [report redelivered and late messages](LossReport::report_redelivered).
    pub fn report_time(&self) -> Option<Instant> {
        self.report_time
    }

    /// When to report the gaps, if there are any.
    pub fn gap_time(&self) -> Option<Instant> {
        self.gap_time
    }

    /// Records reported as missed and not received since.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Whether there are gaps that are not reported.
    pub fn has_gaps(&self) -> bool {
        self.runs.have_gaps()
    }

    /// Reports the gaps whose time has passed.
    pub fn report_gaps(&mut self) {
        self.report(match self.access {
            Access::Exclusive => Gaps::All,
            Access::Shared => Gaps::InSnapshot,
        });
        self.restart();
    }

    /// Reports all gaps at once.
    pub fn report_all_gaps(&mut self) {
        self.report(Gaps::All);
        self.gap_time = None;
    }

    fn report(&mut self, which: Gaps) {
        let unless = match self.access {
            Access::Exclusive => "",
            Access::Shared => ", unless another receiver of the queue has written them",
        };
        self.reported_at = Some(Instant::now());
        let Missing { gaps, forgotten } = self.runs.take_gaps(which);
        for (run, Range { start, end }) in gaps.iter().take(GAPS) {
            let numbers = match end - start {
                1 => start.to_string(),
                _ => format!("{start} to {}", end - 1),
            };
            let missed = messages(end - start);
            // A gap from number 1 on is in a run that was unknown before.
            let (most, sent) = match start {
                1 => ("up to ", ", sent while disconnected or before this receiver started"),
                _ => ("", ""),
            };
            (self.alert)(format!(
                "missed {most}{missed} from run {run:016x} ({numbers}){sent}{unless}"
            ));
        }
        let count = |gaps: &[(u64, Range<u64>)]| total(gaps.iter().map(|(_, gap)| gap.clone()));
        let in_more_gaps = count(&gaps[gaps.len().min(GAPS)..]).saturating_add(forgotten);
        if in_more_gaps > 0 {
            (self.alert)(format!("missed {} in more gaps{unless}", messages(in_more_gaps)));
        }
        self.missed = self.missed.saturating_add(count(&gaps)).saturating_add(forgotten);
    }

    /// Gives all gaps new time to close after a new subscription.
    pub fn restart(&mut self) {
        self.gap_time = None;
        if self.has_gaps() {
            self.expect_gaps_to_close();
        }
    }

    /// Discards the gaps: other receivers of the queue have the messages.
    pub fn discard_gaps(&mut self) {
        self.runs.discard_gaps();
        self.gap_time = None;
    }

    /// Reports late messages, and messages that may be written twice.
    pub fn report_redelivered(&mut self) {
        self.report_time = None;
        let Pending { late, redelivered, unverified, conflicting } = mem::take(&mut self.pending);
        let alert = |text: &str, count| {
            if count > 0 {
                (self.alert)(format!("{} {text}", messages(count)));
            }
        };
        self.missed = self.missed.saturating_sub(late);
        alert("reported as missed arrived late", late);
        if unverified > 0 {
            log::warn!("{} left out: their numbers were written before", messages(unverified));
        }
        alert("written with the number of another message", conflicting);
        alert("may be repeated: delivered before, and not acknowledged", redelivered);
    }
}

fn messages(count: u64) -> String {
    match count {
        1 => "1 message".into(),
        _ => format!("{count} messages"),
    }
}

impl Display for LossReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} missed, {} repeated and left out", self.missed, self.repeated)
    }
}

#[cfg(test)]
mod tests {
    use logs_tests::Message;

    use super::*;
    use crate::testing::{Alerts, alert, messages};

    fn of_run(run: u64, number: u64) -> Message {
        let message_id = Some(format!("emit-log/{run:016x}/{number}"));
        Message { message_id, ..Message::default() }
    }

    fn numbered(number: u64) -> Message {
        of_run(1, number)
    }

    fn observe(report: &mut LossReport, numbers: impl Iterator<Item = u64>) {
        let numbered: Vec<_> = numbers.map(numbered).collect();
        for message in messages(&numbered) {
            report.observe(&message);
        }
    }

    #[test]
    fn a_gap_of_a_shared_queue_has_time_to_close() {
        let mut report = LossReport::new(Access::Shared, &[], alert);
        observe(&mut report, [1, 3].into_iter());
        let time = report.gap_time().unwrap();
        assert!(time > Instant::now() + GAP_DELAY / 2);
        observe(&mut report, [5].into_iter());
        assert_eq!(report.gap_time(), Some(time));
        let alerts = Alerts::during(|| report.report_gaps());
        let text = "missed 1 message from run 0000000000000001 (2), unless another receiver of the \
                    queue has written them";
        assert_eq!(alerts, [text], "the other gap has had no time yet");
        assert!(report.gap_time().unwrap() > time);
        observe(&mut report, [4].into_iter());
        assert_eq!(Alerts::during(|| report.report_gaps()), [""; 0]);
        assert_eq!(report.gap_time(), None);
    }

    #[test]
    fn a_new_subscription_gives_gaps_new_time() {
        let mut report = LossReport::new(Access::Shared, &[], alert);
        observe(&mut report, [1, 3].into_iter());
        let time = report.gap_time().unwrap();
        report.restart();
        assert!(report.gap_time().unwrap() > time);
        observe(&mut report, [2].into_iter());
        report.restart();
        assert_eq!(report.gap_time(), None);
    }

    #[test]
    fn reports_of_gaps_of_an_exclusive_queue_are_limited() {
        let mut report = LossReport::new(Access::Exclusive, &[], alert);
        observe(&mut report, [1, 3].into_iter());
        assert!(report.gap_time().unwrap() <= Instant::now());
        Alerts::during(|| report.report_gaps());
        observe(&mut report, [5].into_iter());
        assert!(report.gap_time().unwrap() > Instant::now() + REPORT_AFTER / 2);
    }

    #[test]
    fn gaps_beyond_the_limit_are_counted() {
        let mut report = LossReport::new(Access::Exclusive, &[], alert);
        observe(&mut report, (1..=25).map(|number| 3 * number));
        let alerts = Alerts::during(|| report.report_all_gaps());
        assert_eq!(alerts.len(), GAPS + 1);
        assert_eq!(alerts[0], "missed 2 messages from run 0000000000000001 (4 to 5)");
        assert_eq!(alerts[GAPS], "missed 8 messages in more gaps");
        assert_eq!(report.to_string(), "48 missed, 0 repeated and left out");
        assert_eq!(Alerts::during(|| report.report_all_gaps()), [""; 0]);
    }

    #[test]
    fn a_discarded_gap_is_never_reported() {
        let mut report = LossReport::new(Access::Shared, &[], alert);
        observe(&mut report, [1, 3].into_iter());
        report.discard_gaps();
        observe(&mut report, [2].into_iter());
        let alerts = Alerts::during(|| {
            report.report_all_gaps();
            report.report_redelivered();
        });
        assert_eq!(alerts, [""; 0]);
    }

    #[test]
    fn filling_a_discarded_gap_does_not_cancel_a_loss() {
        let mut report = LossReport::new(Access::Shared, &[], alert);
        observe(&mut report, [1, 3].into_iter());
        Alerts::during(|| report.report_all_gaps());
        observe(&mut report, [5].into_iter());
        report.discard_gaps();
        observe(&mut report, [4].into_iter());
        assert_eq!(Alerts::during(|| report.report_redelivered()), [""; 0]);
        assert_eq!(report.missed(), 1);
        observe(&mut report, [2].into_iter());
        let alerts = Alerts::during(|| report.report_redelivered());
        assert_eq!(alerts, ["1 message reported as missed arrived late"]);
        assert_eq!(report.missed(), 0);
    }

    #[test]
    fn a_missing_start_of_a_run_is_reported_after_an_outage() {
        let mut report = LossReport::new(Access::Exclusive, &[], alert);
        observe(&mut report, [700].into_iter());
        assert_eq!(report.gap_time(), None);
        report.expect_beginnings();
        report.observe(&messages(&[of_run(2, 801)])[0]);
        assert!(report.gap_time().is_some());
        let alerts = Alerts::during(|| report.report_gaps());
        let text = "missed up to 800 messages from run 0000000000000002 (1 to 800), sent while disconnected or \
                    before this receiver started";
        assert_eq!(alerts, [text]);
        assert_eq!(report.missed(), 800);
    }

    #[test]
    fn single_messages_do_not_displace_longer_runs() {
        let mut report = LossReport::new(Access::Exclusive, &[], alert);
        let singles: Vec<_> = (1000..11_000).map(|run| of_run(run, 1)).collect();
        observe(&mut report, 1..=3);
        messages(&singles).iter().for_each(|message| _ = report.observe(message));
        let runs = report.latest_runs();
        assert_eq!(runs.len(), 1 + RUNS);
        let mut report = LossReport::new(Access::Exclusive, &runs, alert);
        let again = [numbered(3), singles[singles.len() - RUNS].clone(), numbered(4)];
        let written: Vec<_> =
            messages(&again).iter().map(|message| report.observe(message)).collect();
        assert_eq!(written, [false, false, true]);
        let alerts = Alerts::during(|| report.report_redelivered());
        assert_eq!(alerts, [""; 0]);
        assert_eq!(report.latest_runs().len(), 1 + RUNS);
    }

    #[test]
    fn other_messages_with_known_numbers_are_reported() {
        let mut report = LossReport::new(Access::Exclusive, &[], alert);
        let forged =
            Message { message_type: Some("lines".into()), body: vec![b'\n'; 4999], ..of_run(1, 2) };
        let real = |number: u64| Message { body: number.to_string().into(), ..of_run(1, number) };
        let all: Vec<_> = [of_run(1, 1), forged].into_iter().chain((2..=1000).map(real)).collect();
        let all = messages(&all);
        assert!(all.iter().all(|message| report.observe(message)));
        assert!(!all.iter().any(|message| report.observe(message)));
        let alerts = Alerts::during(|| report.report_redelivered());
        assert_eq!(alerts, ["999 messages written with the number of another message"]);
    }
}
