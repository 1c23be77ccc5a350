//! The output: a file or standard output.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use amqp::Mailbox;
use logs_process::background::watch;
use logs_process::exit::{Failure, Status};
use logs_process::stdio;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::cli::Cli;
use crate::environment::Alert;
use crate::file_mark::FileMark;
use crate::filter::Filter;
use crate::format::RecordFormat;
use crate::message::Message;
use crate::sink::{BUFFER, Sink};
use crate::written::{Boundaries, Unit, Written};

/// poll(2) reports an error or a hang-up even without requested flags.
const HANG_UP: PollFlags = PollFlags::empty();

/// Writes records. After a failed write, removes the incomplete record or message.
pub struct Output {
    format: RecordFormat,
    filter: Option<Filter>,
    /// Records to write at most.
    limit: Option<u64>,
    /// Records that the filter has not selected.
    filtered: u64,
    sink: Sink,
    boundaries: Boundaries,
    /// The path of the file; `None` for standard output.
    path: Option<PathBuf>,
    alert: Alert,
}

impl Output {
    /// Opens the file of `--output`, or uses standard output.
    ///
    /// # Errors
    ///
    /// When a file cannot be opened for appending, or standard output is closed or read-only.
    pub fn open(cli: &Cli, alert: Alert) -> Result<Output, Failure> {
        let path = cli.output().map(PathBuf::from);
        let (operation, opened) = match &path {
            Some(path) => ("open", open(path)),
            None => ("write to", stdout()),
        };
        let file = opened.map_err(|error| {
            let hint = path.as_deref().map_or("", open_hint);
            Failure::new(Status::Io, format!("{operation} {}: {error}{hint}", name(&path)))
        })?;
        Output::new(cli, file, path, alert)
    }

    /// Writes to an open file.
    ///
    /// # Errors
    ///
    /// When the local time zone is unknown.
    pub(crate) fn new(
        cli: &Cli,
        file: File,
        path: Option<PathBuf>,
        alert: Alert,
    ) -> Result<Output, Failure> {
        let format = RecordFormat::new(cli, &file)?;
        let unit = if cli.keeps_messages() { Unit::Message } else { Unit::Record };
        Ok(Output {
            format,
            filter: Filter::new(&cli.filter),
            // Acknowledgements and positions refer to whole messages, so the whole batch is written.
            limit: cli.count.filter(|_| !cli.keeps_messages()),
            filtered: 0,
            sink: Sink::new(file),
            boundaries: Boundaries::new(unit),
            path,
            alert,
        })
    }

    /// `stdout`, or the path of the file, for messages.
    pub fn name(&self) -> String {
        name(&self.path)
    }

    /// The failure of the program for an error in writing.
    pub fn failure(&self, error: &io::Error) -> Failure {
        Failure::io(format!("write to {}", self.name()), error)
    }

    /// Buffers the selected records of a message, and writes the buffer when it is full.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn write(&mut self, message: &Message) -> io::Result<()> {
        self.try_write(message).inspect_err(|_| self.discard_rest())
    }

    fn try_write(&mut self, message: &Message) -> io::Result<()> {
        let mut records = self.format.records(message);
        let accepts_sender =
            self.filter.as_ref().is_none_or(|filter| filter.accepts_sender(message));
        for (index, record) in message.selected() {
            if self.limit.is_some_and(|limit| self.boundaries.records >= limit) {
                break;
            }
            if !accepts_sender || !self.filter.as_ref().is_none_or(|filter| filter.accepts(record))
            {
                self.filtered += 1;
                continue;
            }
            write_if_full(&mut self.sink, &mut self.boundaries)?;
            records.write(&mut self.sink, index, record)?;
            self.sink.write_all(&[self.format.end])?;
            self.boundaries.add_record(self.sink.position());
        }
        self.boundaries.add_message(self.sink.position(), message.delivery.tag);
        write_if_full(&mut self.sink, &mut self.boundaries)
    }

    /// Writes the buffer. Returns the messages written since the last `Written`.
    ///
    /// # Errors
    ///
    /// When the output cannot be written. A regular file then ends with a whole record or, if the broker delivers the
    /// messages again, with a whole message.
    pub fn flush(&mut self) -> io::Result<Written> {
        self.write_buffer()?;
        Ok(self.take_written())
    }

    /// Records written. Until a write fails, the records in the buffer are included.
    pub fn written(&self) -> u64 {
        self.boundaries.records
    }

    /// Whether a filter selects the records to write.
    pub fn has_filter(&self) -> bool {
        self.filter.is_some()
    }

    /// Records that the filter has not selected.
    pub fn filtered(&self) -> u64 {
        self.filtered
    }

    /// Records written, without those in the buffer.
    pub fn flushed(&self) -> u64 {
        self.boundaries.flushed_records()
    }

    /// The messages written since the last `Written`, including those of a write that failed later.
    pub fn take_written(&mut self) -> Written {
        self.boundaries.claim()
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let outcome = self.sink.flush();
        self.boundaries.flush(self.sink.flushed());
        outcome.inspect_err(|_| self.discard_rest())
    }

    /// Removes the incomplete record or message at the end of the file after a failed write.
    fn discard_rest(&mut self) {
        self.boundaries.flush(self.sink.flushed());
        let end = self.boundaries.discard_buffer();
        match self.sink.truncate(end.bytes) {
            Ok(true) => self.boundaries.records = end.records,
            Ok(false) => {}
            Err(error) => log::debug!("truncate {}: {error}", self.name()),
        }
    }

    /// Syncs a file to the disk. Does nothing for other outputs.
    ///
    /// # Errors
    ///
    /// When the sync fails.
    pub fn sync(&self) -> io::Result<()> {
        match self.is_file() {
            true => self.sink.file.sync_data(),
            false => Ok(()),
        }
    }

    /// A mark at the end of the written part of the `--output` file; `None` for other outputs.
    pub(crate) fn mark(&self) -> Option<FileMark> {
        let path = self.path.as_ref().filter(|_| self.is_file())?;
        FileMark::at_end_of(&self.sink.file, path)
    }

    /// Opens the path again, because logrotate may have renamed the file, and ends a record that a crash has cut
    /// short. If the path cannot be opened, reports it and keeps the old file. A pipe or a device stays in use.
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
                self.sink.file = file;
                self.end_last_record()?;
            }
            Err(error) => {
                let name = self.name();
                (self.alert)(format!(
                    "open {name}: {error}; continuing with the file opened before"
                ));
            }
        }
        Ok(())
    }

    /// Reports when the other end of the pipe or the terminal is closed. `None` for a file.
    ///
    /// # Errors
    ///
    /// When there are too many open files, or no thread can be started.
    pub fn reader_gone(&self) -> anyhow::Result<Option<Mailbox<()>>> {
        if self.is_file() {
            return Ok(None);
        }
        let (sender, mailbox) = Mailbox::open()?;
        if has_hung_up(&self.sink.file) {
            sender.send(());
            return Ok(Some(mailbox));
        }
        let output = self.sink.file.try_clone()?;
        watch(output, HANG_UP, move || {
            sender.send(());
            ControlFlow::Break(())
        })?;
        Ok(Some(mailbox))
    }

    /// Whether the output is a regular file.
    pub fn is_file(&self) -> bool {
        self.sink.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }

    /// Ends a record that a crash has cut short, so that the next record does not continue it.
    fn end_last_record(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        if self.is_file() && last_byte(path).is_ok_and(|byte| byte != self.format.end) {
            (self.alert)(format!(
                "{path:?} ends in the middle of a record, which is left as it is"
            ));
            self.sink.write_all(&[self.format.end])?;
        }
        Ok(())
    }
}

fn write_if_full(sink: &mut Sink, boundaries: &mut Boundaries) -> io::Result<()> {
    // The sink itself writes parts of a large record.
    if sink.position() - boundaries.last_record >= BUFFER as u64 {
        sink.flush()?;
        boundaries.flush(sink.flushed());
    }
    Ok(())
}

fn name(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| "stdout".into(), |path| format!("{path:?}"))
}

/// A hint for paths that the system cannot open, because standard output is a socket or the pipe of another user.
fn open_hint(path: &Path) -> &'static str {
    let names = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
    match names.iter().any(|name| path.as_os_str() == *name) {
        true => " (-o - writes to standard output)",
        false => "",
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Standard output, without the line buffer of `io::stdout`.
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

/// Whether the other end of a pipe or a terminal is closed.
fn has_hung_up(file: &File) -> bool {
    let mut watched = [PollFd::new(file, HANG_UP)];
    poll(&mut watched, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::pipe;
    use std::os::fd::AsRawFd;

    use amqp::{Table, Value};
    use clap::Parser;
    use logs_tests::{Message, TempFile, wait_until};

    use super::*;
    use crate::testing::{Alerts, alert, delivery, limited_file, lines, messages};

    const DURABLE: &[&str] = &["--queue", "q"];

    fn cli(options: &[&str]) -> Cli {
        Cli::parse_from([&["receive-logs", "--raw"], options].concat())
    }

    fn to_path(path: &Path, options: &[&str]) -> Output {
        let options = [&["-o", path.to_str().unwrap()], options].concat();
        Output::open(&cli(&options), alert).unwrap()
    }

    fn content(file: &File) -> String {
        let mut text = String::new();
        let mut file = file;
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_flush_writes_the_buffered_messages() {
        let file = TempFile::new("log");
        let mut output = to_path(file.path(), DURABLE);
        for message in messages(&[Message::new("a"), lines(2, "b")]) {
            output.write(&message).unwrap();
        }
        assert_eq!(file.read().unwrap(), b"");
        assert_eq!(output.flush().unwrap().last_tag(), Some(2));
        assert_eq!(output.flush().unwrap().last_tag(), None);
        assert_eq!(file.read().unwrap(), b"a\nb\nb\n");
        assert_eq!(output.written(), 3);
    }

    #[test]
    fn a_failed_write_leaves_whole_messages_of_a_durable_queue() {
        let file = limited_file(64 * 1024);
        let mut output =
            Output::new(&cli(DURABLE), file.try_clone().unwrap(), None, alert).unwrap();
        let all = messages(&[lines(2, "a"), lines(3, "b"), lines(50_000, "cc")]);
        output.write(&all[0]).unwrap();
        output.write(&all[1]).unwrap();
        assert!(output.write(&all[2]).is_err());
        assert_eq!(content(&file), "a\na\nb\nb\nb\n");
        assert_eq!(output.written(), 5);
        assert_eq!(output.take_written().last_tag(), Some(2));
    }

    #[test]
    fn a_failed_write_leaves_whole_records_of_an_exclusive_queue() {
        let file = limited_file(64 * 1024);
        let mut output = Output::new(&cli(&[]), file.try_clone().unwrap(), None, alert).unwrap();
        let message = super::Message::new(delivery(lines(20_000, "record")));
        assert!(output.write(&message).is_err());
        let content = content(&file);
        assert_eq!(content.replace("record\n", ""), "");
        assert_eq!(output.written(), (content.len() / "record\n".len()) as u64);
        assert!(content.len() > 64 * 1024 - 8, "{} bytes", content.len());
        assert_eq!(output.take_written().last_tag(), None);
    }

    /// The content of a file of 1 MiB after two small records and two large ones, of which only the first fits.
    fn content_of_full_file(options: &[&str]) -> (String, Output) {
        let file = limited_file(1024 * 1024);
        let mut output =
            Output::new(&cli(options), file.try_clone().unwrap(), None, alert).unwrap();
        let all = messages(&[lines(2, "a"), lines(2, &"x".repeat(600_000))]);
        output.write(&all[0]).unwrap();
        assert!(output.write(&all[1]).is_err());
        (content(&file), output)
    }

    #[test]
    fn a_partly_written_record_is_removed() {
        // The first of the large records fits, the second does not.
        let whole = format!("a\na\n{}\n", "x".repeat(600_000));
        let (content, output) = content_of_full_file(&[]);
        assert!(content == whole, "{} bytes", content.len());
        assert_eq!(output.written(), 3);
        let (content, mut output) = content_of_full_file(DURABLE);
        assert_eq!((&content[..], output.written()), ("a\na\n", 2));
        assert_eq!(output.take_written().last_tag(), Some(1));
    }

    #[test]
    fn a_partly_written_large_record_is_removed() {
        for (format, queue) in
            [("text", &[][..]), ("json", &[][..]), ("text", DURABLE), ("json", DURABLE)]
        {
            let file = limited_file(1024 * 1024);
            let cli = Cli::parse_from([&["receive-logs", "-f", format], queue].concat());
            let mut output = Output::new(&cli, file.try_clone().unwrap(), None, alert).unwrap();
            let all = messages(&[Message::new("a"), Message::new(vec![0xff; 1024 * 1024])]);
            output.write(&all[0]).unwrap();
            assert!(output.write(&all[1]).is_err());
            let content = content(&file);
            assert_eq!(content.matches('\n').count(), 1, "{format}");
            assert!(content.ends_with('\n') && content.len() < 500, "{} bytes", content.len());
            assert_eq!((output.written(), output.flushed()), (1, 1));
            assert_eq!(output.take_written().last_tag(), Some(1));
        }
    }

    /// The output of a message with these options.
    fn written(options: &[&str], message: &super::Message) -> String {
        let file = TempFile::new("log");
        let cli = Cli::parse_from([&["receive-logs"], options].concat());
        let mut output = Output::new(&cli, file.create(), None, alert).unwrap();
        output.write(message).unwrap();
        let _ = output.flush().unwrap();
        String::from_utf8(file.read().unwrap()).unwrap()
    }

    #[test]
    fn a_large_header_is_not_repeated_for_each_record() {
        let hostile = || {
            let mut delivery = delivery(lines(1000, ""));
            let host = Value::LongString("\x07".repeat(120_000));
            let headers = Table::from([("Host".into(), host)]);
            delivery.properties = delivery.properties.with_headers(headers);
            super::Message::new(delivery)
        };
        let text = written(&["--prefix"], &hostile());
        assert!(text.len() < 500_000, "{} bytes", text.len());
        let json = written(&["-f", "json"], &hostile());
        assert!(json.len() < 1_500_000, "{} bytes", json.len());
    }

    #[test]
    fn a_record_that_a_crash_cut_short_is_ended() {
        let file = TempFile::with("log", b"whole\ncut");
        let alerts = Alerts::during(|| {
            let mut output = to_path(file.path(), &[]);
            output.reopen().unwrap();
            output.reopen().unwrap();
        });
        assert_eq!(file.read().unwrap(), b"whole\ncut\n");
        let expected =
            format!("{:?} ends in the middle of a record, which is left as it is", file.path());
        assert_eq!(alerts, [expected]);
    }

    #[test]
    fn a_renamed_file_is_replaced_by_a_new_one() {
        let (file, renamed) = (TempFile::new("log"), TempFile::new("log.1"));
        let mut output = to_path(file.path(), &[]);
        let all = messages(&[Message::new("a"), Message::new("b")]);
        output.write(&all[0]).unwrap();
        fs::rename(file.path(), renamed.path()).unwrap();
        output.reopen().unwrap();
        output.write(&all[1]).unwrap();
        let _ = output.flush().unwrap();
        assert_eq!(renamed.read().unwrap(), b"a\n");
        assert_eq!(file.read().unwrap(), b"b\n");
    }

    #[test]
    fn a_file_that_cannot_be_reopened_stays_in_use() {
        let (file, renamed) = (TempFile::new("log"), TempFile::new("log.1"));
        let mut output = to_path(file.path(), &[]);
        fs::rename(file.path(), renamed.path()).unwrap();
        fs::create_dir(file.path()).unwrap();
        let alerts = Alerts::during(|| output.reopen().unwrap());
        let expected = format!(
            "open {:?}: Is a directory (os error 21); continuing with the file opened before",
            file.path()
        );
        assert_eq!(alerts, [expected]);
        output.write(&messages(&[Message::new("a")])[0]).unwrap();
        let _ = output.flush().unwrap();
        assert_eq!(renamed.read().unwrap(), b"a\n");
    }

    #[test]
    fn an_error_names_the_file_that_cannot_be_opened() {
        let failure = Output::open(&cli(&["-o", "/nonexistent/log"]), alert).err().unwrap();
        let text = "open \"/nonexistent/log\": No such file or directory (os error 2)";
        assert_eq!(failure.to_string(), text);
    }

    #[test]
    fn a_closed_reader_is_noticed() {
        let file = TempFile::new("log");
        assert!(to_path(file.path(), &[]).reader_gone().unwrap().is_none());
        let (reader, writer) = pipe().unwrap();
        let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let output = to_path(Path::new(&path), &[]);
        let reader_gone = output.reader_gone().unwrap().unwrap();
        assert!(reader_gone.is_empty());
        drop(reader);
        wait_until("the closed reader is noticed", || !reader_gone.is_empty());
        assert!(!output.reader_gone().unwrap().unwrap().is_empty(), "at once");
    }
}
