//! One subscription: a queue bound to the exchange, and its consumer.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery};
use amiquip::{FieldTable, Queue, QueueDeclareOptions, Result};
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded};
use logs_common::exchange::Durability;
use logs_common::exit::{During, Failure, Status};
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};
use self_cell::self_cell;

use crate::cli::{Cli, QueueArgs, QueueType};
use crate::output::Written;

/// Messages that the broker sends ahead of their acknowledgement. It bounds our memory; more are
/// not faster.
const PREFETCH: u16 = 2000;

/// How long a message that is done with may be unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// How long the queue may have lost its binding without our notice.
const BIND_AFTER: Duration = Duration::from_secs(10);

/// How long the broker may take to say whether a queue is there whose consumer it has cancelled.
const LOOK: Duration = Duration::from_millis(500);

/// How long a quorum queue may take to act on the last acknowledgement, where the connection
/// allows. It is a matter of milliseconds; a receiver that joins meanwhile hides that it is done.
const SETTLING: Duration = Duration::from_millis(500);

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be
/// our own of a connection that the broker does not know to be lost: for three heartbeats at most.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// Bytes around the body of a delivery, roughly.
const FRAMES: usize = 100;

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
    fn is_shared(&self) -> bool {
        self.shared_until.is_some_and(|until| Instant::now() < until)
    }
}

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
        self.prepare_queue(Declare::Queue)
    }

    /// The same where it was subscribed to before, so that a queue that stays should be there.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](Source::prepare).
    pub fn prepare_again(self: &Arc<Source>) -> Result<Prepared, Failure> {
        if self.queue.name.is_none() || self.exchange.passive {
            return self.prepare();
        }
        match self.prepare_queue(Declare::Nothing) {
            // The queue is not there, and to look for it has closed the channel.
            Err(failure) if failure.status == Status::Config => {
                let mut prepared = self.prepare()?;
                prepared.kept.iter_mut().for_each(|kept| kept.is_new = true);
                Ok(prepared)
            }
            prepared => prepared,
        }
    }

    fn prepare_queue(self: &Arc<Source>, declare: Declare) -> Result<Prepared, Failure> {
        let durability = self.exchange.durability();
        match self.prepare_on(durability, declare) {
            Err(refusal) if refusal.is_other_durability() => {
                self.exchange.note_other_durability();
                self.prepare_on(durability.other(), declare)
            }
            outcome => outcome,
        }
    }

    /// The same on an exchange that is known to be, or to become, of this durability.
    fn prepare_on(
        self: &Arc<Source>,
        durability: Durability,
        declare: Declare,
    ) -> Result<Prepared, Failure> {
        let (mut connection, channel) = Connection::open(&self.uris, "receive-logs")?;
        let operation = format!("subscribe to exchange '{}'", self.exchange.name);
        let bound = connection.ask(&operation, || self.bind(&channel, durability, declare))?;
        let (queue, kept) = bound.map_err(|failure| why(failure, &mut connection))?;
        let (kept, second) = match self.queue.name {
            None => (None, None),
            Some(_) => (Some(kept), Some(connection.open_channel()?)),
        };
        let source = Arc::clone(self);
        Ok(Prepared { connection, channel, second, source, durability, queue, kept })
    }

    /// Returns the name of the queue, and what is known of it in case it stays.
    fn bind(
        &self,
        channel: &Channel,
        durability: Durability,
        declare: Declare,
    ) -> Result<(String, Kept), Failure> {
        self.exchange.declare(channel, durability)?;
        let queue = self.declare_queue(channel, declare)?;
        let (name, exchange) = (queue.name(), &self.exchange.name);
        let binding = channel.queue_bind(name, exchange, "", FieldTable::new());
        binding.during(format!("bind queue '{name}' to exchange '{exchange}'"))?;
        // What is not wanted is better left in the queue, for others or for later.
        let prefetch = self.wanted.unwrap_or(PREFETCH);
        channel.qos(0, prefetch, false).during("set the prefetch count")?;
        let kept = Kept {
            queued: queue.declared_message_count().unwrap_or(0),
            is_new: false,
            shared_until: queue
                .declared_consumer_count()
                .filter(|consumers| *consumers > 0)
                .map(|_| Instant::now() + SHARED_FOR),
        };
        Ok((name.to_string(), kept))
    }

    fn declare_queue<'c>(
        &self,
        channel: &'c Channel,
        declare: Declare,
    ) -> Result<Queue<'c>, Failure> {
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
        if self.exchange.passive || declare == Declare::Nothing {
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
    second: Option<Channel>,
    source: Arc<Source>,
    durability: Durability,
    queue: String,
    kept: Option<Kept>,
}

impl Prepared {
    /// Consumes the queue. When it returns, the broker has confirmed all of it: nothing that is
    /// published is missed. Without a `limit` that may take as long as to connect.
    ///
    /// # Errors
    ///
    /// When the broker refuses it, does not answer, or is lost.
    pub fn consume(self, limit: Option<Duration>) -> Result<Subscription, Failure> {
        let Prepared { mut connection, channel, second, source, durability, queue, kept } = self;
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
            durability,
            queue,
            kept,
            question: Question::new(second),
            is_cancelled: false,
            done: None,
            unacknowledged: 0,
            acknowledge_time: None,
            bind_time: Instant::now() + BIND_AFTER,
            begun: Instant::now(),
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
    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    durability: Durability,
    /// The name of the queue.
    pub queue: String,
    /// What is known of it, unless it is ours alone and goes with us.
    pub kept: Option<Kept>,
    question: Question,
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
        select.recv(&self.question.answers);
    }

    fn deliveries(&self) -> &Receiver<ConsumerMessage> {
        self.consuming.borrow_dependent().receiver()
    }

    fn channel(&self) -> &Channel {
        self.consuming.borrow_owner()
    }

    /// Who reads from the queue, if the broker has been asked after that `time`. If not, it is asked,
    /// and its answer wakes whoever [selects](Subscription::select).
    pub fn sharing(&mut self, time: Instant) -> Sharing {
        let Some(kept) = &mut self.kept else {
            return Sharing::Alone;
        };
        if self.question.answer().is_some_and(|consumers| consumers > 1) {
            if !kept.is_shared() {
                log::info!("queue '{}' has other receivers: gaps are not reported", self.queue);
            }
            kept.shared_until = Some(Instant::now() + SHARED_FOR);
        }
        match self.question.answered {
            _ if kept.is_shared() => Sharing::Shared,
            Some(asked) if asked >= time => Sharing::Alone,
            _ => {
                self.question.ask(&self.queue);
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
        self.kept.is_some() && self.question.channel.is_none()
    }

    /// Whether the exchange, and with it the binding of the queue, outlives the broker.
    pub fn is_bound_for_good(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// Whether others read from the queue, as the last question. If it is not known, too much said
    /// is better than too little.
    pub fn has_other_consumers(&self, deadline: Instant) -> bool {
        let own = u32::from(!self.is_cancelled);
        let are_there = || self.consumers(deadline).is_ok_and(|consumers| consumers > own);
        self.kept.as_ref().is_some_and(|kept| kept.is_shared() || are_there())
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
        let cancelled = matches!(last, Some(ConsumerMessage::ServerCancelled))
            .then(|| self.why_cancelled(&operation));
        let closed = self.connection.end();
        match last {
            Some(ConsumerMessage::ServerClosedChannel(error))
            | Some(ConsumerMessage::ServerClosedConnection(error)) => {
                Failure::amqp(operation, error)
            }
            _ => cancelled.unwrap_or(closed),
        }
    }

    /// Why the broker has cancelled the consumer: mostly because the queue was deleted, but also
    /// where its node is down, or a message was not acknowledged for too long (RabbitMQ 4.3).
    fn why_cancelled(&self, operation: &str) -> Failure {
        let reason = match self.consumers(Instant::now() + LOOK) {
            Err(failure) if failure.status == Status::Config => "the queue was deleted",
            _ => "the broker cancelled the consumer, and keeps the queue",
        };
        Failure::unavailable(format!("{operation}: {reason}"))
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
        if self.kept.is_none() {
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
    /// consumer. The channel answers sooner: RabbitMQ (3.10 to 4.3) puts acknowledgements off while
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

/// How many consumers a queue has, asked without waiting for the answer: on a channel of its own, in
/// a thread of its own.
struct Question {
    /// Unless the broker is being asked, or there is none any more.
    channel: Option<Channel>,
    /// When the question was asked that was answered last.
    answered: Option<Instant>,
    sender: Sender<Answer>,
    answers: Receiver<Answer>,
}

struct Answer {
    channel: Channel,
    asked: Instant,
    consumers: u32,
}

impl Question {
    fn new(channel: Option<Channel>) -> Question {
        let (sender, answers) = bounded(1);
        Question { channel, answered: None, sender, answers }
    }

    /// Asks, unless the broker is being asked.
    fn ask(&mut self, queue: &str) {
        let Some(channel) = self.channel.take() else {
            return;
        };
        let (sender, queue, asked) = (self.sender.clone(), queue.to_string(), Instant::now());
        let ask = move || {
            let declared = channel.queue_declare_passive(queue);
            let consumers = declared.map(|queue| queue.declared_consumer_count());
            match consumers {
                // Nobody listens any more where the subscription has ended.
                Ok(Some(consumers)) => drop(sender.send(Answer { channel, asked, consumers })),
                Ok(None) => {}
                Err(error) => log::debug!("count consumers: {error}"),
            }
        };
        if let Err(error) = thread::Builder::new().spawn(ask) {
            log::debug!("start a thread: {error}");
        }
    }

    /// The answer, if there is a new one.
    fn answer(&mut self) -> Option<u32> {
        let Answer { channel, asked, consumers } = self.answers.try_recv().ok()?;
        (self.channel, self.answered) = (Some(channel), Some(asked));
        Some(consumers)
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
