//! Consuming a queue.

use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery, FieldTable};
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded};
use self_cell::self_cell;

use crate::error::{Context, Error, ErrorKind};
use crate::link::{Link, left};

/// Bytes of frames and properties around the body of a delivery, roughly.
const FRAMING: usize = 100;

/// How long the broker may take to say whether a queue is still there after it has cancelled its
/// consumer.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

self_cell!(
    /// A channel, and the consumer on it.
    struct Consuming {
        owner: Channel,
        #[covariant]
        dependent: Consumer,
    }
);

/// The deliveries of a queue. Dropped without [`close`](Deliveries::close), the connection is cut at once.
pub struct Deliveries {
    // Dropped first: a consumer whose connection is gone does not wait for the broker.
    link: Link,
    consuming: Consuming,
    queue: String,
    counter: ConsumerCounter,
}

impl Deliveries {
    pub(crate) fn start(
        mut link: Link,
        channel: Channel,
        second: Option<Channel>,
        queue: &str,
        arguments: FieldTable,
        timeout: Duration,
    ) -> Result<Deliveries, Error> {
        let operation = format!("consume queue '{queue}'");
        let consume = || {
            let options = ConsumerOptions { arguments, ..ConsumerOptions::default() };
            Consuming::try_new(channel, |channel| {
                channel.basic_consume(queue, options).context(&operation)
            })
        };
        let consuming = link.call(timeout, &operation, consume)?;
        let consuming = consuming.map_err(|error| link.explain(error))?;
        Ok(Deliveries {
            link,
            consuming,
            queue: queue.into(),
            counter: ConsumerCounter::new(second),
        })
    }

    /// The next delivery, if any is there; none after the last of a consumer that was
    /// [cancelled](Deliveries::cancel).
    ///
    /// # Errors
    ///
    /// Why no more come, after the last delivery; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Delivery>, Error> {
        match self.receiver().try_recv() {
            Ok(ConsumerMessage::Delivery(delivery)) => {
                self.link.backlog().take(delivery.body.len() + FRAMING);
                Ok(Some(delivery))
            }
            // The connection stays, as the last acknowledgements are yet to be sent.
            Ok(ConsumerMessage::ClientCancelled) => Ok(None),
            Ok(end) => Err(self.end(Some(end))),
            Err(TryRecvError::Disconnected) => Err(self.end(None)),
            Err(TryRecvError::Empty) => Ok(None),
        }
    }

    /// Makes `select` wait for the next delivery, once none is left, or for the answer that
    /// [`consumers_since`](Deliveries::consumers_since) waits for.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        self.link.backlog().all_taken();
        select.recv(self.receiver());
        select.recv(&self.counter.answers);
    }

    fn receiver(&self) -> &Receiver<ConsumerMessage> {
        self.consuming.borrow_dependent().receiver()
    }

    fn channel(&self) -> &Channel {
        self.consuming.borrow_owner()
    }

    /// Why no more deliveries come, after the message `last` of amiquip.
    fn end(&mut self, last: Option<ConsumerMessage>) -> Error {
        let operation = format!("receive from {}", self.link.peer);
        let cancelled = matches!(last, Some(ConsumerMessage::ServerCancelled))
            .then(|| self.why_cancelled(&operation));
        let closed = self.link.end();
        match last {
            Some(ConsumerMessage::ServerClosedChannel(error))
            | Some(ConsumerMessage::ServerClosedConnection(error)) => {
                self.link.explain(Error::from_amiquip(operation, error))
            }
            _ => cancelled.unwrap_or(closed),
        }
    }

    /// Why the broker has cancelled the consumer: mostly because the queue was deleted, but also
    /// where its node is down, or a message was not acknowledged for too long (RabbitMQ 4.3).
    fn why_cancelled(&self, operation: &str) -> Error {
        let reason = match self.count_consumers(Instant::now() + LOOK_TIMEOUT) {
            Err(error) if error.kind() == ErrorKind::NotFound => "the queue was deleted",
            _ => "the broker cancelled the consumer, and keeps the queue",
        };
        Error::unavailable(format!("{operation}: {reason}"))
    }

    /// Acknowledges this delivery, and all before it. If the connection is lost,
    /// [`try_next`](Deliveries::try_next) tells.
    pub fn acknowledge(&self, delivery: Delivery) {
        if let Err(error) = delivery.ack_multiple(self.channel()) {
            log::debug!("acknowledge: {error}");
        }
    }

    /// Waits until the broker has acted on all acknowledgements.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn barrier(&self, deadline: Instant, operation: &str) -> Result<(), Error> {
        self.link.barrier(self.channel(), left(deadline), operation)?.context(operation)
    }

    /// Asks the broker to send no more. Deliveries that are on their way can still be received.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn cancel(&self, deadline: Instant) -> Result<(), Error> {
        let operation = "cancel the consumer";
        let cancel = || self.consuming.borrow_dependent().cancel();
        self.link.call(left(deadline), operation, cancel)?.context(operation)
    }

    /// How many consumers the queue has. A quorum queue counts a cancelled consumer until the queue has
    /// acted on the last of its acknowledgements.
    ///
    /// # Errors
    ///
    /// A queue that is gone, a lost connection, and no answer by the `deadline`.
    pub fn count_consumers(&self, deadline: Instant) -> Result<u32, Error> {
        let operation = format!("count the consumers of queue '{}'", self.queue);
        let count = || {
            let queue = self.channel().queue_declare_passive(&self.queue)?;
            Ok(queue.declared_consumer_count().unwrap_or(0))
        };
        self.link.call(left(deadline), &operation, count)?.context(operation)
    }

    /// How many consumers the queue had when the broker was last asked, at `since` or later. If that is
    /// not known, the broker is asked without waiting, and its answer wakes whoever
    /// [selects](Deliveries::select). An exclusive queue is not asked about.
    pub fn consumers_since(&mut self, since: Instant) -> Option<u32> {
        self.counter.count_since(since, &self.queue)
    }

    /// Whether the broker owes [`consumers_since`](Deliveries::consumers_since) an answer, or can give
    /// none.
    pub fn is_counting(&self) -> bool {
        self.counter.channel.is_none()
    }

    /// Binds the queue to the exchange once more, without waiting: if the exchange was deleted, the broker
    /// says so only now, and if it was made anew, the binding is. The next receive tells of a failure.
    pub fn bind_again(&self, exchange: &str) {
        let bound = self.channel().queue_bind_nowait(&self.queue, exchange, "", FieldTable::new());
        if let Err(error) = bound {
            log::debug!("bind: {error}");
        }
    }

    /// When the broker last gave a sign of life; the end of the connection counts as a sign.
    pub fn last_received(&self) -> Instant {
        self.link.last_received()
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.link.timeout
    }

    /// Closes the connection by the `deadline`. The broker deletes an exclusive queue; to any other queue it
    /// returns the messages that are not acknowledged.
    pub fn close(mut self, deadline: Instant) {
        // Before the consumer is dropped: amiquip takes the broker's answer to the cancellation of a
        // consumer that is gone for a failure of the connection.
        if let Err(error) = self.link.close_by(deadline) {
            log::debug!("{error}");
        }
    }
}

/// Counts the consumers of a queue without waiting for the answer: on a channel of its own, in a thread of
/// its own.
struct ConsumerCounter {
    /// `None` while the broker is being asked, and where it cannot be.
    channel: Option<Channel>,
    last: Option<Count>,
    sender: Sender<(Channel, Count)>,
    answers: Receiver<(Channel, Count)>,
}

struct Count {
    asked: Instant,
    consumers: u32,
}

impl ConsumerCounter {
    fn new(channel: Option<Channel>) -> ConsumerCounter {
        let (sender, answers) = bounded(1);
        ConsumerCounter { channel, last: None, sender, answers }
    }

    fn count_since(&mut self, since: Instant, queue: &str) -> Option<u32> {
        if let Ok((channel, count)) = self.answers.try_recv() {
            (self.channel, self.last) = (Some(channel), Some(count));
        }
        let count = self.last.as_ref().filter(|count| count.asked >= since);
        if count.is_none()
            && let Some(channel) = self.channel.take()
        {
            self.ask(channel, queue.to_string());
        }
        count.map(|count| count.consumers)
    }

    fn ask(&self, channel: Channel, queue: String) {
        let (sender, asked) = (self.sender.clone(), Instant::now());
        let ask = move || match channel.queue_declare_passive(queue) {
            Ok(declared) => {
                let consumers = declared.declared_consumer_count().unwrap_or(0);
                // The receiver is gone where the subscription has ended.
                let _ = sender.send((channel, Count { asked, consumers }));
            }
            Err(error) => log::debug!("count consumers: {error}"),
        };
        if let Err(error) = thread::Builder::new().spawn(ask) {
            log::debug!("start a thread: {error}");
        }
    }
}
