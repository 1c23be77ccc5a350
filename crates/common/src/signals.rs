//! SIGINT and SIGTERM ask a program to finish what it has begun, but not to take its time.

use std::io;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Reports the first SIGINT or SIGTERM. When `grace` has passed after it, calls `give_up` with it
/// and ends the process by it, as what keeps it from finishing may keep it from noticing
/// anything. A second signal ends it at once.
///
/// # Errors
///
/// When the handlers cannot be installed.
pub fn stop_signal(
    grace: Duration,
    give_up: impl Fn(i32) + Clone + Send + 'static,
) -> io::Result<Receiver<i32>> {
    let (sender, receiver) = bounded(1);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        for signal in signals.forever() {
            if sender.try_send(signal).is_err() {
                die_by(signal);
            }
            let give_up = give_up.clone();
            thread::spawn(move || {
                thread::sleep(grace);
                give_up(signal);
                die_by(signal);
            });
        }
    });
    Ok(receiver)
}

/// Ends the process by `signal`, as if it had never been handled.
pub fn die_by(signal: i32) {
    // Fails for unknown signals only.
    let _ = emulate_default_handler(signal);
}

/// The name of a signal that [`stop_signal`] reports.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}
