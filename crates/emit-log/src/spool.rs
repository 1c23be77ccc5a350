//! Messages on disk until the broker has confirmed them: `--spool`.
//!
//! A spool is a queue of messages in an SQLite database. Each message has a position, and positions only grow. These
//! positions divide the queue:
//!
//! - messages before `confirmed` are confirmed, and deleted with the next commit,
//! - messages before `cursor` have been read to be sent,
//! - messages from `written` on are only in memory, in `pending`,
//! - `end` is the position of the next message.
//!
//! [`Spool::commit`] writes all changes in one transaction, together with the number of remaining records. A lost
//! record is therefore detected.

mod database;
pub mod outbox;

use std::collections::VecDeque;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::ValueEnum;
use logs_process::exit::Failure;

use crate::counts::Counts;
use crate::message::{Message, Position};

use database::{Database, Facts, OpenError};

/// Bytes of pending messages after which they are written.
const MAX_PENDING: u64 = 256 * 1024;

/// Bytes read from the database at a time.
const READ_AHEAD: u64 = 256 * 1024;

/// The time between two attempts to read or write a database after an error of the system.
const RETRY: Duration = Duration::from_millis(100);

/// The time from a commit until its sync to the disk.
const SYNC: Duration = Duration::from_secs(1);

/// The time between two reports that the spool is full.
const REPORT_AGAIN: Duration = Duration::from_secs(10);

/// What to do when the spool is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenFull {
    /// Block the input until the broker has confirmed enough
    Block,
    /// Drop the oldest records that are not in flight
    DropOldest,
    /// Drop the record just read
    DropNewest,
}

/// Messages on disk.
pub struct Spool {
    dir: PathBuf,
    database: Database,
    limit: u64,
    when_full: WhenFull,
    counts: Arc<Counts>,
    confirmed: Position,
    cursor: Position,
    end: Position,
    /// Messages that are not in the database.
    pending: VecDeque<Message>,
    pending_bytes: u64,
    /// When the pending messages must be written.
    due: Option<Instant>,
    /// Messages after the cursor that were read from the database in advance.
    ahead: VecDeque<Message>,
    /// Position and records of each message that was read and is not confirmed.
    in_flight: VecDeque<(Position, u64)>,
    /// The facts in the database.
    facts: Facts,
    /// Records, and their bytes, that were dropped since the last commit.
    dropped: (u64, u64),
    /// Records in the database that are not read.
    unread: u64,
    /// Records that the next commit subtracts from those in the database, because they are confirmed or missing.
    done: u64,
    /// The error of the last write to the database, and its time.
    failure: Option<(String, Instant)>,
    /// The same for reading. A full disk prevents writing, but not reading.
    read_failure: Option<(String, Instant)>,
    reported_full: Option<Instant>,
    /// When to sync the committed messages to the disk.
    sync_due: Option<Instant>,
    /// Reports to the user which records are lost or may be lost.
    alert: Box<dyn Fn(String) + Send>,
}

impl Spool {
    /// Opens the spool in `dir`, and creates both if needed. Records in the spool count as read and spooled; records
    /// that an earlier run dropped without a report count as dropped.
    ///
    /// # Errors
    ///
    /// When the directory does not hold a sound spool, another process uses the spool, or the system cannot open it.
    pub fn open(
        dir: &Path,
        limit: u64,
        when_full: WhenFull,
        counts: Arc<Counts>,
        alert: impl Fn(String) + Send + 'static,
    ) -> Result<Spool, Failure> {
        let opening = format!("open the spool {}", dir.display());
        let opened = Database::open(dir, limit);
        let (database, facts) = opened.map_err(|error| error.describe(&opening))?;
        counts.add_read(facts.records + facts.dropped);
        counts.add_spooled(facts.records);
        counts.add_dropped(facts.dropped, facts.dropped_bytes);
        counts.set_spool_bytes(database.size());
        let first = if facts.records == 0 { facts.end } else { 0 };
        Ok(Spool {
            dir: dir.into(),
            database,
            limit,
            when_full,
            counts,
            confirmed: first,
            cursor: first,
            end: facts.end,
            pending: VecDeque::new(),
            pending_bytes: 0,
            due: None,
            ahead: VecDeque::new(),
            in_flight: VecDeque::new(),
            facts,
            dropped: (0, 0),
            unread: facts.records,
            done: 0,
            failure: None,
            read_failure: None,
            reported_full: None,
            sync_due: Some(Instant::now() + SYNC),
            alert: Box::new(alert),
        })
    }

    /// Whether the spool has unread messages.
    pub fn has_unread(&self) -> bool {
        self.cursor < self.end
    }

    /// Whether the spool has no messages.
    pub fn is_empty(&self) -> bool {
        self.facts.records == self.done && self.pending.is_empty()
    }

    /// Whether messages were read that are not confirmed.
    pub fn has_unconfirmed(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether the spool accepts input.
    pub fn has_room(&self) -> bool {
        let is_failing = self.failure.is_some() && self.is_changed();
        let has_room = !is_failing && self.size() < self.limit;
        has_room || self.when_full != WhenFull::Block
    }

    /// The last error of the database, if there is something to write or read.
    pub fn failure(&self) -> Option<&str> {
        let write = self.failure.as_ref().filter(|_| self.is_changed());
        let read = self.read_failure.as_ref().filter(|_| self.has_unread());
        write.or(read).map(|(error, _)| error.as_str())
    }

    /// Adds a message behind all others. It is written to the disk by the time `by`. If the spool is full, messages may
    /// be dropped and counted.
    ///
    /// # Errors
    ///
    /// When the database is damaged.
    pub fn append(&mut self, message: &Message, by: Instant) -> Result<(), Failure> {
        let (length, max_bytes) = (message.body.len() as u64, self.database.capacity(self.limit));
        let is_too_large =
            length > database::MAX_BODY || length > max_bytes && self.when_full != WhenFull::Block;
        let is_full = self.size() + size_of(message) > self.limit;
        if is_full || is_too_large {
            self.report_full();
        }
        if is_too_large || is_full && self.when_full == WhenFull::DropNewest {
            self.count_dropped(message.records, length);
            return Ok(());
        }
        self.push(message, by);
        match self.pending_bytes >= MAX_PENDING.min(self.limit / 16) {
            true => self.commit(),
            false => Ok(()),
        }
    }

    /// Adds a message that is already sent. The spool must have no unread message. The limit does not apply, because
    /// the window limits such messages.
    pub fn append_sent(&mut self, message: &mut Message) {
        self.push(message, Instant::now());
        message.position = Some(self.end - 1);
        self.cursor = self.end;
        self.in_flight.push_back((self.end - 1, message.records));
    }

    fn push(&mut self, message: &Message, by: Instant) {
        let message = Message { position: Some(self.end), ..message.clone() };
        self.counts.add_spooled(message.records);
        self.pending_bytes += size_of(&message);
        self.pending.push_back(message);
        self.end += 1;
        self.due = Some(self.due.map_or(by, |due| due.min(by)));
    }

    /// Reads the next message to be sent.
    ///
    /// # Errors
    ///
    /// When the database is damaged.
    pub fn read(&mut self) -> Result<Option<Message>, Failure> {
        let is_in_database = self.cursor < self.written() || self.unread > 0;
        if self.ahead.is_empty() && is_in_database {
            if is_recent(&self.read_failure) {
                return Ok(None);
            }
            match self.database.read(self.cursor, READ_AHEAD) {
                Ok(messages) => (self.ahead, self.read_failure) = (messages, None),
                Err(error) => {
                    self.read_failure = Some(self.system_failure(error)?);
                    return Ok(None);
                }
            }
            if self.ahead.is_empty() {
                self.cursor = self.cursor.max(self.written());
                self.count_missing();
            }
        }
        let message = match self.ahead.pop_front() {
            Some(message) => {
                self.unread = self.unread.saturating_sub(message.records);
                message
            }
            None => {
                let index = (self.cursor - self.written()) as usize;
                let Some(message) = self.pending.get(index) else {
                    return Ok(None);
                };
                message.clone()
            }
        };
        let position = message.position.unwrap_or(self.cursor);
        self.cursor = position + 1;
        self.in_flight.push_back((position, message.records));
        Ok(Some(message))
    }

    /// Records that all messages before `position` are confirmed; without a position, all messages that are read.
    pub fn confirm(&mut self, position: Option<Position>) {
        let position = position.unwrap_or(self.cursor);
        self.confirmed = self.confirmed.max(position);
        while let Some(&(first, records)) = self.in_flight.front()
            && first < position
        {
            self.in_flight.pop_front();
            if first < self.written() {
                self.done += records;
            } else if let Some(confirmed) = self.pending.pop_front() {
                self.pending_bytes -= size_of(&confirmed);
            }
        }
    }

    /// Commits if messages are due or confirmed.
    ///
    /// # Errors
    ///
    /// When the database is damaged.
    pub fn work(&mut self, now: Instant) -> Result<(), Failure> {
        match self.due.is_some_and(|due| due <= now) || self.done > 0 {
            true => self.commit(),
            false => Ok(()),
        }
    }

    /// When to [`flush`](Spool::flush).
    pub fn sync_time(&self) -> Option<Instant> {
        self.sync_due
    }

    /// When to [`work`](Spool::work) again if no message is added or confirmed.
    pub fn next_time(&self) -> Option<Instant> {
        let write = self.failure.as_ref().filter(|_| self.is_changed());
        let read = self.read_failure.as_ref().filter(|_| self.has_unread());
        let retry = write.into_iter().chain(read).map(|(_, time)| *time + RETRY);
        // While the broker accepts nothing, a read is overdue and not needed.
        let now = Instant::now();
        let retry = retry.filter(|time| *time > now || write.is_some());
        let due = self.due.filter(|_| self.failure.is_none());
        retry.chain(due).min()
    }

    /// Writes all changes since the last commit. A kill does not lose committed messages.
    ///
    /// # Errors
    ///
    /// When the database is damaged. After an error of the system, records may be dropped, as `--when-full` says.
    pub fn commit(&mut self) -> Result<(), Failure> {
        if !self.is_changed() {
            (self.failure, self.due) = (None, None);
            return Ok(());
        }
        if is_recent(&self.failure) {
            return Ok(());
        }
        let is_dropping = self.when_full == WhenFull::DropOldest;
        let max_bytes = self.database.capacity(self.limit).saturating_sub(self.pending_bytes);
        let max_bytes = is_dropping.then_some(max_bytes);
        let mut written = self.write(max_bytes);
        if written.is_err() {
            // The disk may be full. The sync makes room in the write-ahead log.
            self.sync()?;
            if let Err(error) = self.delete_in_portions() {
                log::debug!("spool: {}", database::describe(&error));
            }
            written = self.write(max_bytes);
        }
        if is_dropping && written.is_err() {
            let max_bytes = self.database.in_use().saturating_sub(self.pending_bytes);
            written = self.write(Some(max_bytes));
        }
        match written {
            Ok(()) => {
                (self.failure, self.due) = (None, None);
                let now = Instant::now();
                match self.database.is_wal_full() {
                    true => self.sync_due = Some(now),
                    false => _ = self.sync_due.get_or_insert(now + SYNC),
                }
                Ok(())
            }
            Err(error) => {
                self.failure = Some(self.system_failure(error)?);
                self.report_full();
                if self.when_full != WhenFull::Block {
                    self.drop_pending();
                }
                Ok(())
            }
        }
    }

    /// Commits, and syncs to the disk. This can take long, and a kill meanwhile loses messages that are not in the
    /// spool.
    ///
    /// # Errors
    ///
    /// As for [`commit`](Spool::commit).
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.failure = None;
        self.commit()?;
        self.sync()
    }

    /// Closes the spool. Messages that cannot be written are dropped, or only counted as not in the spool if they are
    /// sent: `unconfirmed` returns the number of sent and unconfirmed records from a position on. The counts of dropped
    /// records are cleared in the database, because the caller reports them.
    ///
    /// # Errors
    ///
    /// When the database is damaged.
    pub fn close(&mut self, unconfirmed: impl FnOnce(Position) -> u64) -> Result<(), Failure> {
        let flushed = self.flush();
        self.drop_pending();
        self.counts.remove_spooled(unconfirmed(self.written()));
        self.pending.clear();
        self.pending_bytes = 0;
        if !self.database.is_in_place() {
            let left = self.counts.spooled();
            self.counts.remove_spooled(left);
            self.counts.add_dropped(left, 0);
            (self.alert)(format!("spool {}: {} was removed", self.dir.display(), database::NAME));
        }
        if flushed.is_ok() && self.facts.dropped + self.dropped.0 > 0 {
            (self.facts.dropped, self.facts.dropped_bytes, self.dropped) = (0, 0, (0, 0));
            if let Err(error) = self.write(None) {
                log::debug!("spool: {}", database::describe(&error));
            }
        }
        flushed
    }

    /// Deletes confirmed messages in transactions that need little room in the write-ahead log.
    fn delete_in_portions(&mut self) -> rusqlite::Result<()> {
        while self.done > 0 {
            let change = self.database.begin()?;
            let deleted = change.delete_some_before(self.confirmed)?;
            if deleted == 0 {
                break;
            }
            let records = self.facts.records.saturating_sub(deleted);
            let facts = Facts { records, ..self.facts };
            change.commit(facts)?;
            self.database.count_pages();
            self.facts = facts;
            self.done = self.done.saturating_sub(deleted);
            self.database.sync(false)?;
        }
        Ok(())
    }

    fn is_changed(&self) -> bool {
        !self.pending.is_empty() || self.done > 0 || self.dropped.0 > 0
    }

    /// The position of the first pending message.
    fn written(&self) -> Position {
        self.end - self.pending.len() as u64
    }

    /// The size of the spool on the disk, including the pending messages, in bytes.
    fn size(&self) -> u64 {
        self.database.size() + self.pending_bytes
    }

    /// Writes all changes in one transaction. With `max_bytes`, the oldest unread messages are dropped until the
    /// messages in the database have at most this number of bytes.
    fn write(&mut self, max_bytes: Option<u64>) -> rusqlite::Result<()> {
        let mut facts = Facts { end: self.end, ..self.facts };
        facts.records = facts.records.saturating_sub(self.done);
        let pending = self.pending.iter();
        let change = self.database.begin()?;
        change.delete_before(self.confirmed)?;
        let dropped = match max_bytes {
            None => Facts::default(),
            Some(max_bytes) => change.drop_from(self.cursor, max_bytes)?,
        };
        facts.records = facts.records.saturating_sub(dropped.dropped);
        facts.dropped += dropped.dropped + self.dropped.0;
        facts.dropped_bytes += dropped.dropped_bytes + self.dropped.1;
        let mut unread = 0;
        change.insert(pending.clone())?;
        for message in pending {
            facts.records += message.records;
            if message.position >= Some(self.cursor) {
                unread += message.records;
            }
        }
        change.commit(facts)?;
        self.database.count_pages();
        if dropped.dropped > 0 {
            self.ahead.clear();
            self.counts.add_dropped(dropped.dropped, dropped.dropped_bytes);
            self.counts.remove_spooled(dropped.dropped);
        }
        self.unread = self.unread.saturating_sub(dropped.dropped) + unread;
        (self.facts, self.done, self.pending_bytes, self.dropped) = (facts, 0, 0, (0, 0));
        self.pending.clear();
        self.counts.set_spool_bytes(self.size());
        if dropped.dropped > 0 {
            self.report_full();
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let has_rows = self.facts.records > 0 || !self.pending.is_empty();
        self.sync_due = match self.database.sync(!has_rows) {
            Ok(()) => None,
            // The disk may be full. The next commit reports this.
            Err(error) => {
                let (reason, now) = self.system_failure(error)?;
                log::debug!("spool {}: sync: {reason}", self.dir.display());
                Some(now + SYNC)
            }
        };
        Ok(())
    }

    /// Counts the records that are missing after all of the database was read.
    fn count_missing(&mut self) {
        let missing = mem::take(&mut self.unread);
        if missing == 0 {
            return;
        }
        self.done += missing;
        self.counts.remove_spooled(missing);
        self.count_dropped(missing, 0);
        (self.alert)(format!(
            "spool {}: records that are missing or damaged: {missing}; all others are sent",
            self.dir.display()
        ));
    }

    fn count_dropped(&mut self, records: u64, bytes: u64) {
        self.dropped.0 += records;
        self.dropped.1 += bytes;
        self.due.get_or_insert_with(|| Instant::now() + SYNC);
        self.counts.add_dropped(records, bytes);
    }

    /// Drops the pending messages that are not read.
    fn drop_pending(&mut self) {
        while self.has_unread()
            && let Some(message) = self.pending.pop_back()
        {
            self.end -= 1;
            self.pending_bytes -= size_of(&message);
            self.counts.remove_spooled(message.records);
            self.count_dropped(message.records, message.body.len() as u64);
        }
    }

    /// The reason and the time of an error of the system, for another attempt. Returns `Err` if the database is
    /// damaged.
    fn system_failure(&self, error: rusqlite::Error) -> Result<(String, Instant), Failure> {
        if database::is_damage(&error) {
            let using = format!("use the spool {}", self.dir.display());
            return Err(OpenError::from(error).describe(&using));
        }
        Ok((database::describe(&error), Instant::now()))
    }

    /// Reports that the spool is full, and the number of dropped records, at most every [`REPORT_AGAIN`].
    fn report_full(&mut self) {
        if self.reported_full.is_some_and(|time| time.elapsed() < REPORT_AGAIN) {
            return;
        }
        self.reported_full = Some(Instant::now());
        let why = match self.failure() {
            Some(error) => format!("cannot be used ({error})"),
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

/// Whether the last attempt is less than [`RETRY`] ago.
fn is_recent(failure: &Option<(String, Instant)>) -> bool {
    failure.as_ref().is_some_and(|(_, time)| time.elapsed() < RETRY)
}

/// The approximate size of a message in the database, in bytes.
fn size_of(message: &Message) -> u64 {
    message.body.len() as u64 + database::ROW
}

#[cfg(test)]
mod tests;
