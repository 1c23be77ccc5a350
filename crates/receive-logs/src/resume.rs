//! The file of `--resume`: up to where a stream is written, so that the next receiver goes on there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use logs_process::exit::{Failure, Status};
use logs_process::lock::{LOCK_WAIT, lock_by};
use serde::{Deserialize, Serialize};

use crate::alert;
use crate::cli::Cli;
use crate::output::{Mark, Output};
use crate::stream::Start;

/// The position is noted at the latest after this time, and reaches the disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// Where the output cannot be cut back, the position is noted after so many records, too.
const RECORDS: u64 = 10_000;

/// The most bytes that are read of a file: far beyond those of a position, and a limit for a wrong file.
const MAX_FILE: u64 = 1024 * 1024;

/// The version of the format.
const VERSION: u32 = 1;

/// Where a stream is. A position in any other stream is worthless.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The name of the broker's cluster.
    pub cluster: String,
    /// The vhost, the exchange and the stream.
    pub vhost: String,
    /// The exchange.
    pub exchange: String,
    /// The stream.
    pub stream: String,
}

/// The content of the file, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    version: u32,
    #[serde(flatten)]
    origin: Origin,
    /// Where to go on.
    place: Start,
    /// The end of the file of `--output` when the position was noted.
    output: Option<Mark>,
    /// Runs of emit-log and the last numbers of them that are written: what has these numbers is a repeat.
    #[serde(default)]
    runs: Vec<(u64, Range<u64>)>,
    /// Whether the receiver ended, and wrote no message after this.
    is_complete: bool,
}

/// The open file, locked against other receivers.
pub struct ResumeFile {
    path: PathBuf,
    file: File,
    last: Option<Note>,
    /// When the position was noted last, and when a position last reached the disk.
    noted: Instant,
    synced: Instant,
    /// The number of records written when the position was noted last.
    written: u64,
    /// The error of the last attempt.
    error: String,
}

impl ResumeFile {
    /// Opens the file that the command line names, if any, and makes a missing file.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, is in use, or is the file of another program.
    pub fn open(cli: &Cli) -> Result<Option<ResumeFile>, Failure> {
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
        let exists = path.exists();
        let mut file = lock(&path).map_err(io)?;
        // A link stays a link when the file is replaced.
        let path = path.canonicalize().map_err(io)?;
        let mut content = Vec::new();
        let read = (&mut file).take(MAX_FILE).read_to_end(&mut content);
        let foreign = |reason: &str| {
            let text = format!("{operation}: {reason} (remove the file to begin anew)");
            Failure::new(Status::Config, text)
        };
        let last = match read {
            Ok(0) if !exists => None,
            Ok(0) => {
                alert(format!("{path:?} holds no position: reading begins as for the first time"));
                None
            }
            Ok(_) => {
                let note: Note = serde_json::from_slice(&content)
                    .map_err(|error| foreign(&format!("it holds no position: {error}")))?;
                if note.version != VERSION {
                    return Err(foreign("its position was written by another version"));
                }
                Some(note)
            }
            Err(error) => return Err(io(error)),
        };
        let now = Instant::now();
        let (noted, synced) = (now, now);
        let error = String::new();
        Ok(Some(ResumeFile { path, file, last, noted, synced, written: 0, error }))
    }

    /// Where to go on.
    pub fn place(&self) -> Option<Start> {
        Some(self.last.as_ref()?.place)
    }

    /// The runs of emit-log that messages were written from, the most recently active first, and their last numbers.
    pub fn runs(&self) -> &[(u64, Range<u64>)] {
        self.last.as_ref().map_or(&[], |note| &note.runs)
    }

    /// The stream to go on in.
    pub fn origin(&self) -> Option<&Origin> {
        self.last.as_ref().map(|note| &note.origin)
    }

    /// Takes from the end of the `output` the messages that a receiver wrote there and did not note, if the
    /// stream `is_unbroken`, so that all of that comes again. Otherwise tells how much may be repeated.
    ///
    /// # Errors
    ///
    /// When the file cannot be cut.
    pub fn take_back(&self, output: Option<&Path>, is_unbroken: bool) -> Result<(), Failure> {
        let Some(note) = &self.last else {
            return Ok(());
        };
        if let (Some(mark), Some(path)) = (&note.output, output)
            && mark.is_beyond_end_of(path)
        {
            alert(format!(
                "{path:?} is shorter than when the position was noted: it lacks messages"
            ));
        }
        if note.is_complete {
            return Ok(());
        }
        let cut = note.output.as_ref().zip(output).map(|(mark, path)| {
            let failure = |error| Failure::io(format!("cut back {path:?}"), &error);
            let bytes = mark.bytes_after(path).map_err(failure)?;
            let Some(bytes @ 1..) = bytes.filter(|_| is_unbroken) else {
                return Ok(bytes == Some(0));
            };
            mark.cut(path).map_err(failure)?;
            alert(format!(
                "{path:?} is cut back by {bytes} bytes to the position noted last: their messages \
                 come again"
            ));
            Ok(true)
        });
        if !cut.transpose()?.unwrap_or(false) {
            let messages = match note.output {
                Some(_) => "the messages of a second".into(),
                None => format!("up to {RECORDS} messages, or a batch more,"),
            };
            alert(format!(
                "{messages} may be repeated: the receiver before this one ended without noting its position"
            ));
        }
        Ok(())
    }

    /// Whether this place is the first message to be written, and is to be noted before: the next receiver can
    /// only cut the output back if it finds a message by which to recognise the stream.
    pub fn is_first(&self, place: Start) -> bool {
        matches!(place, Start::At { .. }) && self.place() != Some(place) && self.error.is_empty()
    }

    /// Whether the position is to be noted, when so many records are `written`.
    pub fn is_due(&self, written: u64) -> bool {
        let can_be_cut = || self.last.as_ref().is_some_and(|note| note.output.is_some());
        self.noted.elapsed() >= INTERVAL || written >= self.written + RECORDS && !can_be_cut()
    }

    /// When to note this position at the latest, unless that has been done.
    pub fn next_time(&self, place: Start) -> Option<Instant> {
        (self.place() != Some(place)).then_some(self.noted + INTERVAL)
    }

    /// Notes the last position once more, as the output is another file.
    pub fn note_again(&mut self, output: &Output) {
        // After an error the last position noted is older than the output.
        if self.error.is_empty()
            && let Some(Note { origin, place, runs, .. }) = self.last.clone()
        {
            self.note(origin, place, runs, output);
        }
    }

    /// Notes the place up to which the output is written. An error is told once: messages go on being written,
    /// but come again after a restart.
    pub fn note(
        &mut self,
        origin: Origin,
        place: Start,
        runs: Vec<(u64, Range<u64>)>,
        output: &Output,
    ) {
        let mark = output.mark();
        let note = Note { version: VERSION, origin, place, output: mark, runs, is_complete: false };
        self.written = output.written;
        match self.replace(note, output) {
            Ok(()) => self.error.clear(),
            Err(error) => {
                let text = error.to_string();
                if text != self.error {
                    alert(format!(
                        "{text}; messages written from now on come again after a restart"
                    ));
                    self.error = text;
                }
            }
        }
    }

    /// Notes that no message was written after the last position.
    ///
    /// # Errors
    ///
    /// When the file cannot be written, or could not be when the position was to be noted.
    pub fn complete(&mut self, output: &Output) -> Result<(), Failure> {
        if !self.error.is_empty() {
            return Err(Failure::new(Status::Io, self.error.clone()));
        }
        match self.last.clone() {
            Some(note) => self.replace(Note { is_complete: true, ..note }, output),
            None => Ok(()),
        }
    }

    fn replace(&mut self, note: Note, output: &Output) -> Result<(), Failure> {
        self.noted = Instant::now();
        if self.last.as_ref() == Some(&note) {
            return Ok(());
        }
        // After a power cut, a position must not be ahead of the file that it is about.
        let must_sync = note.is_complete || output.is_file() || self.synced.elapsed() >= INTERVAL;
        self.write(&note, output, must_sync).map_err(|error| {
            Failure::io(format!("note the position in {:?}", self.path), &error)
        })?;
        self.last = Some(note);
        Ok(())
    }

    /// Replaces the file in one step. On the disk, the output is never behind the position.
    fn write(&mut self, note: &Note, output: &Output, must_sync: bool) -> io::Result<()> {
        if must_sync {
            output.sync()?;
        }
        let mut beside = self.path.as_os_str().to_owned();
        beside.push(".new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        lock_by(&file, Instant::now() + LOCK_WAIT)?;
        let mut content = serde_json::to_vec(note)?;
        content.push(b'\n');
        file.write_all(&content)?;
        if must_sync {
            file.sync_data()?;
            self.synced = Instant::now();
        }
        fs::rename(&beside, &self.path)?;
        self.file = file;
        Ok(())
    }
}

/// Opens and locks the file at `path`; opens again where the file was replaced before the lock. Another receiver
/// has [`LOCK_WAIT`] to release the file.
fn lock(path: &Path) -> io::Result<File> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        lock_by(&file, deadline)?;
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        if id(file.metadata()?) == id(fs::metadata(path)?) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests;
