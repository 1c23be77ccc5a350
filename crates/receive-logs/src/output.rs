//! Bytes to where they go.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use amqp::{Delivery, Properties};
use crossbeam_channel::{Receiver, bounded, never};
use logs_common::exit::Failure;
use logs_common::stdio;
use logs_common::wire::Packing;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::alert;
use crate::cli::Cli;
use crate::record::Record;

/// Bytes gathered before they are written while more messages are waiting.
const BUFFER: usize = 64 * 1024;

/// Messages that stand in the output as a whole, so that they may be acknowledged. Only an
/// [`Output`] makes one.
#[must_use]
pub struct Written(Option<Delivery>);

impl Written {
    /// The last of the messages, without its content; `None` if there are none.
    pub fn into_last(self) -> Option<Delivery> {
        self.0
    }
}

/// What a failed write must not leave half of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// A record: what was not written is lost with the queue.
    Record,
    /// A message: the queue keeps what was not written, and its next receiver writes it as a whole.
    Message,
}

/// A message whose records are all in the buffer, or partly in the file already.
struct Whole {
    /// Where in the buffer it ends.
    end: usize,
    /// How many records in the buffer are its own or those of earlier messages.
    records: usize,
    delivery: Delivery,
}

/// What stands in the file of a message that is not whole yet.
#[derive(Default)]
struct Begun {
    bytes: usize,
    records: usize,
}

/// Writes whole records, so that whatever reads along never sees half of one that stays so.
pub struct Output {
    record: Record,
    unit: Unit,
    buffer: Vec<u8>,
    /// Where in the buffer its records end.
    ends: Vec<usize>,
    /// The messages that end in the buffer; of [`Unit::Record`] no more than the last.
    messages: Vec<Whole>,
    begun: Begun,
    /// The last message that is written and not told of yet.
    done: Option<Delivery>,
    /// Records written, those in the buffer included until that turns out to be wrong.
    pub written: u64,
    file: File,
    /// What `file` is, unless it is standard output.
    path: Option<PathBuf>,
}

impl Output {
    /// Opens what the command line names, or takes standard output.
    ///
    /// # Errors
    ///
    /// When a file cannot be opened for appending, or standard output is closed or only open for
    /// reading.
    pub fn open(cli: &Cli) -> Result<Output, Failure> {
        let path = cli.output.clone();
        let (operation, opened) = match &path {
            Some(path) => ("open", open(path)),
            None => ("write to", stdout()),
        };
        let file =
            opened.map_err(|error| Failure::io(format!("{operation} {}", name(&path)), &error))?;
        let mut output = Output::new(cli, file, path);
        output.end_last_record();
        Ok(output)
    }

    /// Writes to a file that is open.
    pub(crate) fn new(cli: &Cli, file: File, path: Option<PathBuf>) -> Output {
        Output {
            record: Record::new(cli, &file),
            unit: match cli.queue.name {
                None => Unit::Record,
                Some(_) => Unit::Message,
            },
            buffer: Vec::with_capacity(BUFFER),
            ends: Vec::new(),
            messages: Vec::new(),
            begun: Begun::default(),
            done: None,
            written: 0,
            file,
            path,
        }
    }

    /// `stdout`, or the path of the file, as in messages.
    pub fn name(&self) -> String {
        name(&self.path)
    }

    /// What `error` in writing means for the program.
    pub fn failure(&self, error: &io::Error) -> Failure {
        Failure::io(format!("write to {}", self.name()), error)
    }

    /// Buffers the records of a message, at most `limit` of them, and writes when the buffer is
    /// full. What is left out counts as written.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn write(&mut self, mut delivery: Delivery, limit: u64) -> io::Result<()> {
        let packing = Packing::of(delivery.properties.type_().as_deref());
        for (index, record) in (0..limit).zip(packing.records(&delivery.body)) {
            if self.buffer.len() >= BUFFER {
                self.write_buffer()?;
            }
            self.record.push(&mut self.buffer, &delivery, record, index);
            self.written += 1;
            self.ends.push(self.buffer.len());
        }
        // All that is needed from here on is the delivery tag.
        delivery.body = Vec::new();
        delivery.properties = Properties::default();
        if self.unit == Unit::Record {
            self.messages.clear();
        }
        self.messages.push(Whole { end: self.buffer.len(), records: self.ends.len(), delivery });
        if self.buffer.len() >= BUFFER {
            self.write_buffer()?;
        }
        Ok(())
    }

    /// Writes what is in the buffer. Returns what is written since the last time.
    ///
    /// # Errors
    ///
    /// When it cannot be written. A file of ours then ends with a whole record or, where the queue
    /// keeps the rest, with a whole message.
    pub fn flush(&mut self) -> io::Result<Written> {
        self.write_buffer()?;
        Ok(self.take_written())
    }

    /// What is written since the last time, a failed write included.
    pub fn take_written(&mut self) -> Written {
        Written(self.done.take())
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let mut rest = self.buffer.as_slice();
        let outcome = write_all(&mut self.file, &mut rest);
        let written = self.buffer.len() - rest.len();
        let records = self.ends.partition_point(|end| *end <= written);
        let messages = self.messages.partition_point(|message| message.end <= written);
        match self.messages.drain(..messages).next_back() {
            Some(Whole { end, records: before, delivery }) => {
                self.done = Some(delivery);
                self.begun = Begun { bytes: written - end, records: records - before };
            }
            None => {
                self.begun.bytes += written;
                self.begun.records += records;
            }
        }
        let part = written - records.checked_sub(1).map_or(0, |last| self.ends[last]);
        let missing = self.ends.len() - records;
        self.ends.clear();
        self.messages.clear();
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER);
        outcome.inspect_err(|_| {
            self.written -= missing as u64;
            self.take_back_rest(part);
        })
    }

    /// Takes back what a failed write has left: of its last record so many bytes, or a part of its
    /// last message.
    fn take_back_rest(&mut self, part: usize) {
        let (bytes, records) = match self.unit {
            Unit::Record => (part, 0),
            Unit::Message => (self.begun.bytes, self.begun.records),
        };
        match take_back(&mut self.file, bytes as u64) {
            Ok(true) => self.written -= records as u64,
            Ok(false) => {}
            Err(error) => log::debug!("truncate {}: {error}", self.name()),
        }
    }

    /// Opens the file anew under its path, as whoever rotates logs has renamed it. If that fails,
    /// the file opened before stays in use; so does what is no file.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn reopen(&mut self) -> io::Result<()> {
        self.write_buffer()?;
        let Some(path) = &self.path else {
            return Ok(());
        };
        if !self.is_file() {
            return Ok(());
        }
        match open(path) {
            Ok(file) => {
                self.file = file;
                self.end_last_record();
            }
            Err(error) => {
                let name = self.name();
                alert(format!("open {name}: {error}; writing goes on to the file opened before"));
            }
        }
        Ok(())
    }

    /// Reports when nobody can read the output any more: the other end of the pipe or the terminal
    /// is gone. Never reports anything for a file.
    ///
    /// # Errors
    ///
    /// When there are too many open files.
    pub fn reader_gone(&self) -> io::Result<Receiver<()>> {
        if self.is_file() {
            return Ok(never());
        }
        let (sender, receiver) = bounded(1);
        if has_hung_up(&self.file, Some(&Timespec::default())) {
            // The channel holds one.
            let _ = sender.send(());
            return Ok(receiver);
        }
        let output = self.file.try_clone()?;
        thread::Builder::new().spawn(move || {
            if has_hung_up(&output, None) {
                let _ = sender.send(());
            }
        })?;
        Ok(receiver)
    }

    fn is_file(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }

    /// Ends a record that a crash has cut short, so that the next one is not taken for its rest.
    fn end_last_record(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        if !self.is_file() {
            return;
        }
        if last_byte(path).is_ok_and(|byte| byte != self.record.end) {
            alert(format!("{path:?} ends in the middle of a record, which is left as it is"));
            self.buffer.push(self.record.end);
        }
    }
}

fn name(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| "stdout".into(), |path| format!("{path:?}"))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Standard output, not through `io::stdout`, which would write line by line.
fn stdout() -> io::Result<File> {
    let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let is_read_only = fcntl_getfl(&file)? & OFlags::RWMODE == OFlags::RDONLY;
    if stdio::stdout_is_closed() || is_read_only {
        return Err(Errno::BADF.into());
    }
    Ok(file)
}

fn last_byte(path: &Path) -> io::Result<u8> {
    let mut file = File::open(path)?;
    let mut byte = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// Waits until the other end of a pipe or a terminal is gone, or until the `timeout` has passed.
fn has_hung_up(file: &File, timeout: Option<&Timespec>) -> bool {
    // Without flags to wait for, only an error or a hang-up ends the wait.
    let mut watched = [PollFd::new(file, PollFlags::empty())];
    loop {
        match poll(&mut watched, timeout) {
            Err(Errno::INTR) => {}
            outcome => return outcome.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Writes `rest`, of which on an error only what is not written is left.
fn write_all(file: &mut File, rest: &mut &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => *rest = &rest[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Whoever shares the pipe or the terminal does not want to wait; we do.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(file, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes the last so many bytes, which were written last, from a file. Returns whether it did: not
/// where others have written after them.
fn take_back(file: &mut File, bytes: u64) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || file.stream_position()? != metadata.len() {
        return Ok(false);
    }
    let end = metadata.len() - bytes;
    file.set_len(end)?;
    // Whoever shares standard output writes on from there.
    file.seek(SeekFrom::Start(end))?;
    Ok(true)
}
