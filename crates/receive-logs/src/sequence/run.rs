//! Tracks the numbers of one run.

use std::collections::VecDeque;
use std::iter;
use std::mem;
use std::ops::Range;

/// The maximum number of ranges of a run. A run has several only if messages are missing or others share the queue. A
/// broker redelivers at most the prefetch count, about two thousand messages.
pub const RANGES_OF_RUN: usize = 4096;

/// The relation of a message to the earlier messages of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The message is the next one, or the first.
    InOrder,
    /// Messages before this one are missing.
    Gap,
    /// The message fills a gap. This number of its records was reported as missing.
    Late(u64),
    /// The message was received before.
    Duplicate,
    /// All its numbers were received before. The messages with these numbers are forgotten, so their content cannot
    /// be compared.
    Unverified,
    /// All its numbers were received before, with other content.
    Conflict,
}

/// The received numbers: ranges in ascending order, which do not touch.
#[derive(Default)]
pub struct Run {
    pub received: Vec<Range<u64>>,
    /// The first number and the content of recent messages, in ascending order of numbers.
    pub contents: VecDeque<(u64, u64)>,
    /// Messages with numbers below this one are forgotten, for example by a restart.
    pub known_from: u64,
    /// Whether no message was received since the restart. The stream may continue after the recorded numbers.
    is_restored: bool,
    /// Whether a message had the numbers of another message.
    pub has_conflict: bool,
    /// Reported gaps, without the numbers that were received since.
    pub reported: Vec<Range<u64>>,
    /// Gaps below this number are reported or discarded.
    pub settled: u64,
    /// Gaps below this number are in the snapshot.
    pub snapshot: u64,
}

impl Run {
    /// A run that continues after these numbers.
    pub fn after(numbers: Range<u64>) -> Run {
        let end = numbers.end;
        Run {
            received: vec![numbers],
            known_from: end,
            settled: end,
            snapshot: end,
            ..Run::default()
        }
    }

    /// A run whose `numbers` were written before a restart.
    pub fn restored(numbers: Range<u64>) -> Run {
        Run { is_restored: true, ..Run::after(numbers) }
    }

    pub fn observe(&mut self, new: Range<u64>, content: u64) -> Observation {
        let number = new.start;
        let observation = self.add(new);
        match observation {
            Observation::Duplicate => return self.compare(number, content),
            _ => self.remember(number, content),
        }
        observation
    }

    /// Adds numbers to the received ones.
    fn add(&mut self, new: Range<u64>) -> Observation {
        let is_first = self.received.is_empty() || mem::take(&mut self.is_restored);
        match self.received.last_mut() {
            Some(last) if new.start == last.end => {
                last.end = new.end;
                Observation::InOrder
            }
            Some(last) if new.start < last.end => self.add_again(&new),
            _ if is_first => {
                (self.settled, self.snapshot) = (new.end, new.end);
                self.received.push(new);
                Observation::InOrder
            }
            _ => {
                self.received.push(new);
                Observation::Gap
            }
        }
    }

    /// Adds numbers that start before the end of the last range.
    fn add_again(&mut self, new: &Range<u64>) -> Observation {
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
        self.received.splice(from..to, iter::once(start..end));
        Observation::Late(remove(&mut self.reported, new))
    }

    /// Compares a message whose numbers were all received with the remembered messages.
    fn compare(&mut self, number: u64, content: u64) -> Observation {
        let from = self.contents.partition_point(|(known, _)| *known < number);
        let mut known = self.contents.range(from..).take_while(|(known, _)| *known == number);
        if known.any(|(_, known)| *known == content) {
            return Observation::Duplicate;
        }
        if number < self.known_from {
            return Observation::Unverified;
        }
        self.has_conflict = true;
        self.remember(number, content);
        Observation::Conflict
    }

    fn remember(&mut self, number: u64, content: u64) {
        // Most messages are in order, so they are appended. A search in all contents would miss the CPU caches.
        let place = match self.contents.back() {
            Some((last, _)) if *last > number => {
                self.contents.partition_point(|(known, _)| *known <= number)
            }
            _ => self.contents.len(),
        };
        self.contents.insert(place, (number, content));
    }

    /// The end of the last range.
    pub fn end(&self) -> u64 {
        self.received.last().map_or(0, |range| range.end)
    }

    /// The gaps below `end` that are neither reported nor discarded.
    pub fn gaps(&self, end: u64) -> impl Iterator<Item = Range<u64>> {
        let from = self.received.partition_point(|range| range.end < self.settled);
        let gaps = self.received[from..].windows(2).map(|pair| pair[0].end..pair[1].start);
        let settled = self.settled;
        gaps.take_while(move |gap| gap.end <= end).filter(move |gap| gap.start >= settled)
    }

    /// Forgets the first half of the ranges when there are too many. Returns how many records are missing in the
    /// forgotten gaps that are neither reported nor discarded.
    pub fn forget(&mut self) -> u64 {
        if self.received.len() <= RANGES_OF_RUN {
            return 0;
        }
        let first = self.received[RANGES_OF_RUN / 2].start;
        let missing = total(self.gaps(first));
        self.received.drain(..RANGES_OF_RUN / 2);
        self.reported.retain(|range| range.end > first);
        self.settled = self.settled.max(first);
        missing
    }
}

/// The total length of ranges. It saturates, because a sender can choose any numbers.
pub fn total(ranges: impl Iterator<Item = Range<u64>>) -> u64 {
    ranges.fold(0, |total, range| total.saturating_add(range.end.saturating_sub(range.start)))
}

/// Removes the numbers of `new` from ranges in ascending order. Returns how many are removed.
fn remove(ranges: &mut Vec<Range<u64>>, new: &Range<u64>) -> u64 {
    let from = ranges.partition_point(|range| range.end <= new.start);
    let to = ranges.partition_point(|range| range.start < new.end);
    let touched = &ranges[from..to];
    let (Some(first), Some(last)) = (touched.first(), touched.last()) else {
        return 0;
    };
    let rest = [first.start..new.start, new.end..last.end];
    let removed = total(touched.iter().cloned()) - total(rest.iter().cloned());
    ranges.splice(from..to, rest.into_iter().filter(|range| !range.is_empty()));
    removed
}
