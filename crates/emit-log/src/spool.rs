//! Messages on disk until the broker has confirmed them: `--spool`.
//!
//! A spool is a queue of messages in an SQLite database. It knows nothing of brokers. A message has a position, and
//! positions only grow. These places divide the queue:
//!
//! - messages before `confirmed` are confirmed, and deleted with the next commit,
//! - messages before `cursor` have been read to be sent,
//! - messages from `written` on are in memory only, in `pending`,
//! - `end` is the position of the next message.
//!
//! [`Spool::commit`] writes what has changed in one transaction, with the number of records that are left. So the
//! database says how many records it must hold, and a record that is missing is noticed.

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

/// Bytes that gather before they are written.
const MAX_PENDING: u64 = 256 * 1024;

/// Bytes read from the database at a time.
const READ_AHEAD: u64 = 256 * 1024;

/// The time between two attempts to use a database that the system fails to read or write.
const RETRY: Duration = Duration::from_millis(100);

/// The time after which what is written is brought to the disk itself.
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
    /// Messages that are not in the database yet.
    pending: VecDeque<Message>,
    pending_bytes: u64,
    /// When the pending messages are to be written.
    due: Option<Instant>,
    /// Messages from the cursor on that were read from the database in advance.
    ahead: VecDeque<Message>,
    /// Position and records of each message that was read and is not confirmed.
    in_flight: VecDeque<(Position, u64)>,
    /// What the database says of itself.
    facts: Facts,
    /// Records, and their bytes, that were dropped since the last commit.
    dropped: (u64, u64),
    /// Records in the database that are not read.
    unread: u64,
    /// Records in the database that are confirmed, or were not found there: to be taken off with the next commit.
    done: u64,
    /// Why, and when, the database could last not be written.
    failure: Option<(String, Instant)>,
    /// The same for reading: a full disk holds up no message that is there.
    read_failure: Option<(String, Instant)>,
    reported_full: Option<Instant>,
    /// When to bring what is written to the disk itself.
    sync_due: Option<Instant>,
    /// Reports to the user which records are lost, or may be.
    alert: Box<dyn Fn(String) + Send>,
}

impl Spool {
    /// Opens the spool in `dir`, which is made if it does not exist. Records in the spool count as read and spooled;
    /// records that an earlier run dropped without a report count as dropped.
    ///
    /// # Errors
    ///
    /// When the directory holds something else than a sound spool, another process uses the spool, or the system refuses
    /// to open it.
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

    /// Whether messages are in the spool that are not read yet.
    pub fn has_unread(&self) -> bool {
        self.cursor < self.end
    }

    /// Whether no message is in the spool.
    pub fn is_empty(&self) -> bool {
        self.facts.records == self.done && self.pending.is_empty()
    }

    /// Whether messages were read that are not confirmed.
    pub fn has_unconfirmed(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether the input need not wait for the spool.
    pub fn has_room(&self) -> bool {
        let is_failing = self.failure.is_some() && self.is_changed();
        let has_room = !is_failing && self.size() < self.limit;
        has_room || self.when_full != WhenFull::Block
    }

    /// Why the database could last not be used, while something is to be written or read.
    pub fn failure(&self) -> Option<&str> {
        let write = self.failure.as_ref().filter(|_| self.is_changed());
        let read = self.read_failure.as_ref().filter(|_| self.has_unread());
        write.or(read).map(|(error, _)| error.as_str())
    }

    /// Adds a message that is to be sent after all others in the spool, and is to be written by a time. Where the spool
    /// is full, a message may be dropped, and counted, instead.
    ///
    /// # Errors
    ///
    /// When the database is damaged.
    pub fn append(&mut self, message: &Message, by: Instant) -> Result<(), Failure> {
        let (length, most) = (message.body.len() as u64, self.database.capacity(self.limit));
        let is_too_large =
            length > database::MAX_BODY || length > most && self.when_full != WhenFull::Block;
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

    /// Adds a message that is sent already, while no message in the spool is unread. This one finds room
    /// whatever the limit is: messages being sent are few.
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

    /// Notes that all messages before `position` are confirmed; without a position, all that are read.
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

    /// Does what is due.
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

    /// When to [`work`](Spool::work) again although nothing is added or confirmed.
    pub fn next_time(&self) -> Option<Instant> {
        let write = self.failure.as_ref().filter(|_| self.is_changed());
        let read = self.read_failure.as_ref().filter(|_| self.has_unread());
        let retry = write.into_iter().chain(read).map(|(_, time)| *time + RETRY);
        // A broker that takes nothing leaves a read for later.
        let now = Instant::now();
        let retry = retry.filter(|time| *time > now || write.is_some());
        let due = self.due.filter(|_| self.failure.is_none());
        retry.chain(due).min()
    }

    /// Writes what has changed since the last commit. What a commit has written, no kill can take.
    ///
    /// # Errors
    ///
    /// When the database is damaged. Where the system fails, records may be dropped instead, as `--when-full` says.
    pub fn commit(&mut self) -> Result<(), Failure> {
        if !self.is_changed() {
            (self.failure, self.due) = (None, None);
            return Ok(());
        }
        if is_recent(&self.failure) {
            return Ok(());
        }
        let is_dropping = self.when_full == WhenFull::DropOldest;
        let most = self.database.capacity(self.limit).saturating_sub(self.pending_bytes);
        let most = is_dropping.then_some(most);
        let mut written = self.write(most);
        if written.is_err() {
            // A full disk, perhaps: this makes room in the write-ahead log.
            self.sync()?;
            written = self.write(most);
        }
        if is_dropping && written.is_err() {
            let most = self.database.in_use().saturating_sub(self.pending_bytes);
            written = self.write(Some(most));
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

    /// Writes all that has changed, and brings that to the disk itself. That may take long: what is not in the spool by
    /// then, a kill can take.
    ///
    /// # Errors
    ///
    /// As for [`commit`](Spool::commit).
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.failure = None;
        self.commit()?;
        self.sync()
    }

    /// Ends the use of the spool: what cannot be written is not in the spool. `unconfirmed` counts the records from a
    /// position on that were read and are not confirmed. The counts of dropped records, which the user is about to see,
    /// are cleared in the database.
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

    fn is_changed(&self) -> bool {
        !self.pending.is_empty() || self.done > 0 || self.dropped.0 > 0
    }

    /// The position of the first message that is not in the database.
    fn written(&self) -> Position {
        self.end - self.pending.len() as u64
    }

    /// Bytes that the spool takes on the disk, and that are about to be written.
    fn size(&self) -> u64 {
        self.database.size() + self.pending_bytes
    }

    /// One transaction. With `most`, the oldest unread messages are dropped until all that were there take at most so
    /// many bytes.
    fn write(&mut self, most: Option<u64>) -> rusqlite::Result<()> {
        let mut facts = Facts { end: self.end, ..self.facts };
        facts.records = facts.records.saturating_sub(self.done);
        let pending = self.pending.iter();
        let change = self.database.begin()?;
        change.delete_before(self.confirmed)?;
        let dropped = match most {
            None => Facts::default(),
            Some(most) => change.drop_from(self.cursor, most)?,
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
        if dropped.dropped > 0 {
            self.report_full();
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let has_rows = self.facts.records > 0 || !self.pending.is_empty();
        self.sync_due = match self.database.sync(!has_rows) {
            Ok(()) => None,
            // A full disk; the next commit reports it.
            Err(error) => {
                let (reason, now) = self.system_failure(error)?;
                log::debug!("spool {}: sync: {reason}", self.dir.display());
                Some(now + SYNC)
            }
        };
        Ok(())
    }

    /// All of the database was read: records that it should hold and that did not come are lost.
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

    /// Drops what is neither written nor read.
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

    /// What to take note of for another attempt, if the system is at fault.
    fn system_failure(&self, error: rusqlite::Error) -> Result<(String, Instant), Failure> {
        if database::is_damage(&error) {
            let using = format!("use the spool {}", self.dir.display());
            return Err(OpenError::from(error).describe(&using));
        }
        Ok((database::describe(&error), Instant::now()))
    }

    /// Reports that the spool is full, and how many records are dropped so far, now and then.
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

/// Whether it is too soon for another attempt.
fn is_recent(failure: &Option<(String, Instant)>) -> bool {
    failure.as_ref().is_some_and(|(_, time)| time.elapsed() < RETRY)
}

/// About how many bytes a message takes in the database.
fn size_of(message: &Message) -> u64 {
    message.body.len() as u64 + database::ROW
}

#[cfg(test)]
mod tests;
