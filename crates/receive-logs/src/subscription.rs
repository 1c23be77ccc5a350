//! One subscription: a queue bound to the exchange, and its consumer.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::{
    Connection, Deliveries, Delivery, Durability, Error, ErrorKind, Queue, QueueState, Uri, Value,
};
use crossbeam_channel::Select;
use logs_common::{ExchangeArgs, Failure};

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
const SETTLING: Duration = Duration::from_secs(1);

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be
/// our own of a connection that the broker does not know to be lost: for three heartbeats at most.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// Which queue to declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Declare {
    /// Ours, or the one that stays, if it is not there.
    Queue,
    /// None: the one that stays is there.
    Nothing,
}

/// Who reads from a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Only we, when we asked.
    Alone,
    /// Others, now or until a moment ago.
    Shared,
    /// The broker has not said yet.
    Unknown,
}

/// A queue that stays.
pub struct Kept {
    /// How many messages waited in it.
    pub queued: u32,
    /// It was gone, and is another one.
    pub is_new: bool,
    /// Others read from it, and are taken to do so until this time.
    shared_until: Option<Instant>,
}

impl Kept {
    fn new(queue: &QueueState) -> Kept {
        Kept {
            queued: queue.messages,
            is_new: false,
            shared_until: (queue.consumers > 0).then(|| Instant::now() + SHARED_FOR),
        }
    }

    fn is_shared(&self) -> bool {
        self.shared_until.is_some_and(|until| Instant::now() < until)
    }
}

/// What to subscribe to.
pub struct SubscriptionConfig {
    uris: Vec<Uri>,
    exchange: ExchangeArgs,
    queue: QueueArgs,
    /// How many messages are wanted, where that is no more than the broker sends ahead.
    wanted: Option<u16>,
}

impl SubscriptionConfig {
    /// What the command line asks for.
    ///
    /// # Errors
    ///
    /// When no brokers can be made of it.
    pub fn new(cli: &Cli) -> Result<SubscriptionConfig, Failure> {
        let wanted = cli.count.and_then(|count| u16::try_from(count).ok());
        Ok(SubscriptionConfig {
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
    pub fn prepare(self: &Arc<SubscriptionConfig>) -> Result<BoundQueue, Error> {
        self.prepare_queue(Declare::Queue)
    }

    /// The same where it was subscribed to before, so that a queue that stays should be there.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](SubscriptionConfig::prepare).
    pub fn prepare_again(self: &Arc<SubscriptionConfig>) -> Result<BoundQueue, Error> {
        if self.queue.name.is_none() || self.exchange.passive {
            return self.prepare();
        }
        match self.prepare_queue(Declare::Nothing) {
            // The queue is not there, and to look for it has closed the channel.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut prepared = self.prepare()?;
                prepared.kept.iter_mut().for_each(|kept| kept.is_new = true);
                Ok(prepared)
            }
            prepared => prepared,
        }
    }

    fn prepare_queue(
        self: &Arc<SubscriptionConfig>,
        declare: Declare,
    ) -> Result<BoundQueue, Error> {
        let asked = self.exchange.durability();
        self.exchange.open_as_found(asked, |durability| self.prepare_on(durability, declare))
    }

    /// The same on an exchange that is known to be, or to become, of this durability.
    fn prepare_on(
        self: &Arc<SubscriptionConfig>,
        durability: Durability,
        declare: Declare,
    ) -> Result<BoundQueue, Error> {
        let mut connection = Connection::open(&self.uris, "receive-logs")?;
        if !self.exchange.passive {
            connection.declare_fanout(&self.exchange.name, durability)?;
        }
        let queue = connection.declare_queue(&self.queue(declare))?;
        connection.bind(&queue.name, &self.exchange.name)?;
        // What is not wanted is better left in the queue, for others or for later.
        connection.set_prefetch(self.wanted.unwrap_or(PREFETCH))?;
        let kept = match self.queue.name {
            None => None,
            Some(_) => {
                connection.open_second_channel()?;
                Some(Kept::new(&queue))
            }
        };
        let config = Arc::clone(self);
        Ok(BoundQueue { connection, config, durability, queue: queue.name, kept })
    }

    fn queue(&self, declare: Declare) -> Queue {
        let Some(name) = &self.queue.name else {
            return self.with_backlog(Queue::exclusive());
        };
        if self.exchange.passive || declare == Declare::Nothing {
            return Queue::existing(name);
        }
        let queue = self.with_backlog(Queue::durable(name));
        match self.queue.kind {
            QueueType::Classic => queue.argument("x-queue-type", text("classic")),
            // From version 4 on RabbitMQ would drop what was sent to twenty receivers that could
            // not write it. Older versions take -1, which means no limit there, for 0.
            QueueType::Quorum => queue
                .argument("x-queue-type", text("quorum"))
                .argument("x-delivery-limit", Value::LongInt(i32::MAX)),
        }
    }

    fn with_backlog(&self, queue: Queue) -> Queue {
        let Some(size) = self.queue.max_backlog else {
            return queue;
        };
        let size = i64::try_from(size.as_u64()).unwrap_or(i64::MAX);
        queue
            .argument("x-max-length-bytes", Value::LongLongInt(size))
            .argument("x-overflow", text("drop-head"))
    }
}

fn text(text: &str) -> Value {
    Value::LongString(text.into())
}

/// A queue that is bound to the exchange.
pub struct BoundQueue {
    connection: Connection,
    config: Arc<SubscriptionConfig>,
    durability: Durability,
    queue: String,
    kept: Option<Kept>,
}

impl BoundQueue {
    /// Consumes the queue. When it returns, the broker has confirmed all of it: nothing that is
    /// published is missed. Without a `max_wait` that may take as long as to connect.
    ///
    /// # Errors
    ///
    /// When the broker refuses it, does not answer, or is lost.
    pub fn consume(self, max_wait: Option<Duration>) -> Result<Subscription, Error> {
        let BoundQueue { connection, config, durability, queue, kept } = self;
        let deliveries = connection.consume(&queue, max_wait)?;
        log::info!("consuming queue '{queue}' bound to exchange '{}'", config.exchange.name);
        Ok(Subscription {
            deliveries,
            config,
            durability,
            queue,
            kept,
            counted: None,
            is_cancelled: false,
            done: None,
            unacknowledged: 0,
            acknowledge_time: None,
            bind_time: Instant::now() + BIND_AFTER,
            begun: Instant::now(),
        })
    }
}

/// A running subscription. Dropped without [`close`](Subscription::close), it is cut at once.
pub struct Subscription {
    deliveries: Deliveries,
    config: Arc<SubscriptionConfig>,
    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    durability: Durability,
    /// The name of the queue.
    pub queue: String,
    /// What is known of it, unless it is ours alone and goes with us.
    pub kept: Option<Kept>,
    /// When the broker was asked to count the consumers, the last time that it answered.
    counted: Option<Instant>,
    is_cancelled: bool,
    /// The last message that is written, how many have come that are not acknowledged, and when they
    /// are to be at the latest.
    done: Option<Delivery>,
    unacknowledged: u16,
    acknowledge_time: Option<Instant>,
    bind_time: Instant,
    /// When it began.
    pub begun: Instant,
}

impl Subscription {
    /// The next delivery, if there is one.
    ///
    /// # Errors
    ///
    /// Why no more come, after the last one; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Delivery>, Error> {
        let next = self.deliveries.try_next()?;
        if next.is_some() {
            self.unacknowledged += 1;
            self.acknowledge_time.get_or_insert_with(|| Instant::now() + ACK_AFTER);
        }
        Ok(next)
    }

    /// Makes `select` wait for the next, when there is none.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        self.deliveries.select(select);
    }

    /// Who reads from the queue, if the broker has been asked after that `time`. If not, it is asked,
    /// and its answer wakes whoever [selects](Subscription::select).
    pub fn sharing(&mut self, time: Instant) -> Sharing {
        let Some(kept) = &mut self.kept else {
            return Sharing::Alone;
        };
        if let Some((asked, consumers)) = self.deliveries.consumers() {
            self.counted = Some(asked);
            if consumers > 1 {
                if !kept.is_shared() {
                    log::info!("queue '{}' has other receivers: gaps are not reported", self.queue);
                }
                kept.shared_until = Some(Instant::now() + SHARED_FOR);
            }
        }
        match self.counted {
            _ if kept.is_shared() => Sharing::Shared,
            Some(asked) if asked >= time => Sharing::Alone,
            _ => {
                self.deliveries.ask_consumers();
                Sharing::Unknown
            }
        }
    }

    /// Whether others read from the queue, or have until a moment ago, as far as it is known.
    pub fn is_shared(&self) -> bool {
        self.kept.as_ref().is_some_and(Kept::is_shared)
    }

    /// Whether the broker owes an answer, or can give none.
    pub fn is_asking(&self) -> bool {
        self.kept.is_some() && self.deliveries.is_asking()
    }

    /// Whether the exchange, and with it the binding of the queue, outlives the broker.
    pub fn is_bound_for_good(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// Whether others read from the queue, as the last question. If it is not known, too much said
    /// is better than too little.
    pub fn has_other_consumers(&self, deadline: Instant) -> bool {
        let own = u32::from(!self.is_cancelled);
        let are_there =
            || self.deliveries.count_consumers(deadline).is_ok_and(|consumers| consumers > own);
        self.kept.as_ref().is_some_and(|kept| kept.is_shared() || are_there())
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
        self.unacknowledged >= PREFETCH / 2 && self.config.wanted.is_none()
    }

    /// Does what has to be done from time to time.
    pub fn run_timers(&mut self) {
        let now = Instant::now();
        if self.acknowledge_time.is_some_and(|time| time <= now) {
            self.acknowledge();
        }
        if self.bind_time <= now {
            self.bind();
        }
    }

    /// When to [run them](Subscription::run_timers) at the latest.
    pub fn next_timer(&self) -> Instant {
        self.acknowledge_time.map_or(self.bind_time, |time| time.min(self.bind_time))
    }

    /// Binds the queue to the exchange once more: if somebody has deleted the exchange, the broker
    /// says so only now, or another one is there. If it fails, the next receive tells.
    fn bind(&mut self) {
        self.bind_time = Instant::now() + BIND_AFTER;
        self.deliveries.bind_again(&self.config.exchange.name);
    }

    /// Acknowledges what is done with. If the connection is lost, the next receive tells.
    pub fn acknowledge(&mut self) {
        self.unacknowledged = 0;
        self.acknowledge_time = None;
        if let Some(delivery) = self.done.take() {
            self.deliveries.acknowledge(delivery);
        }
    }

    /// When something came from the broker, be it the end.
    pub fn last_received(&self) -> Instant {
        self.deliveries.last_received()
    }

    /// Asks the broker to send no more. What it has sent by then can still be received, unless there
    /// is no answer by the `deadline`, and the connection is cut.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer in time.
    pub fn cancel(&mut self, deadline: Instant) -> Result<(), Error> {
        self.is_cancelled = true;
        self.deliveries.cancel(deadline)
    }

    /// Acknowledges what is written. When it returns, the broker has acted on that, so that the
    /// end of the connection brings none of it back.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn acknowledge_all(&mut self, deadline: Instant) -> Result<(), Error> {
        if self.kept.is_none() {
            // The queue goes with us.
            return Ok(());
        }
        if self.config.wanted.is_some() {
            // As much was sent as is wanted: the acknowledgement would make the broker send more,
            // to nobody.
            self.cancel(deadline)?;
        }
        if self.is_cancelled && self.done.is_some() && self.config.queue.kind == QueueType::Quorum {
            return self.acknowledge_to_quorum(deadline);
        }
        self.acknowledge();
        self.deliveries.barrier(deadline, "acknowledge what is written")
    }

    /// Acknowledges the rest of a cancelled consumer, and waits until its quorum queue forgets the
    /// consumer. The channel answers sooner: RabbitMQ (3.10 to 4.3) puts acknowledgements off while
    /// the queue has more than 32 commands of the channel to act on, such as the returns of what was
    /// under way at the cancellation, and a closed connection makes it forget what it has put off.
    fn acknowledge_to_quorum(&mut self, deadline: Instant) -> Result<(), Error> {
        let consumers = self.deliveries.count_consumers(deadline)?;
        self.acknowledge();
        let let_go_by = deadline.min(Instant::now() + SETTLING);
        while self.deliveries.count_consumers(deadline)? >= consumers && Instant::now() < let_go_by
        {
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.deliveries.timeout()
    }

    /// Closes the connection, which deletes the queue if it is ours alone, and otherwise returns to
    /// it what is not acknowledged.
    pub fn close(self, deadline: Instant) {
        self.deliveries.close(deadline);
    }
}
