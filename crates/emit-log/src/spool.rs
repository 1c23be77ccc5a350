//! Messages on disk, for as long as the broker has not confirmed them: `--spool`.
//!
//! A spool is a log of messages in files that are only appended to, with two places in it: the messages
//! before the mark are confirmed, those before the cursor have been read to be sent. It knows nothing of
//! brokers. `docs/spool.md` describes the files.

pub mod entry;
mod segment;

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::ValueEnum;
use crossbeam_channel::{Sender, unbounded};
use logs_common::lock::{LOCK_WAIT, lock_by};

use crate::counts::Counts;
use crate::message::Message;

use entry::{Decoded, Entry, FILE_HEADER, FileHeader};
use segment::{Found, Reader};

/// The largest file, unless a single message is larger; a small spool has smaller ones.
const MAX_SEGMENT: u64 = 16 * 1024 * 1024;

/// A spool has room for at least this many files, as the oldest messages are dropped by the file.
const SEGMENTS: u64 = 16;

/// Bytes that gather before they are written.
const MAX_PENDING: usize = 256 * 1024;

/// The time between two attempts to write where the disk is full.
const WRITE_AGAIN: Duration = Duration::from_millis(100);

/// The time between two requests that the system bring what is written to the disk itself.
const SYNC: Duration = Duration::from_secs(1);

/// The time between two lines that say that the spool is full.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// The file with the mark, which is also the lock.
const MARK: &str = "mark";
const MARK_LENGTH: usize = 20;

/// What to do with a record that finds the spool full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenFull {
    /// Let the input wait
    Block,
    /// Give up the oldest records that are not being sent
    DropOldest,
    /// Give up this record
    DropNewest,
}

/// A place in the spool: the number of a file, and a place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    segment: u64,
    offset: u64,
}

/// A message read from the spool.
#[derive(Debug)]
pub struct Spooled {
    /// The run of emit-log that has written the message.
    pub run: u64,
    /// The message, with its position.
    pub message: Message,
}

struct Segment {
    id: u64,
    /// Bytes, with those that are not written yet.
    length: u64,
    /// Records that are not read yet.
    unread: u64,
    is_damaged: bool,
}

/// Messages on disk.
pub struct Spool {
    dir: PathBuf,
    limit: u64,
    when_full: WhenFull,
    counts: Arc<Counts>,
    /// The files, the oldest first. The last is written to if `has_active`.
    segments: VecDeque<Segment>,
    has_active: bool,
    /// The last file, once it exists.
    writer: Option<File>,
    /// The end of the last file, as far as it is not written yet.
    pending: Vec<u8>,
    /// The number of the next file.
    next_id: u64,
    /// Records ever written.
    records: u64,
    /// The next message to be read.
    cursor: Position,
    reader: Option<Reader>,
    mark_file: File,
    mark: Position,
    /// Why, and when, the last attempt to write has failed.
    failure: Option<(String, Instant)>,
    said_full: Option<Instant>,
    /// When a write was first not synced.
    dirty_since: Option<Instant>,
    syncer: Sender<File>,
    /// Tells the user what records are lost, or may be.
    alert: Box<dyn Fn(String) + Send>,
}

impl Spool {
    /// Opens the spool in `dir`, which is made if it does not exist. What is in the spool is counted as
    /// read and spooled.
    ///
    /// # Errors
    ///
    /// When another process uses the spool, or the directory cannot be used.
    pub fn open(
        dir: &Path,
        limit: u64,
        when_full: WhenFull,
        counts: Arc<Counts>,
        alert: impl Fn(String) + Send + 'static,
    ) -> io::Result<Spool> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mark_file = private().read(true).create(true).truncate(false).open(dir.join(MARK))?;
        lock_by(&mark_file, Instant::now() + LOCK_WAIT).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => io::Error::other("another emit-log is using it"),
            _ => error,
        })?;
        let mark = read_mark(&mark_file)?;
        let mut spool = Spool {
            dir: dir.into(),
            limit,
            when_full,
            counts,
            segments: VecDeque::new(),
            has_active: false,
            writer: None,
            pending: Vec::new(),
            next_id: mark.segment,
            records: 0,
            cursor: mark,
            reader: None,
            mark_file,
            mark,
            failure: None,
            said_full: None,
            dirty_since: None,
            syncer: start_syncer()?,
            alert: Box::new(alert),
        };
        spool.find_segments()?;
        Ok(spool)
    }

    /// Whether nothing is in the spool that is not confirmed.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether messages are in the spool that are not read yet.
    pub fn has_unread(&self) -> bool {
        self.cursor < self.end()
    }

    /// Whether the input need not wait for the spool.
    pub fn has_room(&self) -> bool {
        let has_room = self.pending.is_empty() && self.size() < self.limit;
        has_room || self.when_full != WhenFull::Block
    }

    /// Adds a message that is to be sent after all others in the spool. Where the spool is full, a message
    /// may be dropped, and counted, instead.
    pub fn append(&mut self, run: u64, message: &Message) {
        let length = entry_of(run, message).length() as u64;
        if self.size() + length > self.limit && !self.make_room(length) {
            self.counts.add_dropped(message.records, length);
            return self.say_full();
        }
        self.push(run, message);
    }

    /// Adds a message that is sent already, while no message in the spool is unread. This one finds room
    /// whatever the limit is: messages being sent are few.
    pub fn append_sent(&mut self, run: u64, message: &mut Message) {
        message.position = Some(self.push(run, message));
        self.cursor = self.end();
        self.reader = None;
        if let Some(active) = self.segments.back_mut() {
            active.unread = 0;
        }
    }

    /// Writes all that was added to the file, and lets the system bring that to the disk once a second.
    pub fn commit(&mut self) {
        let is_too_soon =
            self.failure.as_ref().is_some_and(|(_, time)| time.elapsed() < WRITE_AGAIN);
        while !self.pending.is_empty() && !is_too_soon {
            match self.write_pending() {
                Ok(()) => {
                    self.failure = None;
                    self.dirty_since.get_or_insert_with(Instant::now);
                }
                Err(error) => {
                    self.failure = Some((error.to_string(), Instant::now()));
                    self.say_full();
                    let can_retry = self.when_full == WhenFull::DropOldest && self.drop_oldest();
                    if !can_retry {
                        if self.when_full != WhenFull::Block {
                            self.drop_pending();
                        }
                        break;
                    }
                }
            }
        }
        if self.dirty_since.is_some_and(|since| since.elapsed() >= SYNC)
            && let Some(file) = self.writer.as_ref().and_then(|file| file.try_clone().ok())
        {
            self.dirty_since = None;
            // The thread ends with the spool.
            let _ = self.syncer.send(file);
        }
    }

    /// When to [`commit`](Spool::commit) again although nothing is added.
    pub fn next_commit(&self) -> Option<Instant> {
        let retry = self.failure.as_ref().map(|(_, time)| *time + WRITE_AGAIN);
        let retry = retry.filter(|_| !self.pending.is_empty());
        let sync = self.dirty_since.map(|since| since + SYNC);
        retry.into_iter().chain(sync).min()
    }

    /// Writes all that was added, and waits until all is on the disk itself.
    pub fn sync(&mut self) {
        self.failure = None;
        self.commit();
        let synced = self.writer.as_ref().map_or(Ok(()), File::sync_data);
        let synced = synced.and_then(|()| File::open(&self.dir)?.sync_all());
        if let Err(error) = synced {
            log::warn!("spool {}: sync: {error}", self.dir.display());
        }
        self.dirty_since = None;
    }

    /// Reads the next message to be sent.
    pub fn read(&mut self) -> Option<Spooled> {
        while self.has_unread() {
            let index = self.segments.iter().position(|segment| segment.id >= self.cursor.segment);
            let index = index?;
            let is_last = index + 1 == self.segments.len();
            if self.segments[index].id > self.cursor.segment {
                self.go_to(self.segments[index].id);
            }
            let pending = if is_last { self.pending.len() as u64 } else { 0 };
            let written = self.segments[index].length - pending;
            match self.read_file(written) {
                Ok(Some(Found::Message { run, mut message })) => {
                    message.position = Some(self.cursor);
                    self.cursor.offset = self.reader.as_ref().map_or(0, Reader::offset);
                    let unread = &mut self.segments[index].unread;
                    *unread = unread.saturating_sub(message.records);
                    return Some(Spooled { run, message });
                }
                Ok(Some(Found::Damage(place))) => {
                    self.segments[index].is_damaged = true;
                    self.cursor.offset = place.end;
                    let name = segment_name(self.cursor.segment);
                    (self.alert)(format!(
                        "spool {}: bytes {} to {} of {name} are no messages; all others are sent, and the \
                         file is kept as {}",
                        self.dir.display(),
                        place.start,
                        place.end,
                        corrupt_name(self.cursor.segment)
                    ));
                }
                Err(error) => {
                    let path = self.path(self.cursor.segment);
                    let path = path.display();
                    (self.alert)(format!("spool: read {path}: {error}; it is kept aside"));
                    self.segments[index].is_damaged = true;
                    self.cursor.offset = written;
                }
                Ok(None) if pending > 0 => return self.read_pending(written),
                Ok(None) => {
                    // Records that the header of the next file tells of, and that could not be read.
                    let lost = mem::take(&mut self.segments[index].unread);
                    self.counts.add_dropped(lost, 0);
                    self.counts.take_spooled(lost);
                    match is_last {
                        true => self.cursor = self.end(),
                        false => self.go_to(self.segments[index + 1].id),
                    }
                }
            }
        }
        None
    }

    /// Notes that all messages before `position` are confirmed; without a position, all that are read.
    pub fn acknowledge(&mut self, position: Option<Position>) {
        let position = position.unwrap_or(self.cursor);
        let is_all = position == self.end();
        while let Some(first) = self.segments.front()
            && (is_all || first.id < position.segment)
        {
            self.remove_oldest();
        }
        let mark = match is_all {
            true => Position { segment: self.next_id, offset: 0 },
            false => position,
        };
        if is_all {
            (self.writer, self.has_active, self.reader) = (None, false, None);
            (self.cursor, self.failure, self.dirty_since) = (mark, None, None);
            self.pending.clear();
        }
        if mark != self.mark {
            self.mark = mark;
            if let Err(error) = self.write_mark() {
                log::warn!("spool {}: write the mark: {error}", self.dir.display());
            }
        }
    }

    /// The place behind the last message.
    fn end(&self) -> Position {
        self.segments
            .back()
            .map_or(self.cursor, |last| Position { segment: last.id, offset: last.length })
    }

    fn size(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length).sum()
    }

    fn path(&self, id: u64) -> PathBuf {
        self.dir.join(segment_name(id))
    }

    fn find_segments(&mut self) -> io::Result<()> {
        let mut ids = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let name = file?.file_name();
            ids.extend(name.to_str().and_then(segment_id));
        }
        ids.sort_unstable();
        for id in ids {
            self.next_id = self.next_id.max(id + 1);
            let path = self.path(id);
            if id < self.mark.segment {
                // The mark was written, and the process ended before it removed the file.
                fs::remove_file(path)?;
                continue;
            }
            let file = File::open(&path)?;
            let mut header = Vec::new();
            (&file).take(FILE_HEADER as u64).read_to_end(&mut header)?;
            if let FileHeader::OtherVersion(version) = entry::decode_file_header(&header) {
                let aside = self.dir.join(corrupt_name(id));
                (self.alert)(format!(
                    "spool: {} has format {version}, which this emit-log does not know; it is kept as {}",
                    path.display(),
                    aside.display()
                ));
                fs::rename(path, aside)?;
                continue;
            }
            let length = file.metadata()?.len();
            self.segments.push_back(Segment { id, length, unread: 0, is_damaged: false });
        }
        if self.segments.front().is_none_or(|first| first.id != self.mark.segment) {
            let segment = self.segments.front().map_or(self.next_id, |first| first.id);
            self.cursor = Position { segment, offset: 0 };
        }
        self.count_records()
    }

    /// Counts what earlier runs have left. The headers of two successive files tell how many records are in
    /// the first; the records of the other files are counted one by one.
    fn count_records(&mut self) -> io::Result<()> {
        let mut total = 0;
        for index in 0..self.segments.len() {
            let (id, length) = (self.segments[index].id, self.segments[index].length);
            let next = self.segments.get(index + 1).filter(|next| next.id == id + 1);
            let next = next.and_then(|next| self.records_before(next.id));
            let before = self.records_before(id);
            let is_first = index == 0;
            let records = match (before, next) {
                (Some(before), Some(next)) if !is_first && next >= before => next - before,
                _ => {
                    let offset = if is_first { self.cursor.offset } else { 0 };
                    count_messages(File::open(self.path(id))?, offset, length)?
                }
            };
            self.segments[index].unread = records;
            self.records = self.records.max(before.unwrap_or(0) + records);
            total += records;
        }
        self.counts.add_read(total);
        self.counts.add_spooled(total);
        Ok(())
    }

    fn records_before(&self, id: u64) -> Option<u64> {
        let mut header = [0; FILE_HEADER];
        File::open(self.path(id)).ok()?.read_exact_at(&mut header, 0).ok()?;
        match entry::decode_file_header(&header) {
            FileHeader::Known(records) => Some(records),
            _ => None,
        }
    }

    fn push(&mut self, run: u64, message: &Message) -> Position {
        let max_segment = (self.limit / SEGMENTS).clamp(1, MAX_SEGMENT);
        let is_full = |active: &Segment| active.length >= max_segment;
        if !self.has_active || self.segments.back().is_none_or(is_full) {
            self.commit();
            // While the last file cannot be written to, it takes more than it should.
            if self.pending.is_empty() || !self.has_active {
                self.begin_segment();
            }
        }
        let position = self.end();
        let entry = entry_of(run, message);
        entry.encode(&mut self.pending);
        if let Some(active) = self.segments.back_mut() {
            active.length += entry.length() as u64;
            active.unread += message.records;
        }
        self.records += message.records;
        self.counts.add_spooled(message.records);
        if self.pending.len() >= MAX_PENDING {
            self.commit();
        }
        position
    }

    fn begin_segment(&mut self) {
        if self.dirty_since.is_some()
            && let Some(file) = self.writer.take()
        {
            let _ = self.syncer.send(file);
        }
        (self.writer, self.has_active) = (None, true);
        let (id, length) = (self.next_id, FILE_HEADER as u64);
        self.next_id += 1;
        self.segments.push_back(Segment { id, length, unread: 0, is_damaged: false });
        self.pending.extend(entry::file_header(self.records));
        if self.segments.len() == 1 {
            self.cursor = Position { segment: id, offset: 0 };
        }
    }

    fn write_pending(&mut self) -> io::Result<()> {
        let Some(active) = self.segments.back() else {
            return Ok(());
        };
        let written = active.length - self.pending.len() as u64;
        if self.writer.is_none() {
            self.writer = Some(private().create_new(true).open(self.path(active.id))?);
            if let Ok(dir) = File::open(&self.dir) {
                let _ = self.syncer.send(dir);
            }
        }
        if let Some(file) = &self.writer {
            file.write_all_at(&self.pending, written).inspect_err(|_| {
                // Part of the bytes may be written; they would be taken for damage later.
                let _ = file.set_len(written);
            })?;
        }
        self.pending.clear();
        Ok(())
    }

    /// Reads from the file at the cursor, as far as the file is written.
    fn read_file(&mut self, written: u64) -> io::Result<Option<Found>> {
        if self.cursor.offset >= written {
            return Ok(None);
        }
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => {
                let file = File::open(self.path(self.cursor.segment))?;
                self.reader.insert(Reader::new(file, self.cursor.offset))
            }
        };
        reader.next(written)
    }

    /// Reads a message that is not written yet.
    fn read_pending(&mut self, written: u64) -> Option<Spooled> {
        let start = (self.cursor.offset - written) as usize;
        let start = if self.cursor.offset == 0 { FILE_HEADER } else { start };
        let bytes = self.pending.get(start..)?;
        let Decoded::Whole(entry) = entry::decode(bytes) else {
            self.cursor = self.end();
            return None;
        };
        let body = entry.body.to_vec().into();
        let mut message = Message::from_spool(body, entry.packing, entry.number, entry.timestamp);
        message.position = Some(self.cursor);
        let run = entry.run;
        self.cursor.offset = written + (start + entry.length()) as u64;
        self.reader = None;
        if let Some(active) = self.segments.back_mut() {
            active.unread = active.unread.saturating_sub(message.records);
        }
        Some(Spooled { run, message })
    }

    fn go_to(&mut self, id: u64) {
        self.cursor = Position { segment: id, offset: 0 };
        self.reader = None;
    }

    /// Makes room for so many bytes, if records may be dropped for them.
    fn make_room(&mut self, length: u64) -> bool {
        match self.when_full {
            // The input waits; what was read before is kept.
            WhenFull::Block => {
                self.say_full();
                true
            }
            WhenFull::DropNewest => false,
            WhenFull::DropOldest => {
                while self.size() + length > self.limit {
                    if !self.drop_oldest() {
                        return false;
                    }
                    self.say_full();
                }
                true
            }
        }
    }

    /// Drops the oldest file of which no message has been read, but not the one that is written to.
    fn drop_oldest(&mut self) -> bool {
        let cursor = self.cursor;
        let is_unread = |segment: &Segment| {
            segment.id > cursor.segment
                || segment.id == cursor.segment && cursor.offset <= FILE_HEADER as u64
        };
        let Some(index) = self.segments.iter().position(is_unread) else {
            return false;
        };
        if index + 1 == self.segments.len() && self.has_active {
            return false;
        }
        let Some(segment) = self.segments.remove(index) else {
            return false;
        };
        if segment.id == cursor.segment {
            self.reader = None;
        }
        self.counts.add_dropped(segment.unread, segment.length - FILE_HEADER as u64);
        self.counts.take_spooled(segment.unread);
        self.remove(segment);
        true
    }

    /// Drops what is neither written nor read.
    fn drop_pending(&mut self) {
        let written =
            self.segments.back().map_or(0, |active| active.length) - self.pending.len() as u64;
        let is_in_active =
            self.segments.back().is_some_and(|active| active.id == self.cursor.segment);
        self.drop_pending_from(match is_in_active {
            true => self.cursor.offset.saturating_sub(written) as usize,
            false => 0,
        });
    }

    /// Drops all that is not written, at the end of the program.
    pub fn drop_unwritten(&mut self) {
        self.drop_pending_from(0);
    }

    fn drop_pending_from(&mut self, read: usize) {
        let Some(active) = self.segments.back_mut() else {
            return;
        };
        let written = active.length - self.pending.len() as u64;
        // The header of a new file stays.
        let mut place = if written == 0 { read.max(FILE_HEADER) } else { read };
        let kept = place;
        while let Some(bytes) = self.pending.get(place..)
            && let Decoded::Whole(entry) = entry::decode(bytes)
        {
            let records = entry.packing.count(entry.body);
            self.counts.add_dropped(records, entry.length() as u64);
            self.counts.take_spooled(records);
            self.records -= records;
            active.unread = active.unread.saturating_sub(records);
            place += entry.length();
        }
        self.pending.truncate(kept);
        active.length = written + kept as u64;
    }

    fn remove_oldest(&mut self) {
        if let Some(segment) = self.segments.pop_front() {
            self.remove(segment);
        }
    }

    /// Removes a file, or puts a damaged one aside.
    fn remove(&self, segment: Segment) {
        let path = self.path(segment.id);
        let removed = match segment.is_damaged {
            true => fs::rename(&path, self.dir.join(corrupt_name(segment.id))),
            false => fs::remove_file(&path),
        };
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("spool: remove {}: {error}", path.display());
            }
            _ => {}
        }
    }

    fn write_mark(&self) -> io::Result<()> {
        let mut bytes = [0; MARK_LENGTH];
        bytes[..8].copy_from_slice(&self.mark.segment.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.mark.offset.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..16]);
        bytes[16..].copy_from_slice(&checksum.to_le_bytes());
        self.mark_file.write_all_at(&bytes, 0)
    }

    /// Says that the spool is full, and how many records are dropped so far, now and then.
    fn say_full(&mut self) {
        if self.said_full.is_some_and(|time| time.elapsed() < SAY_AGAIN) {
            return;
        }
        self.said_full = Some(Instant::now());
        let why = match &self.failure {
            Some((error, _)) => format!("cannot be written to ({error})"),
            None => format!("is full ({})", ByteSize::b(self.limit)),
        };
        let consequence = match self.when_full {
            WhenFull::Block => "the input waits for the broker".to_string(),
            _ => match self.counts.dropped() {
                (0, _) => "records are dropped".to_string(),
                (records, bytes) => format!("{records} records ({}) dropped", ByteSize::b(bytes)),
            },
        };
        let text = format!("spool {} {why}: {consequence}", self.dir.display());
        match self.when_full {
            WhenFull::Block => log::warn!("{text}"),
            _ => (self.alert)(text),
        }
    }
}

fn entry_of(run: u64, message: &Message) -> Entry<'_> {
    let Message { number, timestamp, packing, ref body, .. } = *message;
    Entry { run, number, timestamp, packing, body }
}

/// Opens files for nobody else.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

/// The mark in its file. Without a sound one, what is in the spool is sent from its beginning, and
/// receivers leave out what they have had.
fn read_mark(file: &File) -> io::Result<Position> {
    let mut bytes = [0; MARK_LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(error),
        _ => {}
    }
    let number = |at: usize| {
        bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let checksum = crc32fast::hash(&bytes[..16]).to_le_bytes();
    match checksum == bytes[16..] {
        true => Ok(Position { segment: number(0), offset: number(8) }),
        false => Ok(Position { segment: 0, offset: 0 }),
    }
}

fn count_messages(file: File, offset: u64, length: u64) -> io::Result<u64> {
    let mut reader = Reader::new(file, offset);
    let mut records = 0;
    while let Some(found) = reader.next(length)? {
        if let Found::Message { message, .. } = found {
            records += message.records;
        }
    }
    Ok(records)
}

/// A thread that syncs files, as that may take long.
fn start_syncer() -> io::Result<Sender<File>> {
    let (sender, files) = unbounded::<File>();
    thread::Builder::new().spawn(move || {
        for file in files {
            if let Err(error) = file.sync_all() {
                log::warn!("spool: sync: {error}");
            }
        }
    })?;
    Ok(sender)
}

fn segment_name(id: u64) -> String {
    format!("{id:08}.spool")
}

fn corrupt_name(id: u64) -> String {
    format!("{id:08}.corrupt")
}

fn segment_id(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".spool")?;
    let is_number = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number)
}

#[cfg(test)]
mod tests;
