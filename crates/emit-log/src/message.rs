//! Messages of emit-log.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf, Bytes};
use logs_common::wire::{MessageId, Packing};
use logs_process::time::now_millis;
use memchr::{memchr, memrchr};

const DEFAULT_BODY: &[u8] = b"info: Hello World!";

/// The place of a message in the spool. Positions only grow.
pub type Position = u64;

/// A message: one record, or a batch.
#[derive(Clone, Debug)]
pub struct Message {
    /// The bytes that are published.
    pub body: Bytes,
    /// How the records are joined in the body.
    pub packing: Packing,
    /// The number of records in the body.
    pub records: u64,
    /// The routing key.
    pub key: Arc<str>,
    /// The run of this key in the process that published the message first.
    pub run: u64,
    /// The number of the first record in this run, from 1.
    pub number: u64,
    /// When the message was created, in milliseconds since 1970.
    pub timestamp: u64,
    /// When the first record was read.
    pub read_at: Instant,
    /// The place among all messages that were sent, which orders those of different runs.
    pub order: u64,
    /// The place in the spool; `None` if the message is only in memory.
    pub position: Option<Position>,
    /// The path of the file that has the records, with `--follow`.
    pub file: Option<Arc<str>>,
}

impl Message {
    /// A message that is one record.
    pub fn single(body: impl Into<Bytes>, number: u64) -> Message {
        Message::new(body.into(), Packing::Single, 1, number)
    }

    /// A message of records that are joined as `packing` says.
    pub fn joined(body: Bytes, packing: Packing, number: u64) -> Message {
        match packing.count(&body) {
            1 => Message::single(body, number),
            records => Message::new(body, packing, records, number),
        }
    }

    fn new(body: Bytes, packing: Packing, records: u64, number: u64) -> Message {
        let (timestamp, read_at) = (now_millis(), Instant::now());
        let (key, run, order, position, file) = (Arc::default(), 0, 0, None, None);
        Message {
            body,
            packing,
            records,
            key,
            run,
            number,
            timestamp,
            read_at,
            order,
            position,
            file,
        }
    }

    /// The words of the command line as a message, byte for byte. Without words, the default message of the RabbitMQ
    /// example.
    pub fn from_words(words: &[OsString]) -> Message {
        if words.is_empty() {
            return Message::single(DEFAULT_BODY, 1);
        }
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        Message::single(words.join(&b' '), 1)
    }

    /// The id of the message.
    pub fn id(&self) -> MessageId {
        MessageId { run: self.run, number: self.number }
    }

    /// Splits the records into messages of at most `limit` bytes. A larger record is a message of its own.
    pub fn split(self, limit: usize) -> Vec<Message> {
        let (mut body, mut number) = (self.body.clone(), self.number);
        let piece_of = |body: Bytes, number: u64| {
            let Message { body, packing, records, .. } =
                Message::joined(body, self.packing, number);
            Message { body, packing, records, number, ..self.clone() }
        };
        let mut pieces = Vec::new();
        while body.len() > limit
            && let Some(separator) = self.packing.separator()
            && let Some(end) = end_of_batch(&body, separator, limit)
        {
            let piece = piece_of(body.split_to(end), number);
            number += piece.records;
            pieces.push(piece);
            body.advance(1);
        }
        pieces.push(piece_of(body, number));
        pieces
    }
}

/// The index of the separator at which a message of at most `limit` bytes ends that has as many of these records as
/// possible. A larger first record is a message of its own. `None` without a separator.
pub fn end_of_batch(records: &[u8], separator: u8, limit: usize) -> Option<usize> {
    let within = records.get(..=limit).unwrap_or(records);
    memrchr(separator, within).or_else(|| memchr(separator, records))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn words_are_joined_by_a_space_and_not_changed() {
        let words = [b"caf\xe9".to_vec(), b"  two  ".to_vec(), Vec::new()];
        let message = Message::from_words(&words.map(OsString::from_vec));
        assert_eq!(message.body, &b"caf\xe9   two   "[..]);
        assert_eq!(Message::from_words(&[OsString::new()]).body, &b""[..]);
        assert_eq!(Message::from_words(&[]).body, &b"info: Hello World!"[..]);
    }

    #[test]
    fn a_batch_is_split_between_its_records() {
        let split = |body: &'static str, limit| -> Vec<_> {
            let pieces = Message::joined(body.into(), Packing::Lines, 7).split(limit);
            let body = |piece: &Message| String::from_utf8(piece.body.to_vec()).unwrap();
            pieces.iter().map(|piece| (piece.number, piece.records, body(piece))).collect()
        };
        let piece = |number, records, body: &str| (number, records, body.to_string());
        assert_eq!(split("a\nb\nc\nd", 3), [piece(7, 2, "a\nb"), piece(9, 2, "c\nd")]);
        assert_eq!(
            split("a\nbbbbb\n\n", 3),
            [piece(7, 1, "a"), piece(8, 1, "bbbbb"), piece(9, 2, "\n")]
        );
        assert_eq!(split("aaaa", 3), [piece(7, 1, "aaaa")]);
        assert_eq!(split("aaaa\n", 4), [piece(7, 1, "aaaa"), piece(8, 1, "")]);
        assert_eq!(split("a\nb", 3), [piece(7, 2, "a\nb")]);
    }

    #[test]
    fn a_single_record_is_never_split() {
        let pieces = Message::single("a\nb\nc", 1).split(2);
        assert_eq!(pieces.len(), 1);
        assert_eq!((pieces[0].packing, &pieces[0].body[..]), (Packing::Single, &b"a\nb\nc"[..]));
    }
}
