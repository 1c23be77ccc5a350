//! Reading the entries of a spool file, past all damage.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use memchr::memmem;

use super::entry::{self, Decoded, FILE_HEADER, FileHeader, MARKER};
use crate::message::Message;

/// Bytes read at a time, unless an entry is larger.
const BLOCK: u64 = 512 * 1024;

/// What [`Reader::next`] finds.
#[derive(Debug)]
pub enum Found {
    /// A message, and the run that has read it.
    Message { run: u64, message: Message },
    /// Bytes of the file that are no sound entries.
    Damage(Range<u64>),
}

/// Reads the entries of a file one after another. Bytes that are no sound entries are skipped to the next
/// sound entry.
pub struct Reader {
    file: File,
    /// The place of the next entry.
    offset: u64,
    block: Bytes,
    /// The place of the block in the file.
    start: u64,
    /// The start of the damage that is being skipped.
    damaged_from: Option<u64>,
}

impl Reader {
    /// Reads from `offset`; from 0, with the header of the file.
    pub fn new(file: File, offset: u64) -> Reader {
        Reader { file, offset, block: Bytes::new(), start: offset, damaged_from: None }
    }

    /// The place of the next entry.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next message or damage before `end`; `None` at the end.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn next(&mut self, end: u64) -> io::Result<Option<Found>> {
        if self.offset == 0 && end > 0 {
            self.fill(FILE_HEADER as u64, end)?;
            match entry::decode_file_header(&self.block) {
                FileHeader::Known(_) => self.offset = FILE_HEADER as u64,
                _ => self.damaged_from = Some(0),
            }
        }
        loop {
            let rest = end.saturating_sub(self.offset);
            if rest == 0 {
                return Ok(self.take_damage());
            }
            let mut needed = 1;
            let is_damaged = loop {
                self.fill(needed.min(rest), end)?;
                match entry::decode(self.bytes()) {
                    Decoded::Whole(_) => break false,
                    Decoded::Part(length) if length as u64 <= rest => needed = length as u64,
                    Decoded::Part(_) | Decoded::Damaged => break true,
                }
            };
            if is_damaged {
                self.damaged_from.get_or_insert(self.offset);
                self.skip_to_marker();
            } else {
                return Ok(self.take_damage().or_else(|| self.take_message()));
            }
        }
    }

    fn take_damage(&mut self) -> Option<Found> {
        Some(Found::Damage(self.damaged_from.take()?..self.offset))
    }

    fn take_message(&mut self) -> Option<Found> {
        let Decoded::Whole(entry) = entry::decode(self.bytes()) else {
            return None;
        };
        let body = self.block.slice_ref(entry.body);
        let (run, length) = (entry.run, entry.length() as u64);
        let message = Message::from_spool(body, entry.packing, entry.number, entry.timestamp);
        self.offset += length;
        Some(Found::Message { run, message })
    }

    /// The bytes from the next entry on, as far as they are read.
    fn bytes(&self) -> &[u8] {
        &self.block[(self.offset - self.start) as usize..]
    }

    /// Makes sure that at least `needed` bytes from the next entry on are read.
    fn fill(&mut self, needed: u64, end: u64) -> io::Result<()> {
        let known = self.start + self.block.len() as u64;
        if self.offset >= self.start && self.offset + needed <= known {
            return Ok(());
        }
        let length = needed.max(BLOCK).min(end - self.offset);
        let mut block = vec![0; length as usize];
        self.file.read_exact_at(&mut block, self.offset)?;
        (self.block, self.start) = (block.into(), self.offset);
        Ok(())
    }

    /// Goes to the next bytes that may be the start of an entry.
    fn skip_to_marker(&mut self) {
        let bytes = &self.bytes()[1..];
        let skipped = match memmem::find(bytes, &MARKER) {
            Some(place) => place,
            // The last bytes may be the first of a marker.
            None => bytes.len().saturating_sub(MARKER.len() - 1),
        };
        self.offset += 1 + skipped as u64;
    }
}
