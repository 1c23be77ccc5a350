//! A reader of the output that goes away.

use std::os::fd::OwnedFd;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Reports when nobody can read `output` any more: the other end of the pipe or the terminal is
/// gone. Never reports anything for a file.
pub fn gone(output: OwnedFd) -> Receiver<()> {
    let (sender, receiver) = bounded(1);
    thread::spawn(move || {
        // Without flags to wait for, only an error or a hang-up ends the wait.
        let mut watched = [PollFd::new(&output, PollFlags::empty())];
        while let Err(Errno::INTR) = poll(&mut watched, None) {}
        let _ = sender.send(());
    });
    receiver
}
