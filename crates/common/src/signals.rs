//! SIGINT and SIGTERM ask a program to finish what it has begun, but not to take its time; SIGHUP
//! asks it to open its files anew.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// How long what is to be said after a second signal may take.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Reports the first SIGINT or SIGTERM. When `grace` has passed after it, or a second signal comes,
/// calls `give_up` with it and ends the process by it, as what keeps it from finishing may keep it
/// from noticing anything.
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
            let is_first = sender.try_send(signal).is_ok();
            let give_up = give_up.clone();
            thread::spawn(move || {
                thread::sleep(if is_first { grace } else { Duration::ZERO });
                give_up(signal);
                die_by(signal);
            });
            if !is_first {
                // Not even a stderr that nobody reads may keep it.
                thread::sleep(LAST_WORDS);
                die_by(signal);
            }
        }
    });
    Ok(receiver)
}

/// Reports each SIGHUP, several at once as one.
///
/// # Errors
///
/// When the handlers cannot be installed.
pub fn reopen_signal() -> io::Result<Receiver<()>> {
    let (sender, receiver) = bounded(1);
    let mut signals = Signals::new([SIGHUP])?;
    thread::spawn(move || {
        for _ in signals.forever() {
            // If there is one already, that is yet to be acted on.
            let _ = sender.try_send(());
        }
    });
    Ok(receiver)
}

/// Makes a write beyond the limit of a file's size an error like any other, as its signal no longer
/// ends the process.
///
/// # Errors
///
/// When the handler cannot be installed.
pub fn survive_file_size_limit() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(drop)
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
