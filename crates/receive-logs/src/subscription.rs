//! One subscription: a queue bound to the exchange, and its consumer.

use std::mem;
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Channel, ConsumerMessage, ConsumerOptions, Delivery, FieldTable, Queue};
use amiquip::{QueueDeclareOptions, Result};
use crossbeam_channel::{Receiver, Select, TryRecvError};
use logs_common::exit::{During, Failure};
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};

use crate::account::Others;
use crate::cli::{Cli, QueueArgs, QueueType};

/// Messages that the broker sends ahead of their acknowledgement. It bounds our memory; more are
/// not faster.
const PREFETCH: u16 = 2000;

/// How long a message that is done with may be unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// Bytes around the body of a delivery, roughly.
const FRAMES: usize = 100;

/// What to subscribe to.
pub struct Source {
    uris: Vec<Uri>,
    exchange: ExchangeArgs,
    queue: QueueArgs,
    prefetch: u16,
}

impl Source {
    /// What the command line asks for.
    ///
    /// # Errors
    ///
    /// When no brokers can be made of it.
    pub fn new(cli: &Cli) -> Result<Source, Failure> {
        let wanted = cli.count.and_then(|count| u16::try_from(count).ok());
        Ok(Source {
            uris: cli.connection.uris()?,
            exchange: cli.exchange.clone(),
            queue: cli.queue.clone(),
            // What is not wanted is better left to those who share the queue.
            prefetch: wanted.unwrap_or(PREFETCH).min(PREFETCH),
        })
    }

    /// Connects to the broker.
    ///
    /// # Errors
    ///
    /// When none can be reached, or none lets us in.
    pub fn connect(&self) -> Result<(Connection, Channel), Failure> {
        Connection::open(&self.uris, "receive-logs")
    }

    /// Declares the exchange and the queue, binds and consumes it. When it returns, the broker has
    /// confirmed all of it: nothing that is published is missed.
    ///
    /// # Errors
    ///
    /// When the broker refuses any of this, or is lost.
    pub fn subscribe(
        &self,
        (mut connection, channel): (Connection, Channel),
    ) -> Result<Subscription, Failure> {
        let operation = format!("subscribe to exchange '{}'", self.exchange.name);
        let consumed = connection.ask(operation, || self.consume(&channel))?;
        let (deliveries, queue) = consumed.map_err(|failure| match failure.is_reply() {
            true => failure,
            // It is no more than that the connection is lost.
            false => connection.end(),
        })?;
        let ack_every = (self.prefetch / 2).max(1);
        Ok(Subscription {
            connection,
            channel,
            deliveries,
            queue,
            ack_every,
            done: None,
            unacknowledged: 0,
            acknowledge_time: None,
            queue_is_deleted: false,
        })
    }

    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    pub fn is_durable(&self) -> bool {
        self.exchange.durable
    }

    fn consume(
        &self,
        channel: &Channel,
    ) -> Result<(Receiver<ConsumerMessage>, Option<Shared>), Failure> {
        self.exchange.declare(channel)?;
        let queue = self.declare_queue(channel)?;
        let (name, exchange) = (queue.name(), &self.exchange.name);
        let binding = channel.queue_bind(name, exchange, "", FieldTable::new());
        binding.during(format!("bind queue '{name}' to exchange '{exchange}'"))?;
        channel.qos(0, self.prefetch, false).during("set the prefetch count")?;
        let consumer = queue.consume(ConsumerOptions::default());
        let consumer = consumer.during(format!("consume queue '{name}'"))?;
        let deliveries = consumer.receiver().clone();
        // Its drop would cancel the consumer and wait for the broker; the close of the connection
        // does that as well.
        mem::forget(consumer);
        let shared = self.queue.name.is_some().then(|| Shared {
            name: name.to_string(),
            waiting: queue.declared_message_count().unwrap_or(0),
        });
        Ok((deliveries, shared))
    }

    fn declare_queue<'c>(&self, channel: &'c Channel) -> Result<Queue<'c>, Failure> {
        let mut arguments = FieldTable::new();
        if let Some(size) = self.queue.max_backlog {
            let size = i64::try_from(size.as_u64()).unwrap_or(i64::MAX);
            arguments.insert("x-max-length-bytes".into(), AmqpValue::LongLongInt(size));
            arguments.insert("x-overflow".into(), AmqpValue::LongString("drop-head".into()));
        }
        let Some(name) = &self.queue.name else {
            let options = QueueDeclareOptions {
                exclusive: true,
                arguments,
                ..QueueDeclareOptions::default()
            };
            return channel.queue_declare("", options).during("declare a queue");
        };
        let operation = format!("declare queue '{name}'");
        if self.exchange.passive {
            return channel.queue_declare_passive(name).during(operation);
        }
        let kind = match self.queue.kind {
            QueueType::Quorum => "quorum",
            QueueType::Classic => "classic",
        };
        arguments.insert("x-queue-type".into(), AmqpValue::LongString(kind.into()));
        let options =
            QueueDeclareOptions { durable: true, arguments, ..QueueDeclareOptions::default() };
        channel.queue_declare(name, options).during(operation)
    }
}

/// A queue that outlives us and that others may consume too.
pub struct Shared {
    /// Its name.
    pub name: String,
    /// Messages that waited in it.
    pub waiting: u32,
}

/// A running subscription. Dropped without [`close`](Subscription::close), it is cut at once. The
/// fields are dropped in this order: a channel whose connection is gone does not wait for the
/// broker.
pub struct Subscription {
    connection: Connection,
    channel: Channel,
    deliveries: Receiver<ConsumerMessage>,
    /// Unless the queue is ours alone, and goes with us.
    pub queue: Option<Shared>,
    /// Messages after which they are acknowledged, all at once.
    ack_every: u16,
    /// The last message that is done with, how many are not acknowledged up to it, and when they
    /// are to be at the latest.
    done: Option<Delivery>,
    unacknowledged: u16,
    acknowledge_time: Option<Instant>,
    /// The broker has said so.
    pub queue_is_deleted: bool,
}

impl Subscription {
    /// The next of what the broker has sent. After the last delivery comes the reason of the end,
    /// or nothing.
    ///
    /// # Errors
    ///
    /// When nothing is there, for now or for good.
    pub fn try_next(&self) -> Result<ConsumerMessage, TryRecvError> {
        let next = self.deliveries.try_recv();
        if let Ok(ConsumerMessage::Delivery(delivery)) = &next {
            self.connection.backlog().take(delivery.body.len() + FRAMES);
        }
        next
    }

    /// Makes `select` wait for the next, when there is none.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        self.connection.backlog().all_taken();
        select.recv(&self.deliveries);
    }

    /// Asks the broker who else has messages of the queue.
    pub fn others_of(&self, queue: &Shared, limit: Duration) -> Others {
        // What is not taken must not keep the answer from being read.
        self.connection.backlog().all_taken();
        let operation = format!("count the consumers of queue '{}'", queue.name);
        let asked = self.connection.ask_within(limit, operation, || {
            let queue = self.channel.queue_declare_passive(&queue.name)?;
            Ok::<_, amiquip::Error>(queue.declared_consumer_count())
        });
        match asked {
            Ok(Ok(Some(2..))) => Others::Now,
            // If it is not known, too much said is better than too little.
            _ => Others::Before,
        }
    }

    /// Notes that a message is done with. It is acknowledged later, together with others.
    pub fn settle(&mut self, delivery: Delivery) {
        self.done = Some(delivery);
        self.unacknowledged += 1;
        self.acknowledge_time.get_or_insert_with(|| Instant::now() + ACK_AFTER);
    }

    /// Whether so many messages are done with that they should be acknowledged now.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= self.ack_every
    }

    /// When to acknowledge what is done with, be it less than that.
    pub fn acknowledge_time(&self) -> Option<Instant> {
        self.acknowledge_time
    }

    /// Acknowledges what is done with. If the connection is lost, the next receive tells.
    pub fn acknowledge(&mut self) {
        self.unacknowledged = 0;
        self.acknowledge_time = None;
        if let Some(delivery) = self.done.take()
            && let Err(error) = delivery.ack_multiple(&self.channel)
        {
            log::debug!("acknowledge: {error}");
        }
    }

    /// When something came from the broker, be it the end.
    pub fn last_heard(&self) -> Instant {
        self.connection.last_heard()
    }

    /// Why no more deliveries come, if `last` is what came after them; by then the connection is
    /// closed.
    pub fn end(&mut self, last: Option<ConsumerMessage>) -> Failure {
        let operation = format!("receive from {}", self.connection.peer());
        let closed = self.connection.end();
        match last {
            Some(ConsumerMessage::ServerClosedChannel(error))
            | Some(ConsumerMessage::ServerClosedConnection(error)) => {
                Failure::amqp(operation, error)
            }
            Some(ConsumerMessage::ServerCancelled) => {
                self.queue_is_deleted = true;
                Failure::unavailable(format!("{operation}: the queue was deleted"))
            }
            _ => closed,
        }
    }

    /// Closes the connection without acknowledging what turned out not to be written.
    pub fn abandon(mut self) {
        self.done = None;
        self.close();
    }

    /// Acknowledges what is done with, and closes the connection, which deletes the queue if it is
    /// ours alone.
    pub fn close(mut self) {
        // What is not taken by now must not keep the answer from being read.
        self.connection.backlog().all_taken();
        self.acknowledge();
        let Subscription { mut connection, channel, queue, .. } = self;
        let closed = match queue {
            // The acknowledgement matters only to a queue that stays.
            Some(_) => connection.close_channel(channel).and_then(|()| connection.close()),
            None => connection.close(),
        };
        if let Err(failure) = closed {
            log::debug!("{failure}");
        }
    }
}
