//! A line on stderr that tells how a program is doing: at SIGUSR1, at SIGINFO where the system has that signal
//! (CTRL+T), and at intervals.
//!
//! A thread of its own writes the line, from counts that the program keeps in memory. So there is an answer while
//! the program waits for its first broker, or for an output that takes no bytes; and the program makes no system
//! call for the line.

use std::fmt::{self, Display};
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use amqp::retry::RetryFor;
use amqp::wait_for;
use signal_hook::low_level::pipe;

use crate::notes::note;
use crate::time::{self, Precision};

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

/// A duration for people: `1m 30s`.
pub fn whole_seconds(duration: Duration) -> impl Display {
    humantime::format_duration(Duration::from_secs(duration.as_secs()))
}

/// What the line tells of the broker: `broker localhost:5672`, or `broker none for 12s (trying for 48s more)`.
#[derive(Debug)]
pub struct Broker(Mutex<State>);

#[derive(Debug)]
struct State {
    connections: u64,
    connection: Connection,
}

#[derive(Debug)]
enum Connection {
    Lost { since: Instant, until: Option<Instant> },
    Open { peer: String, remark: String },
}

impl Broker {
    /// There is no broker yet; it is tried for `retry_for`, or once without.
    pub fn new(retry_for: Option<RetryFor>) -> Broker {
        let since = Instant::now();
        let until = retry_for.unwrap_or(RetryFor::NO_TIME).end(since);
        Broker(Mutex::new(State { connections: 0, connection: Connection::Lost { since, until } }))
    }

    /// Since then there is no broker; `until` then one is looked for, or for ever.
    pub fn set_lost(&self, since: Instant, until: Option<Instant>) {
        self.lock().connection = Connection::Lost { since, until };
    }

    /// There is a connection to `peer`; a `remark` says why nothing goes over it.
    pub fn set_open(&self, peer: &str, remark: impl Into<String>) {
        let mut state = self.lock();
        if let Connection::Lost { .. } = state.connection {
            state.connections += 1;
        }
        state.connection = Connection::Open { peer: peer.into(), remark: remark.into() };
    }

    /// How many connections have replaced lost ones.
    pub fn reconnections(&self) -> u64 {
        self.lock().connections.saturating_sub(1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = Instant::now();
        match &self.lock().connection {
            Connection::Open { peer, remark } if remark.is_empty() => write!(f, "broker {peer}"),
            Connection::Open { peer, remark } => write!(f, "broker {peer} ({remark})"),
            Connection::Lost { since, until } => {
                let elapsed = whole_seconds(now.saturating_duration_since(*since));
                write!(f, "broker none for {elapsed} ")?;
                match until {
                    None => f.write_str("(trying until there is one)"),
                    Some(until) if *until <= now => f.write_str("(last attempt)"),
                    Some(until) => write!(f, "(trying for {} more)", whole_seconds(*until - now)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_told_by_its_address_or_by_how_long_there_is_none() {
        let broker = Broker::new(None);
        assert_eq!(broker.to_string(), "broker none for 0s (last attempt)");
        broker.set_open("a:1", "");
        assert_eq!(broker.to_string(), "broker a:1");
        broker.set_open("a:1", "blocked: low on memory");
        assert_eq!(broker.to_string(), "broker a:1 (blocked: low on memory)");
        let since = Instant::now().checked_sub(Duration::from_secs(90)).unwrap();
        broker.set_lost(since, Some(since + Duration::from_secs(150)));
        assert_eq!(broker.to_string(), "broker none for 1m 30s (trying for 59s more)");
        broker.set_lost(since, None);
        assert_eq!(broker.to_string(), "broker none for 1m 30s (trying until there is one)");
    }

    #[test]
    fn only_connections_after_a_loss_count_as_reconnections() {
        let broker = Broker::new(Some(RetryFor::Ever));
        broker.set_open("a:1", "");
        broker.set_open("a:1", "blocked");
        assert_eq!(broker.reconnections(), 0);
        broker.set_lost(Instant::now(), None);
        broker.set_lost(Instant::now(), None);
        broker.set_open("b:1", "");
        assert_eq!(broker.reconnections(), 1);
    }
}
