//! The status line on stderr: at SIGUSR1, at SIGINFO where the system has that signal (CTRL+T), and at intervals.
//!
//! The background thread writes the line from counts in memory. The line therefore appears even while the program
//! connects or while its output blocks, and it costs the main thread no system call.

use std::io::{self, PipeReader, Read};
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::PollFlags;
use signal_hook::low_level::pipe;

use crate::background::{every, watch};
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

/// A static, because signals belong to the whole process.
static LISTENER: OnceLock<Listener> = OnceLock::new();

struct Listener {
    /// Holds a byte for each signal.
    signals: PipeReader,
    begun: Instant,
    begun_at: SystemTime,
}

/// Makes SIGUSR1 a request for a status line instead of the end of the process. Call it first in `main`. If the system
/// has no file descriptor left, SIGUSR1 keeps its default action.
pub fn listen() {
    if let Ok(signals) = register() {
        let listener = Listener { signals, begun: Instant::now(), begun_at: SystemTime::now() };
        // This fails only at a second call.
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

/// Writes a status line at each signal since [`listen`], and at each `interval`, until the process ends. The line has
/// the name of the program, its start time and the text of `describe`. If [`listen`] was not called, or the system has
/// no thread left, this does nothing.
pub fn answer(
    program: &'static str,
    interval: Option<Duration>,
    describe: impl Fn() -> String + Send + Sync + 'static,
) {
    let Some(listener) = LISTENER.get() else {
        return;
    };
    let begun_at = time::format(time::millis(listener.begun_at), Precision::Seconds);
    let line = Arc::new(move || {
        let elapsed = whole_seconds(listener.begun.elapsed());
        note(format_args!("{program}: running since {begun_at} ({elapsed}), {}", describe()));
    });
    if let Err(error) = write_at(listener, interval, line) {
        log::debug!("start a thread: {error}");
    }
}

fn write_at(
    listener: &'static Listener,
    interval: Option<Duration>,
    line: Arc<impl Fn() + Send + Sync + 'static>,
) -> io::Result<()> {
    if let Some(interval) = interval {
        let line = Arc::clone(&line);
        every(interval, move || line())?.keep();
    }
    watch(&listener.signals, PollFlags::IN, move || {
        // Several signals at once get one line.
        let _ = (&listener.signals).read(&mut [0; 4096]);
        line();
        ControlFlow::Continue(())
    })
}
