//! A spool of emit-log, and the lines that are sent through it.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use memchr::memmem;
use tempfile::TempDir;

use crate::{Ended, PATIENCE, Running, Tool, emit_log, free_port, url};

/// A line of 80 bytes and its number.
pub fn line(number: u64) -> String {
    format!("line {number} {}\n", "x".repeat(80))
}

/// The number of a line.
pub fn number_of(line: &str) -> u64 {
    line.split(' ').nth(1).and_then(|number| number.parse().ok()).expect(line)
}

/// The numbers of the lines that a receiver has written.
pub fn numbers(receiver: &Running) -> Vec<u64> {
    let text = receiver.stdout_so_far();
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    String::from_utf8_lossy(&text[..whole]).lines().map(number_of).collect()
}

/// Waits until this line is the last one that a receiver has written.
pub fn wait_for(receiver: &Running, last: u64) {
    let bytes = line(last);
    let start = Instant::now();
    while !receiver.stdout_so_far().ends_with(bytes.as_bytes()) {
        assert!(start.elapsed() < 3 * PATIENCE, "line {last}: {}", receiver.stderr_so_far());
        thread::sleep(Duration::from_millis(5));
    }
}

/// A directory for a spool.
pub struct Dir(TempDir);

impl Dir {
    /// A directory that does not exist yet.
    pub fn temporary() -> Dir {
        Dir(tempfile::tempdir().expect("a directory"))
    }

    /// The path of the directory.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("spool")
    }

    /// `emit-log --lines --spool` with this spool and a broker.
    pub fn emitter(&self, url: &str) -> Tool {
        emit_log().args(["-l", "-u", url, "--spool"]).arg(self.path())
    }

    /// The database file of the spool.
    pub fn database(&self) -> PathBuf {
        self.path().join("spool.db")
    }

    /// Opens the spool of a process that has exited.
    fn open(&self) -> rusqlite::Connection {
        let database = rusqlite::Connection::open(self.database()).expect("a database");
        // A full disk has no space for the shared memory of SQLite.
        database.pragma_update(None, "locking_mode", "EXCLUSIVE").expect("a lock");
        database
    }

    /// The number of records in the spool of a process that has exited.
    pub fn records(&self) -> u64 {
        let select = "SELECT coalesce(sum(records), 0) FROM messages";
        self.open().query_row(select, [], |row| row.get(0)).expect("a sum")
    }

    /// The numbers of the lines in the spool of a process that has exited.
    pub fn numbers(&self) -> Vec<u64> {
        let database = self.open();
        let mut select = database.prepare("SELECT body FROM messages ORDER BY position").unwrap();
        let bodies = select.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        let texts = bodies.map(|body| String::from_utf8(body.unwrap()).unwrap());
        texts.flat_map(|text| text.lines().map(number_of).collect::<Vec<_>>()).collect()
    }

    /// The size of all files in bytes.
    pub fn size(&self) -> u64 {
        let files = fs::read_dir(self.path()).expect("a spool");
        files.map(|file| file.unwrap().metadata().map_or(0, |metadata| metadata.len())).sum()
    }

    /// Sends the remaining lines of an earlier run.
    pub fn send_rest(&self, exchange: &str) -> Ended {
        let rest = self.emitter(&url()).args(["-e", exchange]).run().success();
        assert_eq!(self.records(), 0, "all is confirmed: {rest:?}");
        rest
    }

    /// Whether the spool contains a line.
    pub fn holds(&self, line: &str) -> bool {
        let files = fs::read_dir(self.path()).into_iter().flatten().flatten();
        files
            .flat_map(|file| fs::read(file.path()))
            .any(|bytes| memmem::find(&bytes, line.trim_end().as_bytes()).is_some())
    }
}

/// A URL of a port without a broker.
pub fn nowhere() -> String {
    format!("amqp://127.0.0.1:{}", free_port())
}

/// Both ends of a pipe.
pub fn pipe() -> (PipeReader, PipeWriter) {
    io::pipe().expect("a pipe")
}

/// Writes lines.
pub fn write(writer: &mut PipeWriter, lines: impl IntoIterator<Item = u64>) {
    lines.into_iter().for_each(|number| writer.write_all(line(number).as_bytes()).unwrap());
}

/// A file system of 1 MiB. Dropping it unmounts it.
pub struct SmallDisk(pub Dir);

impl SmallDisk {
    /// If the user may not mount a file system, this prints a note and returns `None`, so that the test can end.
    pub fn mount() -> Option<SmallDisk> {
        let dir = Dir::temporary();
        fs::create_dir(dir.path()).unwrap();
        let mount = Tool::new("mount").args(["-t", "tmpfs", "-o", "size=1m,mode=700", "none"]);
        match mount.arg(dir.path()).run().status.success() {
            true => Some(SmallDisk(dir)),
            false => {
                println!("SKIPPED: this user may not mount a tmpfs");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Tool::new("umount").arg(self.0.path()).run();
    }
}
