//! From records to messages.

use bytes::{Buf, Bytes};
use logs_common::wire::Packing;
use memchr::memchr;

use crate::message::{Message, end_of_batch};

/// Bytes in a batch; a single larger record is a message of its own.
const MAX_BATCH: usize = 64 * 1024;

/// Makes messages of records and numbers them. The messages share the memory of the records.
pub struct Packer {
    separator: u8,
    batch: bool,
    /// Records that are not in a message yet.
    chunk: Bytes,
    /// The number of the next record.
    number: u64,
}

impl Packer {
    /// A packer for records that end in `separator`; with `batch`, a message holds as many records as come
    /// together, up to 64 KiB.
    pub fn new(separator: u8, batch: bool) -> Packer {
        Packer { separator, batch, chunk: Bytes::new(), number: 1 }
    }

    /// Takes complete records, of which only the last may lack the separator. All their messages have to be
    /// taken before the next call.
    pub fn add(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty());
        self.chunk = chunk;
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
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Body and number of each message.
    fn pack(packer: &mut Packer, chunk: &'static [u8]) -> Vec<(&'static str, u64)> {
        packer.add(Bytes::from_static(chunk));
        let messages = packer.map(|message| {
            assert_eq!(message.packing == Packing::Single, message.records == 1);
            assert_eq!(message.packing.count(&message.body), message.records);
            (String::from_utf8(message.body.to_vec()).unwrap().leak() as &str, message.number)
        });
        messages.collect()
    }

    #[test]
    fn each_record_is_a_message() {
        let mut packer = Packer::new(b'\n', false);
        assert_eq!(
            pack(&mut packer, b"one\n\r\n\nfour\n"),
            [("one", 1), ("\r", 2), ("", 3), ("four", 4)]
        );
        assert_eq!(pack(&mut packer, b"end"), [("end", 5)]);
    }

    #[test]
    fn a_batch_holds_what_comes_together() {
        let mut packer = Packer::new(b'\n', true);
        assert_eq!(pack(&mut packer, b"one\ntwo\n\n"), [("one\ntwo\n", 1)]);
        assert_eq!(pack(&mut packer, b"four\n"), [("four", 4)]);
        assert_eq!(pack(&mut packer, b"\n"), [("", 5)]);
        assert_eq!(pack(&mut packer, b"end"), [("end", 6)]);
        let mut packer = Packer::new(b'\0', true);
        assert_eq!(pack(&mut packer, b"a\nb\0c\0"), [("a\nb\0c", 1)]);
    }

    #[test]
    fn a_batch_is_bounded_unless_a_single_record_is_larger() {
        let mut chunk = b"small\n".repeat(3);
        chunk.extend(vec![b'x'; MAX_BATCH + 1]);
        chunk.push(b'\n');
        chunk.extend(b"y".repeat(MAX_BATCH - 2));
        chunk.extend(b"\nz\nend\n");
        let mut packer = Packer::new(b'\n', true);
        packer.add(chunk.into());
        let messages: Vec<_> =
            packer.by_ref().map(|m| (m.body.len(), m.records, m.number)).collect();
        assert_eq!(messages, [(17, 3, 1), (MAX_BATCH + 1, 1, 4), (MAX_BATCH, 2, 5), (3, 1, 7)]);
    }
}
