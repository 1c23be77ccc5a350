//! From records to messages.

use std::mem;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use logs_common::wire::{MAX_BATCH, Packing};
use memchr::memchr;

use crate::message::{Message, end_of_batch};

/// Makes messages of records and numbers them. The messages share the memory of the records.
pub struct Packer {
    separator: u8,
    batch: bool,
    /// How long records wait for others to share a message.
    linger: Duration,
    /// Records that wait, and when the first of them was read.
    lingering: Vec<u8>,
    since: Option<Instant>,
    /// Records that are not in a message yet, and when the first of them was read.
    chunk: Bytes,
    read_at: Instant,
    /// The number of the next record.
    number: u64,
}

impl Packer {
    /// A packer for records that end in `separator`; with `batch`, a message holds as many records as come
    /// together, up to 64 KiB, or within `linger` of the first.
    pub fn new(separator: u8, batch: bool, linger: Duration) -> Packer {
        Packer {
            separator,
            batch,
            linger,
            lingering: Vec::new(),
            since: None,
            chunk: Bytes::new(),
            read_at: Instant::now(),
            number: 1,
        }
    }

    /// Takes complete records, of which only the last may lack the separator, and when they were read. All messages
    /// that are ready have to be taken before the next call.
    pub fn add(&mut self, chunk: Bytes, read_at: Instant) {
        debug_assert!(self.chunk.is_empty());
        if self.linger.is_zero() {
            (self.chunk, self.read_at) = (chunk, read_at);
            return;
        }
        self.since.get_or_insert(read_at);
        self.lingering.extend_from_slice(&chunk);
        if self.lingering.len() >= MAX_BATCH || self.deadline().is_some_and(|time| time <= read_at)
        {
            self.release();
        }
    }

    /// Until when records wait, if any do.
    pub fn deadline(&self) -> Option<Instant> {
        self.since?.checked_add(self.linger)
    }

    /// Makes the records that wait ready.
    pub fn release(&mut self) {
        if self.chunk.is_empty()
            && let Some(since) = self.since.take()
        {
            (self.chunk, self.read_at) = (mem::take(&mut self.lingering).into(), since);
        }
    }

    /// The messages of all records, also of those that wait.
    pub fn take_all(&mut self) -> Vec<Message> {
        let mut messages: Vec<_> = self.collect();
        self.release();
        messages.extend(self);
        messages
    }

    /// Whether records are ready.
    pub fn is_ready(&self) -> bool {
        !self.chunk.is_empty()
    }
}

impl Iterator for Packer {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if self.chunk.is_empty() {
            return None;
        }
        let end = match self.batch {
            true => end_of_batch(&self.chunk, self.separator, MAX_BATCH),
            false => memchr(self.separator, &self.chunk),
        };
        let body = self.chunk.split_to(end.unwrap_or(self.chunk.len()));
        self.chunk.advance(usize::from(!self.chunk.is_empty()));
        let message = match self.batch {
            true => Message::joined(body, Packing::separated_by(self.separator), self.number),
            false => Message::single(body, self.number),
        };
        self.number += message.records;
        Some(Message { read_at: self.read_at, ..message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut packer = Packer::new(b'\n', false, Duration::ZERO);
        assert_eq!(
            pack(&mut packer, b"one\n\r\n\nfour\n"),
            [("one", 1), ("\r", 2), ("", 3), ("four", 4)]
        );
        assert_eq!(pack(&mut packer, b"end"), [("end", 5)]);
    }

    #[test]
    fn a_batch_holds_what_comes_together() {
        let mut packer = Packer::new(b'\n', true, Duration::ZERO);
        assert_eq!(pack(&mut packer, b"one\ntwo\n\n"), [("one\ntwo\n", 1)]);
        assert_eq!(pack(&mut packer, b"four\n"), [("four", 4)]);
        assert_eq!(pack(&mut packer, b"\n"), [("", 5)]);
        assert_eq!(pack(&mut packer, b"end"), [("end", 6)]);
        let mut packer = Packer::new(b'\0', true, Duration::ZERO);
        assert_eq!(pack(&mut packer, b"a\nb\0c\0"), [("a\nb\0c", 1)]);
    }

    #[test]
    fn a_batch_is_bounded_unless_a_single_record_is_larger() {
        let mut chunk = b"small\n".repeat(3);
        chunk.extend(vec![b'x'; MAX_BATCH + 1]);
        chunk.push(b'\n');
        chunk.extend(b"y".repeat(MAX_BATCH - 2));
        chunk.extend(b"\nz\nend\n");
        let mut packer = Packer::new(b'\n', true, Duration::ZERO);
        packer.add(chunk.into(), Instant::now());
        let messages: Vec<_> =
            packer.by_ref().map(|m| (m.body.len(), m.records, m.number)).collect();
        assert_eq!(messages, [(17, 3, 1), (MAX_BATCH + 1, 1, 4), (MAX_BATCH, 2, 5), (3, 1, 7)]);
    }

    #[test]
    fn lingering_records_share_a_message_until_the_time_is_up_or_the_batch_is_full() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut packer = Packer::new(b'\n', true, 2 * second);
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
}
