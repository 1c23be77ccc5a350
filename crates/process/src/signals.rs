//! Signals that ask a program to stop, and other signals that do not end it.
//!
//! A SIGHUP, SIGINT or SIGTERM that was ignored at the start, as under `nohup` and a shell's `&`, stays ignored.

use std::fs;
use std::io::{self, Read};
use std::mem;
use std::ops::ControlFlow;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use amqp::{Mailbox, Sender};
use rustix::event::PollFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::low_level::{emulate_default_handler, exit, pipe, signal_name};

use crate::background::{Ticks, every, watch};

/// For this time after the first signal, the same signal again is not a second request to stop. `timeout` signals its
/// child, and then the process group, which includes the child.
const ECHO: Duration = Duration::from_millis(500);

/// The process id of the first process, of a machine or of a container.
const INIT: u32 = 1;

/// Handles SIGINT, SIGTERM and, at the end of a terminal, SIGHUP. Until [`handle`](StopSignals::handle) is called, they
/// end the process at once. This includes process 1, to which the default action of signals does not apply.
pub struct StopSignals {
    stage: Arc<Mutex<Stage>>,
}

/// The meaning of SIGHUP.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hangup {
    /// It asks the program to stop, as SIGTERM does.
    Stops,
    /// Another handler has it, which the program installs.
    HasHandler,
}

/// How the next signal is handled.
enum Stage {
    /// There is no work to finish: the signal ends the process.
    Idle,
    /// The signal is sent to the program, which then finishes its work.
    Working { stop: Sender<i32>, grace: Duration, give_up: GiveUp },
    /// The program finishes its work. Another signal ends the process.
    Stopping { first: i32, since: Instant, give_up: GiveUp },
}

type GiveUp = Box<dyn FnOnce(i32) + Send>;

impl StopSignals {
    /// Installs the handlers.
    ///
    /// # Errors
    ///
    /// When the handlers cannot be installed, or the system has no thread for them.
    pub fn listen(hangup: Hangup) -> io::Result<StopSignals> {
        let stage = Arc::new(Mutex::new(Stage::Idle));
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            let has_handler = signal == SIGHUP && hangup == Hangup::HasHandler;
            if !has_handler && !is_ignored(signal) {
                let stage = Arc::clone(&stage);
                on(signal, move || handle(signal, &stage))?;
            }
        }
        Ok(StopSignals { stage })
    }

    /// Like [`listen`](StopSignals::listen), for a program without work to finish. Only process 1 needs handlers,
    /// because the default action ends any other process.
    ///
    /// # Errors
    ///
    /// As for [`listen`](StopSignals::listen).
    pub fn listen_as_init() -> io::Result<()> {
        match process::id() {
            INIT => StopSignals::listen(Hangup::Stops).map(drop),
            _ => Ok(()),
        }
    }

    /// Sends the first signal to the returned mailbox. After `grace`, or at a second signal, the background thread
    /// calls `give_up` with the last signal and ends the process by that signal, because a blocked main thread would
    /// not notice a time limit. The same signal within `ECHO` is not a second one.
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
        *lock(&self.stage) = Stage::Working { stop, grace, give_up: Box::new(give_up) };
        Ok(mailbox)
    }
}

/// Calls `run` in the background thread after each `signal`, which no longer has its default action.
///
/// # Errors
///
/// When the handler cannot be installed, or the system has no thread for it.
pub fn on(signal: i32, mut run: impl FnMut() + Send + 'static) -> io::Result<()> {
    let (reader, writer) = io::pipe()?;
    pipe::register(signal, writer)?;
    let reader = Arc::new(reader);
    watch(Arc::clone(&reader), PollFlags::IN, move || {
        // The pipe is ready and never ends, because the signal handler has its writer.
        let _ = (&*reader).read(&mut [0]);
        run();
        ControlFlow::Continue(())
    })
}

fn handle(signal: i32, shared: &Arc<Mutex<Stage>>) {
    let mut stage = lock(shared);
    match mem::replace(&mut *stage, Stage::Idle) {
        Stage::Working { stop, grace, give_up } => {
            stop.send(signal);
            *stage = Stage::Stopping { first: signal, since: Instant::now(), give_up };
            let shared = Arc::clone(shared);
            let limit =
                every(grace, move || end(signal, mem::replace(&mut *lock(&shared), Stage::Idle)));
            // This runs in the background thread, so the thread exists.
            let _ = limit.map(Ticks::keep);
        }
        Stage::Stopping { first, since, give_up } if signal == first && since.elapsed() < ECHO => {
            *stage = Stage::Stopping { first, since, give_up };
        }
        last => end(signal, last),
    }
}

/// Ends the process by `signal`.
fn end(signal: i32, stage: Stage) {
    if let Stage::Stopping { give_up, .. } = stage {
        give_up(signal);
    }
    die_by(signal);
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a write beyond the file size limit (`ulimit -f`) an ordinary error: SIGXFSZ no longer ends the process.
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

/// Whether this process was started with the signal ignored. Safe code can find this only in `/proc`; without it, the
/// answer is `false`.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}
