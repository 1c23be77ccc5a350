//! A connection with its one channel, before it consumes or publishes.

use std::fmt::Display;
use std::time::Duration;

use amiquip::{
    AmqpValue, Channel, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions,
};

use crate::consuming::Deliveries;
use crate::error::{During, Error};
use crate::link::Link;
use crate::publishing::{Publishing, Route};
use crate::uri::Uri;

/// An open connection. Dropped, it is cut at once.
pub struct Connection {
    // Dropped first: a channel whose connection is gone does not wait for the broker.
    link: Link,
    channel: Channel,
    /// On which questions are asked while the other one consumes.
    second: Option<Channel>,
}

/// Whether an exchange survives a restart of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It does, with the bindings of durable queues.
    Durable,
    /// It goes, and all bindings with it.
    Transient,
}

impl Durability {
    /// The one that this is not.
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
    /// Its name; the broker gives one to a queue without.
    name: String,
    kind: Kind,
    arguments: FieldTable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Exclusive,
    Durable,
    Passive,
}

impl Queue {
    /// One for this connection alone, with which it goes; the broker gives it a name.
    pub fn exclusive() -> Queue {
        Queue { name: String::new(), kind: Kind::Exclusive, arguments: FieldTable::new() }
    }

    /// One that stays, also when the broker restarts.
    pub fn durable(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Durable, arguments: FieldTable::new() }
    }

    /// One that is there already, whatever its settings.
    pub fn existing(name: &str) -> Queue {
        Queue { name: name.into(), kind: Kind::Passive, arguments: FieldTable::new() }
    }

    /// The same with another argument.
    pub fn argument(mut self, name: &str, value: AmqpValue) -> Queue {
        self.arguments.insert(name.into(), value);
        self
    }
}

/// A queue as the broker tells of it.
#[derive(Debug)]
pub struct QueueState {
    /// Its name.
    pub name: String,
    /// Messages that wait in it.
    pub messages: u32,
    /// Consumers that read from it.
    pub consumers: u32,
}

impl Connection {
    /// Connects to one of `uris` and logs in. They are tried in turn, from any of them on, so that the
    /// nodes of a cluster share their clients. `program` is the name under which the broker lists the
    /// connection. All of it together takes no longer than the longest `connection_timeout`.
    ///
    /// # Errors
    ///
    /// When none of them lets us in: the reasons of all, or, if no wait can cure any of these, the reason
    /// of the first.
    pub fn open(uris: &[Uri], program: &str) -> Result<Connection, Error> {
        let (link, channel) = Link::open(uris, program)?;
        Ok(Connection { link, channel, second: None })
    }

    /// Declares a fanout exchange: not auto-deleted, without arguments, as the publish/subscribe example
    /// does. Anything else would be refused where that one runs.
    ///
    /// # Errors
    ///
    /// A refusal, which closes the channel, a lost connection, and no answer within its timeout.
    pub fn declare_fanout(&mut self, exchange: &str, durability: Durability) -> Result<(), Error> {
        let declare = |channel: &Channel| {
            let options = exchange_options(durability);
            channel.exchange_declare(ExchangeType::Fanout, exchange, options).map(drop)
        };
        self.call(declaring(exchange), declare)
    }

    /// Declares a queue, or looks for one that exists.
    ///
    /// # Errors
    ///
    /// As for [`declare_fanout`](Connection::declare_fanout).
    pub fn declare_queue(&mut self, queue: &Queue) -> Result<QueueState, Error> {
        let operation = match queue.kind {
            Kind::Exclusive => "declare a queue".to_string(),
            _ => format!("declare queue '{}'", queue.name),
        };
        self.call(operation, |channel| declare_queue(channel, queue))
    }

    /// Binds a queue to a fanout exchange.
    ///
    /// # Errors
    ///
    /// As for [`declare_fanout`](Connection::declare_fanout).
    pub fn bind(&mut self, queue: &str, exchange: &str) -> Result<(), Error> {
        let operation = format!("bind queue '{queue}' to exchange '{exchange}'");
        self.call(operation, |channel| channel.queue_bind(queue, exchange, "", FieldTable::new()))
    }

    /// Lets the broker send no more than `messages` ahead of their acknowledgement.
    ///
    /// # Errors
    ///
    /// As for [`declare_fanout`](Connection::declare_fanout).
    pub fn set_prefetch(&mut self, messages: u16) -> Result<(), Error> {
        self.call("set the prefetch count", |channel| channel.qos(0, messages, false))
    }

    /// Opens a second channel, on which [consumers can be counted](Deliveries::ask_consumers) without
    /// waiting for the answer.
    ///
    /// # Errors
    ///
    /// As for [`declare_fanout`](Connection::declare_fanout).
    pub fn open_second_channel(&mut self) -> Result<(), Error> {
        self.second = Some(self.link.open_channel()?);
        Ok(())
    }

    /// Consumes a queue. When it returns, nothing that comes to the queue is missed.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within `max_wait` (the connection's timeout without).
    pub fn consume(self, queue: &str, max_wait: Option<Duration>) -> Result<Deliveries, Error> {
        let max_wait = max_wait.unwrap_or(self.link.limit);
        Deliveries::start(self.link, self.channel, self.second, queue, max_wait)
    }

    /// Makes the connection ready for publishing.
    ///
    /// # Errors
    ///
    /// A lost connection. A refused declaration shows in place of the first confirmation.
    pub fn publish(self, route: Route) -> Result<Publishing, Error> {
        Publishing::start(self.link, self.channel, route)
    }

    /// Asks the broker something on the channel.
    fn call<T>(
        &mut self,
        operation: impl Display,
        work: impl FnOnce(&Channel) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let answer = self.link.call(&operation, || work(&self.channel))?.during(operation);
        answer.map_err(|error| self.link.why(error))
    }
}

/// The operation, as in messages.
pub(crate) fn declaring(exchange: &str) -> String {
    format!("declare exchange '{exchange}'")
}

pub(crate) fn exchange_options(durability: Durability) -> ExchangeDeclareOptions {
    let durable = durability == Durability::Durable;
    ExchangeDeclareOptions { durable, ..ExchangeDeclareOptions::default() }
}

fn declare_queue(channel: &Channel, queue: &Queue) -> amiquip::Result<QueueState> {
    let options = QueueDeclareOptions {
        exclusive: queue.kind == Kind::Exclusive,
        durable: queue.kind == Kind::Durable,
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
