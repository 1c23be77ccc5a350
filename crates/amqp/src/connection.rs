//! A connection with its one channel, before it consumes or publishes.

use std::fmt::Display;
use std::time::Duration;

use amiquip::{AmqpValue, Channel, FieldTable, QueueDeclareOptions};
use amq_protocol::protocol::{AMQPClass, basic, exchange, queue};

use crate::consuming::{Deliveries, Delivery};
use crate::error::{Error, Hint};
use crate::link::Link;
use crate::publishing::{Publishing, Route};
use crate::transport::encoder::Answer;
use crate::transport::frame_filter::CHANNEL;
use crate::uri::Uri;

/// An open connection, cut at once when dropped.
pub struct Connection {
    // Dropped first: a channel whose connection is gone does not wait for the broker.
    link: Link,
    channel: Channel,
    /// For a queue that others may consume: counts its consumers while the first channel consumes.
    second: Option<Channel>,
}

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

/// A queue to be declared.
#[derive(Debug)]
pub struct Queue {
    /// Empty for a name that the broker chooses.
    name: String,
    kind: Kind,
    arguments: FieldTable,
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
        Queue { name: String::new(), kind: Kind::Exclusive, arguments: FieldTable::new() }
    }

    /// A queue that stays, also when the broker restarts.
    pub fn durable(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Durable, arguments: FieldTable::new() }
    }

    /// A stream, which stays as well.
    pub fn stream(name: &str) -> Queue {
        let kind = AmqpValue::LongString("stream".into());
        Queue { kind: Kind::Stream, ..Queue::durable(name) }.argument("x-queue-type", kind)
    }

    /// A queue that exists, whatever its settings.
    pub fn existing(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Passive, arguments: FieldTable::new() }
    }

    /// The same with another argument.
    pub fn argument(mut self, name: &str, value: AmqpValue) -> Queue {
        self.arguments.insert(name.into(), value);
        self
    }
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
    /// At the next message that comes.
    Next,
    /// At this offset, or the next that there is. Nothing is delivered until the stream reaches the offset.
    At(u64),
    /// At the chunk in which messages of this time are, in seconds since 1970 by the broker's clock.
    Time(u64),
}

impl From<StreamOffset> for AmqpValue {
    fn from(offset: StreamOffset) -> AmqpValue {
        match offset {
            StreamOffset::First => AmqpValue::LongString("first".into()),
            StreamOffset::Next => AmqpValue::LongString("next".into()),
            StreamOffset::LastChunk => AmqpValue::LongString("last".into()),
            // Streams do not get that long.
            StreamOffset::At(offset) => AmqpValue::LongLongInt(offset as i64),
            StreamOffset::Time(seconds) => AmqpValue::Timestamp(seconds),
        }
    }
}

/// The offset of a message in its stream; `None` where the message comes from a queue.
pub fn stream_offset(delivery: &Delivery) -> Option<u64> {
    match delivery.properties.headers().as_ref()?.get(STREAM_OFFSET)? {
        AmqpValue::LongLongInt(offset) => u64::try_from(*offset).ok(),
        _ => None,
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

impl Connection {
    /// Connects to any of `uris` and logs in. They are tried in turn, from any of them on, so that the
    /// nodes of a cluster share their clients. `program` is the name under which the broker lists the
    /// connection; `hint` ends the texts of errors. All steps together take no longer than the longest
    /// `connection_timeout`.
    ///
    /// # Errors
    ///
    /// When no broker accepts the login: with the reasons of all, or, if time cures none of these, the
    /// reason of the first.
    pub fn open(uris: &[Uri], program: &str, hint: Hint) -> Result<Connection, Error> {
        let (link, channel) = Link::open(uris, program, hint)?;
        Ok(Connection { link, channel, second: None })
    }

    /// Opens another connection to the same broker, be it that of a cluster that was chosen first.
    ///
    /// # Errors
    ///
    /// As for [`open`](Connection::open).
    pub fn open_another(&self) -> Result<Connection, Error> {
        let (link, channel) = self.link.open_another()?;
        Ok(Connection { link, channel, second: None })
    }

    /// Declares a fanout exchange: not auto-deleted, without arguments, as the publish/subscribe example
    /// does. The broker refuses any other declaration where the example runs. That closes the channel, and shows in
    /// place of the next answer.
    pub fn declare_fanout(&mut self, exchange: &str, durability: Durability) {
        self.link.request(&declare_fanout(exchange, durability), declaring(exchange));
    }

    /// Declares a queue, or looks for an existing queue.
    ///
    /// # Errors
    ///
    /// A refusal, which closes the channel, a lost connection, and no answer within its timeout.
    pub fn declare_queue(&mut self, queue: &Queue) -> Result<QueueState, Error> {
        let operation = match queue.kind {
            Kind::Exclusive => "declare a queue".to_string(),
            Kind::Stream => format!("declare stream '{}'", queue.name),
            _ => format!("declare queue '{}'", queue.name),
        };
        let declared = self.call(operation, |channel| declare_queue(channel, queue))?;
        if matches!(queue.kind, Kind::Durable | Kind::Passive) {
            self.second = Some(self.link.open_channel()?);
        }
        Ok(declared)
    }

    /// Binds a queue to a fanout exchange. A refusal shows in place of the next answer.
    pub fn bind(&mut self, queue: &str, exchange: &str) {
        let operation = format!("bind queue '{queue}' to exchange '{exchange}'");
        self.link.request(&bind(queue, exchange), operation);
    }

    /// Sends the requests that wait for the next one to be sent.
    pub fn flush(&self) {
        self.link.flush();
    }

    /// Lets the broker send no more than `messages` ahead of their acknowledgement. A refusal shows in place of the
    /// next answer.
    pub fn set_prefetch(&mut self, messages: u16) {
        let qos = qos(messages);
        self.link.request_answered(&qos, Answer::Qos(CHANNEL), "set the prefetch count");
    }

    /// Consumes a queue. From the return on, every message of the queue is delivered.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within `timeout`, by default that of the connection.
    pub fn consume(self, queue: &str, timeout: Option<Duration>) -> Result<Deliveries, Error> {
        let timeout = timeout.unwrap_or(self.link.timeout);
        let arguments = FieldTable::new();
        Deliveries::start(self.link, self.channel, self.second, queue, arguments, timeout)
    }

    /// Consumes a stream from an offset on. A stream sends messages ahead only up to the
    /// [prefetch](Connection::set_prefetch), which has to be set; acknowledged messages stay in the stream.
    ///
    /// # Errors
    ///
    /// As for [`consume`](Connection::consume).
    pub fn consume_stream(
        self,
        stream: &str,
        from: StreamOffset,
        timeout: Option<Duration>,
    ) -> Result<Deliveries, Error> {
        let timeout = timeout.unwrap_or(self.link.timeout);
        let mut arguments = FieldTable::new();
        arguments.insert(STREAM_OFFSET.into(), from.into());
        Deliveries::start(self.link, self.channel, self.second, stream, arguments, timeout)
    }

    /// A property that the broker has introduced itself with, such as `version` or `cluster_name`.
    pub fn server_property(&self, name: &str) -> Option<String> {
        self.link.server_property(name)
    }

    /// Makes the connection ready for publishing.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within its timeout. With
    /// [`Start::AtOnce`](crate::Start::AtOnce) these show in place of the first confirmation.
    pub fn publish(self, route: Route) -> Result<Publishing, Error> {
        Publishing::start(self.link, self.channel, route)
    }

    /// Sends a request on the channel, and waits for the answer.
    fn call<T>(
        &mut self,
        operation: impl Display,
        work: impl FnOnce(&Channel) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let timeout = self.link.timeout;
        let answer = self.link.call(timeout, &operation, || work(&self.channel))?;
        answer.map_err(|error| self.link.explain(operation, error))
    }
}

/// The operation, as in messages.
pub(crate) fn declaring(exchange: &str) -> String {
    format!("declare exchange '{exchange}'")
}

pub(crate) fn declare_fanout(exchange: &str, durability: Durability) -> AMQPClass {
    AMQPClass::Exchange(exchange::AMQPMethod::Declare(exchange::Declare {
        ticket: 0,
        exchange: exchange.into(),
        type_: "fanout".into(),
        passive: false,
        durable: durability == Durability::Durable,
        auto_delete: false,
        internal: false,
        nowait: true,
        arguments: FieldTable::new(),
    }))
}

pub(crate) fn bind(queue: &str, exchange: &str) -> AMQPClass {
    AMQPClass::Queue(queue::AMQPMethod::Bind(queue::Bind {
        ticket: 0,
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: String::new(),
        nowait: true,
        arguments: FieldTable::new(),
    }))
}

/// Sets the prefetch count of consumers to come.
pub(crate) fn qos(prefetch_count: u16) -> AMQPClass {
    let qos = basic::Qos { prefetch_size: 0, prefetch_count, global: false };
    AMQPClass::Basic(basic::AMQPMethod::Qos(qos))
}

fn declare_queue(channel: &Channel, queue: &Queue) -> amiquip::Result<QueueState> {
    let options = QueueDeclareOptions {
        exclusive: queue.kind == Kind::Exclusive,
        durable: matches!(queue.kind, Kind::Durable | Kind::Stream),
        arguments: queue.arguments.clone(),
        ..QueueDeclareOptions::default()
    };
    let declared = match queue.kind {
        Kind::Passive => channel.queue_declare_passive(&queue.name),
        _ => channel.queue_declare(&queue.name, options),
    }?;
    Ok(QueueState {
        name: declared.name().to_string(),
        messages: declared.declared_message_count().unwrap_or(0),
        consumers: declared.declared_consumer_count().unwrap_or(0),
    })
}
