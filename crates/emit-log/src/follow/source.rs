//! One file that is followed: its records from an offset on, and how far the broker has confirmed them.
//!
//! After a kill, the records after the confirmed position are read and sent again, under the same numbers, so that
//! receivers drop them. This requires the same messages again. Their ends follow from the content of the file, except
//! those that a time limit has chosen: such a *cut* is recorded before the message is sent.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use logs_common::wire::MAX_BATCH;
use serde::{Deserialize, Serialize};

use crate::cutter::{Cutter, Rest};
use crate::keys::{Keys, Run};
use crate::message::Message;

/// Bytes at the beginning of a file that distinguish it from another file with the same inode.
const FINGERPRINT: u64 = 1024;

/// Bytes that distinguish a file from others without its inode.
const ENOUGH: u64 = 64;

/// How long a file that was rotated away may not grow before its last line counts as complete. Programs write into the
/// old file until they open the new one.
const ROTATION_WAIT: Duration = Duration::from_secs(5);

/// Bytes to read at a time: two batches.
const READ: usize = 2 * MAX_BATCH;

/// The identity of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    /// The number of bytes in the checksum.
    length: u64,
    /// CRC-32 of the first bytes.
    checksum: u32,
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity { device: metadata.dev(), inode: metadata.ino(), length: 0, checksum: 0 }
    }

    /// Whether the metadata is of a file with this device and inode.
    pub fn has_inode(&self, metadata: &Metadata) -> bool {
        (self.device, self.inode) == (metadata.dev(), metadata.ino())
    }

    /// Whether the checksum covers enough bytes to recognise a copy of the file.
    pub fn can_find_copy(&self) -> bool {
        self.length >= ENOUGH
    }

    /// Whether the file begins as it did.
    pub fn has_beginning(&self, file: &File) -> bool {
        checksum(file, self.length).is_ok_and(|checksum| checksum == self.checksum)
    }
}

/// CRC-32 of the first bytes of a file.
fn checksum(file: &File, length: u64) -> io::Result<u32> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(crc32fast::hash(&bytes))
}

/// A position in a file up to which all records are confirmed, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The path on the command line.
    pub path: PathBuf,
    /// The path without symbolic links.
    pub real: PathBuf,
    #[serde(flatten)]
    pub identity: Identity,
    /// The end of the last confirmed record, in bytes.
    pub offset: u64,
    /// Routing keys, the run of each, and the number of its next record.
    pub runs: Vec<Run>,
    /// Ends of messages after the offset that a time limit has chosen.
    pub cuts: VecDeque<u64>,
}

/// Why the records of a file cannot be read.
#[derive(Debug)]
pub enum ReadError {
    /// The record at this offset is larger than allowed.
    TooLarge(u64),
    /// The file cannot be read.
    Io(io::Error),
}

/// A message that is sent and may not be confirmed.
struct Sent {
    key: usize,
    run: u64,
    /// The number after its last record.
    next: u64,
    /// The end of its last record in the file.
    end: u64,
}

/// A file that is open.
pub struct Source {
    file: File,
    /// The path, as in the header of the messages.
    name: Arc<str>,
    position: Position,
    keys: Keys,
    /// The start of the next record to be sent.
    offset: u64,
    /// The end of the bytes that were read.
    seen: u64,
    /// The size of the file when it was last looked at.
    size: u64,
    /// What is between `offset` and `seen`.
    rest: Rest,
    /// Whether there may be bytes to read.
    is_dirty: bool,
    /// When the file lost its path; `None` if it has the path.
    rotated_at: Option<Instant>,
    /// Whether the file will not grow any more, so that its last record is complete.
    is_final: bool,
    /// Whether the identity must be recorded before messages are sent. Without it, the file would be read again under
    /// other numbers after a kill.
    pub is_unrecorded: bool,
    /// The messages after the position, in the order of the file.
    sent: VecDeque<Sent>,
}

impl Source {
    /// A file to be read from an offset on, with new runs.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn new(
        file: File,
        path: &Path,
        real: PathBuf,
        keys: Keys,
        offset: u64,
    ) -> io::Result<Source> {
        let identity = Identity::of(&file.metadata()?);
        let (path, runs, cuts) = (path.into(), Vec::new(), VecDeque::new());
        let position = Position { path, real, identity, offset, runs, cuts };
        let source = Source::at(file, position, keys);
        Ok(Source { rotated_at: None, is_unrecorded: true, ..source })
    }

    /// A file to be read from a position on. It counts as rotated away until [`restore`](Source::restore).
    pub fn at(file: File, mut position: Position, mut keys: Keys) -> Source {
        keys.restore(&position.runs);
        position.runs = keys.runs();
        // A power cut may have shortened the file.
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        position.cuts.retain(|cut| *cut <= size);
        position.offset = position.offset.min(size);
        let (offset, now) = (position.offset, Instant::now());
        let mut source = Source {
            file,
            name: position.path.to_string_lossy().into(),
            position,
            keys,
            offset,
            seen: offset,
            size,
            rest: Rest::new(now),
            is_dirty: true,
            rotated_at: Some(now),
            is_final: false,
            is_unrecorded: false,
            sent: VecDeque::new(),
        };
        // The bytes may be read much later. Until then, a copy is recognised by them. An error is found again then.
        let _ = source.extend_identity(size);
        source
    }

    /// The position up to which all records are confirmed.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Whether this is the file of the metadata.
    pub fn is(&self, metadata: &Metadata) -> bool {
        self.file.metadata().is_ok_and(|own| Identity::of(&own).has_inode(metadata))
            && !self.is_final
    }

    /// Whether there may be bytes to read.
    pub fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// Whether whole lines wait for others. Later files are read after them.
    pub fn has_lines(&self) -> bool {
        self.rest.has_lines()
    }

    /// Whether the file will not grow, and is read to its end.
    pub fn is_read(&self) -> bool {
        self.is_final && !self.is_dirty
    }

    /// Whether nothing more will be read from the file, and all records are confirmed.
    pub fn is_closable(&self) -> bool {
        self.is_read() && self.sent.is_empty()
    }

    /// Bytes of the file that are not confirmed.
    pub fn behind(&self) -> u64 {
        self.current_size().saturating_sub(self.position.offset)
    }

    fn current_size(&self) -> u64 {
        self.file.metadata().map_or(self.size, |metadata| metadata.len())
    }

    /// Records that the path names this file again.
    pub fn restore(&mut self) {
        self.rotated_at = None;
    }

    /// Records that the path names another file.
    pub fn rotate(&mut self, now: Instant) {
        self.rotated_at = Some(now);
    }

    /// Records that the file will not grow any more.
    pub fn finish(&mut self) {
        if !self.is_final {
            (self.is_final, self.is_dirty) = (true, true);
        }
    }

    /// Finishes a file that was rotated away and has not grown for a time.
    pub fn finish_if_quiet(&mut self, now: Instant) {
        let since = self.rotated_at.map(|rotated_at| rotated_at.max(self.rest.grown_at()));
        if since.is_some_and(|since| now >= since + ROTATION_WAIT) && !self.is_dirty {
            self.finish();
        }
    }

    /// Records that the file was truncated. The bytes that are not read are in the `copy` or lost.
    pub fn move_to(&mut self, copy: Option<File>, now: Instant) {
        self.rotated_at = Some(now);
        (self.seen, self.size) = (self.offset, self.offset);
        self.rest.clear();
        match copy {
            Some(copy) => (self.file, self.is_dirty) = (copy, true),
            None => (self.is_final, self.is_dirty) = (true, false),
        }
    }

    /// Where the next record begins.
    pub fn end(&self) -> Position {
        Position { offset: self.offset, ..self.position.clone() }
    }

    /// Looks whether the file has grown. Returns false if it was truncated, or overwritten from its beginning.
    pub fn look(&mut self, now: Instant) -> bool {
        let size = self.current_size();
        if self.is_final || size == self.seen && size == self.size {
            return true;
        }
        let is_shorter = size < self.seen.max(self.size);
        if is_shorter || !self.position.identity.has_beginning(&self.file) {
            return false;
        }
        // As in `at`.
        let _ = self.extend_identity(size);
        self.size = size;
        if size > self.seen {
            self.is_dirty = true;
            self.rest.grow(now);
        }
        true
    }

    /// Reads once, and returns the messages that are complete.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or a record is too large. All records before it were returned.
    pub fn read(
        &mut self,
        cutter: &Cutter,
        buffer: &mut Vec<u8>,
        now: Instant,
    ) -> Result<Vec<Message>, ReadError> {
        let mut length = READ;
        loop {
            buffer.resize(length, 0);
            let filled = match self.read_same(buffer) {
                Ok(Some(filled)) => filled,
                // The next look finds the truncation.
                Ok(None) => {
                    (self.seen, self.is_dirty) = (u64::MAX, false);
                    self.rest.clear();
                    return Ok(Vec::new());
                }
                // The next look finds bytes to read, and tries again.
                Err(error) => {
                    (self.seen, self.is_dirty) = (self.offset, false);
                    self.rest.clear();
                    return Err(ReadError::Io(error));
                }
            };
            let is_end = filled < length;
            let within = self.offset + 1..=self.offset + filled as u64;
            let cuts = self.position.cuts.iter().filter(|cut| within.contains(cut));
            let cut = cuts.min().map(|cut| (cut - self.offset) as usize);
            let is_closed = cut.is_some() || self.is_final && is_end;
            let text = &buffer[..cut.unwrap_or(filled)];
            let found = cutter.cut(text, is_closed, &self.keys);
            let taken = found.taken();
            if taken == 0
                && let Some(start) = found.too_large
            {
                return Err(ReadError::TooLarge(self.offset + start as u64));
            }
            if taken == 0 && !is_end && cut.is_none() {
                length *= 2;
                continue;
            }
            if is_closed && cut.is_none() && filled > 0 {
                // The file may grow in spite of that, before a kill and the next read.
                self.position.cuts.push_back(self.offset + filled as u64);
                self.is_unrecorded = true;
            }
            self.rest.set(&found, filled, taken, now);
            let messages = found.messages.into_iter().map(|cut| {
                let message = self.keys.assign(cut.key, cut.message);
                let (run, next) = (message.run, message.number + message.records);
                let end = self.offset + cut.end as u64;
                self.sent.push_back(Sent { key: cut.key, run, next, end });
                Message { file: Some(Arc::clone(&self.name)), ..message }
            });
            let messages: Vec<_> = messages.collect();
            self.seen = self.offset + filled as u64;
            self.offset += taken as u64;
            self.is_dirty = !is_end || cut.is_some() || found.too_large.is_some();
            return Ok(messages);
        }
    }

    /// Fills the buffer from the offset on, and extends the checksum of the beginning. Returns `None` if the file begins
    /// in another way than before.
    fn read_same(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let filled = read_at(&self.file, buffer, self.offset)?;
        if !self.position.identity.has_beginning(&self.file) {
            return Ok(None);
        }
        self.extend_identity(self.offset + filled as u64)?;
        Ok(Some(filled))
    }

    /// Extends the checksum of the beginning of a file that has this size now.
    fn extend_identity(&mut self, size: u64) -> io::Result<()> {
        let (length, identity) = (size.min(FINGERPRINT), &mut self.position.identity);
        if length > identity.length {
            let checksum = checksum(&self.file, length)?;
            self.is_unrecorded |= identity.length < ENOUGH;
            (identity.length, identity.checksum) = (length, checksum);
        }
        Ok(())
    }

    /// When [`cut`](Source::cut) has something to do.
    pub fn deadline(&self, cutter: &Cutter) -> Option<Instant> {
        self.rest.deadline(cutter).filter(|_| !self.is_dirty)
    }

    /// Cuts the file where the rest has waited long enough. The cut must be recorded before the next read.
    pub fn cut(&mut self, cutter: &Cutter, now: Instant, is_all_confirmed: bool) -> bool {
        let released = self.rotated_at.is_some() || is_all_confirmed && cutter.releases_confirmed();
        let due = self.rest.due(cutter, now, released).filter(|_| !self.is_dirty);
        if let Some(length) = due {
            self.position.cuts.push_back(self.offset + length as u64);
            self.is_dirty = true;
        }
        due.is_some()
    }

    /// Moves the position behind all confirmed records. `unconfirmed` has the lowest unconfirmed number of each run that
    /// has one.
    pub fn advance(&mut self, unconfirmed: &BTreeMap<u64, u64>) {
        let is_confirmed =
            |sent: &&Sent| unconfirmed.get(&sent.run).is_none_or(|first| *first >= sent.next);
        let position = &mut self.position;
        let confirmed = self.sent.iter().take_while(is_confirmed).count();
        for sent in self.sent.drain(..confirmed) {
            position.offset = sent.end;
            position.runs[sent.key].next = sent.next;
        }
        if self.sent.is_empty() {
            position.offset = self.offset;
        }
        position.cuts.retain(|cut| *cut > position.offset);
    }
}

/// Fills the buffer from an offset of the file on. Returns fewer bytes only at the end of the file.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs::OpenOptions;
    use std::io::Write;

    use logs_tests::TempFile;

    use super::*;
    use crate::batch::Batch;
    use crate::join::Join;

    fn cutter(batch: Batch, join: Option<Join>) -> Cutter {
        Cutter {
            separator: b'\n',
            join,
            join_timeout: Duration::ZERO,
            batch,
            idle: None,
            max_record: 100_000,
            skip_empty: false,
        }
    }

    fn keys() -> Keys {
        Keys::new("{severity}", None, None).unwrap()
    }

    fn open(path: &Path) -> Source {
        Source::new(File::open(path).unwrap(), path, path.into(), keys(), 0).unwrap()
    }

    /// Reads all that is complete.
    fn read(source: &mut Source, cutter: &Cutter) -> Vec<Message> {
        let (mut messages, mut buffer) = (Vec::new(), Vec::new());
        while source.is_dirty() {
            messages.extend(source.read(cutter, &mut buffer, Instant::now()).unwrap());
        }
        messages
    }

    fn bodies(messages: &[Message]) -> Vec<&str> {
        messages.iter().map(|message| str::from_utf8(&message.body).unwrap()).collect()
    }

    /// Lines of all severities and lengths, some of them in stack traces.
    fn random_text(random: &mut fastrand::Rng) -> String {
        let mut text = String::new();
        for _ in 0..random.usize(1..40) {
            let start = random.choice(["error: ", "info: ", "", "  at a.b(", "\n"]).unwrap();
            let length = if random.u8(..) < 5 { 40_000 } else { random.usize(..100) };
            text += &format!("{start}{}\n", "x".repeat(length));
        }
        text
    }

    #[test]
    fn the_same_messages_are_sent_again_after_a_kill() {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let batch = *random
                .choice([&Batch::Off, &Batch::Within(Duration::ZERO), &Batch::WhileUnconfirmed])
                .unwrap();
            let join = random.bool().then_some(Join::Traces);
            let cutter = cutter(batch, join);
            let file = TempFile::with("log", b"");
            let mut appended = OpenOptions::new().append(true).open(file.path()).unwrap();
            let (mut source, mut written) = (open(file.path()), String::new());
            let mut recorded = source.position().clone();
            let mut sent: HashMap<(u64, u64), (u64, Vec<u8>)> = HashMap::new();
            for _ in 0..200 {
                let text = random_text(&mut random);
                written += &text;
                appended.write_all(text.as_bytes()).unwrap();
                source.look(Instant::now());
                let mut messages = read(&mut source, &cutter);
                // Time limits pass at random; a cut is recorded at once.
                if random.bool() && source.cut(&cutter, Instant::now(), true) {
                    recorded = source.position().clone();
                    messages.extend(read(&mut source, &cutter));
                }
                for message in messages {
                    let id = (message.run, message.number);
                    let content = (message.records, message.body.to_vec());
                    let earlier = sent.insert(id, content.clone());
                    assert!(earlier.is_none_or(|earlier| earlier == content), "seed {seed}");
                }
                if random.u8(..) < 100 {
                    // Some of the last messages are not confirmed.
                    let unconfirmed = source.sent.iter().skip(random.usize(..50));
                    let mut first = BTreeMap::new();
                    for Sent { run, next, .. } in unconfirmed {
                        first.entry(*run).or_insert(*next - 1);
                    }
                    source.advance(&first);
                    if random.bool() {
                        recorded = source.position().clone();
                    }
                }
                if random.u8(..) < 30 {
                    source = Source::at(File::open(file.path()).unwrap(), recorded.clone(), keys());
                }
            }
            source.finish();
            for message in read(&mut source, &cutter) {
                sent.insert(
                    (message.run, message.number),
                    (message.records, message.body.to_vec()),
                );
            }
            // No byte is missing: each record has a separator, which a message has one less of.
            let length: usize = sent.values().map(|(_, body)| body.len() + 1).sum();
            assert_eq!(length, written.len(), "seed {seed}");
        }
    }

    #[test]
    fn a_batch_is_full_or_cut() {
        let file = TempFile::with("log", &b"info: line\n".repeat(10_000));
        let cutter = cutter(Batch::Within(Duration::ZERO), None);
        let mut source = open(file.path());
        let messages = read(&mut source, &cutter);
        assert_eq!(messages.len(), 1);
        assert!(messages[0].body.len() > MAX_BATCH - 11 && messages[0].body.len() <= MAX_BATCH);
        assert!(source.deadline(&cutter).is_some());
        assert!(source.cut(&cutter, Instant::now(), false));
        let rest = read(&mut source, &cutter);
        assert_eq!(messages[0].records + rest[0].records, 10_000);
        assert_eq!(rest[0].number, messages[0].number + messages[0].records);
    }

    #[test]
    fn a_position_is_behind_all_unconfirmed_messages() {
        let file = TempFile::with("log", b"info: a\nerror: b\ninfo: c\n");
        let mut source = open(file.path());
        let messages = read(&mut source, &cutter(Batch::Off, None));
        assert_eq!(bodies(&messages), ["info: a", "error: b", "info: c"]);
        let (info, error) = (messages[0].run, messages[1].run);
        source.advance(&BTreeMap::from([(error, 1)]));
        assert_eq!(source.position().offset, 8);
        source.advance(&BTreeMap::from([(info, 2)]));
        assert_eq!(source.position().offset, 17);
        source.advance(&BTreeMap::new());
        assert_eq!(source.position().offset, 25);
    }

    #[test]
    fn a_record_that_is_too_large_is_an_error_after_the_others() {
        let text = format!("a\n{}\nb\n", "x".repeat(200_000));
        let file = TempFile::with("log", text.as_bytes());
        let (mut source, mut buffer) = (open(file.path()), Vec::new());
        let plain = cutter(Batch::Off, None);
        let messages = source.read(&plain, &mut buffer, Instant::now()).unwrap();
        assert_eq!(bodies(&messages), ["a"]);
        let outcome = source.read(&plain, &mut buffer, Instant::now());
        assert!(matches!(outcome, Err(ReadError::TooLarge(2))));

        let lines = format!("a\n{}", format!(" {}\n", "x".repeat(999)).repeat(150));
        let file = TempFile::with("log", lines.as_bytes());
        let mut source = open(file.path());
        source.finish();
        let messages = read(&mut source, &cutter(Batch::Off, Some(Join::Traces)));
        let lengths: Vec<_> = messages.iter().map(|message| message.body.len()).collect();
        assert_eq!(lengths, [99_100, 51_050]);
    }

    #[test]
    fn a_file_with_another_beginning_is_another_file() {
        let file = TempFile::with("log", b"one\ntwo\n");
        let mut source = open(file.path());
        read(&mut source, &cutter(Batch::Off, None));
        assert!(source.look(Instant::now()));
        std::fs::write(file.path(), "other\nand longer\n").unwrap();
        assert!(!source.look(Instant::now()));
        std::fs::write(file.path(), "one\n").unwrap();
        assert!(!source.look(Instant::now()));
        std::fs::write(file.path(), "one\ntwo\nthree\n").unwrap();
        assert!(source.look(Instant::now()));
        assert!(source.is_dirty());
    }
}
