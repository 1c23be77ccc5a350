//! Bytes to where they go.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use amiquip::Delivery;
use crossbeam_channel::{Receiver, bounded, never};
use logs_common::exit::Failure;
use logs_common::logging::alert;
use logs_common::packing::Packing;
use logs_common::stdio;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::cli::Cli;
use crate::record::Record;

/// Bytes gathered before they are written while more messages are waiting.
const BUFFER: usize = 64 * 1024;

/// Writes whole records, so that whatever reads along never sees half of one that stays so.
pub struct Output {
    record: Record,
    buffer: Vec<u8>,
    /// Where in the buffer its records end.
    ends: Vec<usize>,
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
        let record = Record::new(cli, &file);
        let buffer = Vec::with_capacity(BUFFER);
        let mut output = Output { record, buffer, ends: Vec::new(), written: 0, file, path };
        output.end_last_record();
        Ok(output)
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
    /// full.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn write(&mut self, delivery: &Delivery, limit: u64) -> io::Result<()> {
        let packing = Packing::of(delivery.properties.type_().as_deref());
        for (index, record) in (0..limit).zip(packing.records(&delivery.body)) {
            self.record.push(&mut self.buffer, delivery, record, index);
            self.written += 1;
            self.ends.push(self.buffer.len());
            if self.buffer.len() >= BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is in the buffer.
    ///
    /// # Errors
    ///
    /// When it cannot be written. A file of ours then ends with a whole record.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut rest = self.buffer.as_slice();
        let outcome = write_all(&mut self.file, &mut rest);
        if outcome.is_err() {
            let written = self.buffer.len() - rest.len();
            let whole = self.ends.partition_point(|end| *end <= written);
            self.written -= (self.ends.len() - whole) as u64;
            let part = written - self.ends[..whole].last().unwrap_or(&0);
            if self.path.is_some()
                && let Err(error) = take_back(&mut self.file, part as u64)
            {
                log::debug!("truncate {}: {error}", self.name());
            }
        }
        self.ends.clear();
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER);
        outcome
    }

    /// Opens the file anew under its path, as whoever rotates logs has renamed it. If that fails,
    /// the file opened before stays in use; so does what is no file.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn reopen(&mut self) -> io::Result<()> {
        self.flush()?;
        let Some(path) = &self.path else {
            return Ok(());
        };
        if !self.file.metadata()?.is_file() {
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
        if self.file.metadata()?.is_file() {
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

    /// Ends a record that a crash has cut short, so that the next one is not taken for its rest.
    fn end_last_record(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        if !self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
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

/// Removes the last so many bytes, which were written last, unless others have written after them.
fn take_back(file: &mut File, bytes: u64) -> io::Result<()> {
    let end = file.stream_position()?;
    match file.metadata()? {
        metadata if metadata.is_file() && metadata.len() == end => file.set_len(end - bytes),
        _ => Ok(()),
    }
}
