//! Cuts text into records, and records into messages: the text of a file, or of joined lines.

use std::mem;
use std::time::{Duration, Instant};

use bytes::Bytes;
use logs_common::wire::{MAX_BATCH, Packing};
use memchr::{memchr, memchr_iter, memrchr};

use crate::batch::Batch;
use crate::join::Join;
use crate::keys::Keys;
use crate::message::Message;

/// The rules by which a text is cut.
pub struct Cutter {
    /// The byte that ends a line.
    pub separator: u8,
    /// Which lines share a record.
    pub join: Option<Join>,
    /// How long a record may wait for its next line.
    pub join_timeout: Duration,
    /// Which records share a message.
    pub batch: Batch,
    /// How long a line may wait for its end; `None` is no limit.
    pub idle: Option<Duration>,
    /// Limit for a record in bytes.
    pub max_record: usize,
    /// Skip empty records.
    pub skip_empty: bool,
}

/// A part of a text.
pub struct Cut {
    /// Messages without numbers, in order.
    pub messages: Vec<CutMessage>,
    /// The end of the skipped records if there are no messages.
    pub skipped: usize,
    /// The end of the last complete record, and of the last whole line.
    pub complete: usize,
    pub lines: usize,
    /// The start of a record that is too large. No record after it is in the messages.
    pub too_large: Option<usize>,
}

/// A message of the text.
pub struct CutMessage {
    pub message: Message,
    /// The index of its routing key.
    pub key: usize,
    /// The end of its last record, with the separator.
    pub end: usize,
}

impl Cut {
    /// The end of the last message, or of skipped records.
    pub fn taken(&self) -> usize {
        self.messages.last().map_or(self.skipped, |last| last.end)
    }
}

impl Cutter {
    /// Whether complete records do not have to wait for others when all earlier messages are confirmed.
    pub fn releases_confirmed(&self) -> bool {
        self.batch == Batch::WhileUnconfirmed
    }

    /// Cuts a text that begins with a record. If it `is_closed`, its last record is complete, and no other records will
    /// join its last message.
    pub fn cut(&self, text: &[u8], is_closed: bool, keys: &Keys) -> Cut {
        let lines = memrchr(self.separator, text).map_or(0, |last| last + 1);
        let (ends, too_large) = self.ends(text, lines, is_closed);
        let complete = ends.last().copied().unwrap_or(0);
        let bytes = Bytes::copy_from_slice(&text[..complete]);
        let (mut messages, mut group, mut start, mut skipped) =
            (Vec::new(), Group::default(), 0, 0);
        for end in ends {
            let length = end - start - usize::from(text[end - 1] == self.separator);
            let record = bytes.slice(start..start + length);
            start = end;
            if record.is_empty() && self.skip_empty {
                skipped = end;
                continue;
            }
            let key = keys.index_of(&record);
            let is_single = self.join.is_some() && memchr(0, &record).is_some();
            if !group.has_room_for(&record, key, is_single) || self.batch == Batch::Off {
                messages.extend(group.take(self.packing()));
            }
            group.add(record, key, end, is_single);
        }
        if is_closed || self.batch == Batch::Off || too_large.is_some() {
            messages.extend(group.take(self.packing()));
        }
        if !messages.is_empty() || !group.records.is_empty() {
            skipped = 0;
        }
        Cut { messages, skipped, complete, lines, too_large }
    }

    /// Joined lines contain newlines, so joined records are separated by NUL.
    fn packing(&self) -> Packing {
        match self.join {
            Some(_) => Packing::Nul,
            None => Packing::separated_by(self.separator),
        }
    }

    /// The ends of the records of a text with whole lines up to `lines`, and the start of one that is too large.
    fn ends(&self, text: &[u8], lines: usize, is_closed: bool) -> (Vec<usize>, Option<usize>) {
        let (mut found, mut start) = (Vec::new(), 0);
        loop {
            let ends = self.ends_from(text, start, lines, is_closed);
            // The last record is not complete, but may be too large already.
            let open = ends.last().is_none_or(|last| *last < text.len()).then_some(text.len());
            let all = ends.iter().copied().chain(open);
            let mut split = None;
            for end in all {
                if end - start > self.max_record + 1 {
                    let within = &text[start..=start + self.max_record];
                    let newline = memrchr(self.separator, within);
                    split = Some(newline.filter(|_| self.join.is_some()));
                    break;
                }
                if Some(end) != open {
                    found.push(end);
                    start = end;
                }
            }
            match split {
                None => return (found, None),
                Some(None) => return (found, Some(start)),
                Some(Some(newline)) => {
                    start += newline + 1;
                    found.push(start);
                }
            }
        }
    }

    /// The ends of the complete records from a position on.
    fn ends_from(&self, text: &[u8], start: usize, lines: usize, is_closed: bool) -> Vec<usize> {
        let mut ends: Vec<_> = match &self.join {
            Some(join) => join.ends(&text[start..lines.max(start)]),
            None => memchr_iter(self.separator, &text[start..]).map(|end| end + 1).collect(),
        };
        ends.iter_mut().for_each(|end| *end += start);
        if is_closed && ends.last().copied().unwrap_or(start) < text.len() {
            ends.push(text.len());
        }
        ends
    }
}

/// What is left of a text, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    length: usize,
    /// The length of the complete records in it, and of the whole lines.
    complete: usize,
    lines: usize,
    /// When the first complete record was read.
    complete_since: Instant,
    /// When the text last grew.
    grown_at: Instant,
}

impl Rest {
    pub fn new(now: Instant) -> Rest {
        Rest { length: 0, complete: 0, lines: 0, complete_since: now, grown_at: now }
    }

    /// Records that the text has grown.
    pub fn grow(&mut self, now: Instant) {
        self.grown_at = now;
    }

    /// When the text last grew.
    pub fn grown_at(&self) -> Instant {
        self.grown_at
    }

    /// Records that a cut has taken the first bytes of a text of this length.
    pub fn set(&mut self, cut: &Cut, length: usize, taken: usize, now: Instant) {
        if self.complete == 0 || taken > 0 {
            self.complete_since = now;
        }
        self.length = length - taken;
        self.complete = cut.complete.saturating_sub(taken);
        self.lines = cut.lines.saturating_sub(taken);
    }

    /// Records that nothing is left.
    pub fn clear(&mut self) {
        (self.length, self.complete, self.lines) = (0, 0, 0);
    }

    /// When the rest has waited long enough; `None` for never.
    pub fn deadline(&self, cutter: &Cutter) -> Option<Instant> {
        match (self.length, self.lines, self.complete) {
            (0, ..) => None,
            (_, 0, 0) => self.grown_at.checked_add(cutter.idle?),
            (_, _, 0) => self.grown_at.checked_add(cutter.join_timeout),
            _ => self.complete_since.checked_add(cutter.batch.linger()),
        }
    }

    /// Whether whole lines wait.
    pub fn has_lines(&self) -> bool {
        self.lines > 0
    }

    /// The length of the part that has waited long enough; `None` if there is none. Complete records do not have to
    /// wait for others if they are `released`.
    pub fn due(&self, cutter: &Cutter, now: Instant, released: bool) -> Option<usize> {
        let is_released = released && self.complete > 0;
        let has_waited = self.deadline(cutter).is_some_and(|deadline| deadline <= now);
        (is_released || has_waited).then_some(match (self.lines, self.complete) {
            (0, 0) => self.length,
            (lines, 0) => lines,
            (_, complete) => complete,
        })
    }
}

/// Records that share a message.
#[derive(Default)]
struct Group {
    records: Vec<Bytes>,
    key: usize,
    /// The end of the last record in the text.
    end: usize,
    /// The length of the message.
    length: usize,
    /// Whether the record cannot share a message.
    is_single: bool,
}

impl Group {
    fn has_room_for(&self, record: &Bytes, key: usize, is_single: bool) -> bool {
        self.records.is_empty()
            || key == self.key
                && !is_single
                && !self.is_single
                && self.length + 1 + record.len() <= MAX_BATCH
    }

    fn add(&mut self, record: Bytes, key: usize, end: usize, is_single: bool) {
        self.length += record.len() + usize::from(!self.records.is_empty());
        (self.key, self.end, self.is_single) = (key, end, is_single);
        self.records.push(record);
    }

    fn take(&mut self, packing: Packing) -> Option<CutMessage> {
        let Group { mut records, key, end, .. } = mem::take(self);
        let message = match (records.len(), packing.separator()) {
            (0, _) => return None,
            (1, _) | (_, None) => Message::single(records.remove(0), 0),
            (_, Some(separator)) => {
                let body = records.join(&separator);
                Message::joined(body.into(), packing, 0)
            }
        };
        Some(CutMessage { message, key, end })
    }
}
