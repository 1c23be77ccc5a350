//! Detects data in standard input without `--lines`, as in `echo hi | emit-log`.

use std::os::fd::AsFd;
use std::time::Instant;

use amqp::wait_for;
use logs_process::{Failure, Status};
use rustix::fs::{FileType, SeekFrom, fstat, seek};
use rustix::io::{ioctl_fionread, pread};

/// The content of an input at this moment. The check reads nothing and does not wait, because a slow writer cannot be
/// distinguished from a writer that never writes, such as that of an inherited pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// No bytes: a terminal, `/dev/null`, or an input at its end.
    Empty,
    /// A pipe or a socket without bytes whose writer has not closed it.
    Silent,
    /// A file before its end, or a pipe or a socket with bytes.
    Bytes,
}

impl Unread {
    /// Checks an input.
    pub fn of(input: impl AsFd) -> Unread {
        let holds_bytes = match fstat(&input).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::RegularFile) => {
                // Files in /proc have size 0, so a byte is read.
                let next = seek(&input, SeekFrom::Current(0));
                next.and_then(|next| pread(&input, &mut [0], next)).is_ok_and(|length| length > 0)
            }
            Ok(FileType::Fifo | FileType::Socket) => {
                if !wait_for(&[input.as_fd()], Some(Instant::now())).by(0) {
                    return Unread::Silent;
                }
                ioctl_fionread(&input).is_ok_and(|length| length > 0)
            }
            _ => false,
        };
        if holds_bytes { Unread::Bytes } else { Unread::Empty }
    }
}

/// The failure for an input with bytes. Its text begins with `outcome`.
pub fn failure(outcome: &str) -> Failure {
    let text = "standard input has data, which only --lines reads (in a crontab, write % as \\%)";
    Failure::new(Status::Usage, format!("{outcome} {text}"))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Seek, Write, pipe};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_holds_bytes_up_to_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(Unread::of(&file), Unread::Empty);
        file.write_all(b"hi").unwrap();
        assert_eq!(Unread::of(&file), Unread::Empty, "at the end");
        file.rewind().unwrap();
        assert_eq!(Unread::of(&file), Unread::Bytes);
        assert_eq!(std::io::read_to_string(&file).unwrap(), "hi", "all is still there");
        assert_eq!(Unread::of(File::open("/proc/self/status").unwrap()), Unread::Bytes);
    }

    #[test]
    fn a_pipe_and_a_socket_hold_bytes() {
        let (mut reader, mut writer) = pipe().unwrap();
        assert_eq!(Unread::of(&reader), Unread::Silent);
        writer.write_all(b"a").unwrap();
        assert_eq!(Unread::of(&reader), Unread::Bytes);
        drop(writer);
        assert_eq!(Unread::of(&reader), Unread::Bytes, "the writer has gone");
        reader.read_exact(&mut [0]).unwrap();
        assert_eq!(Unread::of(&reader), Unread::Empty);

        let (mut socket, mut peer) = UnixStream::pair().unwrap();
        assert_eq!(Unread::of(&socket), Unread::Silent);
        peer.write_all(b"a").unwrap();
        assert_eq!(Unread::of(&socket), Unread::Bytes);
        socket.read_exact(&mut [0]).unwrap();
        drop(peer);
        assert_eq!(Unread::of(&socket), Unread::Empty);
    }

    #[test]
    fn devices_and_directories_hold_nothing() {
        for path in ["/dev/null", "/dev/zero", "/"] {
            assert_eq!(Unread::of(File::open(path).unwrap()), Unread::Empty, "{path}");
        }
        let terminal = OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
        assert_eq!(Unread::of(terminal), Unread::Empty);
    }
}
