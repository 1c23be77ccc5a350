//! The password file, read again at each attempt to connect.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use amqp::{Error, Secret, Uri};
use logs_process::{Failure, Status};
use rustix::fs::OFlags;

/// Limit for the first line of a password file, in bytes. It is far beyond any password, and stops reading endless
/// files.
const MAX_LINE: usize = 64 * 1024;

/// The brokers to try, at least one, and the file of their password.
#[derive(Debug)]
pub struct Brokers {
    pub(crate) uris: Vec<Uri>,
    pub(crate) password_file: Option<PathBuf>,
}

impl Brokers {
    /// The vhost of the first broker.
    pub fn vhost(&self) -> &str {
        self.uris[0].vhost()
    }

    /// The brokers with the current password of the file. The password of a pipe is kept, because a pipe can be read
    /// only once.
    ///
    /// # Errors
    ///
    /// A transient error when the file cannot be read or holds no password, because another program may be replacing
    /// it.
    pub fn uris(&self) -> Result<Vec<Uri>, Error> {
        let mut uris = self.uris.clone();
        if let Some(path) = &self.password_file
            && path.metadata().map_or(true, |metadata| metadata.is_file())
        {
            let password =
                read_now(path).map_err(|failure| Error::unavailable(failure.to_string()))?;
            uris.iter_mut().for_each(|uri| uri.password = password.clone());
        }
        Ok(uris)
    }
}

/// Reads the password at the start of the program. Waits for the writer of a pipe.
///
/// # Errors
///
/// [`Status::Io`] when the file cannot be read, [`Status::Config`] when it holds no password.
pub(crate) fn read(path: &Path) -> Result<Secret, Failure> {
    password_of(path, File::open(path))
}

/// The same without blocking, even if a pipe has replaced the file.
fn read_now(path: &Path) -> Result<Secret, Failure> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    password_of(path, OpenOptions::new().read(true).custom_flags(flags).open(path))
}

fn password_of(path: &Path, file: io::Result<File>) -> Result<Secret, Failure> {
    let operation = format!("read password file {path:?}");
    let line = file.and_then(first_line).map_err(|error| Failure::io(&operation, &error))?;
    let reject = |reason: &str| {
        Failure::new(Status::Config, format!("{operation}: its first line {reason}"))
    };
    if line.is_empty() {
        return Err(reject("is empty"));
    }
    if line.len() > MAX_LINE {
        return Err(reject("is longer than 64 KiB"));
    }
    let password = String::from_utf8(line).map_err(|_| reject("is not UTF-8"))?;
    Ok(Secret::new(password))
}

/// The byte order mark of UTF-8, which editors on Windows write at the start of a file.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The first line of a file, without the byte order mark and the line end (LF or CR LF), and of at most [`MAX_LINE`] +
/// 1 bytes. Reading stops at the line end, so that the writer of a pipe need not close it.
fn first_line(file: File) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(file.take(MAX_LINE as u64 + 1)).read_until(b'\n', &mut line)?;
    if line.pop_if(|byte| *byte == b'\n').is_some() {
        line.pop_if(|byte| *byte == b'\r');
    }
    if line.starts_with(BYTE_ORDER_MARK) {
        line.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::{env, fs, process, thread};

    use super::*;

    /// A path for a file of this test.
    fn path(name: &str) -> PathBuf {
        env::temp_dir().join(format!("password-{name}-{}", process::id()))
    }

    fn brokers(path: &Path) -> Brokers {
        let mut uri = Uri::parse("amqp://u:x@a").unwrap();
        uri.password = read(path).unwrap();
        Brokers { uris: vec![uri], password_file: Some(path.into()) }
    }

    #[test]
    fn the_password_is_the_first_line_of_its_file() {
        let path = path("line");
        for content in ["s3cr3t \r\nmore\n", "\u{feff}s3cr3t ", "s3cr3t \n"] {
            fs::write(&path, content).unwrap();
            assert_eq!(read(&path).unwrap(), Secret::new("s3cr3t "));
        }
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_missing_password_file_is_named() {
        let failure = read(Path::new("/nonexistent/p")).unwrap_err();
        assert_eq!(failure.status, Status::Io);
        assert!(failure.to_string().contains("/nonexistent/p"));
    }

    #[test]
    fn a_password_file_without_a_password_is_an_error() {
        let path = path("wrong");
        let long = vec![b'x'; MAX_LINE + 1];
        for (content, reason) in [
            (&b""[..], "is empty"),
            (b"\nsecond\n", "is empty"),
            ("\u{feff}\n".as_bytes(), "is empty"),
            (&long, "is longer than 64 KiB"),
            (b"\xff\n", "is not UTF-8"),
        ] {
            fs::write(&path, content).unwrap();
            let failure = read(&path).unwrap_err();
            assert_eq!(failure.status, Status::Config);
            assert!(failure.to_string().ends_with(reason), "{failure}");
        }
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn each_attempt_reads_the_password_file_again() {
        let path = path("rotated");
        fs::write(&path, "first\n").unwrap();
        let brokers = brokers(&path);
        fs::write(&path, "second\n").unwrap();
        assert_eq!(brokers.uris().unwrap()[0].password, Secret::new("second"));
        fs::write(&path, "").unwrap();
        let error = brokers.uris().unwrap_err();
        assert!(error.is_transient() && error.to_string().ends_with("is empty"), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(brokers.uris().unwrap_err().is_transient());
    }

    #[test]
    fn the_password_of_a_pipe_is_read_once() {
        let path = path("pipe");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let writer = thread::spawn({
            let path = path.clone();
            move || fs::write(path, "first\n")
        });
        let brokers = brokers(&path);
        writer.join().unwrap().unwrap();
        assert_eq!(brokers.uris().unwrap()[0].password, Secret::new("first"));
        fs::remove_file(path).unwrap();
    }
}
