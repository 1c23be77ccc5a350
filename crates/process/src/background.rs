//! The background thread, for all work that must be done while the main thread is busy or blocked.
//!
//! The thread starts with the first job and runs until the process ends. All jobs share it, so a job must not block
//! longer than a [note](crate::notes::note). A panic ends only its job.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::mem;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The connection to the thread; `None` before its start.
static THREAD: Mutex<Option<Thread>> = Mutex::new(None);

struct Thread {
    jobs: Sender<Job>,
    waker: PipeWriter,
}

enum Job {
    Watch(Watch),
    Tick(Tick),
}

struct Watch {
    file: Box<dyn AsFd + Send>,
    events: PollFlags,
    run: Box<dyn FnMut() -> ControlFlow<()> + Send>,
}

struct Tick {
    /// The time of the next run; `None` if it is too far away to be expressed.
    next: Option<Instant>,
    interval: Duration,
    run: Arc<Mutex<Option<Run>>>,
}

type Run = Box<dyn FnMut() + Send>;

/// The ticks of [`every`]. Dropping this value ends them.
#[must_use = "dropping this value ends the ticks"]
pub struct Ticks(Arc<Mutex<Option<Run>>>);

/// Calls `run` in the background thread at each `interval`, until the returned value is dropped. The drop waits for a
/// running `run`. To avoid a deadlock, neither `run` itself nor the holder of a lock that `run` takes may drop the
/// value.
///
/// # Errors
///
/// When the system has no thread or file descriptor left.
pub fn every(interval: Duration, run: impl FnMut() + Send + 'static) -> io::Result<Ticks> {
    let run = Arc::new(Mutex::new(Some(Box::new(run) as Run)));
    let ticks = Ticks(Arc::clone(&run));
    add(Job::Tick(Tick { next: Instant::now().checked_add(interval), interval, run }))?;
    Ok(ticks)
}

/// Calls `run` in the background thread whenever `file` has one of `events`, an error or a hang-up, until `run` returns
/// [`ControlFlow::Break`].
///
/// # Errors
///
/// When the system has no thread or file descriptor left.
pub fn watch(
    file: impl AsFd + Send + 'static,
    events: PollFlags,
    run: impl FnMut() -> ControlFlow<()> + Send + 'static,
) -> io::Result<()> {
    add(Job::Watch(Watch { file: Box::new(file), events, run: Box::new(run) }))
}

fn add(job: Job) -> io::Result<()> {
    let mut thread = lock(&THREAD);
    if thread.is_none() {
        *thread = Some(start()?);
    }
    if let Some(thread) = &*thread
        && thread.jobs.send(job).is_ok()
    {
        (&thread.waker).write_all(&[0])?;
    }
    Ok(())
}

fn start() -> io::Result<Thread> {
    let (sender, jobs) = mpsc::channel();
    let (wakeups, waker) = io::pipe()?;
    thread::Builder::new().name("background".into()).spawn(move || run(&jobs, &wakeups))?;
    Ok(Thread { jobs: sender, waker })
}

fn run(jobs: &Receiver<Job>, mut wakeups: &PipeReader) {
    let (mut watches, mut ticks) = (Vec::new(), Vec::new());
    loop {
        for job in jobs.try_iter() {
            match job {
                Job::Watch(watch) => watches.push(watch),
                Job::Tick(tick) => ticks.push(tick),
            }
        }
        let ready = wait(wakeups, &watches, ticks.iter().filter_map(|tick: &Tick| tick.next).min());
        if ready[0] {
            // The pipe is ready, and its writer is never dropped.
            let _ = wakeups.read(&mut [0; 64]);
        }
        let mut ready = ready[1..].iter();
        watches.retain_mut(|watch| {
            ready.next() != Some(&true) || continues(|| (watch.run)().is_continue())
        });
        ticks.retain_mut(|tick| continues(|| tick.run_if_due()));
    }
}

/// Calls `run`, and returns whether its job continues. A panic ends the job.
fn continues(run: impl FnOnce() -> bool) -> bool {
    panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or(false)
}

/// Waits until the `next` tick at the latest. Returns whether `wakeups` and each of `watches` are ready, in this order.
fn wait(wakeups: &PipeReader, watches: &[Watch], next: Option<Instant>) -> Vec<bool> {
    let mut files = vec![PollFd::new(wakeups, PollFlags::IN)];
    files.extend(watches.iter().map(|watch| PollFd::new(&watch.file, watch.events)));
    let left = next.map(|next| next.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    // If a signal interrupts the wait, no file is ready.
    let _ = poll(&mut files, timeout.as_ref());
    files.iter().map(|file| !file.revents().is_empty()).collect()
}

impl Tick {
    /// Runs if the tick is due. Returns whether the ticks continue.
    fn run_if_due(&mut self) -> bool {
        let mut run = lock(&self.run);
        let Some(run) = &mut *run else {
            return false;
        };
        if self.next.is_some_and(|next| next <= Instant::now()) {
            run();
            self.next = Instant::now().checked_add(self.interval);
        }
        true
    }
}

impl Ticks {
    /// Continues the ticks until the process ends.
    pub fn keep(self) {
        mem::forget(self);
    }

    /// Ends the ticks, and waits for a running one.
    pub fn stop(&self) {
        *lock(&self.0) = None;
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const TICK: Duration = Duration::from_millis(5);

    #[test]
    fn ticks_end_when_they_are_dropped() {
        let (sender, ticks) = mpsc::channel();
        let guard = every(TICK, move || sender.send(()).unwrap()).unwrap();
        for _ in 0..3 {
            ticks.recv_timeout(PATIENCE).unwrap();
        }
        drop(guard);
        while ticks.try_recv().is_ok() {}
        let end = ticks.recv_timeout(PATIENCE).unwrap_err();
        assert_eq!(end, RecvTimeoutError::Disconnected, "the closure is dropped as well");
    }

    #[test]
    fn a_job_may_add_another() {
        let (sender, ticks) = mpsc::channel();
        let mut inner = None;
        let _outer = every(TICK, move || {
            let sender = sender.clone();
            inner.get_or_insert_with(|| every(TICK, move || sender.send(()).unwrap()).unwrap());
        });
        ticks.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_file_is_watched_until_its_job_ends() {
        let (reader, mut writer) = io::pipe().unwrap();
        let reader = Arc::new(reader);
        let (sender, bytes) = mpsc::channel();
        watch(Arc::clone(&reader), PollFlags::IN, move || {
            let mut byte = [0];
            (&*reader).read_exact(&mut byte).unwrap();
            sender.send(byte[0]).unwrap();
            if byte[0] == b'2' { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        writer.write_all(b"123").unwrap();
        let bytes: Vec<_> = bytes.iter().collect();
        assert_eq!(bytes, b"12");
    }

    #[test]
    fn a_closed_reader_is_noticed_without_events() {
        let (reader, writer) = io::pipe().unwrap();
        let (sender, gone) = mpsc::channel();
        watch(writer, PollFlags::empty(), move || {
            sender.send(()).unwrap();
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(gone.recv_timeout(4 * TICK), Err(RecvTimeoutError::Timeout));
        drop(reader);
        gone.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_panic_ends_its_job_only() {
        let (sender, ticks) = mpsc::channel();
        let _panics = every(TICK, || panic!("of a test")).unwrap();
        let _continues = every(TICK, move || sender.send(()).unwrap_or_default()).unwrap();
        for _ in 0..3 {
            ticks.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn an_endless_interval_is_not_an_error() {
        let _never = every(Duration::MAX, || panic!("never")).unwrap();
        let (sender, ticks) = mpsc::channel();
        let _soon = every(TICK, move || sender.send(()).unwrap_or_default()).unwrap();
        ticks.recv_timeout(PATIENCE).unwrap();
    }
}
