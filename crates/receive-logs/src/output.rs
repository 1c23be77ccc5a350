//! Writes records to standard output or a file, and knows which messages are written as a whole.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::SystemTime;

use amqp::{Delivery, Mailbox, Properties};
use logs_common::wire::Layout;
use logs_process::exit::{Failure, Status};
use logs_process::stdio;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::alert;
use crate::cli::Cli;
use crate::record::RecordFormat;
use crate::sink::{BUFFER, Sink};

/// Bytes before the end of a file that tell it from another file.
const CHECKED: u64 = 4096;

/// Proof that messages stand in the output as a whole, and may be acknowledged. Only [`Output`] makes
/// values of this type.
#[must_use]
pub struct Written(Option<Delivery>);

impl Written {
    /// The last of the messages, without its content; `None` if there are none.
    pub fn into_last(self) -> Option<Delivery> {
        self.0
    }
}

/// Which unit a failed write must leave whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// A record: an exclusive queue loses the rest anyway.
    Record,
    /// A message: the kept queue delivers all records of an unacknowledged message again.
    Message,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Bytes written before.
    bytes: u64,
    /// Records written before.
    records: u64,
}

/// A message whose records all have been passed to the sink.
struct Whole {
    end: Place,
    delivery: Delivery,
}

/// Writes records, and takes back a record or message that a failed write leaves unfinished.
pub struct Output {
    format: RecordFormat,
    unit: Unit,
    sink: Sink,
    /// Where the records end that may not be in the file yet.
    ends: Vec<u64>,
    /// The messages that may not be in the file yet; with [`Unit::Record`] only the last of them.
    messages: Vec<Whole>,
    /// The ends of the last whole record and of the last whole message in the file.
    record_end: u64,
    message_end: Place,
    /// The last message that is written and not part of a [`Written`] yet.
    done: Option<Delivery>,
    /// Records written. Those in the buffer are included until a write fails.
    pub written: u64,
    /// The path of the file, unless that is standard output.
    path: Option<PathBuf>,
}

impl Output {
    /// Opens the file that the command line names, or takes standard output.
    ///
    /// # Errors
    ///
    /// When a file cannot be opened for appending, or standard output is closed or only open for
    /// reading.
    pub fn open(cli: &Cli) -> Result<Output, Failure> {
        let path = cli.output().map(PathBuf::from);
        let (operation, opened) = match &path {
            Some(path) => ("open", open(path)),
            None => ("write to", stdout()),
        };
        let file = opened.map_err(|error| {
            let hint = path.as_deref().map_or("", open_hint);
            Failure::new(Status::Io, format!("{operation} {}: {error}{hint}", name(&path)))
        })?;
        Ok(Output::new(cli, file, path))
    }

    /// Writes to a file that is open.
    pub(crate) fn new(cli: &Cli, file: File, path: Option<PathBuf>) -> Output {
        Output {
            format: RecordFormat::new(cli, &file),
            unit: match cli.keeps_messages() {
                false => Unit::Record,
                true => Unit::Message,
            },
            sink: Sink::new(file),
            ends: Vec::new(),
            messages: Vec::new(),
            record_end: 0,
            message_end: Place::default(),
            done: None,
            written: 0,
            path,
        }
    }

    /// `stdout`, or the path of the file, as in messages.
    pub fn name(&self) -> String {
        name(&self.path)
    }

    /// The failure of the program that an error in writing leads to.
    pub fn failure(&self, error: &io::Error) -> Failure {
        Failure::io(format!("write to {}", self.name()), error)
    }

    /// Buffers these `records` of a message, counted from 0, and writes when the buffer is full. The
    /// others count as written.
    ///
    /// # Errors
    ///
    /// As for [`flush`](Output::flush).
    pub fn write(&mut self, mut delivery: Delivery, records: Range<u64>) -> io::Result<()> {
        let outcome = self.write_records(&delivery, records);
        // An acknowledgement needs no more than the delivery tag.
        delivery.body = Vec::new();
        delivery.properties = Properties::default();
        let outcome = outcome.and_then(|()| {
            if self.unit == Unit::Record {
                self.messages.clear();
            }
            let end = Place { bytes: self.sink.position(), records: self.written };
            self.messages.push(Whole { end, delivery });
            self.write_if_full()
        });
        outcome.inspect_err(|_| self.take_back_rest())
    }

    fn write_records(&mut self, delivery: &Delivery, records: Range<u64>) -> io::Result<()> {
        let layout = Layout::of(&delivery.properties, &delivery.body);
        let bodies = layout.packing.records(&delivery.body).skip(records.start as usize);
        let mut format = self.format.message(delivery, &layout);
        for (index, record) in records.zip(bodies) {
            self.write_if_full()?;
            format.write(&mut self.sink, record, index)?;
            self.written += 1;
            self.ends.push(self.sink.position());
        }
        Ok(())
    }

    /// Writes the buffer. Returns the messages written since the last [`Written`].
    ///
    /// # Errors
    ///
    /// When the output takes no more. A regular file then ends with a whole record or, where the queue is
    /// kept, with a whole message.
    pub fn flush(&mut self) -> io::Result<Written> {
        self.write_buffer()?;
        Ok(self.take_written())
    }

    /// Records written, without those in the buffer.
    pub fn flushed(&self) -> u64 {
        self.written - self.ends.len() as u64
    }

    /// The messages written since the last [`Written`], be it by a write that failed in the end.
    pub fn take_written(&mut self) -> Written {
        Written(self.done.take())
    }

    fn write_if_full(&mut self) -> io::Result<()> {
        // The sink has written a large record in part by itself.
        if self.sink.position() - self.record_end >= BUFFER as u64 {
            self.sink.flush()?;
            self.settle();
        }
        Ok(())
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let outcome = self.sink.flush();
        self.settle();
        outcome.inspect_err(|_| self.take_back_rest())
    }

    /// Counts the records and messages that are in the file as a whole.
    fn settle(&mut self) {
        let flushed = self.sink.flushed();
        let records = self.ends.partition_point(|end| *end <= flushed);
        if let Some(end) = self.ends.drain(..records).next_back() {
            self.record_end = end;
        }
        let messages = self.messages.partition_point(|message| message.end.bytes <= flushed);
        if let Some(Whole { end, delivery }) = self.messages.drain(..messages).next_back() {
            self.message_end = end;
            self.done = Some(delivery);
        }
    }

    /// Takes back the unfinished record or message that a failed write has left at the end of the file.
    fn take_back_rest(&mut self) {
        self.settle();
        self.written = self.flushed();
        self.ends.clear();
        self.messages.clear();
        let whole = match self.unit {
            Unit::Record => Place { bytes: self.record_end, records: self.written },
            Unit::Message => self.message_end,
        };
        match self.sink.truncate(whole.bytes) {
            Ok(true) => self.written = whole.records,
            Ok(false) => {}
            Err(error) => log::debug!("truncate {}: {error}", self.name()),
        }
    }

    /// Lets all that is written reach the disk, where it is a file.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn sync(&self) -> io::Result<()> {
        match self.is_file() {
            true => self.sink.file.sync_data(),
            false => Ok(()),
        }
    }

    /// The end of the file of `--output`, as far as it is written; `None` for other outputs.
    pub(crate) fn mark(&self) -> Option<Mark> {
        let metadata = self.sink.file.metadata().ok().filter(|_| self.is_file())?;
        let mark = Mark::of(&metadata, metadata.len());
        let file = File::open(self.path.as_ref()?).ok()?;
        mark.is_of(&file).then_some(())?;
        Some(Mark { checksum: checksum(&file, mark.length).ok()?, ..mark })
    }

    /// Opens the path anew, as logrotate may have renamed the file, and ends a record that a crash has cut
    /// short. A file that cannot be opened is told of, and the one opened before stays in use, as does a
    /// pipe or a device.
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
                alert(format!("open {name}: {error}; writing goes on to the file opened before"));
            }
        }
        Ok(())
    }

    /// Reports when nobody can read the output any more: the other end of the pipe or the terminal
    /// is gone. `None` for a file.
    ///
    /// # Errors
    ///
    /// When there are too many open files.
    pub fn reader_gone(&self) -> anyhow::Result<Option<Mailbox<()>>> {
        if self.is_file() {
            return Ok(None);
        }
        let (sender, mailbox) = Mailbox::open()?;
        if has_hung_up(&self.sink.file, Some(&Timespec::default())) {
            sender.send(());
            return Ok(Some(mailbox));
        }
        let output = self.sink.file.try_clone()?;
        thread::Builder::new().spawn(move || {
            if has_hung_up(&output, None) {
                sender.send(());
            }
        })?;
        Ok(Some(mailbox))
    }

    /// Whether the output is a regular file.
    pub fn is_file(&self) -> bool {
        self.sink.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }

    /// Ends a record that a crash has cut short, so that the next record is not taken for the rest.
    fn end_last_record(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        if self.is_file() && last_byte(path).is_ok_and(|byte| byte != self.format.end) {
            alert(format!("{path:?} ends in the middle of a record, which is left as it is"));
            self.sink.write_all(&[self.format.end])?;
        }
        Ok(())
    }
}

/// The end of a file, by which to recognise the place again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    device: u64,
    inode: u64,
    /// The number of an inode is used again; `None` where the file system does not know the time.
    created: Option<SystemTime>,
    length: u64,
    /// CRC-32 of the last [`CHECKED`] bytes before.
    checksum: u32,
}

impl Mark {
    fn of(metadata: &Metadata, length: u64) -> Mark {
        let created = metadata.created().ok();
        Mark { device: metadata.dev(), inode: metadata.ino(), created, length, checksum: 0 }
    }

    /// Whether the mark was made in the file of this metadata, however long the file is now.
    fn has_file(&self, metadata: &Metadata) -> bool {
        Mark { checksum: self.checksum, ..Mark::of(metadata, self.length) } == *self
    }

    fn is_of(&self, file: &File) -> bool {
        file.metadata()
            .is_ok_and(|metadata| self.has_file(&metadata) && metadata.len() >= self.length)
    }

    /// Whether this file is the one, and has lost its end.
    pub fn is_beyond_end_of(&self, path: &Path) -> bool {
        fs::metadata(path)
            .is_ok_and(|metadata| self.has_file(&metadata) && metadata.len() < self.length)
    }

    /// How many bytes a file has after the mark; `None` if the mark is not in this file.
    pub fn bytes_after(&self, path: &Path) -> io::Result<Option<u64>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if !self.is_of(&file) || checksum(&file, self.length)? != self.checksum {
            return Ok(None);
        }
        Ok(Some(file.metadata()?.len() - self.length))
    }

    /// Cuts a file off after the mark, which is in this file.
    pub fn cut(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.set_len(self.length)
    }
}

/// CRC-32 of the last bytes of the first `length` of a file.
fn checksum(file: &File, length: u64) -> io::Result<u32> {
    let checked = length.min(CHECKED);
    let mut bytes = vec![0; checked as usize];
    file.read_exact_at(&mut bytes, length - checked)?;
    Ok(crc32fast::hash(&bytes))
}

fn name(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| "stdout".into(), |path| format!("{path:?}"))
}

/// What to do where the system cannot open `path`: a socket has no file to open, and the pipe of another user is
/// not to be opened.
fn open_hint(path: &Path) -> &'static str {
    let names = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
    match names.iter().any(|name| path == *name) {
        true => " (-o - writes to standard output)",
        false => "",
    }
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::pipe;
    use std::mem;
    use std::os::fd::AsRawFd;

    use amqp::{Table, Value};
    use clap::Parser;
    use logs_tests::{Message, TempFile, wait_until};

    use super::*;
    use crate::testing::{Notes, deliveries, limited_file};

    const KEPT: &[&str] = &["--queue", "q"];

    fn cli(options: &[&str]) -> Cli {
        Cli::parse_from([&["receive-logs", "--raw"], options].concat())
    }

    fn to_path(path: &Path, options: &[&str]) -> Output {
        let options = [&["-o", path.to_str().unwrap()], options].concat();
        Output::open(&cli(&options)).unwrap()
    }

    fn last_tag(written: Written) -> Option<u64> {
        written.into_last().map(|delivery| delivery.tag)
    }

    fn lines(count: usize, line: &str) -> Message {
        let body = vec![line; count].join("\n");
        let message_id = Some("emit-log/0000000000000001/1".into());
        Message { message_type: Some("lines".into()), message_id, ..Message::new(body) }
    }

    fn content(file: &File) -> String {
        let mut text = String::new();
        let mut file = file;
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn messages_are_written_once_the_buffer_is_flushed() {
        let file = TempFile::new("log");
        let mut output = to_path(file.path(), KEPT);
        for delivery in deliveries(&[Message::new("a"), lines(3, "b")]) {
            output.write(delivery, 0..2).unwrap();
        }
        assert_eq!(file.read().unwrap(), b"");
        assert_eq!(last_tag(output.flush().unwrap()), Some(2));
        assert_eq!(last_tag(output.flush().unwrap()), None);
        assert_eq!(file.read().unwrap(), b"a\nb\nb\n");
        assert_eq!(output.written, 3);
    }

    #[test]
    fn a_failed_write_leaves_whole_messages_of_a_kept_queue() {
        let file = limited_file(64 * 1024);
        let mut output = Output::new(&cli(KEPT), file.try_clone().unwrap(), None);
        let mut all = deliveries(&[lines(2, "a"), lines(3, "b"), lines(50_000, "cc")]).into_iter();
        for delivery in all.by_ref().take(2) {
            output.write(delivery, 0..u64::MAX).unwrap();
        }
        assert!(output.write(all.next().unwrap(), 0..u64::MAX).is_err());
        assert_eq!(content(&file), "a\na\nb\nb\nb\n");
        assert_eq!(output.written, 5);
        assert_eq!(last_tag(output.take_written()), Some(2));
    }

    #[test]
    fn a_failed_write_leaves_whole_records_of_an_exclusive_queue() {
        let file = limited_file(64 * 1024);
        let mut output = Output::new(&cli(&[]), file.try_clone().unwrap(), None);
        let [delivery] = deliveries(&[lines(20_000, "record")]).try_into().unwrap();
        assert!(output.write(delivery, 0..u64::MAX).is_err());
        let content = content(&file);
        assert_eq!(content.replace("record\n", ""), "");
        assert_eq!(output.written, (content.len() / "record\n".len()) as u64);
        assert!(content.len() > 64 * 1024 - 8, "{} bytes", content.len());
        assert_eq!(last_tag(output.take_written()), None);
    }

    /// What is left in a file of 1 MiB after two records, and two of which only the first fits.
    fn left_in_full_file(options: &[&str]) -> (String, Output) {
        let file = limited_file(1024 * 1024);
        let mut output = Output::new(&cli(options), file.try_clone().unwrap(), None);
        let messages = [lines(2, "a"), lines(2, &"x".repeat(600_000))];
        let [first, large] = deliveries(&messages).try_into().unwrap();
        output.write(first, 0..u64::MAX).unwrap();
        assert!(output.write(large, 0..u64::MAX).is_err());
        (content(&file), output)
    }

    #[test]
    fn a_record_torn_between_two_writes_is_taken_back() {
        // The first of the large records fits, the second does not.
        let whole = format!("a\na\n{}\n", "x".repeat(600_000));
        let (content, output) = left_in_full_file(&[]);
        assert!(content == whole, "{} bytes", content.len());
        assert_eq!(output.written, 3);
        let (content, mut output) = left_in_full_file(KEPT);
        assert_eq!((&content[..], output.written), ("a\na\n", 2));
        assert_eq!(last_tag(output.take_written()), Some(1));
    }

    #[test]
    fn a_large_record_torn_in_its_pieces_is_taken_back() {
        for (format, queue) in
            [("text", &[][..]), ("json", &[][..]), ("text", KEPT), ("json", KEPT)]
        {
            let file = limited_file(1024 * 1024);
            let cli = Cli::parse_from([&["receive-logs", "-f", format], queue].concat());
            let mut output = Output::new(&cli, file.try_clone().unwrap(), None);
            let messages = [Message::new("a"), Message::new(vec![0xff; 1024 * 1024])];
            let [first, large] = deliveries(&messages).try_into().unwrap();
            output.write(first, 0..1).unwrap();
            assert!(output.write(large, 0..1).is_err());
            let content = content(&file);
            assert_eq!(content.matches('\n').count(), 1, "{format}");
            assert!(content.ends_with('\n') && content.len() < 500, "{} bytes", content.len());
            assert_eq!((output.written, output.flushed()), (1, 1));
            assert_eq!(last_tag(output.take_written()), Some(1));
        }
    }

    /// What these options write of a message.
    fn written(options: &[&str], delivery: Delivery) -> String {
        let file = TempFile::new("log");
        let cli = Cli::parse_from([&["receive-logs"], options].concat());
        let mut output = Output::new(&cli, file.create(), None);
        output.write(delivery, 0..u64::MAX).unwrap();
        let _ = output.flush().unwrap();
        String::from_utf8(file.read().unwrap()).unwrap()
    }

    #[test]
    fn a_large_header_is_not_repeated_for_each_record() {
        let hostile = || {
            let [mut delivery] = deliveries(&[lines(1000, "")]).try_into().unwrap();
            let host = Value::LongString("\x07".repeat(120_000));
            let headers = Table::from([("Host".into(), host)]);
            delivery.properties = mem::take(&mut delivery.properties).with_headers(headers);
            delivery
        };
        let text = written(&["--prefix"], hostile());
        assert!(text.len() < 500_000, "{} bytes", text.len());
        let json = written(&["-f", "json"], hostile());
        assert!(json.len() < 1_500_000, "{} bytes", json.len());
    }

    #[test]
    fn a_record_that_a_crash_has_cut_short_is_ended() {
        let file = TempFile::with("log", b"whole\ncut");
        let notes = Notes::during(|| {
            let mut output = to_path(file.path(), &[]);
            output.reopen().unwrap();
            output.reopen().unwrap();
        });
        assert_eq!(file.read().unwrap(), b"whole\ncut\n");
        let note =
            format!("{:?} ends in the middle of a record, which is left as it is", file.path());
        assert_eq!(notes, [note]);
    }

    #[test]
    fn a_renamed_file_is_replaced_by_a_new_one() {
        let (file, renamed) = (TempFile::new("log"), TempFile::new("log.1"));
        let mut output = to_path(file.path(), &[]);
        let [a, b] = deliveries(&[Message::new("a"), Message::new("b")]).try_into().unwrap();
        output.write(a, 0..1).unwrap();
        fs::rename(file.path(), renamed.path()).unwrap();
        output.reopen().unwrap();
        output.write(b, 0..1).unwrap();
        let _ = output.flush().unwrap();
        assert_eq!(renamed.read().unwrap(), b"a\n");
        assert_eq!(file.read().unwrap(), b"b\n");
    }

    #[test]
    fn a_file_that_cannot_be_opened_anew_stays_in_use() {
        let (file, renamed) = (TempFile::new("log"), TempFile::new("log.1"));
        let mut output = to_path(file.path(), &[]);
        fs::rename(file.path(), renamed.path()).unwrap();
        fs::create_dir(file.path()).unwrap();
        let notes = Notes::during(|| output.reopen().unwrap());
        let note = format!(
            "open {:?}: Is a directory (os error 21); writing goes on to the file opened before",
            file.path()
        );
        assert_eq!(notes, [note]);
        let [delivery] = deliveries(&[Message::new("a")]).try_into().unwrap();
        output.write(delivery, 0..1).unwrap();
        let _ = output.flush().unwrap();
        assert_eq!(renamed.read().unwrap(), b"a\n");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let failure = Output::open(&cli(&["-o", "/nonexistent/log"])).err().unwrap();
        let text = "open \"/nonexistent/log\": No such file or directory (os error 2)";
        assert_eq!(failure.to_string(), text);
    }

    #[test]
    fn a_reader_that_goes_is_noticed_and_a_file_has_none() {
        let file = TempFile::new("log");
        assert!(to_path(file.path(), &[]).reader_gone().unwrap().is_none());
        let (reader, writer) = pipe().unwrap();
        let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let output = to_path(Path::new(&path), &[]);
        let reader_gone = output.reader_gone().unwrap().unwrap();
        assert!(reader_gone.is_empty());
        drop(reader);
        wait_until("that is noticed", || !reader_gone.is_empty());
        assert!(!output.reader_gone().unwrap().unwrap().is_empty(), "at once");
    }
}
