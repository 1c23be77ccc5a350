//! Tracks the numbers of messages: received, missing, and repeated.

pub mod run;

use std::hash::{BuildHasher, Hasher};
use std::mem;
use std::ops::Range;

use foldhash::quality::RandomState;
use logs_common::wire::{Layout, MessageId};
use lru::LruCache;

use self::run::{Observation, Run, total};
use crate::message::Message;

/// The maximum number of ranges of numbers to remember, of all runs together. Each run has at least one.
const RANGES: usize = 16_384;

/// The maximum number of runs of a single message to remember.
const SINGLES: usize = RANGES;

/// The numbers of a run of a single message.
const FIRST: Range<u64> = 1..2;

/// The maximum number of messages whose content is remembered, of all runs together, to recognise a duplicate.
/// emit-log sends at most 40,000 messages again, because it has at most that many unconfirmed.
const CONTENTS: usize = 4 * RANGES;

/// The runs of the received messages. If there are too many, those that were inactive longest are forgotten.
pub struct SequenceTracker {
    runs: LruCache<u64, Run>,
    /// Runs of which only the first record was received, as of `emit-log MESSAGE`, with its content; `None` if it was
    /// received before a restart. They are separate, so that thousands of them do not displace longer runs.
    singles: LruCache<u64, Option<u64>>,
    ranges: usize,
    contents: usize,
    /// A random seed, so that a sender cannot construct a message with the hash of another message.
    hash: RandomState,
    /// The number of missing records in gaps that were forgotten before a report.
    forgotten: u64,
    /// Whether records before the first of a new run count as missing.
    expects_beginnings: bool,
}

/// A selection of gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// All of them.
    All,
    /// The gaps in the last [snapshot](SequenceTracker::take_snapshot).
    InSnapshot,
}

/// Missing records.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The runs and their missing numbers.
    pub gaps: Vec<(u64, Range<u64>)>,
    /// The number of missing records in forgotten gaps.
    pub forgotten: u64,
}

impl SequenceTracker {
    /// Starts without any run.
    pub fn new() -> SequenceTracker {
        SequenceTracker {
            runs: LruCache::unbounded(),
            singles: LruCache::unbounded(),
            ranges: 0,
            contents: 0,
            hash: RandomState::default(),
            forgotten: 0,
            expects_beginnings: false,
        }
    }

    /// Restores a run: these numbers were written before the receiver was restarted.
    pub fn restore(&mut self, run: u64, numbers: Range<u64>) {
        match numbers {
            FIRST => drop(self.singles.put(run, None)),
            _ => self.insert(run, Run::restored(numbers)),
        }
    }

    fn insert(&mut self, id: u64, run: Run) {
        self.ranges += run.received.len();
        self.contents += run.contents.len();
        self.runs.put(id, run);
    }

    /// The runs, the one that was active last first, and the last range of numbers received of each. Runs with a
    /// conflict are excluded, because their numbers do not identify a message without its content.
    pub fn latest(&self) -> impl Iterator<Item = (u64, Range<u64>)> {
        let runs = self.runs.iter().filter(|(_, run)| !run.has_conflict);
        runs.filter_map(|(id, run)| Some((*id, run.received.last()?.clone())))
    }

    /// The same for runs of which only the first record was received.
    pub fn latest_singles(&self) -> impl Iterator<Item = (u64, Range<u64>)> {
        self.singles.iter().map(|(id, _)| (*id, FIRST))
    }

    /// From now on, records before the first record of a new run count as missing. They were sent while the receiver
    /// was disconnected, or before it started.
    pub fn expect_beginnings(&mut self) {
        self.expects_beginnings = true;
    }

    /// Observes a message of this number of records, the first of which has the number of `id`. `content` is a hash
    /// of the body and the number of records.
    pub fn observe(&mut self, id: MessageId, records: u64, content: u64) -> Observation {
        let numbers = id.number..id.number + records;
        if !self.runs.contains(&id.run)
            && let Some(observation) = self.begin_run(id.run, &numbers, content)
        {
            return observation;
        }
        let run = self.runs.get_or_insert_mut(id.run, Run::default);
        let (before, contents) = (run.received.len(), run.contents.len());
        let observation = run.observe(numbers, content);
        self.forgotten = self.forgotten.saturating_add(run.forget());
        self.ranges = self.ranges + run.received.len() - before;
        self.contents = self.contents + run.contents.len() - contents;
        self.enforce_limits();
        observation
    }

    /// Observes a message if no other record than the first of its run was received. For any other message, moves the
    /// run to `runs` and returns `None`.
    fn begin_run(&mut self, id: u64, numbers: &Range<u64>, content: u64) -> Option<Observation> {
        let first = self.singles.get(&id).copied();
        if *numbers == FIRST {
            match first {
                None => {
                    self.singles.put(id, Some(content));
                    self.enforce_limits();
                    return Some(Observation::InOrder);
                }
                Some(None) => return Some(Observation::Unverified),
                Some(Some(known)) if known == content => return Some(Observation::Duplicate),
                Some(Some(_)) => {}
            }
        }
        self.singles.pop(&id);
        match first {
            None if !self.expects_beginnings => {}
            // The first record of the run may have been received and forgotten.
            None if numbers.start == 2 && self.singles.len() == SINGLES => {}
            // Numbers start at 1, so 0 marks the start of the run as received.
            None => self.insert(id, Run::after(0..1)),
            Some(None) => self.insert(id, Run::restored(FIRST)),
            Some(Some(content)) => {
                let mut run = Run::default();
                run.observe(FIRST, content);
                self.insert(id, run);
            }
        }
        None
    }

    /// Forgets runs and contents beyond the limits.
    fn enforce_limits(&mut self) {
        while self.singles.len() > SINGLES {
            self.singles.pop_lru();
        }
        while self.ranges > RANGES
            && let Some((_, forgotten)) = self.runs.pop_lru()
        {
            self.ranges -= forgotten.received.len();
            self.contents -= forgotten.contents.len();
            self.forgotten = self.forgotten.saturating_add(total(forgotten.gaps(u64::MAX)));
            // A forgotten run cannot be distinguished from a new one.
            self.expects_beginnings = false;
        }
        if self.contents > CONTENTS {
            // A quarter at a time, because this takes long. At this limit, the runs have on average more than four
            // contents each, so at least one is removed.
            self.contents = 0;
            for (_, run) in &mut self.runs {
                if let Some((last, _)) = run.contents.drain(..run.contents.len() / 4).next_back() {
                    run.known_from = run.known_from.max(last + 1);
                }
                self.contents += run.contents.len();
            }
        }
    }

    /// Observes a message. A message without a number is in order.
    pub fn observe_message(&mut self, message: &Message) -> Observation {
        let Layout { records, id, .. } = message.layout;
        let Some(id) = id else {
            return Observation::InOrder;
        };
        let mut hasher = self.hash.build_hasher();
        hasher.write_u64(records);
        hasher.write(&message.delivery.body);
        self.observe(id, records, hasher.finish())
    }

    /// Remembers which gaps are open now.
    pub fn take_snapshot(&mut self) {
        self.runs.iter_mut().for_each(|(_, run)| run.snapshot = run.end());
    }

    /// Takes the missing records that were not taken before; they count as reported. The run that was inactive
    /// longest is first.
    pub fn take_gaps(&mut self, which: Gaps) -> Missing {
        let mut gaps = Vec::new();
        for (id, run) in self.runs.iter_mut().rev() {
            let end = match which {
                Gaps::All => run.end(),
                Gaps::InSnapshot => run.snapshot,
            };
            let taken: Vec<_> = run.gaps(end).collect();
            gaps.extend(taken.iter().map(|gap| (*id, gap.clone())));
            run.reported.extend(taken);
            run.settled = run.settled.max(end);
        }
        Missing { gaps, forgotten: mem::take(&mut self.forgotten) }
    }

    /// Discards the gaps, so that they are never reported.
    pub fn discard_gaps(&mut self) {
        self.runs.iter_mut().for_each(|(_, run)| run.settled = run.end());
        self.forgotten = 0;
    }

    /// Whether there are missing records that were not taken.
    pub fn have_gaps(&self) -> bool {
        let has_gaps = |run: &Run| run.gaps(u64::MAX).next().is_some();
        self.forgotten > 0 || self.runs.iter().any(|(_, run)| has_gaps(run))
    }
}

#[cfg(test)]
mod tests {
    use super::run::RANGES_OF_RUN;
    use super::*;

    /// A message whose content is determined by its number of records.
    fn observe(runs: &mut SequenceTracker, run: u64, number: u64, records: u64) -> Observation {
        runs.observe(MessageId { run, number }, records, records)
    }

    #[test]
    fn a_run_may_begin_with_any_number() {
        let mut runs = SequenceTracker::new();
        for (run, number, records) in [(1, 1, 1), (1, 2, 5), (2, 700, 1), (1, 7, 1), (2, 701, 3)] {
            assert_eq!(observe(&mut runs, run, number, records), Observation::InOrder);
        }
        assert_eq!(runs.ranges, 2);
    }

    /// The first and last number of each gap.
    fn gaps(runs: &mut SequenceTracker, which: Gaps) -> Vec<(u64, u64)> {
        let gaps = runs.take_gaps(which).gaps.into_iter();
        gaps.map(|(_, gap)| (gap.start, gap.end - 1)).collect()
    }

    #[test]
    fn a_gap_is_taken_once_and_may_be_filled_late() {
        let mut runs = SequenceTracker::new();
        observe(&mut runs, 1, 1, 10);
        assert_eq!(observe(&mut runs, 1, 31, 1), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(11, 30)]);
        assert_eq!(gaps(&mut runs, Gaps::All), []);
        assert_eq!(observe(&mut runs, 1, 32, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 1, 15, 5), Observation::Late(5));
        assert_eq!(observe(&mut runs, 1, 15, 5), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 11, 4), Observation::Late(4));
        assert_eq!(
            observe(&mut runs, 1, 18, 4),
            Observation::Late(2),
            "the last two of them are new"
        );
        assert_eq!(observe(&mut runs, 1, 1, 33), Observation::Late(9), "22 to 30");
        assert_eq!(observe(&mut runs, 1, 1, 33), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 34, 1), Observation::InOrder);
        assert_eq!(runs.ranges, 1);
    }

    #[test]
    fn a_gap_that_is_filled_in_time_is_not_taken() {
        let mut runs = SequenceTracker::new();
        for number in [1, 5, 9] {
            observe(&mut runs, 1, number, 1);
        }
        runs.take_snapshot();
        assert_eq!(observe(&mut runs, 1, 20, 1), Observation::Gap);
        assert_eq!(observe(&mut runs, 1, 2, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 7, 1), Observation::Late(0));
        assert_eq!(gaps(&mut runs, Gaps::InSnapshot), [(6, 6), (8, 8)]);
        assert!(runs.have_gaps());
        assert_eq!(gaps(&mut runs, Gaps::InSnapshot), []);
        assert_eq!(observe(&mut runs, 1, 6, 1), Observation::Late(1));
        assert_eq!(observe(&mut runs, 1, 10, 10), Observation::Late(0));
        assert!(!runs.have_gaps());
    }

    #[test]
    fn a_repeated_message_is_a_duplicate() {
        let mut runs = SequenceTracker::new();
        for number in 1..=5 {
            observe(&mut runs, 1, number, 1);
        }
        for number in 3..=5 {
            assert_eq!(observe(&mut runs, 1, number, 1), Observation::Duplicate);
        }
        assert_eq!(observe(&mut runs, 1, 6, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 2, 3, 1), Observation::InOrder, "of another run");
    }

    #[test]
    fn earlier_numbers_than_the_first_are_new_but_not_missing() {
        let mut runs = SequenceTracker::new();
        observe(&mut runs, 1, 100, 1);
        assert_eq!(observe(&mut runs, 1, 50, 1), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 98, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 49, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 98, 3), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 102, 1), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(101, 101)]);
        assert_eq!(observe(&mut runs, 1, 99, 3), Observation::Late(1));
    }

    #[test]
    fn other_content_under_a_known_number_is_a_conflict() {
        let mut runs = SequenceTracker::new();
        let mut message =
            |number, records, content| runs.observe(MessageId { run: 1, number }, records, content);
        assert_eq!(message(1, 1, 7), Observation::InOrder);
        // A message that claims the numbers of later messages.
        assert_eq!(message(2, 5000, 8), Observation::InOrder);
        for number in 2..1000 {
            assert_eq!(message(number, 1, 9), Observation::Conflict);
            assert_eq!(message(number, 1, 9), Observation::Duplicate, "sent twice");
        }
        assert_eq!(message(2, 5000, 8), Observation::Duplicate);
        assert_eq!(message(5002, 1, 9), Observation::InOrder);
    }

    #[test]
    fn restored_numbers_count_as_written() {
        let mut runs = SequenceTracker::new();
        runs.restore(1, 5..11);
        assert_eq!(observe(&mut runs, 1, 4, 1), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 5, 1), Observation::Unverified);
        assert_eq!(observe(&mut runs, 1, 9, 2), Observation::Unverified);
        assert_eq!(observe(&mut runs, 1, 10, 2), Observation::Late(0), "the second is new");
        assert_eq!(observe(&mut runs, 1, 12, 1), Observation::InOrder);
        assert_eq!(runs.latest().collect::<Vec<_>>(), [(1, 4..13)]);
        // The receiver may continue at a later position than the recorded numbers.
        runs.restore(2, 5..11);
        assert_eq!(observe(&mut runs, 2, 51, 1), Observation::InOrder);
        assert!(!runs.have_gaps());
        assert_eq!(observe(&mut runs, 2, 53, 1), Observation::Gap);
    }

    #[test]
    fn a_run_with_a_conflict_is_not_restored_by_its_numbers() {
        let mut runs = SequenceTracker::new();
        runs.observe(MessageId { run: 1, number: 1 }, 5000, 1);
        assert_eq!(runs.latest().count(), 1);
        assert_eq!(runs.observe(MessageId { run: 1, number: 1 }, 1, 2), Observation::Conflict);
        assert_eq!(runs.latest().count(), 0);
    }

    #[test]
    fn a_duplicate_with_forgotten_content_is_not_a_conflict() {
        let mut runs = SequenceTracker::new();
        for number in 1..=100 {
            observe(&mut runs, 1, number, 1);
        }
        for number in 1..=3 * CONTENTS as u64 {
            observe(&mut runs, 2, number, 1);
        }
        assert_eq!(observe(&mut runs, 1, 1, 1), Observation::Unverified);
        assert_eq!(observe(&mut runs, 1, 100, 1), Observation::Duplicate);
    }

    #[test]
    fn a_missing_start_of_a_run_is_a_gap_if_expected() {
        let mut runs = SequenceTracker::new();
        assert_eq!(observe(&mut runs, 1, 801, 1), Observation::InOrder);
        runs.expect_beginnings();
        assert_eq!(observe(&mut runs, 1, 802, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 2, 1, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 3, 801, 1), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(1, 800)]);
        assert_eq!(observe(&mut runs, 3, 701, 100), Observation::Late(100));
    }

    #[test]
    fn a_discarded_gap_was_never_reported() {
        let mut runs = SequenceTracker::new();
        for number in [1, 3] {
            observe(&mut runs, 1, number, 1);
        }
        assert_eq!(gaps(&mut runs, Gaps::All), [(2, 2)]);
        observe(&mut runs, 1, 6, 1);
        runs.discard_gaps();
        assert!(!runs.have_gaps());
        assert_eq!(observe(&mut runs, 1, 4, 2), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 2, 1), Observation::Late(1));
    }

    #[test]
    fn memory_is_limited() {
        let mut runs = SequenceTracker::new();
        for number in 1..3 * RANGES as u64 {
            observe(&mut runs, 1, 2 * number, 1);
        }
        assert!(runs.ranges <= RANGES_OF_RUN);
        let Missing { gaps, forgotten } = runs.take_gaps(Gaps::All);
        assert_eq!(gaps.len() as u64 + forgotten, 3 * RANGES as u64 - 2, "each is counted");
        assert_eq!(observe(&mut runs, 1, 6 * RANGES as u64 - 2, 1), Observation::Duplicate);
        // A large gap that other messages fill in part.
        observe(&mut runs, 1, 100 * RANGES as u64, 1);
        for number in 4 * RANGES as u64..6 * RANGES as u64 {
            observe(&mut runs, 1, 2 * number, 1);
        }
        assert!(runs.ranges <= RANGES_OF_RUN);
        for run in 2..3 * RANGES as u64 {
            observe(&mut runs, run, 5, 1);
        }
        assert_eq!((runs.ranges, runs.runs.len()), (RANGES, RANGES));
        assert_eq!(observe(&mut runs, 3 * RANGES as u64 - 1, 5, 1), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 2, 5, 1), Observation::InOrder, "forgotten");
        for number in 1..3 * CONTENTS as u64 {
            observe(&mut runs, 1, number, 1);
        }
        let known: usize = runs.runs.iter().map(|(_, run)| run.contents.len()).sum();
        assert!(
            known == runs.contents && (CONTENTS * 5 / 8..=CONTENTS).contains(&known),
            "{known}"
        );
    }

    #[test]
    fn memory_is_limited_after_an_outage() {
        let mut runs = SequenceTracker::new();
        runs.expect_beginnings();
        for run in 0..3 * RANGES as u64 {
            observe(&mut runs, run, 1, 1);
            observe(&mut runs, run, 2, 1);
        }
        assert_eq!((runs.ranges, runs.runs.len()), (RANGES, RANGES));
    }

    #[test]
    fn single_messages_do_not_displace_a_longer_run() {
        const OTHERS: Range<u64> = 1000..1000 + 3 * SINGLES as u64;
        let mut runs = SequenceTracker::new();
        for number in 1..=3 {
            observe(&mut runs, 1, number, 1);
        }
        for run in OTHERS {
            assert_eq!(observe(&mut runs, run, 1, 1), Observation::InOrder);
            assert_eq!(observe(&mut runs, run, 1, 1), Observation::Duplicate);
        }
        assert_eq!((runs.singles.len(), runs.ranges, runs.contents), (SINGLES, 1, 3));
        assert!(!runs.have_gaps());
        assert_eq!(observe(&mut runs, OTHERS.start, 1, 1), Observation::InOrder, "forgotten");
        assert_eq!(
            observe(&mut runs, OTHERS.end - SINGLES as u64 / 2, 1, 1),
            Observation::Duplicate
        );
        assert_eq!(observe(&mut runs, 1, 2, 1), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 5, 1), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(4, 4)]);
    }

    #[test]
    fn a_run_of_one_message_may_continue() {
        let mut runs = SequenceTracker::new();
        for run in 1..=5 {
            assert_eq!(observe(&mut runs, run, 1, 1), Observation::InOrder);
        }
        assert_eq!(observe(&mut runs, 1, 2, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 1, 1, 1), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 2, 4, 1), Observation::Gap);
        assert_eq!(observe(&mut runs, 3, 1, 7), Observation::Late(0), "more records than before");
        let other = MessageId { run: 4, number: 1 };
        assert_eq!(runs.observe(other, 1, 9), Observation::Conflict);
        assert_eq!(runs.observe(other, 1, 1), Observation::Duplicate);
        assert_eq!(gaps(&mut runs, Gaps::All), [(2, 3)]);
        assert_eq!(runs.latest_singles().collect::<Vec<_>>(), [(5, FIRST)]);
    }

    #[test]
    fn a_single_message_is_restored() {
        let mut runs = SequenceTracker::new();
        for run in 1..=3 {
            runs.restore(run, FIRST);
        }
        assert_eq!((runs.singles.len(), runs.ranges), (3, 0));
        assert_eq!(observe(&mut runs, 1, 1, 1), Observation::Unverified);
        assert_eq!(observe(&mut runs, 2, 2, 1), Observation::InOrder);
        assert_eq!(observe(&mut runs, 2, 1, 1), Observation::Unverified);
        assert_eq!(
            observe(&mut runs, 3, 70, 1),
            Observation::InOrder,
            "the position is that of later messages"
        );
        assert!(!runs.have_gaps());
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        const LAST: u64 = i64::MAX as u64;
        let mut runs = SequenceTracker::new();
        observe(&mut runs, 1, 5, 1);
        assert_eq!(observe(&mut runs, 1, LAST, 3), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(6, LAST - 1)]);
        assert_eq!(observe(&mut runs, 1, LAST, 3), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 0, LAST), Observation::Late(LAST - 6));
        for run in 2..6 {
            observe(&mut runs, run, 1, 1);
            observe(&mut runs, run, LAST, 1);
        }
        let all = runs.take_gaps(Gaps::All).gaps.into_iter();
        assert_eq!(total(all.map(|(_, gap)| gap)), u64::MAX);
    }
}
