//! The records of standard input.

use std::io::{self, ErrorKind, Read};
use std::mem;
use std::time::Instant;

use bytes::Bytes;
use memchr::{memchr_iter, memmem, memrchr};

/// Bytes to read at a time: the capacity of a pipe.
pub const READ_BUFFER: usize = 64 * 1024;

/// Why reading stops before the end of the input.
#[derive(Debug)]
pub enum InputError {
    /// The record with this number, counted from 1, is larger than allowed. All earlier records were
    /// returned.
    TooLarge(u64),
    /// The input cannot be read.
    Io(io::Error),
}

/// The outcome of a read.
pub enum Step {
    /// At least one complete record.
    Chunk(Chunk),
    /// No record is complete.
    Incomplete,
    /// The end of the input.
    End,
}

/// Records that were completed by the same read.
pub struct Chunk {
    /// The records, each with its separator; the last record of the input may lack the separator.
    pub bytes: Bytes,
    /// The number of records.
    pub records: u64,
    /// The time of that read.
    pub read_at: Instant,
}

/// Returns records as soon as they are complete, even if the input is slow.
pub struct Records<R> {
    source: R,
    separator: u8,
    max_record: usize,
    skip_empty: bool,
    /// A partial record, in the first `filled` bytes.
    buffer: Vec<u8>,
    filled: usize,
    ended: bool,
    /// The number of complete records read, including empty ones.
    records: u64,
    /// Whether the next record is too large.
    too_large: bool,
}

impl<R: Read> Records<R> {
    /// Records that end in `separator`, and have at most `max_record` bytes before the separator.
    pub fn new(source: R, separator: u8, max_record: usize, skip_empty: bool) -> Records<R> {
        Records {
            source,
            separator,
            max_record,
            skip_empty,
            buffer: vec![0; READ_BUFFER],
            filled: 0,
            ended: false,
            records: 0,
            too_large: false,
        }
    }

    /// The source, so that the caller can wait for it.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// Whether the next [`read`](Records::read) reads from the source.
    pub fn needs_input(&self) -> bool {
        !self.too_large && !self.ended
    }

    /// Reads once, and returns all records that are complete.
    ///
    /// # Errors
    ///
    /// When the source cannot be read, or the next record is too large.
    pub fn read(&mut self) -> Result<Step, InputError> {
        if !self.too_large {
            let Some(mut bytes) = self.read_complete()? else {
                return Ok(if self.ended { Step::End } else { Step::Incomplete });
            };
            if let Some(start) = self.start_of_too_large(&bytes) {
                bytes.truncate(start);
                self.too_large = true;
            }
            self.records += self.count(&bytes);
            if self.skip_empty {
                bytes = self.without_empty(bytes);
            }
            if !bytes.is_empty() {
                let records = self.count(&bytes);
                return Ok(Step::Chunk(Chunk { bytes, records, read_at: Instant::now() }));
            }
        }
        match self.too_large {
            true => Err(InputError::TooLarge(self.records + 1)),
            false => Ok(Step::Incomplete),
        }
    }

    /// Whether a partial record was read.
    pub fn has_partial(&self) -> bool {
        self.filled > 0 && !self.too_large
    }

    /// Returns the partial record as the last record. Later calls read nothing.
    ///
    /// # Errors
    ///
    /// When an earlier record is too large.
    pub fn take_partial(&mut self) -> Result<Option<Chunk>, InputError> {
        self.ended = true;
        if self.too_large {
            return Err(InputError::TooLarge(self.records + 1));
        }
        if self.filled == 0 {
            return Ok(None);
        }
        self.records += 1;
        let bytes = self.take(self.filled);
        Ok(Some(Chunk { bytes, records: 1, read_at: Instant::now() }))
    }

    /// Reads once, and returns the bytes of all complete records; `None` without any.
    fn read_complete(&mut self) -> Result<Option<Bytes>, InputError> {
        // A terminal may have more data after its end of file.
        if self.ended {
            return Ok(None);
        }
        if self.filled == self.buffer.len() {
            let larger = (2 * self.buffer.len()).min(self.max_record + 1);
            self.buffer.resize(larger.max(READ_BUFFER), 0);
        }
        let start = self.filled;
        match self.source.read(&mut self.buffer[start..]) {
            Ok(0) => self.ended = true,
            Ok(length) => self.filled += length,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The input is non-blocking, and another process has read the data.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(InputError::Io(error)),
        }
        if let Some(last) = memrchr(self.separator, &self.buffer[start..self.filled]) {
            return Ok(Some(self.take(start + last + 1)));
        }
        let is_complete = self.ended && self.filled > 0 || self.filled > self.max_record;
        Ok(is_complete.then(|| self.take(self.filled)))
    }

    fn start_of_too_large(&self, bytes: &[u8]) -> Option<usize> {
        if bytes.len() <= self.max_record {
            return None;
        }
        let mut start = 0;
        for record in bytes.split(|byte| *byte == self.separator) {
            if record.len() > self.max_record {
                return Some(start);
            }
            start += record.len() + 1;
        }
        None
    }

    fn count(&self, bytes: &[u8]) -> u64 {
        let ended = memchr_iter(self.separator, bytes).count() as u64;
        let open = bytes.last().is_some_and(|last| *last != self.separator);
        ended + u64::from(open)
    }

    fn without_empty(&self, bytes: Bytes) -> Bytes {
        let two = [self.separator; 2];
        if !bytes.starts_with(&two[..1]) && memmem::find(&bytes, &two).is_none() {
            return bytes;
        }
        let records = bytes.split_inclusive(|byte| *byte == self.separator);
        let not_empty = records.filter(|record| *record != [self.separator]);
        not_empty.collect::<Vec<_>>().concat().into()
    }

    /// Takes the first `length` bytes out of the buffer. A large buffer is returned itself, because copying a large
    /// record is expensive. From a buffer of the usual size, the bytes are copied, so that a small chunk does not keep
    /// the memory of the whole buffer.
    fn take(&mut self, length: usize) -> Bytes {
        let rest = self.filled - length;
        let chunk = if self.buffer.len() > READ_BUFFER {
            let mut buffer = vec![0; READ_BUFFER.max(rest)];
            buffer[..rest].copy_from_slice(&self.buffer[length..self.filled]);
            let mut chunk = mem::replace(&mut self.buffer, buffer);
            chunk.truncate(length);
            chunk.into()
        } else {
            let chunk = Bytes::copy_from_slice(&self.buffer[..length]);
            self.buffer.copy_within(length..self.filled, 0);
            chunk
        };
        self.filled = rest;
        chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source that returns the next of these pieces at each read.
    struct Pieces(Vec<Vec<u8>>);

    impl Read for Pieces {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.first_mut() else {
                return Ok(0);
            };
            let length = piece.len().min(out.len());
            out[..length].copy_from_slice(&piece[..length]);
            piece.drain(..length);
            if piece.is_empty() {
                self.0.remove(0);
            }
            Ok(length)
        }
    }

    /// The chunks, and the number of the record that is too large.
    fn chunks(mut records: Records<Pieces>) -> (Vec<Bytes>, Option<u64>) {
        let mut chunks = Vec::new();
        loop {
            match records.read() {
                Ok(Step::Incomplete) => {}
                Ok(Step::Chunk(chunk)) => {
                    assert_eq!(chunk.records, records.count(&chunk.bytes));
                    chunks.push(chunk.bytes);
                }
                Ok(Step::End) => return (chunks, None),
                Err(InputError::TooLarge(record)) => return (chunks, Some(record)),
                Err(InputError::Io(error)) => panic!("{error}"),
            }
        }
    }

    fn records(pieces: &[&[u8]], separator: u8, max_record: usize) -> Records<Pieces> {
        let pieces = Pieces(pieces.iter().map(|piece| piece.to_vec()).collect());
        Records::new(pieces, separator, max_record, false)
    }

    #[test]
    fn a_record_is_returned_as_soon_as_it_is_complete() {
        let pieces: [&[u8]; 5] = [b"on", b"e\ntwo\nth", b"ree", b"\n\n", b"end"];
        let (chunks, too_large) = chunks(records(&pieces, b'\n', 100));
        assert_eq!(chunks, [&b"one\ntwo\n"[..], b"three\n\n", b"end"]);
        assert_eq!(too_large, None);
    }

    #[test]
    fn a_partial_record_is_the_last_one() {
        let mut half = records(&[b"one\nhalf", b"more\n"], b'\n', 100);
        assert!(matches!(half.read(), Ok(Step::Chunk(_))));
        assert!(half.has_partial());
        let rest = half.take_partial().unwrap().unwrap();
        assert_eq!((&rest.bytes[..], rest.records), (&b"half"[..], 1));
        assert!(!half.has_partial());
        assert!(half.take_partial().unwrap().is_none());
        assert!(matches!(half.read(), Ok(Step::End)));
    }

    #[test]
    fn no_record_follows_one_that_is_too_large() {
        let mut records = records(&[b"one\nlarge\nhalf"], b'\n', 4);
        assert!(matches!(records.read(), Ok(Step::Chunk(_))));
        assert!(!records.has_partial());
        assert!(matches!(records.take_partial(), Err(InputError::TooLarge(2))));
    }

    #[test]
    fn nothing_is_read_after_the_end() {
        let (chunks, too_large) = chunks(records(&[b"half", b"", b"more\n"], b'\n', 100));
        assert_eq!((chunks, too_large), (vec![Bytes::from_static(b"half")], None));
    }

    #[test]
    fn input_that_another_process_has_read_is_incomplete() {
        struct Emptied;
        impl Read for Emptied {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(ErrorKind::WouldBlock.into())
            }
        }
        let mut records = Records::new(Emptied, b'\n', 100, false);
        assert!(matches!(records.read(), Ok(Step::Incomplete)));
    }

    #[test]
    fn records_may_end_in_nul_and_hold_anything_else() {
        let bytes = &b"a\nb\0c\r\n\xff\0"[..];
        assert_eq!(chunks(records(&[bytes], b'\0', 100)).0, [bytes]);
        assert!(chunks(records(&[], b'\0', 100)).0.is_empty());
    }

    #[test]
    fn empty_records_can_be_skipped() {
        let mut records = records(&[b"\n\n", b"\none\n\n\ntwo\n\n", b"x\n", b"\ny"], b'\n', 100);
        records.skip_empty = true;
        assert_eq!(chunks(records).0, [&b"one\ntwo\n"[..], b"x\n", b"y"]);
    }

    #[test]
    fn a_record_may_be_larger_than_the_buffer_but_not_than_allowed() {
        for max in [10, READ_BUFFER - 1, READ_BUFFER, 10 * READ_BUFFER] {
            let mut large = vec![b'x'; max];
            large.push(b'\n');
            let (found, too_large) = chunks(records(&[b"a\n", &large, b"z\n"], b'\n', max));
            assert_eq!(found.concat(), [b"a\n", &large[..], b"z\n"].concat());
            assert_eq!(too_large, None);

            let mut larger = vec![b'x'; max + 1];
            larger.push(b'\n');
            for pieces in
                [vec![b"a\n\n", &larger[..], b"z\n"], vec![&[b"a\n\n", &larger[..]].concat()]]
            {
                let (found, too_large) = chunks(records(&pieces, b'\n', max));
                assert_eq!(found.concat(), b"a\n\n");
                assert_eq!(too_large, Some(3));
            }
        }
    }

    #[test]
    fn memory_is_freed_after_a_large_record() {
        let large = vec![b'x'; 5 * READ_BUFFER];
        let mut records = records(&[&large, b"\n", b"y\n"], b'\n', 1 << 20);
        while !matches!(records.read().unwrap(), Step::End) {}
        assert_eq!(records.buffer.len(), READ_BUFFER);
    }
}
