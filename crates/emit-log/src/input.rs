//! Where messages come from: the words on the command line, or the records of standard input.

use std::ffi::OsString;
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::os::unix::ffi::OsStrExt;

use bytes::Bytes;
use memchr::memrchr;

const DEFAULT_MESSAGE: &[u8] = b"info: Hello World!";

/// Bytes asked of the kernel at a time: what a pipe holds.
const READ_BUFFER: usize = 64 * 1024;

/// The message made of the words on the command line, byte for byte.
pub fn message(words: &[OsString]) -> Vec<u8> {
    if words.is_empty() {
        return DEFAULT_MESSAGE.to_vec();
    }
    let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
    words.join(&b' ')
}

/// What cannot be read.
#[derive(Debug)]
pub enum InputError {
    /// A record larger than allowed, after all that were returned.
    TooLarge,
    /// The operating system's words.
    Io(io::Error),
}

/// Reads records as soon as they are complete, however slowly they come.
pub struct Records<R> {
    source: R,
    separator: u8,
    max_record: usize,
    /// The beginning of a record, `filled` bytes of it.
    buffer: Vec<u8>,
    filled: usize,
    ended: bool,
}

impl<R: Read> Records<R> {
    /// Records that end in `separator` and are at most `max_record` bytes without it.
    pub fn new(source: R, separator: u8, max_record: usize) -> Records<R> {
        Records {
            source,
            separator,
            max_record,
            buffer: vec![0; READ_BUFFER],
            filled: 0,
            ended: false,
        }
    }

    /// All records that are complete when the first one is, each with its separator, which only
    /// the last of the input may lack. `None` at the end.
    ///
    /// # Errors
    ///
    /// When the source cannot be read, or an incomplete record is too large already. A complete
    /// one has to be looked at.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>, InputError> {
        while !self.ended {
            if self.filled == self.buffer.len() {
                let larger = (2 * self.buffer.len()).min(self.max_record + 1);
                self.buffer.resize(larger.max(READ_BUFFER), 0);
            }
            let start = self.filled;
            match self.source.read(&mut self.buffer[start..]) {
                Ok(0) => self.ended = true,
                Ok(length) => self.filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(InputError::Io(error)),
            }
            if let Some(last) = memrchr(self.separator, &self.buffer[start..self.filled]) {
                return Ok(Some(self.take(start + last + 1)));
            }
            if self.filled > self.max_record {
                return Err(InputError::TooLarge);
            }
        }
        Ok((self.filled > 0).then(|| self.take(self.filled)))
    }

    /// Takes the first `length` bytes out of the buffer. What has outgrown the buffer is handed
    /// over with it; of all else, a copy needs no more memory than it has bytes.
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
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn words_are_joined_by_a_space_and_kept_as_they_are() {
        let words = [b"caf\xe9".to_vec(), b"  two  ".to_vec(), Vec::new()];
        assert_eq!(message(&words.map(OsString::from_vec)), b"caf\xe9   two   ");
        assert_eq!(message(&[OsString::new()]), b"");
        assert_eq!(message(&[]), b"info: Hello World!");
    }

    /// A source that gives one of these pieces at each read.
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

    fn chunks(pieces: &[&[u8]], separator: u8, max: usize) -> (Vec<Bytes>, Option<InputError>) {
        let pieces = Pieces(pieces.iter().map(|piece| piece.to_vec()).collect());
        let mut records = Records::new(pieces, separator, max);
        let mut chunks = Vec::new();
        loop {
            match records.next_chunk() {
                Ok(Some(chunk)) => chunks.push(chunk),
                Ok(None) => return (chunks, None),
                Err(error) => return (chunks, Some(error)),
            }
        }
    }

    #[test]
    fn a_record_comes_the_moment_it_is_complete() {
        let pieces: [&[u8]; 5] = [b"on", b"e\ntwo\nth", b"ree", b"\n\n", b"end"];
        let (chunks, error) = chunks(&pieces, b'\n', 100);
        assert_eq!(chunks, [&b"one\ntwo\n"[..], b"three\n\n", b"end"]);
        assert!(error.is_none());
    }

    #[test]
    fn records_may_end_in_nul_and_hold_anything_else() {
        assert_eq!(
            chunks(&[b"a\nb\0c\r\n\xff\0"], b'\0', 100).0,
            [&b"a\nb\0c\r\n\xff\0"[..]]
        );
        assert!(chunks(&[], b'\0', 100).0.is_empty());
    }

    #[test]
    fn a_record_may_be_larger_than_the_buffer_but_not_than_allowed() {
        let max = 10 * READ_BUFFER;
        for length in [READ_BUFFER - 1, READ_BUFFER, READ_BUFFER + 1, max] {
            let mut large = vec![b'x'; length];
            large.push(b'\n');
            let (chunks, error) = chunks(&[b"a\n", &large, b"z\n"], b'\n', max);
            assert_eq!(chunks.concat(), [b"a\n", &large[..], b"z\n"].concat());
            assert!(error.is_none());
        }
        let (chunks, error) = chunks(&[b"a\n", &vec![b'x'; max + 1], b"\n"], b'\n', max);
        assert_eq!(chunks, [&b"a\n"[..]]);
        assert!(matches!(error, Some(InputError::TooLarge)));
    }

    #[test]
    fn memory_is_given_back_after_a_large_record() {
        let mut large = vec![b'x'; 5 * READ_BUFFER];
        large.push(b'\n');
        let mut records = Records::new(Pieces(vec![large, b"y\n".to_vec()]), b'\n', 1 << 20);
        while records.next_chunk().unwrap().is_some() {}
        assert_eq!(records.buffer.len(), READ_BUFFER);
    }
}
