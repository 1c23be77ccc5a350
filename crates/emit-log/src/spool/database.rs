//! The database of a spool. `docs/spool.md` describes it for its users.
//!
//! SQLite writes to a write-ahead log (WAL) with `synchronous=NORMAL`: a commit is safe from a kill at once, and from a
//! power cut with the next [`Database::sync`], which alone waits for the disk. The lock of the database keeps it to one
//! process.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crc32fast::Hasher;
use logs_common::wire::Packing;
use logs_process::exit::{Failure, Status};
use logs_process::lock::LOCK_WAIT;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::message::Message;

/// The name of the database in its directory.
pub const NAME: &str = "spool.db";

/// The largest body that SQLite accepts in a row. The limit of a row is 1,000,000,000 bytes, and the other columns are
/// small.
pub const MAX_BODY: u64 = 999_999_000;

/// The property `application_id` of a database: "emit".
const APPLICATION: i64 = 0x656d_6974;

/// The property `user_version`: the version of these tables.
const VERSION: i64 = 2;

/// The size of the write-ahead log at which a checkpoint copies it into the database, in bytes. A small spool has a
/// smaller limit.
const MAX_WAL: u64 = 4 * 1024 * 1024;

/// The average time between two attempts to open a database that another process uses. The real time is random.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Bytes of a row beside its body.
pub const ROW: u64 = 40;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Pages of a database without messages.
const MIN_PAGES: u64 = 3;

/// Messages that are deleted at a time when there is little room.
const PORTION: u64 = 64;

/// Pages reserved at a time.
const RESERVE: u64 = 16;

/// An empty database of more pages is shrunk.
const MAX_EMPTY: u64 = 256;

/// Checksums detect damage that SQLite does not detect. The single row of `facts` is [`Facts`].
const SCHEMA: &str = "
    CREATE TABLE messages (
        position INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        run INTEGER NOT NULL,
        number INTEGER NOT NULL,
        time INTEGER NOT NULL,
        packing INTEGER NOT NULL,
        records INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE TABLE facts (
        next INTEGER NOT NULL,
        records INTEGER NOT NULL,
        dropped INTEGER NOT NULL,
        dropped_bytes INTEGER NOT NULL,
        checksum INTEGER NOT NULL
    ) STRICT;";

/// The counts that the database stores about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The position of the next message.
    pub end: u64,
    /// Records in the database.
    pub records: u64,
    /// Records that were dropped, and that no run has reported at its end.
    pub dropped: u64,
    /// Bytes of these.
    pub dropped_bytes: u64,
}

impl Facts {
    fn checksum(&self) -> i64 {
        let mut hasher = Hasher::new();
        for number in [self.end, self.records, self.dropped, self.dropped_bytes] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.finalize().into()
    }
}

/// Why a spool cannot be used.
#[derive(Debug)]
pub enum OpenError {
    /// An error of the system.
    System(String),
    /// Another process uses the spool.
    InUse,
    /// The directory does not hold a sound spool. The text has the reason and the next step.
    Unusable(String),
}

impl OpenError {
    /// The failure of an operation such as "open the spool DIR".
    pub fn describe(self, operation: &str) -> Failure {
        match self {
            OpenError::System(text) => Failure::new(Status::Io, format!("{operation}: {text}")),
            OpenError::InUse => {
                Failure::new(Status::Io, format!("{operation}: another emit-log is using it"))
            }
            OpenError::Unusable(text) => {
                Failure::new(Status::Config, format!("{operation}: {text}"))
            }
        }
    }

    fn unusable(what: impl std::fmt::Display) -> OpenError {
        OpenError::Unusable(format!(
            "{NAME} {what} (move {NAME}* to another directory to begin with an empty spool)"
        ))
    }
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> OpenError {
        OpenError::System(error.to_string())
    }
}

impl From<rusqlite::Error> for OpenError {
    fn from(error: rusqlite::Error) -> OpenError {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse,
            Some(ErrorCode::NotADatabase) => OpenError::unusable("is not a database"),
            _ if is_damage(&error) => {
                OpenError::unusable(format!("is damaged: {}", describe(&error)))
            }
            _ => OpenError::System(describe(&error)),
        }
    }
}

/// Whether the content of the database is the cause, and not the system.
pub fn is_damage(error: &rusqlite::Error) -> bool {
    // The file is truncated. SQLite reports this as an error of the system.
    if error.sqlite_extended_error_code() == Some(rusqlite::ffi::SQLITE_IOERR_SHORT_READ) {
        return true;
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => true,
        // Tables, columns or positions are not as expected.
        Some(ErrorCode::Unknown | ErrorCode::ConstraintViolation) => true,
        Some(_) => false,
        None => true,
    }
}

/// The text of an SQLite error. For an error of the system, the reason alone.
pub fn describe(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(code, _) if code.code == ErrorCode::SystemIoFailure => {
            let text = code.to_string();
            text.split_once(": ").map_or(text.clone(), |(_, reason)| reason.into())
        }
        error => error.to_string(),
    }
}

/// The database of a spool.
pub struct Database {
    connection: Connection,
    path: PathBuf,
    /// The file, to reserve space in. It must be dropped after the connection, because closing a file releases its
    /// locks.
    file: File,
    /// Bytes reserved in the file.
    reserved: Cell<u64>,
    /// Pages in use.
    pages: u64,
    /// Pages in the write-ahead log.
    wal_pages: Arc<AtomicU64>,
    /// The size of the write-ahead log at which it is full, in bytes. The last commit may exceed it.
    wal_limit: u64,
}

impl Database {
    /// Opens the database in `dir`, and creates both if needed. `limit` is the limit of the spool in bytes. Waits up to
    /// [`LOCK_WAIT`] for another process to release the database.
    pub fn open(dir: &Path, limit: u64) -> Result<(Database, Facts), OpenError> {
        let end = Instant::now() + LOCK_WAIT;
        loop {
            match Database::try_open(dir, limit) {
                // Two processes that open the database at once may each hold a part of the lock. Only closing the
                // database releases it, so SQLite cannot wait here.
                Err(OpenError::InUse) if Instant::now() < end => {
                    thread::sleep(LOCK_RETRY.mul_f64(0.5 + fastrand::f64()));
                }
                opened => return opened,
            }
        }
    }

    fn try_open(dir: &Path, limit: u64) -> Result<(Database, Facts), OpenError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        check_for_old_files(dir)?;
        // SQLite follows no symbolic links here, so they are resolved before.
        let path = fs::canonicalize(dir)?.join(NAME);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Err(OpenError::unusable("is not a regular file")),
            Err(error) if error.kind() == ErrorKind::NotFound => create(&path)?,
            Err(error) => return Err(error.into()),
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut connection = Connection::open_with_flags(&path, flags)?;
        connection.busy_timeout(Duration::ZERO)?;
        // Until the checks have passed, nothing in the spool changes.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        let is_new = check_format(&connection)?;
        let wal_limit = (limit / 16).min(MAX_WAL);
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let wal_pages = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&wal_pages);
        // This replaces the hook of SQLite, with which some commits wait for the disk.
        connection.wal_hook(Some(move |_: &mut _, pages| {
            counted.store(u64::from(u32::try_from(pages).unwrap_or(0)), Ordering::Relaxed);
            Ok(())
        }))?;
        connection.pragma_update(None, "journal_size_limit", wal_limit)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "temp_store", "MEMORY")?;
        if is_new {
            create_tables(&connection)?;
        }
        let reserved = Cell::new(file.metadata()?.len());
        let mut database =
            Database { connection, path, file, reserved, pages: 0, wal_pages, wal_limit };
        let facts = database.facts()?;
        let no_checkpoint = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
        database.connection.set_db_config(no_checkpoint, false)?;
        // A full disk is not an error yet.
        if let Err(error) = begin_log(&database.connection)
            && is_damage(&error)
        {
            return Err(error.into());
        }
        database.count_pages();
        Ok((database, facts))
    }

    fn facts(&self) -> Result<Facts, OpenError> {
        let select = "SELECT next, records, dropped, dropped_bytes, checksum FROM facts";
        let row = self.connection.query_row(select, [], |row| {
            let (end, records) = (row.get(0)?, row.get(1)?);
            let facts = Facts { end, records, dropped: row.get(2)?, dropped_bytes: row.get(3)? };
            Ok((facts, row.get::<_, i64>(4)?))
        });
        match row.optional()? {
            Some((facts, checksum)) if facts.checksum() == checksum => Ok(facts),
            _ => Err(OpenError::unusable("is damaged: its record count is missing or wrong")),
        }
    }

    /// The size of the database on the disk with its write-ahead log, in bytes.
    pub fn size(&self) -> u64 {
        self.in_use() + 2 * self.wal_limit
    }

    /// The size of the pages in use, in bytes.
    pub fn in_use(&self) -> u64 {
        self.pages * PAGE
    }

    /// The space for messages in files of `limit` bytes, in bytes.
    pub fn capacity(&self, limit: u64) -> u64 {
        limit.saturating_sub(2 * self.wal_limit + MIN_PAGES * PAGE)
    }

    /// Reads messages from a position on, of about `bytes` together. Damaged messages are skipped.
    pub fn read(&self, from: u64, bytes: u64) -> rusqlite::Result<VecDeque<Message>> {
        let mut select = self.connection.prepare_cached(
            "SELECT position, key, run, number, time, packing, records, checksum, body FROM messages
             WHERE position >= ?1 ORDER BY position",
        )?;
        let mut rows = select.query([from])?;
        let (mut messages, mut length) = (VecDeque::new(), 0);
        let mut last = None;
        while length < bytes
            && let Some(row) = rows.next()?
        {
            if let Some(message) = decode(row)
                // A damaged database may refer to a page twice.
                && last < message.position
                && message.position >= Some(from)
            {
                last = message.position;
                length += message.body.len() as u64 + 1;
                messages.push_back(message);
            }
        }
        Ok(messages)
    }

    /// Begins a transaction, which is rolled back unless it is committed.
    pub fn begin(&self) -> rusqlite::Result<Change<'_>> {
        Ok(Change { transaction: self.connection.unchecked_transaction()?, database: self })
    }

    /// Updates the number of pages in use after a commit.
    pub fn count_pages(&mut self) {
        self.pages = pages(&self.connection).unwrap_or(self.pages);
    }

    /// Whether the write-ahead log has reached its limit, so that it is time for a [`sync`](Database::sync).
    pub fn is_wal_full(&self) -> bool {
        self.wal_pages.load(Ordering::Relaxed) * PAGE >= self.wal_limit
    }

    /// Syncs all commits to the disk. An empty database is shrunk.
    pub fn sync(&self, is_empty: bool) -> rusqlite::Result<()> {
        if is_empty && pragma(&self.connection, "page_count")? > MAX_EMPTY {
            self.connection.execute_batch("VACUUM")?;
            self.reserved.set(0);
        }
        self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
        begin_log(&self.connection)
    }

    /// Whether the path still refers to the open file.
    pub fn is_in_place(&self) -> bool {
        let id = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let file = self.file.metadata().map(id).ok();
        file.is_some() && fs::metadata(&self.path).map(id).ok() == file
    }

    /// Reserves space for all pages in the database. A checkpoint can then always empty the write-ahead log, even on a
    /// full disk, and the log has room for the deletion of messages.
    fn reserve(&self, pages: u64) -> rusqlite::Result<()> {
        let length = pages.next_multiple_of(RESERVE) * PAGE;
        if length <= self.reserved.get() {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, length) {
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
                let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
                let text = "database or disk is full".to_string();
                return Err(rusqlite::Error::SqliteFailure(code, Some(text)));
            }
            // Not every file system can reserve.
            _ => self.reserved.set(length),
        }
        Ok(())
    }
}

/// A transaction.
pub struct Change<'d> {
    transaction: Transaction<'d>,
    database: &'d Database,
}

impl Change<'_> {
    /// Deletes the messages before a position.
    pub fn delete_before(&self, position: u64) -> rusqlite::Result<()> {
        let delete = "DELETE FROM messages WHERE position < ?1";
        self.transaction.prepare_cached(delete)?.execute([position])?;
        Ok(())
    }

    /// Deletes some of the messages before a position. Returns the number of records in them.
    pub fn delete_some_before(&self, position: u64) -> rusqlite::Result<u64> {
        let end =
            "SELECT position FROM messages WHERE position < ?1 ORDER BY position LIMIT 1 OFFSET ?2";
        let mut end = self.transaction.prepare_cached(end)?;
        let end = end.query_row([position, PORTION], |row| row.get(0)).optional()?;
        let end = end.unwrap_or(position);
        let records = "SELECT coalesce(sum(records), 0) FROM messages WHERE position < ?1";
        let mut records = self.transaction.prepare_cached(records)?;
        let records = records.query_row([end], |row| row.get(0))?;
        self.delete_before(end)?;
        Ok(records)
    }

    /// Deletes the oldest messages from a position on, until all messages have at most `max_bytes` bytes. Returns the
    /// dropped records and bytes.
    pub fn drop_from(&self, from: u64, max_bytes: u64) -> rusqlite::Result<Facts> {
        let excess = || -> rusqlite::Result<u64> {
            Ok((pages(&self.transaction)?.saturating_sub(MIN_PAGES) * PAGE)
                .saturating_sub(max_bytes))
        };
        let mut oldest = self.transaction.prepare_cached(
            "SELECT position, records, length(body) FROM messages
             WHERE position >= ?1 ORDER BY position",
        )?;
        let mut delete = self
            .transaction
            .prepare_cached("DELETE FROM messages WHERE position BETWEEN ?1 AND ?2")?;
        let mut dropped = Facts::default();
        loop {
            let (excess, mut found, mut last) = (excess()?, 0, None);
            let mut rows = oldest.query([from])?;
            while found < excess
                && let Some(row) = rows.next()?
            {
                let (records, length): (u64, u64) = (row.get(1)?, row.get(2)?);
                dropped.dropped += records;
                dropped.dropped_bytes += length;
                found += length + ROW;
                last = Some(row.get::<_, u64>(0)?);
            }
            drop(rows);
            let Some(last) = last else { return Ok(dropped) };
            delete.execute([from, last])?;
        }
    }

    /// Adds messages.
    pub fn insert<'m>(&self, all: impl Iterator<Item = &'m Message>) -> rusqlite::Result<()> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO messages (position, key, run, number, time, packing, records, checksum, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        for message in all {
            insert.execute((
                message.position,
                &*message.key,
                message.run as i64,
                message.number as i64,
                message.timestamp as i64,
                number_of(message.packing),
                message.records,
                checksum(message),
                &message.body[..],
            ))?;
        }
        Ok(())
    }

    /// Commits the transaction. After an error, the database is unchanged.
    pub fn commit(self, facts: Facts) -> rusqlite::Result<()> {
        let mut update = self.transaction.prepare_cached(
            "UPDATE facts SET next = ?1, records = ?2, dropped = ?3, dropped_bytes = ?4, checksum = ?5",
        )?;
        update.execute((
            facts.end,
            facts.records,
            facts.dropped,
            facts.dropped_bytes,
            facts.checksum(),
        ))?;
        drop(update);
        self.database.reserve(pragma(&self.transaction, "page_count")?)?;
        self.transaction.commit()
    }
}

/// The message in a row; `None` if the row is damaged.
fn decode(row: &Row<'_>) -> Option<Message> {
    let integer = |index| row.get_ref(index).ok()?.as_i64().ok();
    let packing = match integer(5)? {
        0 => Packing::Single,
        1 => Packing::Lines,
        2 => Packing::Nul,
        _ => return None,
    };
    let key = Arc::from(row.get_ref(1).ok()?.as_str().ok()?);
    let (run, number, time) = (integer(2)? as u64, integer(3)? as u64, integer(4)? as u64);
    let body = row.get_ref(8).ok()?.as_blob().ok()?.to_vec();
    let position = Some(integer(0)? as u64);
    let message = Message::joined(body.into(), packing, number);
    let message = Message { packing, key, run, timestamp: time, position, ..message };
    let is_sound = integer(6)? as u64 == message.records && integer(7)? == checksum(&message);
    is_sound.then_some(message)
}

/// The checksum of a row. It covers the position and all sent data, from which the number of records follows.
fn checksum(message: &Message) -> i64 {
    let mut hasher = Hasher::new();
    for number in [message.position.unwrap_or(0), message.run, message.number, message.timestamp] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(&[number_of(message.packing), message.key.len() as u8]);
    hasher.update(message.key.as_bytes());
    hasher.update(&message.body);
    hasher.finalize().into()
}

fn number_of(packing: Packing) -> u8 {
    match packing {
        Packing::Single => 0,
        Packing::Lines => 1,
        Packing::Nul => 2,
    }
}

/// The number of pages in use.
fn pages(connection: &Connection) -> rusqlite::Result<u64> {
    let all = pragma(connection, "page_count")?;
    Ok(all.saturating_sub(pragma(connection, "freelist_count")?))
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<u64> {
    connection.prepare_cached(&format!("PRAGMA {name}"))?.query_row([], |row| row.get(0))
}

/// Checks the format, and returns whether the database is new.
fn check_format(connection: &Connection) -> Result<bool, OpenError> {
    let number = |name| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0));
    let tables =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    match (number("application_id")?, number("user_version")?, tables) {
        (APPLICATION, VERSION, 1_i64..) => Ok(false),
        (APPLICATION, VERSION, _) => Err(OpenError::unusable("is damaged: it has no tables")),
        (APPLICATION, version, _) => Err(OpenError::unusable(format_args!(
            "has format {version}; this emit-log only knows format {VERSION}"
        ))),
        (0, 0, 0) => Ok(true),
        _ => Err(OpenError::unusable("is a database of another program")),
    }
}

/// Makes an empty commit. The first commit to a new log, or after a checkpoint, waits for the disk; with this one, no
/// commit of messages has to wait.
fn begin_log(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "user_version", VERSION)
}

fn create_tables(connection: &Connection) -> Result<(), OpenError> {
    let create = connection.unchecked_transaction()?;
    create.execute_batch(SCHEMA)?;
    create.pragma_update(None, "application_id", APPLICATION)?;
    create.pragma_update(None, "user_version", VERSION)?;
    create.execute("INSERT INTO facts VALUES (0, 0, 0, 0, ?1)", [Facts::default().checksum()])?;
    Ok(create.commit()?)
}

/// Creates an empty file that only this user can read. Its directory is synced, so that a power cut does not remove it.
fn create(path: &Path) -> io::Result<()> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match created {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        created => created?.sync_all()?,
    }
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Rejects files of emit-log 0.2, which had another format.
fn check_for_old_files(dir: &Path) -> Result<(), OpenError> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if Path::new(&name).extension().is_some_and(|extension| extension == "spool") {
            let name = name.display();
            return Err(OpenError::Unusable(format!(
                "{name} is a file of emit-log 0.2 (send it with that version, or move *.spool to another directory)"
            )));
        }
    }
    Ok(())
}
