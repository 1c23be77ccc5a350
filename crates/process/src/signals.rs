//! SIGINT and SIGTERM ask a program to finish the work at hand, without taking its time.
//!
//! A SIGINT or SIGTERM that was ignored at the start, as under `nohup` and a shell's `&`, stays ignored.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Letterbox, Mailbox, wait_for};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::low_level::{emulate_default_handler, exit, pipe, signal_name};

/// For this time after the first signal, the same signal again is not a second request to stop: `timeout`
/// signals its child, and then the process group, which includes the child.
const ECHO: Duration = Duration::from_millis(500);

/// The process that starts all others, of a machine or of a container.
const INIT: u32 = 1;

/// Listens to SIGINT and SIGTERM. Until [`handle`](StopSignals::handle) is called they end the process
/// at once. That holds in process 1 too, which the system spares the default action of signals.
pub struct StopSignals {
    handler: Arc<Mutex<Option<Handler>>>,
}

struct Handler {
    stop: Letterbox<i32>,
    grace: Duration,
    give_up: Box<dyn FnOnce(i32) + Send>,
}

impl StopSignals {
    /// Begins to listen.
    ///
    /// # Errors
    ///
    /// When the handlers cannot be installed, or the system has no thread for them.
    pub fn listen() -> io::Result<StopSignals> {
        let mut signals = Vec::new();
        for signal in [SIGINT, SIGTERM] {
            if !is_ignored(signal) {
                let (reader, writer) = io::pipe()?;
                pipe::register(signal, writer)?;
                signals.push((signal, reader));
            }
        }
        let handler = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&handler);
        thread::Builder::new().spawn(move || run(&signals, &shared))?;
        Ok(StopSignals { handler })
    }

    /// Like [`listen`](StopSignals::listen), for a program without work to finish: only process 1 has
    /// to listen.
    ///
    /// # Errors
    ///
    /// As for [`listen`](StopSignals::listen).
    pub fn listen_as_init() -> io::Result<()> {
        match process::id() {
            INIT => StopSignals::listen().map(drop),
            _ => Ok(()),
        }
    }

    /// From now on the first signal goes to the returned mailbox. After `grace`, or at a second signal,
    /// calls `give_up` with the last signal and ends the process by that signal: whatever keeps the
    /// program from finishing may keep it from noticing a time limit, too. The same signal within `ECHO`
    /// is not a second one.
    ///
    /// # Errors
    ///
    /// When the system has no file descriptors left.
    pub fn handle(
        self,
        grace: Duration,
        give_up: impl FnOnce(i32) + Send + 'static,
    ) -> Result<Mailbox<i32>, amqp::Error> {
        let (stop, mailbox) = Mailbox::open()?;
        let handler = Handler { stop, grace, give_up: Box::new(give_up) };
        *self.handler.lock().unwrap_or_else(PoisonError::into_inner) = Some(handler);
        Ok(mailbox)
    }
}

fn run(signals: &[(i32, PipeReader)], handler: &Mutex<Option<Handler>>) {
    let Some(first) = wait(signals, None) else {
        return;
    };
    let handler = handler.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(Handler { stop, grace, give_up }) = handler else {
        return die_by(first);
    };
    let received = Instant::now();
    stop.send(first);
    let end = received.checked_add(grace);
    let last = loop {
        match wait(signals, end) {
            Some(signal) if signal == first && received.elapsed() < ECHO => {}
            second => break second.unwrap_or(first),
        }
    };
    give_up(last);
    die_by(last);
}

/// Waits for the next of the signals until `end`.
fn wait(signals: &[(i32, PipeReader)], end: Option<Instant>) -> Option<i32> {
    let pipes: Vec<_> = signals.iter().map(|(_, pipe)| pipe.as_fd()).collect();
    let woken = wait_for(&pipes, end);
    let place = (0..pipes.len()).find(|place| woken.by(*place))?;
    let (signal, mut pipe) = (signals[place].0, &signals[place].1);
    // The pipe is ready, and never ends: its writer lives in the signal handler.
    let _ = pipe.read(&mut [0]);
    Some(signal)
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error like any other: its signal no longer ends the
/// process.
///
/// # Errors
///
/// When the handler cannot be installed.
pub fn survive_file_size_limit() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(drop)
}

/// Ends the process by `signal`, as if the signal had never been handled. Process 1, which cannot die
/// by a signal, exits with the status that a shell gives to a death by `signal`.
pub fn die_by(signal: i32) {
    if process::id() == INIT {
        exit(128 + signal);
    }
    // Fails for unknown signals only.
    let _ = emulate_default_handler(signal);
}

/// The name of a signal that stops a program.
pub fn name(signal: i32) -> &'static str {
    signal_name(signal).unwrap_or("a signal")
}

/// Whether this process was started with the signal ignored. Where the system has no `/proc`, that
/// cannot be told without unsafe code, and counts as no.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}
