//! Which numbered messages have come, which are missing, and which come twice.

use std::iter;
use std::mem;
use std::ops::Range;

use amqp::Delivery;
use logs_common::wire::{Layout, MessageId};
use lru::LruCache;

/// Ranges of numbers remembered, of all runs together. Each run has at least one.
const RANGES: usize = 16_384;

/// Ranges of a run: there are several only where messages are missing or others share the queue. A
/// broker redelivers no more than the prefetch count, some two thousand messages.
const RANGES_OF_RUN: usize = 4096;

/// How a message relates to the earlier messages of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The next message, or the first.
    InOrder,
    /// Messages before this one are missing.
    Gap,
    /// A gap is filled; so many of the records have been [taken](SequenceTracker::take_gaps) for missing.
    Late(u64),
    /// All records have come before.
    Duplicate,
}

/// The runs that messages have come from; those least recently active are forgotten when there are too many.
pub struct SequenceTracker {
    runs: LruCache<u64, Run>,
    ranges: usize,
    /// Records missing that nobody has taken note of before their gap was forgotten.
    forgotten: u64,
}

/// Which gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// All that there are.
    All,
    /// Those that were there already at the last [mark](SequenceTracker::mark).
    Marked,
}

/// Records that are missing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The runs, and the numbers in them.
    pub gaps: Vec<(u64, Range<u64>)>,
    /// Records in gaps that are forgotten.
    pub forgotten: u64,
}

impl SequenceTracker {
    /// None yet.
    pub fn new() -> SequenceTracker {
        SequenceTracker { runs: LruCache::unbounded(), ranges: 0, forgotten: 0 }
    }

    /// Takes note of a message of `records` records, of which `id` has the number of the first.
    pub fn observe(&mut self, id: MessageId, records: u64) -> Observation {
        let numbers = id.number..id.number + records;
        let run = self.runs.get_or_insert_mut(id.run, Run::default);
        let before = run.received.len();
        let received = run.observe(numbers);
        self.forgotten += run.forget();
        self.ranges = self.ranges + run.received.len() - before;
        while self.ranges > RANGES
            && let Some((_, forgotten)) = self.runs.pop_lru()
        {
            self.ranges -= forgotten.received.len();
            self.forgotten += forgotten.gaps(u64::MAX).map(|gap| gap.end - gap.start).sum::<u64>();
        }
        received
    }

    /// Notes a message, and returns the number of its records as well. A message without a number is in
    /// order, wherever it comes.
    pub fn observe_delivery(&mut self, delivery: &Delivery) -> (u64, Observation) {
        let Layout { records, id, .. } = Layout::of(&delivery.properties, &delivery.body);
        (records, id.map_or(Observation::InOrder, |id| self.observe(id, records)))
    }

    /// Marks the gaps that there are, so that they can be told from those to come.
    pub fn mark(&mut self) {
        self.runs.iter_mut().for_each(|(_, run)| run.marked = run.end());
    }

    /// The missing records not taken before, those of the run least recently active first.
    pub fn take_gaps(&mut self, which: Gaps) -> Missing {
        let mut gaps = Vec::new();
        for (id, run) in self.runs.iter_mut().rev() {
            let end = match which {
                Gaps::All => run.end(),
                Gaps::Marked => run.marked,
            };
            gaps.extend(run.gaps(end).map(|gap| (*id, gap)));
            run.taken = run.taken.max(end);
        }
        Missing { gaps, forgotten: mem::take(&mut self.forgotten) }
    }

    /// Whether anything is missing that has not been taken.
    pub fn have_gaps(&self) -> bool {
        let has_gaps = |run: &Run| run.gaps(u64::MAX).next().is_some();
        self.forgotten > 0 || self.runs.iter().any(|(_, run)| has_gaps(run))
    }
}

/// The numbers that have come: ranges in ascending order that do not touch.
#[derive(Default)]
struct Run {
    received: Vec<Range<u64>>,
    /// Numbers below this one, before the first received or forgotten, do not count as missing.
    first: u64,
    /// Gaps below this number are taken, or marked.
    taken: u64,
    marked: u64,
}

impl Run {
    fn observe(&mut self, new: Range<u64>) -> Observation {
        match self.received.last_mut() {
            None => {
                self.first = new.start;
                (self.taken, self.marked) = (new.end, new.end);
                self.received.push(new);
                Observation::InOrder
            }
            Some(last) if new.start == last.end => {
                last.end = new.end;
                Observation::InOrder
            }
            Some(last) if new.start > last.end => {
                self.received.push(new);
                Observation::Gap
            }
            Some(_) => self.observe_again(&new),
        }
    }

    /// Notes a message that begins before the end of the last range.
    fn observe_again(&mut self, new: &Range<u64>) -> Observation {
        let from = self.received.partition_point(|range| range.end < new.start);
        let to = self.received.partition_point(|range| range.start <= new.end);
        let touched = &self.received[from..to];
        if let [only] = touched
            && only.start <= new.start
            && new.end <= only.end
        {
            return Observation::Duplicate;
        }
        let start = touched.first().map_or(new.start, |range| range.start.min(new.start));
        let end = touched.last().map_or(new.end, |range| range.end.max(new.end));
        let missable =
            |start: u64, end: u64| end.min(self.taken).saturating_sub(start.max(self.first));
        let known: u64 = touched.iter().map(|range| missable(range.start, range.end)).sum();
        let late = missable(start, end) - known;
        self.received.splice(from..to, iter::once(start..end));
        Observation::Late(late)
    }

    /// Where the last range ends.
    fn end(&self) -> u64 {
        self.received.last().map_or(0, |range| range.end)
    }

    /// The gaps below `end` that are not taken yet.
    fn gaps(&self, end: u64) -> impl Iterator<Item = Range<u64>> {
        let from = self.received.partition_point(|range| range.end < self.taken);
        let gaps = self.received[from..].windows(2).map(|pair| pair[0].end..pair[1].start);
        let taken = self.taken;
        gaps.take_while(move |gap| gap.end <= end).filter(move |gap| gap.start >= taken)
    }

    /// Forgets the earlier half when there is too much to remember. Returns how many records are
    /// missing in the gaps that are forgotten and not taken.
    fn forget(&mut self) -> u64 {
        if self.received.len() <= RANGES_OF_RUN {
            return 0;
        }
        let first = self.received[RANGES_OF_RUN / 2].start;
        let missing = self.gaps(first).map(|gap| gap.end - gap.start).sum();
        self.received.drain(..RANGES_OF_RUN / 2);
        self.first = first;
        self.taken = self.taken.max(first);
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe(runs: &mut SequenceTracker, run: u64, number: u64, records: u64) -> Observation {
        runs.observe(MessageId { run, number }, records)
    }

    #[test]
    fn what_comes_in_order_is_in_order_wherever_it_begins() {
        let mut runs = SequenceTracker::new();
        for (run, number, records) in [(1, 1, 1), (1, 2, 5), (2, 700, 1), (1, 7, 1), (2, 701, 3)] {
            assert_eq!(observe(&mut runs, run, number, records), Observation::InOrder);
        }
        assert_eq!(runs.ranges, 2);
    }

    /// First and last number of each.
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
        assert_eq!(observe(&mut runs, 1, 1, 32), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 34, 1), Observation::InOrder);
        assert_eq!(runs.ranges, 1);
    }

    #[test]
    fn a_gap_that_is_filled_before_it_is_taken_is_none() {
        let mut runs = SequenceTracker::new();
        for number in [1, 5, 9] {
            observe(&mut runs, 1, number, 1);
        }
        runs.mark();
        assert_eq!(observe(&mut runs, 1, 20, 1), Observation::Gap);
        assert_eq!(observe(&mut runs, 1, 2, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 7, 1), Observation::Late(0));
        assert_eq!(gaps(&mut runs, Gaps::Marked), [(6, 6), (8, 8)]);
        assert!(runs.have_gaps());
        assert_eq!(gaps(&mut runs, Gaps::Marked), []);
        assert_eq!(observe(&mut runs, 1, 6, 1), Observation::Late(1));
        assert_eq!(observe(&mut runs, 1, 10, 10), Observation::Late(0));
        assert!(!runs.have_gaps());
    }

    #[test]
    fn what_comes_twice_is_repeated() {
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
    fn what_was_before_the_first_is_new_but_was_not_missing() {
        let mut runs = SequenceTracker::new();
        observe(&mut runs, 1, 100, 1);
        assert_eq!(observe(&mut runs, 1, 50, 1), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 98, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 49, 3), Observation::Late(0));
        assert_eq!(observe(&mut runs, 1, 99, 1), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 102, 1), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(101, 101)]);
        assert_eq!(observe(&mut runs, 1, 99, 3), Observation::Late(1));
    }

    #[test]
    fn memory_is_bounded() {
        let mut runs = SequenceTracker::new();
        for number in 1..3 * RANGES as u64 {
            observe(&mut runs, 1, 2 * number, 1);
        }
        assert!(runs.ranges <= RANGES_OF_RUN);
        let Missing { gaps, forgotten } = runs.take_gaps(Gaps::All);
        assert_eq!(gaps.len() as u64 + forgotten, 3 * RANGES as u64 - 2, "each is counted");
        assert_eq!(observe(&mut runs, 1, 6 * RANGES as u64 - 2, 1), Observation::Duplicate);
        // A large gap that others fill here and there.
        observe(&mut runs, 1, 100 * RANGES as u64, 1);
        for number in 4 * RANGES as u64..6 * RANGES as u64 {
            observe(&mut runs, 1, 2 * number, 1);
        }
        assert!(runs.ranges <= RANGES_OF_RUN);
        for run in 2..3 * RANGES as u64 {
            observe(&mut runs, run, 1, 1);
        }
        assert_eq!((runs.ranges, runs.runs.len()), (RANGES, RANGES));
        assert_eq!(observe(&mut runs, 3 * RANGES as u64 - 1, 1, 1), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 2, 1, 1), Observation::InOrder, "forgotten");
    }

    #[test]
    fn numbers_at_the_end_of_the_scale_do_no_harm() {
        const LAST: u64 = i64::MAX as u64;
        let mut runs = SequenceTracker::new();
        observe(&mut runs, 1, 5, 1);
        assert_eq!(observe(&mut runs, 1, LAST, 3), Observation::Gap);
        assert_eq!(gaps(&mut runs, Gaps::All), [(6, LAST - 1)]);
        assert_eq!(observe(&mut runs, 1, LAST, 3), Observation::Duplicate);
        assert_eq!(observe(&mut runs, 1, 0, LAST), Observation::Late(LAST - 6));
    }
}
