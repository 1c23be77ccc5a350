//! One subscription: a queue bound to the exchange, and its consumer.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery};
use amiquip::{FieldTable, Queue, QueueDeclareOptions, Result};
use crossbeam_channel::{Receiver, Select, TryRecvError};
use logs_common::exchange::Durability;
use logs_common::exit::{During, Failure};
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};
use self_cell::self_cell;

use crate::account::Others;
use crate::cli::{Cli, QueueArgs, QueueType};
use crate::output::Written;

/// Messages that the broker sends ahead of their acknowledgement. It bounds our memory; more are
/// not faster.
const PREFETCH: u16 = 2000;

/// How long a message that is done with may be unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// How long the queue may have lost its binding without our notice.
const BIND_AFTER: Duration = Duration::from_secs(10);

/// How long a quorum queue may take to act on the last acknowledgement, where the connection
/// allows. It is a matter of milliseconds; a receiver that joins meanwhile hides that it is done.
const SETTLING: Duration = Duration::from_millis(500);

/// Bytes around the body of a delivery, roughly.
const FRAMES: usize = 100;

/// What to subscribe to.
pub struct Source {
    uris: Vec<Uri>,
    exchange: ExchangeArgs,
    queue: QueueArgs,
    /// How many messages are wanted, where that is no more than the broker sends ahead.
    wanted: Option<u16>,
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
            wanted: wanted.filter(|wanted| *wanted <= PREFETCH),
        })
    }

    /// Connects, declares the exchange and the queue, and binds it.
    ///
    /// # Errors
    ///
    /// When no broker can be reached, or it refuses any of this.
    pub fn prepare(self: &Arc<Source>) -> Result<Prepared, Failure> {
        let durability = self.exchange.durability();
        match self.prepare_once(durability) {
            Err(refusal) if refusal.is_other_durability() => {
                self.exchange.note_other_durability();
                self.prepare_once(durability.other())
            }
            outcome => outcome,
        }
    }

    fn prepare_once(self: &Arc<Source>, durability: Durability) -> Result<Prepared, Failure> {
        let (mut connection, channel) = Connection::open(&self.uris, "receive-logs")?;
        let operation = format!("subscribe to exchange '{}'", self.exchange.name);
        let bound = connection.ask(operation, || self.bind(&channel, durability))?;
        let (queue, waiting) = bound.map_err(|failure| why(failure, &mut connection))?;
        Ok(Prepared {
            connection,
            channel,
            source: Arc::clone(self),
            queue,
            waiting: self.queue.name.is_some().then_some(waiting),
        })
    }

    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    pub fn is_durable(&self) -> bool {
        self.exchange.durable
    }

    /// Returns the name of the queue, and how many messages wait in it.
    fn bind(&self, channel: &Channel, durability: Durability) -> Result<(String, u32), Failure> {
        self.exchange.declare(channel, durability)?;
        let queue = self.declare_queue(channel)?;
        let (name, exchange) = (queue.name(), &self.exchange.name);
        let binding = channel.queue_bind(name, exchange, "", FieldTable::new());
        binding.during(format!("bind queue '{name}' to exchange '{exchange}'"))?;
        // What is not wanted is better left in the queue, for others or for later.
        let prefetch = self.wanted.unwrap_or(PREFETCH);
        channel.qos(0, prefetch, false).during("set the prefetch count")?;
        Ok((name.to_string(), queue.declared_message_count().unwrap_or(0)))
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
        if self.queue.kind == QueueType::Quorum {
            // From version 4 on RabbitMQ would drop what was sent to twenty receivers that could
            // not write it. Older versions take -1, which means no limit there, for 0.
            arguments.insert("x-delivery-limit".into(), AmqpValue::LongInt(i32::MAX));
        }
        let options =
            QueueDeclareOptions { durable: true, arguments, ..QueueDeclareOptions::default() };
        channel.queue_declare(name, options).during(operation)
    }
}

/// A failure of the broker, or else why the connection is lost.
fn why(failure: Failure, connection: &mut Connection) -> Failure {
    match failure.is_reply() {
        true => failure,
        false => connection.end(),
    }
}

/// A queue that is bound to the exchange.
pub struct Prepared {
    // Dropped first: a channel whose connection is gone does not wait for the broker.
    connection: Connection,
    channel: Channel,
    source: Arc<Source>,
    queue: String,
    waiting: Option<u32>,
}

impl Prepared {
    /// Consumes the queue. When it returns, the broker has confirmed all of it: nothing that is
    /// published is missed. Without a `limit` that may take as long as to connect.
    ///
    /// # Errors
    ///
    /// When the broker refuses it, does not answer, or is lost.
    pub fn consume(self, limit: Option<Duration>) -> Result<Subscription, Failure> {
        let Prepared { mut connection, channel, source, queue, waiting } = self;
        let operation = format!("consume queue '{queue}'");
        let consume = || {
            Consuming::try_new(channel, |channel| {
                channel.basic_consume(&queue, ConsumerOptions::default()).during(&operation)
            })
        };
        let limit = limit.unwrap_or(connection.limit);
        let consuming = connection.ask_within(limit, &operation, consume)?;
        let consuming = consuming.map_err(|failure| why(failure, &mut connection))?;
        log::info!("consuming queue '{queue}' bound to exchange '{}'", source.exchange.name);
        Ok(Subscription {
            connection,
            consuming,
            source,
            queue,
            waiting,
            is_cancelled: false,
            done: None,
            unacknowledged: 0,
            acknowledge_time: None,
            bind_time: Instant::now() + BIND_AFTER,
            begun: Instant::now(),
            queue_is_deleted: false,
        })
    }
}

self_cell!(
    /// A channel, and the consumer on it.
    struct Consuming {
        owner: Channel,
        #[covariant]
        dependent: Consumer,
    }
);

/// A running subscription. Dropped without [`close`](Subscription::close), it is cut at once. The
/// fields are dropped in this order: a consumer whose connection is gone does not wait for the
/// broker.
pub struct Subscription {
    connection: Connection,
    consuming: Consuming,
    source: Arc<Source>,
    /// The name of the queue.
    pub queue: String,
    /// How many messages waited in it, unless it is ours alone and goes with us.
    pub waiting: Option<u32>,
    is_cancelled: bool,
    /// The last message that is written, how many have come that are not acknowledged, and when they
    /// are to be at the latest.
    done: Option<Delivery>,
    unacknowledged: u16,
    acknowledge_time: Option<Instant>,
    bind_time: Instant,
    /// When it began.
    pub begun: Instant,
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
    pub fn try_next(&mut self) -> Result<ConsumerMessage, TryRecvError> {
        let next = self.deliveries().try_recv()?;
        self.count(&next);
        Ok(next)
    }

    fn count(&mut self, next: &ConsumerMessage) {
        if let ConsumerMessage::Delivery(delivery) = next {
            self.connection.backlog().take(delivery.body.len() + FRAMES);
            self.unacknowledged += 1;
            self.acknowledge_time.get_or_insert_with(|| Instant::now() + ACK_AFTER);
        }
    }

    /// Makes `select` wait for the next, when there is none.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        self.connection.backlog().all_taken();
        select.recv(self.deliveries());
    }

    fn deliveries(&self) -> &Receiver<ConsumerMessage> {
        self.consuming.borrow_dependent().receiver()
    }

    fn channel(&self) -> &Channel {
        self.consuming.borrow_owner()
    }

    /// Asks the broker who else has messages of the queue.
    pub fn others(&self, deadline: Instant) -> Others {
        match self.consumers(deadline) {
            Ok(2..) => Others::Now,
            Ok(1) if self.is_cancelled => Others::Now,
            // If it is not known, too much said is better than too little.
            _ => Others::Before,
        }
    }

    /// How many consumers the queue has. A quorum queue counts one that is cancelled until it has
    /// acted on the last of its acknowledgements.
    fn consumers(&self, deadline: Instant) -> Result<u32, Failure> {
        let operation = format!("count the consumers of queue '{}'", self.queue);
        let count = || {
            let queue = self.channel().queue_declare_passive(&self.queue)?;
            Ok(queue.declared_consumer_count().unwrap_or(0))
        };
        self.connection.ask_within(left(deadline), &operation, count)?.during(operation)
    }

    /// Notes what is written. It is acknowledged later, together with what follows.
    pub fn settle(&mut self, written: Written) {
        if let Some(delivery) = written.into_last() {
            self.done = Some(delivery);
        }
    }

    /// Whether so many messages have come that they should be written and acknowledged now. It makes
    /// the broker send more.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= PREFETCH / 2 && self.source.wanted.is_none()
    }

    /// Does what has to be done from time to time.
    pub fn tend(&mut self) {
        let now = Instant::now();
        if self.acknowledge_time.is_some_and(|time| time <= now) {
            self.acknowledge();
        }
        if self.bind_time <= now {
            self.bind();
        }
    }

    /// When to [`tend`](Subscription::tend) it at the latest.
    pub fn tend_time(&self) -> Instant {
        self.acknowledge_time.map_or(self.bind_time, |time| time.min(self.bind_time))
    }

    /// Binds the queue to the exchange once more: if somebody has deleted the exchange, the broker
    /// says so only now, or another one is there. If it fails, the next receive tells.
    fn bind(&mut self) {
        self.bind_time = Instant::now() + BIND_AFTER;
        let (queue, exchange) = (&self.queue, &self.source.exchange.name);
        if let Err(error) = self.channel().queue_bind_nowait(queue, exchange, "", FieldTable::new())
        {
            log::debug!("bind: {error}");
        }
    }

    /// Acknowledges what is done with. If the connection is lost, the next receive tells.
    pub fn acknowledge(&mut self) {
        self.unacknowledged = 0;
        self.acknowledge_time = None;
        if let Some(delivery) = self.done.take()
            && let Err(error) = delivery.ack_multiple(self.channel())
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

    /// Asks the broker to send no more. What it has sent by then can still be received, unless there
    /// is no answer by the `deadline`, and the connection is cut.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer in time.
    pub fn cancel(&mut self, deadline: Instant) -> Result<(), Failure> {
        self.is_cancelled = true;
        let operation = "cancel the consumer";
        let cancel = || self.consuming.borrow_dependent().cancel();
        self.connection.ask_within(left(deadline), operation, cancel)?.during(operation)
    }

    /// Acknowledges what is written. When it returns, the broker has acted on that, so that the
    /// end of the connection brings none of it back.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn acknowledge_all(&mut self, deadline: Instant) -> Result<(), Failure> {
        if self.waiting.is_none() {
            // The queue goes with us.
            return Ok(());
        }
        if self.source.wanted.is_some() {
            // As much was sent as is wanted: the acknowledgement would make the broker send more,
            // to nobody.
            self.cancel(deadline)?;
        }
        if self.is_cancelled && self.done.is_some() && self.source.queue.kind == QueueType::Quorum {
            return self.acknowledge_to_quorum(deadline);
        }
        self.acknowledge();
        let operation = "acknowledge what is written";
        self.connection.sync(self.channel(), left(deadline), operation)?.during(operation)
    }

    /// Acknowledges the rest of a cancelled consumer, and waits until its quorum queue forgets the
    /// consumer. The channel answers sooner: RabbitMQ (3.10 to 4.1) puts acknowledgements off while
    /// the queue has more than 32 commands of the channel to act on, such as the returns of what was
    /// under way at the cancellation, and a closed connection makes it forget what it has put off.
    fn acknowledge_to_quorum(&mut self, deadline: Instant) -> Result<(), Failure> {
        let consumers = self.consumers(deadline)?;
        self.acknowledge();
        let patience = deadline.min(Instant::now() + SETTLING);
        while self.consumers(deadline)? >= consumers && Instant::now() < patience {
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// How long the broker may take to answer.
    pub fn limit(&self) -> Duration {
        self.connection.limit
    }

    /// Closes the connection, which deletes the queue if it is ours alone, and otherwise returns to
    /// it what is not acknowledged.
    pub fn close(mut self, deadline: Instant) {
        // Only then does the consumer end: amiquip takes it for a failure of the connection if it
        // is gone when the broker's answer to its cancellation comes.
        if let Err(failure) = self.connection.close_by(deadline) {
            log::debug!("{failure}");
        }
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
