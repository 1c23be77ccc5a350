//! Packs records into messages.

use std::collections::VecDeque;
use std::mem;
use std::time::Instant;

use bytes::{Buf, Bytes};
use logs_common::wire::{MAX_BATCH, Packing};
use memchr::memchr;

use crate::batch::Batch;
use crate::cutter::{Cutter, Rest};
use crate::keys::Keys;
use crate::message::{Message, end_of_batch};

/// Packs records into messages. The messages share the memory of the records. A batch has the records of one routing
/// key: it ends before the first record of another key, so that all records keep their order.
pub struct Packer {
    cutter: Cutter,
    /// With `--join`, the lines that are not in a message yet.
    joined: Option<Joined>,
    /// Records that wait for others, and when the first of them was read.
    lingering: Vec<u8>,
    since: Option<Instant>,
    /// Records that are not in a message yet, and when the first of them was read.
    chunk: Bytes,
    read_at: Instant,
    keys: Keys,
}

impl Packer {
    /// A packer for records that are cut by these rules.
    pub fn new(cutter: Cutter, keys: Keys) -> Packer {
        Packer {
            joined: cutter.join.is_some().then(Joined::new),
            cutter,
            lingering: Vec::new(),
            since: None,
            chunk: Bytes::new(),
            read_at: Instant::now(),
            keys,
        }
    }

    /// Adds complete records, of which only the last may lack the separator. The caller must take all ready messages
    /// before the next call.
    pub fn add(&mut self, chunk: Bytes, read_at: Instant) {
        debug_assert!(self.chunk.is_empty());
        if let Some(joined) = &mut self.joined {
            return joined.add(&chunk, &self.cutter, &mut self.keys, read_at);
        }
        // The content of a full pipe may be slightly smaller than a full message.
        let batch = self.cutter.batch;
        let is_full = |length: usize| match batch {
            Batch::WhileUnconfirmed => length >= MAX_BATCH / 2,
            _ => length >= MAX_BATCH,
        };
        if batch.linger().is_zero() || self.since.is_none() && is_full(chunk.len()) {
            (self.chunk, self.read_at) = (chunk, read_at);
            return;
        }
        self.since.get_or_insert(read_at);
        self.lingering.extend_from_slice(&chunk);
        if is_full(self.lingering.len()) || self.deadline().is_some_and(|time| time <= read_at) {
            self.release();
        }
    }

    /// When waiting records become ready; `None` if no record waits.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.joined {
            Some(joined) => joined.rest.deadline(&self.cutter),
            None => self.since?.checked_add(self.cutter.batch.linger()),
        }
    }

    /// Whether lines share records, so that the number of records is known only from the messages.
    pub fn joins_lines(&self) -> bool {
        self.joined.is_some()
    }

    /// Whether a record waits for more lines.
    pub fn has_partial(&self) -> bool {
        self.joined.as_ref().is_some_and(|joined| !joined.text.is_empty())
    }

    /// Makes waiting records ready, because all messages are confirmed.
    pub fn release_waiting(&mut self) {
        if let Some(joined) = &mut self.joined {
            joined.release(&self.cutter, &mut self.keys, self.cutter.releases_confirmed());
        } else if self.cutter.batch == Batch::WhileUnconfirmed {
            self.release();
        }
    }

    /// Makes waiting records ready, except a record that waits for more lines.
    pub fn release(&mut self) {
        if let Some(joined) = &mut self.joined {
            return joined.release(&self.cutter, &mut self.keys, false);
        }
        if self.chunk.is_empty()
            && let Some(since) = self.since.take()
        {
            (self.chunk, self.read_at) = (mem::take(&mut self.lingering).into(), since);
        }
    }

    /// The index of the key of the next message, and the index of the separator at which it ends, if there is one.
    fn next_batch(&self) -> (usize, Option<usize>) {
        let Cutter { separator, batch, .. } = self.cutter;
        if batch != Batch::Off && !self.keys.vary() {
            return (0, end_of_batch(&self.chunk, separator, MAX_BATCH));
        }
        let end_from = |start: usize| Some(start + memchr(separator, &self.chunk[start..])?);
        let key_of = |start: usize, end: Option<usize>| {
            self.keys.index_of(&self.chunk[start..end.unwrap_or(self.chunk.len())])
        };
        let mut end = end_from(0);
        let key = key_of(0, end);
        while batch != Batch::Off
            && let Some(start) = end.map(|end| end + 1)
            && start < self.chunk.len()
        {
            let next = end_from(start);
            if next.unwrap_or(self.chunk.len()) > MAX_BATCH || key_of(start, next) != key {
                break;
            }
            end = next;
        }
        (key, end)
    }

    /// The messages of all records, including waiting ones.
    pub fn take_all(&mut self) -> Vec<Message> {
        let mut messages: Vec<_> = self.collect();
        match &mut self.joined {
            Some(joined) => {
                joined.cut(joined.text.len(), &self.cutter, &mut self.keys, Instant::now())
            }
            None => self.release(),
        }
        messages.extend(self);
        messages
    }
}

impl Iterator for Packer {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if let Some(joined) = &mut self.joined {
            return joined.ready.pop_front();
        }
        if self.chunk.is_empty() {
            return None;
        }
        let (key, end) = self.next_batch();
        let body = self.chunk.split_to(end.unwrap_or(self.chunk.len()));
        self.chunk.advance(usize::from(!self.chunk.is_empty()));
        let message = match self.cutter.batch {
            Batch::Off => Message::single(body, 0),
            _ => Message::joined(body, Packing::separated_by(self.cutter.separator), 0),
        };
        Some(self.keys.assign(key, Message { read_at: self.read_at, ..message }))
    }
}

/// Lines of which some share a record.
struct Joined {
    text: Vec<u8>,
    rest: Rest,
    ready: VecDeque<Message>,
}

impl Joined {
    fn new() -> Joined {
        Joined { text: Vec::new(), rest: Rest::new(Instant::now()), ready: VecDeque::new() }
    }

    fn add(&mut self, lines: &[u8], cutter: &Cutter, keys: &mut Keys, now: Instant) {
        self.text.extend_from_slice(lines);
        self.rest.grow(now);
        self.cut(0, cutter, keys, now);
    }

    /// Makes the records ready that have waited long enough.
    fn release(&mut self, cutter: &Cutter, keys: &mut Keys, released: bool) {
        let now = Instant::now();
        if let Some(due) = self.rest.due(cutter, now, released) {
            self.cut(due, cutter, keys, now);
            self.cut(0, cutter, keys, now);
        }
    }

    /// Makes the records ready that are complete, or within the first `closed` bytes.
    fn cut(&mut self, closed: usize, cutter: &Cutter, keys: &mut Keys, now: Instant) {
        let text = if closed > 0 { &self.text[..closed] } else { &self.text[..] };
        let cut = cutter.cut(text, closed > 0, keys);
        let taken = cut.taken();
        self.rest.set(&cut, self.text.len(), taken, now);
        self.ready.extend(cut.messages.into_iter().map(|cut| keys.assign(cut.key, cut.message)));
        self.text.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::batch::LONGEST_WAIT;

    fn new_packer(separator: u8, batch: Batch) -> Packer {
        let cutter = Cutter {
            separator,
            join: None,
            join_timeout: Duration::ZERO,
            batch,
            idle: None,
            max_record: 1024 * 1024,
            skip_empty: false,
        };
        Packer::new(cutter, Keys::new("", None, None).unwrap())
    }

    /// Body and number of each message.
    fn pack(packer: &mut Packer, chunk: &'static [u8]) -> Vec<(&'static str, u64)> {
        packer.add(Bytes::from_static(chunk), Instant::now());
        let messages = packer.map(|message| {
            assert_eq!(message.packing == Packing::Single, message.records == 1);
            assert_eq!(message.packing.count(&message.body), message.records);
            (String::from_utf8(message.body.to_vec()).unwrap().leak() as &str, message.number)
        });
        messages.collect()
    }

    #[test]
    fn each_record_is_a_message() {
        let mut packer = new_packer(b'\n', Batch::Off);
        assert_eq!(
            pack(&mut packer, b"one\n\r\n\nfour\n"),
            [("one", 1), ("\r", 2), ("", 3), ("four", 4)]
        );
        assert_eq!(pack(&mut packer, b"end"), [("end", 5)]);
    }

    #[test]
    fn a_batch_holds_records_that_are_read_together() {
        let mut packer = new_packer(b'\n', Batch::Within(Duration::ZERO));
        assert_eq!(pack(&mut packer, b"one\ntwo\n\n"), [("one\ntwo\n", 1)]);
        assert_eq!(pack(&mut packer, b"four\n"), [("four", 4)]);
        assert_eq!(pack(&mut packer, b"\n"), [("", 5)]);
        assert_eq!(pack(&mut packer, b"end"), [("end", 6)]);
        let mut packer = new_packer(b'\0', Batch::Within(Duration::ZERO));
        assert_eq!(pack(&mut packer, b"a\nb\0c\0"), [("a\nb\0c", 1)]);
    }

    #[test]
    fn a_batch_is_bounded_unless_a_single_record_is_larger() {
        let mut chunk = b"small\n".repeat(3);
        chunk.extend(vec![b'x'; MAX_BATCH + 1]);
        chunk.push(b'\n');
        chunk.extend(b"y".repeat(MAX_BATCH - 2));
        chunk.extend(b"\nz\nend\n");
        let mut packer = new_packer(b'\n', Batch::Within(Duration::ZERO));
        packer.add(chunk.into(), Instant::now());
        let messages: Vec<_> =
            packer.by_ref().map(|m| (m.body.len(), m.records, m.number)).collect();
        assert_eq!(messages, [(17, 3, 1), (MAX_BATCH + 1, 1, 4), (MAX_BATCH, 2, 5), (3, 1, 7)]);
    }

    #[test]
    fn records_linger_until_the_deadline_or_a_full_batch() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut packer = new_packer(b'\n', Batch::Within(2 * second));
        let add = |packer: &mut Packer, chunk: &[u8], seconds: u32| {
            packer.add(chunk.to_vec().into(), start + seconds * second);
            let messages: Vec<_> = packer.collect();
            let since = messages.first().map(|message| (message.read_at - start).as_secs());
            (since, messages.iter().map(|message| message.body.len()).collect::<Vec<_>>())
        };
        assert_eq!(add(&mut packer, b"a\n", 0), (None, vec![]));
        assert_eq!(packer.deadline(), Some(start + 2 * second));
        assert_eq!(add(&mut packer, b"b\n", 1), (None, vec![]));
        assert_eq!(add(&mut packer, b"c\n", 2), (Some(0), vec![5]));
        assert_eq!(packer.deadline(), None);
        assert_eq!(add(&mut packer, b"d\n", 3), (None, vec![]));
        assert_eq!(
            add(&mut packer, &b"x\n".repeat(MAX_BATCH / 2), 4),
            (Some(3), vec![MAX_BATCH - 1, 1])
        );
        assert_eq!(add(&mut packer, b"e\n", 5), (None, vec![]));
        packer.release();
        assert_eq!(packer.next().map(|message| message.number), Some(5 + MAX_BATCH as u64 / 2));
    }

    #[test]
    fn records_wait_briefly_while_a_message_is_unconfirmed() {
        let mut packer = new_packer(b'\n', Batch::WhileUnconfirmed);
        let start = Instant::now();
        let add = |packer: &mut Packer, chunk: &[u8], milliseconds: u64| {
            packer.add(chunk.to_vec().into(), start + Duration::from_millis(milliseconds));
            packer.map(|message| message.records).collect::<Vec<_>>()
        };
        assert!(add(&mut packer, b"a\n", 0).is_empty());
        assert_eq!(packer.deadline(), Some(start + LONGEST_WAIT));
        assert!(add(&mut packer, b"b\n", 4).is_empty());
        assert_eq!(add(&mut packer, b"c\n", 5), [3]);
        assert!(add(&mut packer, b"d\n", 6).is_empty());
        packer.release_waiting();
        assert_eq!(packer.by_ref().count(), 1);
        assert_eq!(add(&mut packer, &b"x\n".repeat(MAX_BATCH / 4), 7), [MAX_BATCH as u64 / 4]);
        assert_eq!(packer.deadline(), None);
        let mut packer = new_packer(b'\n', Batch::Within(LONGEST_WAIT));
        assert!(add(&mut packer, b"a\n", 0).is_empty());
        packer.release_waiting();
        assert_eq!(packer.count(), 0, "with --linger, records always wait");
    }
}
