//! Facts about the stream, for the holder of a connection while amiquip holds the stream.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::frame_filter::{Close, Fault};
use crate::error::Error;

/// The longest time in which a socket is read empty.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Facts that the I/O thread notes while the stream is read.
#[derive(Debug)]
pub struct Observed {
    /// Whether the peer has sent anything.
    has_received: AtomicBool,
    /// Deliveries that the program has not taken from the wire, and those that it has taken and not handled.
    pub unread: AtomicUsize,
    pub unhandled: AtomicUsize,
    /// When the peer gave a sign of life.
    pub last_received: LastReceived,
    /// Why the connection, or the channel on it, came to its end: the first reason, once there is any.
    /// amiquip has no words for a few of them, and loses others.
    pub ending: OnceLock<Reason>,
}

/// Why a connection or its channel came to an end.
#[derive(Debug)]
pub enum Reason {
    /// The broker has closed the connection or a channel.
    Closed(Close),
    /// The peer is not a broker, or a broken one.
    Fault(Fault),
    /// TLS failed after the handshake.
    Tls(Error),
}

impl Observed {
    /// `heartbeat` is the time between two signs of life of the peer, or zero if none are agreed on.
    pub fn new(heartbeat: Duration) -> Observed {
        Observed {
            has_received: AtomicBool::new(false),
            unread: AtomicUsize::new(0),
            unhandled: AtomicUsize::new(0),
            last_received: LastReceived::now(heartbeat),
            ending: OnceLock::new(),
        }
    }

    /// Notes that the peer has sent so many bytes.
    pub fn note_bytes(&self, length: usize) {
        self.has_received.fetch_or(length > 0, Ordering::Relaxed);
    }

    /// Whether the peer has sent anything.
    pub fn has_received(&self) -> bool {
        self.has_received.load(Ordering::Relaxed)
    }

    /// Notes why the stream ends, unless a reason is known.
    pub fn ends(&self, reason: Reason) {
        let _ = self.ending.set(reason);
    }
}

/// When the peer gave a sign of life.
#[derive(Debug)]
pub struct LastReceived(Mutex<SignsOfLife>);

#[derive(Debug)]
struct SignsOfLife {
    heartbeat: Duration,
    last: Instant,
    /// The latest silence that was longer than the heartbeat: when it began, and when it ended.
    silence: Option<(Instant, Instant)>,
}

impl LastReceived {
    fn now(heartbeat: Duration) -> LastReceived {
        LastReceived(Mutex::new(SignsOfLife { heartbeat, last: Instant::now(), silence: None }))
    }

    /// Notes a sign of life at this time.
    pub fn set(&self, now: Instant) {
        let mut signs = self.lock();
        if !signs.heartbeat.is_zero() && now - signs.last > signs.heartbeat {
            signs.silence = Some((signs.last, now));
        }
        signs.last = now;
    }

    /// When the last sign came. After SIGSTOP and SIGCONT a process finds in its socket the signs of the
    /// time before, and then the end: where the last sign is part of a burst after a long silence, the
    /// beginning of the silence counts.
    pub fn get(&self) -> Instant {
        let signs = self.lock();
        match signs.silence {
            Some((began, ended)) if signs.last - ended < AT_ONCE => began,
            _ => signs.last,
        }
    }

    fn lock(&self) -> MutexGuard<'_, SignsOfLife> {
        // Times are whole also after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_after_a_long_silence_counts_as_received_before_it() {
        let second = Duration::from_secs(1);
        let last_received = LastReceived::now(10 * second);
        let start = last_received.get();
        last_received.set(start + 10 * second);
        assert_eq!(last_received.get(), start + 10 * second, "a heartbeat");
        last_received.set(start + 60 * second);
        assert_eq!(last_received.get(), start + 10 * second);
        last_received.set(start + 62 * second);
        assert_eq!(last_received.get(), start + 62 * second, "the peer is alive again");
        let without_heartbeat = LastReceived::now(Duration::ZERO);
        without_heartbeat.set(start + 60 * second);
        assert_eq!(without_heartbeat.get(), start + 60 * second);
    }
}
