//! The file of `--resume`: the position up to which a stream is written.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use logs_process::exit::{Failure, Status};
use logs_process::state_file::StateFile;
use serde::{Deserialize, Serialize};

use crate::cli::Cli;
use crate::environment::Alert;
use crate::file_mark::FileMark;
use crate::output::Output;
use crate::stream::place::{Origin, Place};

/// The longest interval between two records of the position, and between two syncs to the disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// If the output cannot be truncated, the position is also recorded after this number of records.
const RECORDS: u64 = 10_000;

/// The maximum number of bytes to read from the file. A position is much smaller; the limit protects against a wrong
/// file.
const MAX_FILE: u64 = 1024 * 1024;

/// The version of the format.
const VERSION: u32 = 1;

/// Runs of emit-log, the one that was active last first, and the last numbers of each that are written.
pub type Runs = Vec<(u64, Range<u64>)>;

/// The content of the file, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    version: u32,
    #[serde(flatten)]
    origin: Origin,
    /// Where to continue.
    place: Place,
    /// The end of the file of `--output` when the position was recorded.
    output: Option<FileMark>,
    /// Runs of emit-log and their last written numbers. A message with these numbers is a duplicate.
    #[serde(default)]
    runs: Runs,
    /// Whether the receiver has exited and has written no message after this position.
    is_complete: bool,
}

/// The open file, locked to exclude other receivers.
pub struct ResumeFile {
    file: StateFile,
    last: Option<Position>,
    /// When the position was last recorded, and when it was last synced to the disk.
    recorded_at: Instant,
    synced_at: Instant,
    /// The number of records written when the position was last recorded.
    written: u64,
    /// The error of the last attempt to record; empty after a success.
    error: String,
    alert: Alert,
}

impl ResumeFile {
    /// Opens the file of `--resume`, if given. Creates a missing file.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, is in use, or is the file of another program.
    pub fn open(cli: &Cli, alert: Alert) -> Result<Option<ResumeFile>, Failure> {
        let Some(path) = cli.stream.resume.clone() else {
            return Ok(None);
        };
        let operation = format!("resume from {path:?}");
        let io = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock => {
                Failure::new(Status::Config, format!("{operation}: another receiver uses it"))
            }
            _ => Failure::io(&operation, &error),
        };
        let (file, content) = StateFile::open(&path, MAX_FILE).map_err(io)?;
        let foreign = |reason: &str| {
            let text = format!("{operation}: {reason} (remove the file to start over)");
            Failure::new(Status::Config, text)
        };
        let last = match content.as_deref() {
            None => None,
            Some([]) => {
                let path = file.path();
                alert(format!("{path:?} holds no position: reading begins as with a new file"));
                None
            }
            Some(content) => {
                let position: Position = serde_json::from_slice(content)
                    .map_err(|error| foreign(&format!("it holds no position: {error}")))?;
                if position.version != VERSION {
                    return Err(foreign("its position was written by another version"));
                }
                Some(position)
            }
        };
        let now = Instant::now();
        Ok(Some(ResumeFile {
            file,
            last,
            recorded_at: now,
            synced_at: now,
            written: 0,
            error: String::new(),
            alert,
        }))
    }

    /// Where to continue.
    pub fn place(&self) -> Option<Place> {
        Some(self.last.as_ref()?.place)
    }

    /// The runs of emit-log that messages were written from, the one that was active last first, and their last
    /// numbers.
    pub fn runs(&self) -> &[(u64, Range<u64>)] {
        self.last.as_ref().map_or(&[], |position| &position.runs)
    }

    /// The stream to continue in.
    pub fn origin(&self) -> Option<&Origin> {
        self.last.as_ref().map(|position| &position.origin)
    }

    /// Truncates `output` at the recorded position, so that the messages after it are written again. If the stream is
    /// not `is_unbroken`, or the output cannot be truncated, reports how many messages may be repeated.
    ///
    /// # Errors
    ///
    /// When the file cannot be truncated.
    pub fn truncate_output(&self, output: Option<&Path>, is_unbroken: bool) -> Result<(), Failure> {
        let Some(position) = &self.last else {
            return Ok(());
        };
        if let (Some(mark), Some(path)) = (&position.output, output)
            && mark.is_beyond_end_of(path)
        {
            (self.alert)(format!(
                "{path:?} is shorter than when the position was recorded: messages are missing from it"
            ));
        }
        if position.is_complete {
            return Ok(());
        }
        let cut = position.output.as_ref().zip(output).map(|(mark, path)| {
            let failure = |error| Failure::io(format!("truncate {path:?}"), &error);
            let bytes = mark.bytes_after(path).map_err(failure)?;
            let Some(bytes @ 1..) = bytes.filter(|_| is_unbroken) else {
                return Ok(bytes == Some(0));
            };
            mark.truncate(path).map_err(failure)?;
            (self.alert)(format!(
                "{path:?} is truncated by {bytes} bytes to the last recorded position: the messages in \
                 them are written again"
            ));
            Ok(true)
        });
        if !cut.transpose()?.unwrap_or(false) {
            let messages = match position.output {
                Some(_) => "the messages of the last second".into(),
                None => format!("up to {RECORDS} messages, or one batch more,"),
            };
            (self.alert)(format!(
                "{messages} may be repeated: the previous receiver ended without recording its position"
            ));
        }
        Ok(())
    }

    /// Whether this place is the first message to write. It is recorded before the write, because the next receiver
    /// truncates the output only if it can recognise the stream by a message.
    pub fn is_first(&self, place: Place) -> bool {
        matches!(place, Place::At { .. }) && self.place() != Some(place) && self.error.is_empty()
    }

    /// Whether to record the position after this number of `written` records.
    pub fn is_due(&self, written: u64) -> bool {
        let can_be_cut = || self.last.as_ref().is_some_and(|position| position.output.is_some());
        self.recorded_at.elapsed() >= INTERVAL || written >= self.written + RECORDS && !can_be_cut()
    }

    /// When to record this position at the latest; `None` if it is recorded.
    pub fn next_time(&self, place: Place) -> Option<Instant> {
        (self.place() != Some(place)).then_some(self.recorded_at + INTERVAL)
    }

    /// Records the last position again for another output file.
    pub fn record_again(&mut self, output: &Output) {
        // After an error, the last recorded position is older than the output.
        if self.error.is_empty()
            && let Some(Position { origin, place, runs, .. }) = self.last.clone()
        {
            self.record(origin, place, runs, output);
        }
    }

    /// Records the place up to which the output is written. Reports an error once, because messages are still
    /// written, and are repeated after a restart.
    pub fn record(&mut self, origin: Origin, place: Place, runs: Runs, output: &Output) {
        let mark = output.mark();
        let position =
            Position { version: VERSION, origin, place, output: mark, runs, is_complete: false };
        self.written = output.written();
        match self.replace(position, output) {
            Ok(()) => self.error.clear(),
            Err(error) => {
                let text = error.to_string();
                if text != self.error {
                    (self.alert)(format!(
                        "{text}; messages written from now on are repeated after a restart"
                    ));
                    self.error = text;
                }
            }
        }
    }

    /// Records that no message was written after the last position.
    ///
    /// # Errors
    ///
    /// When the file cannot be written, or the last attempt to record has failed.
    pub fn complete(&mut self, output: &Output) -> Result<(), Failure> {
        if !self.error.is_empty() {
            return Err(Failure::new(Status::Io, self.error.clone()));
        }
        match self.last.clone() {
            Some(position) => self.replace(Position { is_complete: true, ..position }, output),
            None => Ok(()),
        }
    }

    fn replace(&mut self, position: Position, output: &Output) -> Result<(), Failure> {
        self.recorded_at = Instant::now();
        if self.last.as_ref() == Some(&position) {
            return Ok(());
        }
        // After a power cut, the position must not be ahead of the output.
        let must_sync =
            position.is_complete || output.is_file() || self.synced_at.elapsed() >= INTERVAL;
        self.write(&position, output, must_sync).map_err(|error| {
            Failure::io(format!("record the position in {:?}", self.file.path()), &error)
        })?;
        self.last = Some(position);
        Ok(())
    }

    /// Replaces the file atomically. On the disk, the output is never behind the position.
    fn write(&mut self, position: &Position, output: &Output, must_sync: bool) -> io::Result<()> {
        if must_sync {
            output.sync()?;
        }
        let mut content = serde_json::to_vec(position)?;
        content.push(b'\n');
        self.file.replace(&content, must_sync)?;
        if must_sync {
            self.synced_at = Instant::now();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
