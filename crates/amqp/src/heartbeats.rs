//! Heartbeats: when one is due, and when the peer last sent anything.

use std::time::{Duration, Instant};

/// The longest time in which a socket is read empty.
const BURST: Duration = Duration::from_secs(1);

/// The signs of life of both sides.
#[derive(Debug)]
pub(crate) struct Heartbeats {
    /// The agreed time between two signs of life; zero for no heartbeats.
    interval: Duration,
    last_sent: Instant,
    last_received: Instant,
    /// The latest silence of the peer that was longer than the interval: its start and its end.
    silence: Option<(Instant, Instant)>,
}

impl Heartbeats {
    /// Begins now.
    pub fn new(interval: Duration) -> Heartbeats {
        let now = Instant::now();
        Heartbeats { interval, last_sent: now, last_received: now, silence: None }
    }

    /// Records that bytes were sent.
    pub fn record_sent(&mut self, now: Instant) {
        self.last_sent = now;
    }

    /// Records a sign of life of the peer.
    pub fn record_received(&mut self, now: Instant) {
        if !self.interval.is_zero() && now - self.last_received > self.interval {
            self.silence = Some((self.last_received, now));
        }
        self.last_received = now;
    }

    /// Whether a heartbeat is to be sent: after half the interval without other bytes.
    pub fn is_due(&self, now: Instant) -> bool {
        self.send_time().is_some_and(|time| time <= now)
    }

    /// Whether the peer has missed two heartbeats.
    pub fn is_peer_silent(&self, now: Instant) -> bool {
        self.silent_time().is_some_and(|time| time <= now)
    }

    /// When the next of these two happens, if nothing is sent or received.
    pub fn next_time(&self) -> Option<Instant> {
        self.send_time().into_iter().chain(self.silent_time()).min()
    }

    /// When the last sign came. After SIGSTOP and SIGCONT a process finds in its socket the signs of the
    /// time before, and then the end: if the last sign is part of a burst after a long silence, the
    /// start of the silence counts.
    pub fn last_received(&self) -> Instant {
        match self.silence {
            Some((start, end)) if self.last_received - end < BURST => start,
            _ => self.last_received,
        }
    }

    fn send_time(&self) -> Option<Instant> {
        (!self.interval.is_zero()).then(|| self.last_sent + self.interval / 2)
    }

    /// When the peer has missed two heartbeats, if nothing is received before.
    pub fn silent_time(&self) -> Option<Instant> {
        (!self.interval.is_zero()).then(|| self.last_received + 2 * self.interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_after_a_long_silence_counts_as_received_before_it() {
        let second = Duration::from_secs(1);
        let mut heartbeats = Heartbeats::new(10 * second);
        let start = heartbeats.last_received();
        heartbeats.record_received(start + 10 * second);
        assert_eq!(heartbeats.last_received(), start + 10 * second, "a heartbeat");
        heartbeats.record_received(start + 60 * second);
        assert_eq!(heartbeats.last_received(), start + 10 * second);
        heartbeats.record_received(start + 62 * second);
        assert_eq!(heartbeats.last_received(), start + 62 * second, "the peer is alive again");
    }

    #[test]
    fn heartbeats_are_due_at_half_and_missed_at_twice_the_interval() {
        let second = Duration::from_secs(1);
        let mut heartbeats = Heartbeats::new(10 * second);
        let start = heartbeats.last_sent;
        assert!(!heartbeats.is_due(start + 4 * second));
        assert!(heartbeats.is_due(start + 5 * second));
        heartbeats.record_sent(start + 5 * second);
        assert_eq!(heartbeats.next_time(), Some(start + 10 * second));
        heartbeats.record_sent(start + 30 * second);
        assert!(heartbeats.is_peer_silent(heartbeats.next_time().unwrap()));
        assert!(!heartbeats.is_peer_silent(heartbeats.last_received + 19 * second));
    }

    #[test]
    fn without_heartbeats_nothing_is_due() {
        let mut heartbeats = Heartbeats::new(Duration::ZERO);
        let later = heartbeats.last_received() + Duration::from_secs(3600);
        assert!(!heartbeats.is_due(later) && !heartbeats.is_peer_silent(later));
        assert_eq!(heartbeats.next_time(), None);
        heartbeats.record_received(later);
        assert_eq!(heartbeats.last_received(), later);
    }
}
