//! The state of the connection, as a status line shows it.

use std::fmt::{self, Display};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use amqp::retry::RetryFor;
use logs_process::metrics::Metrics;
use logs_process::time::whole_seconds;

/// The part of a status line about the broker: `broker localhost:5672`, or `broker none for 12s (trying for 48s more)`.
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
    /// The state before the first connection. Connecting is retried for `retry_for`; `None` is a single attempt.
    pub fn new(retry_for: Option<RetryFor>) -> Broker {
        let since = Instant::now();
        let until = retry_for.unwrap_or(RetryFor::NO_TIME).end(since);
        Broker(Mutex::new(State { connections: 0, connection: Connection::Lost { since, until } }))
    }

    /// Records that the connection is lost `since` this time. Connecting is retried `until` this time; `None` is
    /// forever.
    pub fn set_lost(&self, since: Instant, until: Option<Instant>) {
        self.lock().connection = Connection::Lost { since, until };
    }

    /// Records the connection to `peer`. The `remark` is the reason why no messages are sent, or empty.
    pub fn set_open(&self, peer: &str, remark: impl Into<String>) {
        let mut state = self.lock();
        if let Connection::Lost { .. } = state.connection {
            state.connections += 1;
        }
        state.connection = Connection::Open { peer: peer.into(), remark: remark.into() };
    }

    /// The number of connections after the first.
    pub fn reconnections(&self) -> u64 {
        self.lock().connections.saturating_sub(1)
    }

    /// The time [without a broker](without_broker). Empty while connected.
    pub fn outage(&self) -> String {
        match &self.lock().connection {
            Connection::Open { .. } => String::new(),
            Connection::Lost { since, until } => without_broker(*since, *until, Instant::now()),
        }
    }

    /// Adds the metrics of the connection.
    pub fn describe(&self, metrics: &mut Metrics) {
        let is_connected = matches!(self.lock().connection, Connection::Open { .. });
        let help = "1 while the program is connected to a broker, otherwise 0.";
        metrics.gauge("connected", help, u8::from(is_connected));
        let help = "Connections to a broker after the first.";
        metrics.counter("reconnections_total", help, self.reconnections());
    }

    /// Whether the program is connected, and can send no messages.
    pub fn is_paused(&self) -> bool {
        matches!(&self.lock().connection, Connection::Open { remark, .. } if !remark.is_empty())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.lock().connection {
            Connection::Open { peer, remark } if remark.is_empty() => write!(f, "broker {peer}"),
            Connection::Open { peer, remark } => write!(f, "broker {peer} ({remark})"),
            Connection::Lost { since, until } => {
                let elapsed = whole_seconds(since.elapsed());
                write!(f, "broker none for {elapsed} ({})", attempts(*until, Instant::now()))
            }
        }
    }
}

/// A time without a broker, as a line on the terminal shows it: `no broker for 12s, trying for 48s more`.
pub fn without_broker(since: Instant, until: Option<Instant>, now: Instant) -> String {
    let elapsed = whole_seconds(now.saturating_duration_since(since));
    format!("no broker for {elapsed}, {}", attempts(until, now))
}

/// How long connecting is tried: `trying for 48s more`.
fn attempts(until: Option<Instant>, now: Instant) -> String {
    match until.map(|until| until.saturating_duration_since(now)) {
        None => "trying until there is one".into(),
        Some(Duration::ZERO) => "last attempt".into(),
        Some(left) => format!("trying for {} more", whole_seconds(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_address_or_the_time_without_a_broker() {
        let broker = Broker::new(None);
        assert_eq!(broker.to_string(), "broker none for 0s (last attempt)");
        broker.set_open("a:1", "");
        assert_eq!(broker.to_string(), "broker a:1");
        broker.set_open("a:1", "blocked: low on memory");
        assert_eq!(broker.to_string(), "broker a:1 (blocked: low on memory)");
        let since = Instant::now().checked_sub(Duration::from_secs(90)).unwrap();
        broker.set_lost(since, Some(since + Duration::from_secs(150)));
        assert_eq!(broker.to_string(), "broker none for 1m 30s (trying for 59s more)");
        assert_eq!(broker.outage(), "no broker for 1m 30s, trying for 59s more");
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
