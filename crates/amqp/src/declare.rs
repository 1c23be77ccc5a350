//! Exchanges and queues, as they are declared.

use crate::message::Delivery;
use crate::{Table, Value};

/// Whether an exchange survives a restart of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The exchange survives, with the bindings of durable queues.
    Durable,
    /// The exchange ends with the broker, and all bindings with it.
    Transient,
}

impl Durability {
    /// The opposite.
    pub fn other(self) -> Durability {
        match self {
            Durability::Durable => Durability::Transient,
            Durability::Transient => Durability::Durable,
        }
    }
}

/// An exchange to be declared: not auto-deleted, without arguments.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it routes messages.
    pub kind: ExchangeKind,
    /// Whether it survives a restart of the broker.
    pub durability: Durability,
}

impl Exchange {
    /// The operation of declaring the exchange, as in messages.
    pub(crate) fn declaring(&self) -> String {
        format!("declare exchange '{}'", self.name)
    }
}

/// How an exchange routes messages to the queues bound to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExchangeKind {
    /// Each message to all queues; the routing key is ignored.
    Fanout,
    /// To the queues that are bound with the routing key of the message.
    Direct,
    /// To the queues that are bound with a pattern that the routing key matches.
    Topic,
}

impl ExchangeKind {
    /// All types.
    pub const ALL: [ExchangeKind; 3] =
        [ExchangeKind::Fanout, ExchangeKind::Direct, ExchangeKind::Topic];

    /// The name of the type in AMQP.
    pub fn name(self) -> &'static str {
        match self {
            ExchangeKind::Fanout => "fanout",
            ExchangeKind::Direct => "direct",
            ExchangeKind::Topic => "topic",
        }
    }
}

/// The routing key of a broadcast, which a fanout exchange ignores.
pub const NO_KEY: &str = "";

/// A queue to be declared.
#[derive(Debug)]
pub struct Queue {
    /// Empty for a name that the broker chooses.
    pub(crate) name: String,
    kind: Kind,
    pub(crate) arguments: Table,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Exclusive,
    Durable,
    Stream,
    Passive,
}

impl Queue {
    /// A queue for this connection alone, deleted with it, under a name that the broker chooses.
    pub fn exclusive() -> Queue {
        Queue { name: String::new(), kind: Kind::Exclusive, arguments: Table::new() }
    }

    /// A queue that survives its connections and a restart of the broker.
    pub fn durable(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Durable, arguments: Table::new() }
    }

    /// A stream, which survives as well.
    pub fn stream(name: &str) -> Queue {
        let kind = Value::LongString("stream".into());
        Queue { kind: Kind::Stream, ..Queue::durable(name) }.argument("x-queue-type", kind)
    }

    /// An existing queue with any settings.
    pub fn existing(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Passive, arguments: Table::new() }
    }

    /// The same with another argument.
    pub fn argument(mut self, name: &str, value: Value) -> Queue {
        self.arguments.insert(name.into(), value);
        self
    }

    pub(crate) fn is_passive(&self) -> bool {
        self.kind == Kind::Passive
    }

    pub(crate) fn is_durable(&self) -> bool {
        matches!(self.kind, Kind::Durable | Kind::Stream)
    }

    pub(crate) fn is_exclusive(&self) -> bool {
        self.kind == Kind::Exclusive
    }

    /// Whether other connections may consume the queue, each for a part of its messages.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.kind, Kind::Durable | Kind::Passive)
    }

    /// The operation, as in messages.
    pub(crate) fn declaring(&self) -> String {
        match self.kind {
            Kind::Exclusive => "declare a queue".to_string(),
            Kind::Stream => format!("declare stream '{}'", self.name),
            _ => format!("declare queue '{}'", self.name),
        }
    }
}

/// The broker's answer to the declaration of a queue.
#[derive(Debug)]
pub struct QueueState {
    /// Its name.
    pub name: String,
    /// Messages that wait in the queue.
    pub messages: u32,
    /// Consumers of the queue.
    pub consumers: u32,
}

/// The argument of a consumer of a stream, and the header of each message, that hold an offset.
pub(crate) const STREAM_OFFSET: &str = "x-stream-offset";

/// Where in a stream to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamOffset {
    /// At the oldest message.
    First,
    /// At the first message of the last chunk, which ends with the newest message.
    LastChunk,
    /// At the next message that is published.
    Next,
    /// At this offset, or the next that there is. Nothing is delivered until the stream reaches the offset.
    At(u64),
    /// At the chunk in which messages of this time are, in seconds since 1970 by the broker's clock.
    Time(u64),
}

impl From<StreamOffset> for Value {
    fn from(offset: StreamOffset) -> Value {
        match offset {
            StreamOffset::First => Value::LongString("first".into()),
            StreamOffset::Next => Value::LongString("next".into()),
            StreamOffset::LastChunk => Value::LongString("last".into()),
            // Streams do not get that long.
            StreamOffset::At(offset) => Value::LongLongInt(offset as i64),
            StreamOffset::Time(seconds) => Value::Timestamp(seconds),
        }
    }
}

/// The offset of a message in its stream; `None` for a message of a queue.
pub fn stream_offset(delivery: &Delivery) -> Option<u64> {
    match delivery.properties.headers().as_ref()?.get(STREAM_OFFSET)? {
        Value::LongLongInt(offset) => u64::try_from(*offset).ok(),
        _ => None,
    }
}
