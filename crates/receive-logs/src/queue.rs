//! The queue of a subscription: exclusive, durable, or a stream.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::{Connection, Deliveries, Durability, ExchangeKind, NO_KEY, QueueState};
use logs_common::ExchangeConfig;
use logs_process::exit::{Failure, Status};

use crate::cli::{Cli, QueueType};
use crate::stream::cursor::Cursor;
use crate::stream::place::Place;

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be the consumer of
/// a lost connection of this receiver, which the broker keeps for at most three heartbeats.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// A queue that is bound to the exchanges.
pub struct BoundQueue {
    /// The name of the queue.
    pub name: String,
    /// What kind of queue it is.
    pub source: Source,
    /// Whether the exchanges, and with them the bindings of a durable queue, survive a restart of the broker.
    pub durability: Durability,
    /// The bindings of the queue.
    pub bindings: Arc<Bindings>,
    /// Whether to bind the queue again from time to time, because the exchange may be deleted.
    pub rebinds: bool,
}

/// The exchanges from which a queue gets messages, and their routing keys.
pub struct Bindings(Vec<Binding>);

struct Binding {
    exchange: String,
    /// A routing key, or a pattern of a topic exchange; empty for a fanout exchange.
    key: String,
}

impl Bindings {
    /// Takes the options of the command line.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] when the type of the exchange and the patterns do not fit.
    pub fn new(cli: &Cli) -> Result<Bindings, Failure> {
        let exchanges = cli.exchanges();
        let patterns: Vec<_> = cli.bind.iter().map(String::as_str).collect();
        let ignores_keys = |exchange: &ExchangeConfig| {
            exchange.kind() == ExchangeKind::Fanout && exchange.is_declared()
        };
        let is_direct = |exchange: &ExchangeConfig| exchange.kind() == ExchangeKind::Direct;
        let fault = match patterns.is_empty() {
            true if exchanges.iter().any(is_direct) => {
                "a direct exchange requires --bind, with a whole routing key: -b error"
            }
            false if exchanges.iter().all(ignores_keys) => {
                "--bind: a fanout exchange ignores routing keys (use --exchange-type topic or direct)"
            }
            _ => "",
        };
        if !fault.is_empty() {
            return Err(Failure::new(Status::Usage, fault));
        }
        let keys = |exchange: &ExchangeConfig| match exchange.kind() {
            ExchangeKind::Topic if patterns.is_empty() => vec!["#"],
            _ if patterns.is_empty() || ignores_keys(exchange) => vec![NO_KEY],
            _ => patterns.clone(),
        };
        let bindings = exchanges.iter().flat_map(|exchange| {
            let binding = |key: &str| Binding { exchange: exchange.name.clone(), key: key.into() };
            keys(exchange).into_iter().map(binding)
        });
        Ok(Bindings(bindings.collect()))
    }

    /// Binds a queue. After a refusal, a later call on the connection fails.
    pub fn bind(&self, connection: &mut Connection, queue: &str) {
        for Binding { exchange, key } in &self.0 {
            connection.bind(queue, exchange, key);
        }
    }

    /// Binds a queue that is consumed once more, without waiting.
    pub fn bind_again(&self, deliveries: &Deliveries) {
        for Binding { exchange, key } in &self.0 {
            deliveries.bind_again(exchange, key);
        }
    }
}

impl Display for Bindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<_> = self.0.iter().map(|binding| binding.exchange.as_str()).collect();
        names.dedup();
        let plural = if names.len() == 1 { "" } else { "s" };
        write!(f, "exchange{plural} '{}'", names.join("', '"))
    }
}

/// The kind of a queue.
pub enum Source {
    /// A queue that is deleted with its connection.
    Exclusive,
    /// A durable queue.
    Durable(DurableQueue),
    /// A stream, which keeps its messages.
    Stream(Box<Cursor>),
}

/// A queue that remains when its receivers exit.
pub struct DurableQueue {
    /// The type to declare.
    pub kind: QueueType,
    /// The number of messages that waited in the queue.
    pub queued: u32,
    /// Whether the queue was deleted and is created again.
    pub is_new: bool,
    /// Until when the queue counts as shared.
    shared_until: Option<Instant>,
}

impl DurableQueue {
    /// A queue with the state that the broker reports.
    pub fn new(kind: QueueType, state: &QueueState) -> DurableQueue {
        let mut queue =
            DurableQueue { kind, queued: state.messages, is_new: false, shared_until: None };
        if state.consumers > 0 {
            queue.record_other_consumers();
        }
        queue
    }

    /// Records that the broker has counted other consumers.
    pub fn record_other_consumers(&mut self) {
        self.shared_until = Some(Instant::now() + SHARED_FOR);
    }

    /// Whether the queue has other consumers now, or had them within `SHARED_FOR`.
    pub fn is_shared(&self) -> bool {
        self.shared_until.is_some_and(|until| Instant::now() < until)
    }
}

impl BoundQueue {
    /// The durable queue, which keeps unacknowledged messages; `None` for other kinds.
    pub fn durable(&self) -> Option<&DurableQueue> {
        match &self.source {
            Source::Durable(queue) => Some(queue),
            _ => None,
        }
    }

    /// The reading of a stream; `None` for other kinds.
    pub fn cursor(&self) -> Option<&Cursor> {
        match &self.source {
            Source::Stream(cursor) => Some(cursor),
            _ => None,
        }
    }

    /// The same, mutable.
    pub fn cursor_mut(&mut self) -> Option<&mut Cursor> {
        match &mut self.source {
            Source::Stream(cursor) => Some(cursor),
            _ => None,
        }
    }

    /// Where to continue in a stream.
    pub fn place(&self) -> Option<Place> {
        self.cursor().map(Cursor::place)
    }

    /// Whether the binding of the queue survives a restart of the broker.
    pub fn has_durable_binding(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// Whether messages may have been sent while no queue was bound, if this queue replaces a lost subscription.
    pub fn may_have_missed(&self) -> bool {
        match &self.source {
            Source::Exclusive => true,
            Source::Durable(queue) => queue.is_new || !self.has_durable_binding(),
            Source::Stream(cursor) => cursor.is_new() || !self.has_durable_binding(),
        }
    }
}
