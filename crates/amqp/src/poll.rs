//! Waiting for several file descriptors at once, with poll(2).

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Which of the watched file descriptors are ready.
#[derive(Clone, Copy, Debug, Default)]
pub struct Woken(u32);

impl Woken {
    /// Whether the file descriptor at this index, of 32 at most, is ready.
    pub fn by(self, index: usize) -> bool {
        self.0 >> index & 1 == 1
    }

    /// Whether any of the first `count` file descriptors is ready.
    pub(crate) fn by_any_of(self, count: usize) -> bool {
        self.0 & !(u32::MAX << count) != 0
    }
}

/// Waits until one of `watched` is readable, at most until `until`.
pub fn wait_for(watched: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
    wait(readable(watched), until)
}

pub(crate) fn readable<'a>(watched: &[BorrowedFd<'a>]) -> Vec<PollFd<'a>> {
    watched.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)).collect()
}

/// Waits for these events, at most until `until`.
pub(crate) fn wait(mut files: Vec<PollFd<'_>>, until: Option<Instant>) -> Woken {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A time too far away for poll(2) counts as no limit.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut files, timeout.as_ref()) {
            // A signal that concerns the waiting program puts a message into a mailbox.
            Err(Errno::INTR) => {}
            Err(_) => return Woken(0),
            Ok(_) => break,
        }
    }
    let ready = files.iter().enumerate().filter(|(_, file)| !file.revents().is_empty());
    Woken(ready.fold(0, |woken, (index, _)| woken | 1 << index))
}
