//! Locks that reserve a file for one process.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long to wait for a lock. The system may release the locks of a killed process some time after the kill.
pub const LOCK_WAIT: Duration = Duration::from_secs(2);

/// The time between two attempts to lock a file.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Locks a file against other processes, and waits until the `deadline` for another holder to release it.
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] when another process still holds the lock at the deadline.
pub fn lock_by(file: &File, deadline: Instant) -> io::Result<()> {
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(RETRY_DELAY),
            locked => return Ok(locked?),
        }
    }
}
