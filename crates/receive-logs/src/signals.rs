//! What can stop a receiver from outside: signals, and a reader of its output that goes away.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// How long a receiver that was told to stop may take to write what it has.
const GRACE: Duration = Duration::from_millis(1800);

/// Reports the first SIGINT or SIGTERM. A second one ends the process at once, and so does the
/// end of the grace, as a reader that takes nothing keeps the writer from noticing anything.
///
/// # Errors
///
/// When the handlers cannot be installed.
pub fn stop_signal() -> io::Result<Receiver<i32>> {
    let (sender, receiver) = bounded(1);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        for signal in signals.forever() {
            if sender.try_send(signal).is_err() {
                die(signal);
            }
            thread::spawn(move || {
                thread::sleep(GRACE);
                log::warn!("stopped before all that was received could be written");
                die(signal);
            });
        }
    });
    Ok(receiver)
}

fn die(signal: i32) {
    // Fails for unknown signals only.
    let _ = emulate_default_handler(signal);
}

/// Reports when nobody can read `output` any more: the other end of the pipe or the terminal is
/// gone. Never reports anything for a file.
pub fn reader_gone(output: OwnedFd) -> Receiver<()> {
    let (sender, receiver) = bounded(1);
    thread::spawn(move || {
        // Without flags to wait for, only an error or a hang-up ends the wait.
        let mut watched = [PollFd::new(&output, PollFlags::empty())];
        while let Err(Errno::INTR) = poll(&mut watched, None) {}
        let _ = sender.send(());
    });
    receiver
}
