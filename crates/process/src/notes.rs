//! Notes: lines on stderr for users. Each line is one write, so that the lines of several programs do not mix. A note
//! never blocks the program for long. If stderr is not read, notes are dropped and counted.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::escape::one_line;

/// How long a note waits for a slow reader. After a dropped note, the next ones do not wait until stderr is read again.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// How long the last line of a program waits. It waits longer, because it has the reason for the end of the program.
const MAX_LAST_WAIT: Duration = Duration::from_secs(1);

/// Bytes that can be written to a writable pipe without blocking (`PIPE_BUF`).
const ATOMIC: usize = if cfg!(target_os = "linux") { 4096 } else { 512 };

/// Clears the line of the terminal, and moves the cursor to its start.
const CLEAR: &str = "\r\x1b[K";

static STDERR: Mutex<Stderr> = Mutex::new(Stderr { status: String::new(), left_out: 0 });

/// Writes a line.
pub fn note(line: impl Display) {
    lock().write_line(&one_line(&line.to_string()), MAX_WAIT);
}

/// Writes the last line of a program, and waits up to a second for the reader.
pub fn last_note(line: impl Display) {
    lock().write_line(&one_line(&line.to_string()), MAX_LAST_WAIT);
}

/// Replaces the progress line on the terminal. Notes are written above it.
pub fn show_status(status: impl Into<String>) {
    lock().show_status(status.into());
}

/// Removes the progress line of [`show_status`].
pub fn clear_status() {
    lock().show_status(String::new());
}

/// A writer of notes. Each write must consist of whole lines.
pub struct Notes;

impl Write for Notes {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        lock().write_lines(&String::from_utf8_lossy(lines), MAX_WAIT);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock() -> MutexGuard<'static, Stderr> {
    // After a panic, at worst the count is wrong.
    STDERR.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Stderr {
    /// The progress line, which is the last on the terminal, or an empty text.
    status: String,
    /// Lines dropped since the last line that was written.
    left_out: u64,
}

impl Stderr {
    fn write_line(&mut self, line: &str, max_wait: Duration) {
        self.write_lines(&format!("{line}\n"), max_wait);
    }

    fn write_lines(&mut self, lines: &str, max_wait: Duration) {
        let clear = if self.status.is_empty() { "" } else { CLEAR };
        let left_out = match self.left_out {
            0 => String::new(),
            count => format!(" [!] {count} lines are missing here: stderr was not read\n"),
        };
        let text = format!("{clear}{left_out}{lines}{}", self.status);
        let max_wait = if self.left_out == 0 { max_wait } else { Duration::ZERO };
        match write_within(text.as_bytes(), max_wait) {
            true => self.left_out = 0,
            false => self.left_out += 1,
        }
    }

    fn show_status(&mut self, status: String) {
        if !status.is_empty() || !self.status.is_empty() {
            write_within(format!("{CLEAR}{status}").as_bytes(), Duration::ZERO);
            self.status = status;
        }
    }
}

/// Writes to stderr until all bytes are written or `max_wait` has passed. Returns `false` if the time has passed. An
/// error of stderr counts as written.
fn write_within(mut bytes: &[u8], max_wait: Duration) -> bool {
    let end = Instant::now() + max_wait;
    let stderr = io::stderr();
    while !bytes.is_empty() {
        let mut watched = [PollFd::new(&stderr, PollFlags::OUT)];
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now()));
        match poll(&mut watched, left.ok().as_ref()) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(_) => continue,
        }
        let part = &bytes[..bytes.len().min(ATOMIC)];
        match stderr.lock().write(part) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if is_passing(&error) => {}
            // There is no other place to report this.
            Err(_) => return true,
        }
    }
    true
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}
