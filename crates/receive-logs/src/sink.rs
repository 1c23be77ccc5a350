//! A buffered file. Records of any size need a limited amount of memory.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::mem;

use rustix::event::{PollFd, PollFlags, poll};

/// The buffer is written at this number of bytes. It holds at most twice as many.
pub const BUFFER: usize = 64 * 1024;

/// A file and its buffer, with their positions in bytes.
pub struct Sink {
    pub file: File,
    buffer: Vec<u8>,
    /// Bytes in the file.
    flushed: u64,
}

impl Sink {
    pub fn new(file: File) -> Sink {
        Sink { file, buffer: Vec::with_capacity(2 * BUFFER), flushed: 0 }
    }

    /// Bytes in the file since it was opened.
    pub fn flushed(&self) -> u64 {
        self.flushed
    }

    /// Bytes in the file and the buffer.
    pub fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Removes the bytes after a `position` from the buffer and from the end of the file. Returns false for a pipe or
    /// a device, and if another program has written after them.
    pub fn truncate(&mut self, position: u64) -> io::Result<bool> {
        self.buffer.clear();
        let is_removed = truncate_end(&mut self.file, self.flushed - position)?;
        if is_removed {
            self.flushed = position;
        }
        Ok(is_removed)
    }

    fn write_to_file(&mut self, mut rest: &[u8]) -> io::Result<()> {
        let length = rest.len();
        let outcome = write_all(&mut self.file, &mut rest);
        self.flushed += (length - rest.len()) as u64;
        outcome
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > 2 * BUFFER {
            self.flush()?;
            if bytes.len() > BUFFER {
                return self.write_to_file(bytes);
            }
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes the buffer. After an error, the bytes that are not in the file are discarded.
    fn flush(&mut self) -> io::Result<()> {
        let mut buffer = mem::take(&mut self.buffer);
        let outcome = self.write_to_file(&buffer);
        buffer.clear();
        self.buffer = buffer;
        outcome
    }
}

/// Writes `rest`. After an error, `rest` holds the bytes that are not written.
fn write_all(file: &mut File, rest: &mut &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => *rest = &rest[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another program that shares the pipe or the terminal has made its writes non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(file, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes the last `bytes` from the end of a file. Returns false for a pipe or a device, and if another program has
/// written after them.
fn truncate_end(file: &mut File, bytes: u64) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || file.stream_position()? != metadata.len() {
        return Ok(false);
    }
    let end = metadata.len() - bytes;
    file.set_len(end)?;
    // Programs that share this standard output write from this offset on.
    file.seek(SeekFrom::Start(end))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use logs_tests::TempFile;

    use super::*;

    #[test]
    fn bytes_of_other_programs_are_not_removed() {
        let file = TempFile::new("log");
        let mut ours = file.create();
        ours.write_all(b"ours").unwrap();
        assert!(truncate_end(&mut ours, 2).unwrap());
        assert_eq!(file.read().unwrap(), b"ou");
        let mut theirs = OpenOptions::new().append(true).open(file.path()).unwrap();
        theirs.write_all(b"theirs").unwrap();
        assert!(!truncate_end(&mut ours, 2).unwrap());
        assert_eq!(file.read().unwrap(), b"outheirs");
    }

    #[test]
    fn a_position_counts_the_file_and_the_buffer() {
        let file = TempFile::new("log");
        let mut sink = Sink::new(file.create());
        sink.write_all(b"small").unwrap();
        assert_eq!((sink.flushed(), sink.position()), (0, 5));
        sink.write_all(&[b'x'; 2 * BUFFER]).unwrap();
        sink.write_all(b"small").unwrap();
        let position = 2 * BUFFER as u64 + 10;
        assert_eq!((sink.flushed(), sink.position()), (position - 5, position));
        assert!(sink.truncate(3).unwrap());
        assert_eq!((sink.position(), &file.read().unwrap()[..]), (3, &b"sma"[..]));
    }
}
