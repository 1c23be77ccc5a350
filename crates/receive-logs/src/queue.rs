//! The queue of a subscription: exclusive, durable, or a stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::{Connection, Deliveries, Durability, ExchangeKind, NO_KEY, QueueState};
use logs_process::exit::{Failure, Status};

use crate::cli::{Cli, QueueType};
use crate::stream::cursor::Cursor;
use crate::stream::place::Place;

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be the consumer of
/// a lost connection of this receiver, which the broker keeps for at most three heartbeats.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// A queue that is bound to the exchange.
pub struct BoundQueue {
    /// The name of the queue.
    pub name: String,
    /// What kind of queue it is.
    pub source: Source,
    /// Whether the exchange, and with it the binding of a durable queue, survives a restart of the broker.
    pub durability: Durability,
    /// The bindings of the queue.
    pub bindings: Arc<Bindings>,
    /// Whether to bind the queue again from time to time, because the exchange may be deleted.
    pub rebinds: bool,
}

/// The exchange from which a queue gets messages, and their routing keys.
pub struct Bindings {
    /// The name of the exchange.
    pub exchange: String,
    /// Routing keys, or patterns of a topic exchange. For a fanout exchange, one empty key.
    pub keys: Vec<String>,
}

impl Bindings {
    /// Takes the options of the command line.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] when the type of the exchange and the patterns do not fit.
    pub fn new(cli: &Cli) -> Result<Bindings, Failure> {
        let usage = |text: &str| Err(Failure::new(Status::Usage, text));
        let keys = match (cli.exchange.kind(), cli.bind.as_slice()) {
            (ExchangeKind::Fanout, []) => vec![NO_KEY.into()],
            (ExchangeKind::Topic, []) => vec!["#".into()],
            (ExchangeKind::Direct, []) => {
                return usage(
                    "a direct exchange requires --bind, with a whole routing key: -b error",
                );
            }
            (ExchangeKind::Fanout, _) if cli.exchange.is_declared() => {
                return usage(
                    "--bind: a fanout exchange ignores routing keys (use --exchange-type topic or direct)",
                );
            }
            (_, keys) => keys.to_vec(),
        };
        Ok(Bindings { exchange: cli.exchange.name.clone(), keys })
    }

    /// Binds a queue. After a refusal, a later call on the connection fails.
    pub fn bind(&self, connection: &mut Connection, queue: &str) {
        self.keys.iter().for_each(|key| connection.bind(queue, &self.exchange, key));
    }

    /// Binds a queue that is consumed once more, without waiting.
    pub fn bind_again(&self, deliveries: &Deliveries) {
        self.keys.iter().for_each(|key| deliveries.bind_again(&self.exchange, key));
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
