//! A line on stderr that tells how a program is doing: at SIGUSR1, at SIGINFO where the system has that signal
//! (CTRL+T), and at intervals.
//!
//! A thread of its own writes the line, from counts that the program keeps in memory. So there is an answer while
//! the program waits for its first broker, or for an output that takes no bytes; and the program makes no system
//! call for the line.

use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use amqp::wait_for;
use signal_hook::low_level::pipe;

use crate::notes::note;
use crate::time::{self, Precision, whole_seconds};

#[cfg(any(
    target_vendor = "apple",
    target_os = "freebsd",
    target_os = "netbsd",
    target_os = "openbsd"
))]
const SIGNALS: &[i32] = &[signal_hook::consts::SIGUSR1, signal_hook::consts::SIGINFO];
#[cfg(not(any(
    target_vendor = "apple",
    target_os = "freebsd",
    target_os = "netbsd",
    target_os = "openbsd"
)))]
const SIGNALS: &[i32] = &[signal_hook::consts::SIGUSR1];

/// Signals belong to the process as a whole.
static LISTENER: OnceLock<Listener> = OnceLock::new();

struct Listener {
    /// Holds a byte for each signal.
    signals: PipeReader,
    begun: Instant,
    begun_at: SystemTime,
}

/// From now on SIGUSR1 does not end the process, and asks for an [`answer`]; to be called first of all in `main`.
/// Where the system has no file descriptor left, SIGUSR1 is as before.
pub fn listen() {
    if let Ok(signals) = register() {
        let listener = Listener { signals, begun: Instant::now(), begun_at: SystemTime::now() };
        // Set once only, in `main`.
        let _ = LISTENER.set(listener);
    }
}

fn register() -> io::Result<PipeReader> {
    let (reader, writer) = io::pipe()?;
    for signal in SIGNALS {
        pipe::register(*signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

/// Writes a line at each signal since [`listen`], and at each `interval`, until the process ends: with the name of
/// the program, since when it runs, and what `describe` returns. Does nothing without [`listen`], and where the
/// system has no thread for it, which is no reason to give up the work.
pub fn answer(
    program: &'static str,
    interval: Option<Duration>,
    describe: impl Fn() -> String + Send + 'static,
) {
    let Some(listener) = LISTENER.get() else {
        return;
    };
    let spawned = thread::Builder::new().spawn(move || run(program, listener, interval, describe));
    if let Err(error) = spawned {
        log::debug!("start a thread: {error}");
    }
}

fn run(
    program: &str,
    listener: &Listener,
    interval: Option<Duration>,
    describe: impl Fn() -> String,
) {
    let begun_at = time::format(time::millis(listener.begun_at), Precision::Seconds);
    let next_time = || interval.and_then(|interval| Instant::now().checked_add(interval));
    let mut next = next_time();
    loop {
        match wait_for(&[listener.signals.as_fd()], next).by(0) {
            // Signals that have come together get one line.
            true => drop((&listener.signals).read(&mut [0; 4096])),
            false => next = next_time(),
        }
        let elapsed = whole_seconds(listener.begun.elapsed());
        note(format_args!("{program}: running since {begun_at} ({elapsed}), {}", describe()));
    }
}
