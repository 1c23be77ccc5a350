//! One subscription: an exclusive queue bound to the exchange, and its consumer.

use std::mem;

use amiquip::{Channel, ConsumerMessage, ConsumerOptions, Delivery, FieldTable};
use amiquip::{QueueDeclareOptions, Result};
use crossbeam_channel::{Receiver, Select, TryRecvError};
use logs_common::exit::{During, Failure};
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};

/// Messages that the broker sends ahead of their acknowledgement. It bounds our memory; more are
/// not faster.
const PREFETCH: u16 = 2000;

/// Messages after which they are acknowledged, all at once.
const ACK_EVERY: u16 = PREFETCH / 2;

/// Bytes around the body of a delivery, roughly.
const FRAMES: usize = 100;

/// A running subscription. Dropped without [`close`](Subscription::close), it is cut at once. The
/// fields are dropped in this order: a channel whose connection is gone does not wait for the
/// broker.
pub struct Subscription {
    connection: Connection,
    channel: Channel,
    deliveries: Receiver<ConsumerMessage>,
    /// The last message that is done with, and how many are not acknowledged up to it.
    done: Option<Delivery>,
    unacknowledged: u16,
}

impl Subscription {
    /// Connects, declares the exchange, and binds and consumes a queue of its own. When it
    /// returns, the broker has confirmed all of it: nothing that is published is missed.
    ///
    /// # Errors
    ///
    /// When no broker can be reached, or it refuses any of this.
    pub fn open(uris: &[Uri], exchange: &ExchangeArgs) -> Result<Subscription, Failure> {
        let (connection, channel) = Connection::open(uris, "receive-logs")?;
        let deliveries = connection.ask("subscribe", || subscribe(&channel, exchange))??;
        Ok(Subscription { connection, channel, deliveries, done: None, unacknowledged: 0 })
    }

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

    /// Notes that a message is done with. It is acknowledged later, together with others.
    pub fn settle(&mut self, delivery: Delivery) {
        self.done = Some(delivery);
        self.unacknowledged += 1;
    }

    /// Whether so many messages are done with that they should be acknowledged now.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= ACK_EVERY
    }

    /// Whether any message is done with and not acknowledged.
    pub fn has_unacknowledged(&self) -> bool {
        self.done.is_some()
    }

    /// Acknowledges what is done with. If the connection is lost, the next receive tells.
    pub fn acknowledge(&mut self) {
        self.unacknowledged = 0;
        if let Some(delivery) = self.done.take()
            && let Err(error) = delivery.ack_multiple(&self.channel)
        {
            log::debug!("acknowledge: {error}");
        }
    }

    /// Why no more deliveries come, if `last` is what came after them.
    pub fn end(&mut self, last: Option<ConsumerMessage>) -> Failure {
        let operation = format!("receive from {}", self.connection.peer());
        match last {
            Some(ConsumerMessage::ServerClosedChannel(error))
            | Some(ConsumerMessage::ServerClosedConnection(error)) => {
                Failure::amqp(operation, error)
            }
            Some(ConsumerMessage::ServerCancelled) => {
                Failure::unavailable(format!("{operation}: the queue was deleted"))
            }
            _ => self.connection.end(),
        }
    }

    /// Acknowledges what is done with, and closes the connection, which deletes the queue.
    pub fn close(mut self) {
        // What is not taken by now must not keep the answer from being read.
        self.connection.backlog().all_taken();
        self.acknowledge();
        if let Err(failure) = self.connection.close() {
            log::debug!("{failure}");
        }
    }
}

fn subscribe(
    channel: &Channel,
    exchange: &ExchangeArgs,
) -> Result<Receiver<ConsumerMessage>, Failure> {
    exchange.declare(channel)?;
    let name = &exchange.name;
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let queue = channel.queue_declare("", exclusive).during("declare a queue")?;
    let binding = channel.queue_bind(queue.name(), name, "", FieldTable::new());
    binding.during(format!("bind queue '{}' to exchange '{name}'", queue.name()))?;
    channel.qos(0, PREFETCH, false).during("set the prefetch count")?;
    let consumer = queue
        .consume(ConsumerOptions::default())
        .during(format!("consume queue '{}'", queue.name()))?;
    let deliveries = consumer.receiver().clone();
    // Its drop would cancel the consumer and wait for the broker; the close of the connection
    // does that as well.
    mem::forget(consumer);
    Ok(deliveries)
}
