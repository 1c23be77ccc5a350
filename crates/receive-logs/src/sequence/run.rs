//! Which numbers of one run were received.

use std::collections::VecDeque;
use std::iter;
use std::mem;
use std::ops::Range;

/// Ranges of a run: there are several only where messages are missing or others share the queue. A
/// broker redelivers no more than the prefetch count, some two thousand messages.
pub const RANGES_OF_RUN: usize = 4096;

/// How a message relates to the earlier messages of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The next message, or the first.
    InOrder,
    /// Messages before this one are missing.
    Gap,
    /// A gap is filled; so many of the records have been reported as missing.
    Late(u64),
    /// The same message was received before.
    Duplicate,
    /// All numbers were received before, and the messages with these numbers are forgotten.
    Unverified,
    /// All numbers were received before, with other content.
    Conflict,
}

/// The numbers received: ranges in ascending order that do not touch.
#[derive(Default)]
pub struct Run {
    pub received: Vec<Range<u64>>,
    /// First number and content of recent messages, in ascending order of the numbers.
    pub contents: VecDeque<(u64, u64)>,
    /// Messages with numbers below this one are forgotten, as by a restart.
    pub known_from: u64,
    /// Whether nothing was received since the restart. The recorded numbers may be older than the position.
    is_restored: bool,
    /// Whether a message had the numbers of others.
    pub has_conflict: bool,
    /// Gaps that were reported, without the numbers received since.
    pub reported: Vec<Range<u64>>,
    /// Gaps below this number are reported or discarded.
    pub settled: u64,
    /// Gaps below this number are in the snapshot.
    pub snapshot: u64,
}

impl Run {
    /// A run that goes on after these numbers.
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

    /// A run of which these numbers were written before a restart.
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

    /// Adds numbers to those received.
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

    /// Adds numbers that begin before the end of the last range.
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

    /// Whether a message whose numbers were all received is one of the known messages.
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
        // Most messages are in order, and a search among all contents would miss the caches.
        let place = match self.contents.back() {
            Some((last, _)) if *last > number => {
                self.contents.partition_point(|(known, _)| *known <= number)
            }
            _ => self.contents.len(),
        };
        self.contents.insert(place, (number, content));
    }

    /// Where the last range ends.
    pub fn end(&self) -> u64 {
        self.received.last().map_or(0, |range| range.end)
    }

    /// The gaps below `end` that are not settled yet.
    pub fn gaps(&self, end: u64) -> impl Iterator<Item = Range<u64>> {
        let from = self.received.partition_point(|range| range.end < self.settled);
        let gaps = self.received[from..].windows(2).map(|pair| pair[0].end..pair[1].start);
        let settled = self.settled;
        gaps.take_while(move |gap| gap.end <= end).filter(move |gap| gap.start >= settled)
    }

    /// Forgets the earlier half when there is too much to remember. Returns how many records are
    /// missing in the gaps that are forgotten and not settled.
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

/// How many numbers there are in ranges, whose ends anybody may have made up.
pub fn total(ranges: impl Iterator<Item = Range<u64>>) -> u64 {
    ranges.fold(0, |total, range| total.saturating_add(range.end.saturating_sub(range.start)))
}

/// Takes the numbers of `new` out of ranges in ascending order; returns how many of them there were.
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
