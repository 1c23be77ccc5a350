//! A queue bound to the exchange, its consumer, and the acknowledgements.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::slice;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::{
    Connection, Deliveries, Delivery, Durability, Error, ErrorKind, Queue, QueueState, Uri, Value,
    Waiting,
};
use logs_common::ExchangeArgs;
use logs_common::hints::hint;
use logs_common::password::Brokers;
use logs_process::Failure;

use crate::cli::{Cli, QueueArgs, QueueType};
use crate::output::Written;
use crate::resume::{Origin, ResumeFile};
use crate::stream::{self, OtherStream, Reader, Start, StreamConfig};

/// Messages that the broker sends ahead of their acknowledgement. They bound the memory; a larger
/// number is not faster.
const PREFETCH: u16 = 2000;

/// How long a message that is received may stay unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// How long the queue may be without its binding unnoticed.
const BIND_AFTER: Duration = Duration::from_secs(10);

/// How long a quorum queue may take to apply the last acknowledgement, where the deadline of
/// stopping allows. Milliseconds are usual; a receiver that joins meanwhile keeps the end from showing.
const SETTLING: Duration = Duration::from_secs(1);

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be
/// that of our own lost connection, which the broker keeps for three heartbeats at most.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// How to get at a kept queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Declare {
    /// Create the queue if it does not exist.
    Create,
    /// Only look for the queue, as it should exist.
    Find,
}

/// When deliveries are acknowledged, which makes the broker send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Credit {
    /// Again and again, so that there are always deliveries on their way.
    Renewed,
    /// At the end, as `--count` asks for no more messages than these; before, if repeats use them up.
    Once(u16),
}

impl Credit {
    fn prefetch(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH,
            Credit::Once(count) => count,
        }
    }

    /// The number of deliveries to acknowledge together.
    fn acknowledged_after(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH / 2,
            // Only repeats leave --count short of its messages here. Acknowledged earlier, deliveries without
            // repeats would make the broker send messages beyond --count.
            Credit::Once(count) => count,
        }
    }
}

/// Who consumes a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Only this receiver, when the broker counted.
    Alone,
    /// Others too, now or within `SHARED_FOR`.
    Shared,
    /// The broker has not answered yet.
    Unknown,
}

/// Where the messages come from.
pub enum Source {
    /// A queue that goes with its connection.
    Exclusive,
    /// A queue that stays.
    Kept(Kept),
    /// A stream, from which nothing is taken out.
    Stream(Box<Reader>),
}

/// What is known of a queue that stays when its receivers go.
pub struct Kept {
    /// How many messages waited in the queue.
    pub queued: u32,
    /// Whether the queue had to be created in place of one that was gone.
    pub is_new: bool,
    /// Until when others are taken to consume the queue.
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

/// Which queue to consume, and how to get there.
pub struct SubscriptionConfig {
    brokers: Brokers,
    exchange: ExchangeArgs,
    queue: QueueArgs,
    /// The stream, in place of the queue.
    pub stream: Option<StreamConfig>,
    credit: Credit,
}

impl SubscriptionConfig {
    /// Takes the options of the command line.
    ///
    /// # Errors
    ///
    /// When a URI, or the password file, is not right.
    pub fn new(cli: &Cli, resume: Option<&ResumeFile>) -> Result<SubscriptionConfig, Failure> {
        let count = cli.count.and_then(|count| u16::try_from(count).ok());
        let brokers = cli.connection.brokers()?;
        Ok(SubscriptionConfig {
            exchange: cli.exchange.clone(),
            queue: cli.queue.clone(),
            stream: StreamConfig::new(cli, brokers.vhost(), resume)?,
            brokers,
            credit: match count {
                // Of a stream, messages before the first that is wanted may come in any number.
                Some(count) if count <= PREFETCH && cli.stream.name.is_none() => {
                    Credit::Once(count)
                }
                _ => Credit::Renewed,
            },
        })
    }

    /// Connects, declares the exchange and the queue, and binds it.
    ///
    /// # Errors
    ///
    /// When no broker can be reached, or the broker refuses a step.
    pub fn prepare(self: &Arc<SubscriptionConfig>) -> Result<BoundQueue, Error> {
        match &self.stream {
            None => self.prepare_queue(Declare::Create),
            Some(stream) => self.prepare_stream(stream, stream.start, OtherStream::Refuse),
        }
    }

    /// The same after a lost subscription, so that a kept queue should still exist, and a stream is read
    /// on from a `place`.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](SubscriptionConfig::prepare).
    pub fn prepare_again(
        self: &Arc<SubscriptionConfig>,
        place: Option<Start>,
    ) -> Result<BoundQueue, Error> {
        if let (Some(stream), Some(place)) = (&self.stream, place) {
            return self.prepare_stream(stream, place, OtherStream::ReadAll);
        }
        if self.queue.name.is_none() || self.exchange.passive {
            return self.prepare();
        }
        match self.prepare_queue(Declare::Find) {
            // The broker has also closed the channel, so all begins anew.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut prepared = self.prepare()?;
                if let Source::Kept(kept) = &mut prepared.source {
                    kept.is_new = true;
                }
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

    /// The same with an exchange declared with this durability.
    fn prepare_on(
        self: &Arc<SubscriptionConfig>,
        durability: Durability,
        declare: Declare,
    ) -> Result<BoundQueue, Error> {
        let mut connection = Connection::open(&self.brokers.uris()?, "receive-logs", hint)?;
        if !self.exchange.passive {
            connection.declare_fanout(&self.exchange.name, durability);
        }
        let queue = connection.declare_queue(&self.queue(declare))?;
        connection.bind(&queue.name, &self.exchange.name);
        // Messages beyond --count stay in a kept queue, for others or for later.
        connection.set_prefetch(self.credit.prefetch());
        let source = match self.queue.name {
            None => Source::Exclusive,
            Some(_) => Source::Kept(Kept::new(&queue)),
        };
        let config = Arc::clone(self);
        Ok(BoundQueue { connection, config, durability, queue: queue.name, source })
    }

    /// Connects, declares the exchange and the stream, binds it, and finds where to begin. The stream is bound
    /// first: in a new stream, the search for the end of the old one takes seconds.
    fn prepare_stream(
        self: &Arc<SubscriptionConfig>,
        stream: &StreamConfig,
        start: Start,
        other: OtherStream,
    ) -> Result<BoundQueue, Error> {
        self.exchange.open_as_found(self.exchange.durability(), |durability| {
            let find = |uris: &[Uri]| -> Result<_, Error> {
                let (mut connection, state) = self.open_stream(uris, stream, durability)?;
                connection.set_prefetch(self.credit.prefetch());
                let reader = stream.find(&connection, &state, start, other)?;
                Ok((connection, reader))
            };
            let all = self.brokers.uris()?;
            let outcome = match find(&all) {
                // Another node of the cluster may have a replica.
                Err(error) if error.kind() == ErrorKind::NoReplica => {
                    all.iter().find_map(|uri| find(slice::from_ref(uri)).ok()).ok_or(error)
                }
                outcome => outcome,
            };
            let (connection, reader) = outcome?;
            Ok(BoundQueue {
                connection,
                config: Arc::clone(self),
                durability,
                queue: stream.name.clone(),
                source: Source::Stream(Box::new(reader)),
            })
        })
    }

    /// Connects, and declares and binds the exchange and the stream, unless they are to be used as they are.
    fn open_stream(
        &self,
        uris: &[Uri],
        stream: &StreamConfig,
        durability: Durability,
    ) -> Result<(Connection, QueueState), Error> {
        let open = || -> Result<Connection, Error> {
            let mut connection = Connection::open(uris, "receive-logs", stream::hint)?;
            stream.check_broker(&connection)?;
            if !self.exchange.passive {
                connection.declare_fanout(&self.exchange.name, durability);
            }
            Ok(connection)
        };
        let mut connection = open()?;
        let existing = Queue::existing(&stream.name);
        if self.exchange.passive {
            let state = connection.declare_queue(&existing)?;
            return Ok((connection, state));
        }
        let state = match connection.declare_queue(&stream.queue()) {
            // The refusal has closed the channel.
            Err(error) if error.kind() == ErrorKind::OtherQueue => {
                stream.note_other_limits();
                connection = open()?;
                let state = connection.declare_queue(&existing)?;
                // A queue of another type would collect messages that nobody reads.
                stream.check_type(&connection)?;
                state
            }
            declared => declared?,
        };
        connection.bind(&stream.name, &self.exchange.name);
        connection.flush();
        Ok((connection, state))
    }

    fn queue(&self, declare: Declare) -> Queue {
        let Some(name) = &self.queue.name else {
            return self.with_backlog(Queue::exclusive());
        };
        if self.exchange.passive || declare == Declare::Find {
            return Queue::existing(name);
        }
        let queue = self.with_backlog(Queue::durable(name));
        match self.queue.kind {
            QueueType::Classic => queue.argument("x-queue-type", text("classic")),
            // By default RabbitMQ 4 drops a message that twenty receivers in turn could not write.
            // Its value for no limit, -1, means 0 to older versions.
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

/// A queue bound to the exchange, over a connection that is ready to consume.
pub struct BoundQueue {
    connection: Connection,
    config: Arc<SubscriptionConfig>,
    durability: Durability,
    queue: String,
    source: Source,
}

impl BoundQueue {
    /// Consumes the queue; the broker may take `max_wait` to confirm that, or the connection timeout
    /// without. Every message published from then on is received.
    ///
    /// # Errors
    ///
    /// When the broker refuses, does not answer, or is lost.
    pub fn consume(self, max_wait: Option<Duration>) -> Result<Subscription, Error> {
        let BoundQueue { connection, config, durability, queue, source } = self;
        let deliveries = match &source {
            Source::Stream(reader) => reader.consume(connection, max_wait)?,
            _ => connection.consume(&queue, max_wait)?,
        };
        log::info!("consuming queue '{queue}' bound to exchange '{}'", config.exchange.name);
        Ok(Subscription {
            deliveries,
            config,
            durability,
            queue,
            source,
            is_cancelled: false,
            last_written: None,
            unacknowledged: 0,
            acknowledge_time: None,
            bind_time: Instant::now() + BIND_AFTER,
            begun: Instant::now(),
        })
    }
}

/// A running subscription. Dropped without [`close`](Subscription::close), its connection is cut at once.
pub struct Subscription {
    deliveries: Deliveries,
    config: Arc<SubscriptionConfig>,
    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    durability: Durability,
    /// The name of the queue.
    pub queue: String,
    /// What the messages come from.
    pub source: Source,
    is_cancelled: bool,
    /// The last message that is written and not acknowledged.
    last_written: Option<Delivery>,
    /// How many deliveries came since the last acknowledgement, and when the next one is due.
    unacknowledged: u16,
    acknowledge_time: Option<Instant>,
    bind_time: Instant,
    /// When the broker had confirmed the consumer.
    pub begun: Instant,
}

impl Subscription {
    /// The next delivery, if there is one.
    ///
    /// # Errors
    ///
    /// After the last delivery, why no more come; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Delivery>, Error> {
        let next = match &mut self.source {
            Source::Stream(reader) => reader.try_next(&mut self.deliveries)?,
            _ => self.deliveries.try_next()?,
        };
        if next.is_some() {
            self.unacknowledged += 1;
            self.acknowledge_time.get_or_insert_with(|| Instant::now() + ACK_AFTER);
        }
        Ok(next)
    }

    /// The next delivery that has reached this machine, if there is one.
    ///
    /// # Errors
    ///
    /// As for [`try_next`](Subscription::try_next).
    pub fn next_here(&mut self) -> Result<Option<Delivery>, Error> {
        let next = self.try_next()?;
        if next.is_some() {
            return Ok(next);
        }
        self.wait(&[], Some(Instant::now()));
        self.try_next()
    }

    /// How many deliveries have been received and not been returned, for any thread.
    pub fn waiting(&self) -> Waiting {
        self.deliveries.waiting()
    }

    /// Host and port of the broker, as in messages.
    pub fn peer(&self) -> &str {
        self.deliveries.peer()
    }

    /// Waits until a delivery has come, or an answer about consumers, or one of `others` is ready, at most `until`
    /// then.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) {
        self.deliveries.wait(others, until);
    }

    /// Who consumes the queue, if the broker has counted after that `time`. Otherwise the broker is
    /// asked; the answer wakes whoever [waits](Subscription::wait).
    pub fn sharing(&mut self, time: Instant) -> Sharing {
        let Source::Kept(kept) = &mut self.source else {
            return Sharing::Alone;
        };
        if kept.is_shared() {
            return Sharing::Shared;
        }
        match self.deliveries.consumers_since(time) {
            None => Sharing::Unknown,
            Some(..=1) => Sharing::Alone,
            Some(_) => {
                log::info!("queue '{}' has other receivers: gaps are not reported", self.queue);
                kept.shared_until = Some(Instant::now() + SHARED_FOR);
                Sharing::Shared
            }
        }
    }

    /// Whether the queue stays, with the messages that are not acknowledged.
    pub fn is_kept(&self) -> bool {
        self.kept().is_some()
    }

    fn kept(&self) -> Option<&Kept> {
        match &self.source {
            Source::Kept(kept) => Some(kept),
            _ => None,
        }
    }

    fn reader(&mut self) -> Option<&mut Reader> {
        match &mut self.source {
            Source::Stream(reader) => Some(reader),
            _ => None,
        }
    }

    /// Where to go on in a stream after this subscription; `None` for queues.
    pub fn place(&self) -> Option<Start> {
        match &self.source {
            Source::Stream(reader) => Some(reader.place()),
            _ => None,
        }
    }

    /// Which stream this is the subscription of; `None` for queues.
    pub fn origin(&self) -> Option<Origin> {
        self.config.stream.as_ref().map(StreamConfig::origin)
    }

    /// Whether a stream still has all messages after the last written.
    pub fn is_unbroken(&self) -> bool {
        matches!(&self.source, Source::Stream(reader) if reader.is_unbroken())
    }

    /// Whether no message is left before the end that `--no-follow` asks for.
    pub fn is_at_end(&self) -> bool {
        matches!(&self.source, Source::Stream(reader) if reader.is_at_end())
    }

    /// Whether the message was sent before the time to begin with.
    pub fn is_too_old(&self, delivery: &Delivery) -> bool {
        matches!(&self.source, Source::Stream(reader) if reader.is_too_old(delivery))
    }

    /// Which of the `records` of a delivery to write.
    pub fn select_records(&mut self, records: u64) -> Range<u64> {
        match self.reader() {
            Some(reader) => reader.select(records),
            None => 0..records,
        }
    }

    /// Whether others are known to consume the queue, now or within `SHARED_FOR`.
    pub fn is_shared(&self) -> bool {
        self.kept().is_some_and(Kept::is_shared)
    }

    /// Whether the broker owes an answer, or can give none.
    pub fn is_asking(&self) -> bool {
        self.is_kept() && self.deliveries.is_counting()
    }

    /// Whether the exchange, and with it the binding of the queue, survives a restart of the broker.
    pub fn is_bound_for_good(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// Whether messages may have been sent while no queue was bound, where this subscription replaces a lost one.
    pub fn may_have_missed(&self) -> bool {
        match &self.source {
            Source::Exclusive => true,
            Source::Kept(kept) => kept.is_new || !self.is_bound_for_good(),
            Source::Stream(reader) => reader.is_new() || !self.is_bound_for_good(),
        }
    }

    /// Whether others consume the queue, asking the broker by the `deadline`. Without an answer they
    /// count as absent: gaps reported in vain are better than gaps kept secret.
    pub fn has_other_consumers(&self, deadline: Instant) -> bool {
        let own = u32::from(!self.is_cancelled);
        let are_there =
            || self.deliveries.count_consumers(deadline).is_ok_and(|consumers| consumers > own);
        self.kept().is_some_and(|kept| kept.is_shared() || are_there())
    }

    /// Notes that messages are written, which the next [acknowledgement](Subscription::acknowledge) covers.
    ///
    /// Only a [`Written`] will do, and only [`Output`](crate::output::Output) makes one, once the bytes
    /// are out of the process. A message that was merely received cannot be acknowledged:
    ///
    /// ```compile_fail,E0308
    /// # use amqp::Delivery;
    /// # use receive_logs::output::Output;
    /// # use receive_logs::subscription::Subscription;
    /// fn copy(delivery: Delivery, output: &mut Output, subscription: &mut Subscription) {
    ///     subscription.note_written(delivery);
    ///     subscription.acknowledge();
    /// }
    /// ```
    ///
    /// Nor can a `Written` be made of it:
    ///
    /// ```compile_fail,E0423
    /// # use amqp::Delivery;
    /// # use receive_logs::output::{Output, Written};
    /// # use receive_logs::subscription::Subscription;
    /// fn copy(delivery: Delivery, output: &mut Output, subscription: &mut Subscription) {
    ///     subscription.note_written(Written(Some(delivery)));
    ///     subscription.acknowledge();
    /// }
    /// ```
    ///
    /// The way by the output compiles:
    ///
    /// ```
    /// # use amqp::Delivery;
    /// # use receive_logs::output::{Output, Written};
    /// # use receive_logs::subscription::Subscription;
    /// fn copy(delivery: Delivery, output: &mut Output, subscription: &mut Subscription) {
    ///     output.write(delivery, 0..1).unwrap();
    ///     subscription.note_written(output.flush().unwrap());
    ///     subscription.acknowledge();
    /// }
    /// ```
    pub fn note_written(&mut self, written: Written) {
        if let Some(delivery) = written.into_last() {
            if let Some(reader) = self.reader() {
                reader.note_written(delivery.tag);
            }
            self.last_written = Some(delivery);
        }
    }

    /// Whether so many messages have come that they should be written and acknowledged now, before the
    /// broker has no more to send.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= self.config.credit.acknowledged_after()
    }

    /// Acknowledges, and binds the queue again, if it is time.
    pub fn run_timers(&mut self) {
        let now = Instant::now();
        if self.acknowledge_time.is_some_and(|time| time <= now) {
            self.acknowledge();
        }
        if self.bind_time <= now {
            self.bind();
        }
    }

    /// When to [run the timers](Subscription::run_timers) at the latest.
    pub fn next_timer(&self) -> Instant {
        self.acknowledge_time.map_or(self.bind_time, |time| time.min(self.bind_time))
    }

    /// Binds the queue to the exchange once more: that the exchange was deleted, and perhaps declared
    /// again without the binding, shows in no other way. A failure ends the deliveries.
    fn bind(&mut self) {
        self.bind_time = Instant::now() + BIND_AFTER;
        if self.config.stream.is_none() || !self.config.exchange.passive {
            self.deliveries.bind_again(&self.config.exchange.name);
        }
    }

    /// Acknowledges the messages that are noted as written. If that fails, the deliveries end.
    pub fn acknowledge(&mut self) {
        self.unacknowledged = 0;
        self.acknowledge_time = None;
        if let Some(delivery) = self.last_written.take() {
            self.deliveries.acknowledge(&delivery);
        }
    }

    /// When the broker last sent anything, be it the end.
    pub fn last_received(&self) -> Instant {
        self.deliveries.last_received()
    }

    /// Asks the broker to send no more. Deliveries sent by then can still be received, unless the
    /// broker does not answer by the `deadline`, which cuts the connection.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer in time.
    pub fn cancel(&mut self, deadline: Instant) -> Result<(), Error> {
        self.is_cancelled = true;
        self.deliveries.cancel(deadline)
    }

    /// Acknowledges the messages that are noted as written, and waits until the broker has acted on
    /// that, so that the end of the connection makes none of them come again.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts the connection.
    pub fn acknowledge_all(&mut self, deadline: Instant) -> Result<(), Error> {
        if !self.is_kept() {
            // The queue goes with the connection; a stream keeps its messages.
            return Ok(());
        }
        if matches!(self.config.credit, Credit::Once(_)) {
            // To a consumer, the broker would answer the acknowledgement with more messages.
            self.cancel(deadline)?;
        }
        if self.is_cancelled
            && self.last_written.is_some()
            && self.config.queue.kind == QueueType::Quorum
        {
            return self.acknowledge_to_quorum(deadline);
        }
        self.acknowledge();
        self.deliveries.barrier(deadline, "acknowledge what is written")
    }

    /// Acknowledges the rest of a cancelled consumer, and waits until its quorum queue forgets the
    /// consumer. An answer of the channel proves too little: RabbitMQ (3.10 to 4.3) puts acknowledgements
    /// off while the queue has more than 32 commands of the channel to apply, such as the returns of
    /// cancelled deliveries, and drops those put off when the connection closes.
    fn acknowledge_to_quorum(&mut self, deadline: Instant) -> Result<(), Error> {
        let consumers = self.deliveries.count_consumers(deadline)?;
        self.acknowledge();
        let settled_by = deadline.min(Instant::now() + SETTLING);
        while self.deliveries.count_consumers(deadline)? >= consumers && Instant::now() < settled_by
        {
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.deliveries.timeout()
    }

    /// Closes the connection by the `deadline`. That deletes an exclusive queue, and returns to any
    /// other the messages that are not acknowledged.
    pub fn close(self, deadline: Instant) {
        self.deliveries.close(deadline);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use logs_tests::{
        CONSUME, EXCHANGE_DECLARE, QUEUE_BIND, QUEUE_DECLARE, QueueCounts, ScriptedBroker,
    };

    use super::*;

    #[test]
    fn a_passive_receiver_of_a_stream_never_binds() {
        for (passive, bindings) in [(&["--passive"][..], 0), (&[], 2)] {
            let broker = ScriptedBroker::start();
            broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
            let arguments = ["receive-logs", "--uri", &broker.url(), "--stream", "s"];
            let cli = Cli::parse_from([&arguments, passive].concat());
            let config = Arc::new(SubscriptionConfig::new(&cli, None).unwrap());
            let mut subscription = config.prepare().unwrap().consume(None).unwrap();
            subscription.bind_time = Instant::now();
            subscription.run_timers();
            let deadline = Instant::now() + subscription.timeout();
            subscription.deliveries.barrier(deadline, "test").unwrap();
            assert_eq!(broker.count_requests(QUEUE_BIND), bindings);
            assert_eq!(broker.count_requests(EXCHANGE_DECLARE), bindings.min(1));
        }
    }

    #[test]
    fn a_stream_is_bound_before_its_end_is_found() {
        let broker = ScriptedBroker::start();
        broker.withhold(CONSUME);
        let cli = Cli::parse_from(["receive-logs", "--uri", &broker.url(), "--stream", "s"]);
        let config = Arc::new(SubscriptionConfig::new(&cli, None).unwrap());
        thread::spawn(move || config.prepare().map(drop));
        broker.wait_for_requests(CONSUME, 1);
        broker.wait_for_requests(QUEUE_BIND, 1);
    }

    #[test]
    fn a_queue_that_is_no_stream_is_never_bound() {
        for start in [&[][..], &["--from-start"]] {
            let broker = ScriptedBroker::start();
            broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
            let other = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 's'";
            broker.refuse(QUEUE_DECLARE, 406, other);
            let no_stream = "PRECONDITION_FAILED - invalid arg 'x-stream-offset' for queue 's'";
            broker.refuse(CONSUME, 406, no_stream);
            let arguments = ["receive-logs", "--uri", &broker.url(), "--stream", "s"];
            let cli = Cli::parse_from([&arguments, start].concat());
            let config = Arc::new(SubscriptionConfig::new(&cli, None).unwrap());
            let subscribe = || config.prepare()?.consume(None);
            assert_eq!(subscribe().err().unwrap().kind(), ErrorKind::NotAStream);
            assert_eq!(broker.count_requests(QUEUE_BIND), 0, "{start:?}");
        }
    }
}
