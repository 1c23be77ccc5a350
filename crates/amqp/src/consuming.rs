//! Consuming a queue.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Consumer, ConsumerOptions, FieldTable};
use self_cell::self_cell;

use crate::Properties;
use crate::connection::{bind, qos};
use crate::error::{Context, Error, ErrorKind};
use crate::link::{Link, Lost, left};
use crate::mailbox::{Letterbox, Mailbox};
use crate::transport::decoder::Inbound;
use crate::transport::encoder::{self, Answer};
use crate::transport::frame_filter::CHANNEL;
use crate::transport::observed::Observed;

/// How long the broker may take to say whether a queue is still there after it has cancelled its
/// consumer.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// How soon to look again for a queue that is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A message for the consumer.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The delivery tag: messages are counted from 1 on each connection.
    pub tag: u64,
    /// Whether the message was delivered before, to any consumer.
    pub redelivered: bool,
    /// The exchange to which the message was published.
    pub exchange: String,
    /// The routing key with which the message was published.
    pub routing_key: String,
    /// The properties.
    pub properties: Properties,
    /// The body.
    pub body: Vec<u8>,
    /// The memory that body and properties take when received, in bytes, with room to spare.
    pub(crate) memory: usize,
}

/// Counts received deliveries.
#[derive(Clone, Debug)]
pub struct Waiting(Arc<Observed>);

impl Waiting {
    /// How many deliveries have been received and not been handed to the program.
    pub fn count(&self) -> usize {
        self.0.unread.load(Ordering::Relaxed) + self.0.unhandled.load(Ordering::Relaxed)
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

/// The deliveries of a queue. Dropped without [`close`](Deliveries::close), the connection is cut at once.
pub struct Deliveries {
    // Dropped first: a consumer whose connection is gone does not wait for the broker.
    link: Link,
    consuming: Consuming,
    queue: String,
    /// For a queue that others may consume.
    counter: Option<ConsumerCounter>,
}

impl Deliveries {
    pub(crate) fn start(
        link: Link,
        channel: Channel,
        second: Option<Channel>,
        queue: &str,
        arguments: FieldTable,
        timeout: Duration,
    ) -> Result<Deliveries, Error> {
        let counter = second.map(ConsumerCounter::new).transpose()?;
        // Dropped first: a channel whose connection is gone does not wait for the broker.
        let mut link = link;
        let operation = format!("consume queue '{queue}'");
        let consume = || {
            let options = ConsumerOptions { arguments, ..ConsumerOptions::default() };
            Consuming::try_new(channel, |channel| channel.basic_consume(queue, options))
        };
        let consuming = link.call(timeout, &operation, consume)?;
        let consuming = consuming.map_err(|error| link.explain(operation, error))?;
        link.take_over();
        Ok(Deliveries { link, consuming, queue: queue.into(), counter })
    }

    /// The next delivery, if any is there; none after the last of a consumer that was
    /// [cancelled](Deliveries::cancel).
    ///
    /// # Errors
    ///
    /// Why no more come, after the last delivery; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Delivery>, Error> {
        loop {
            match self.link.try_next() {
                Ok(Some(Inbound::Delivery(delivery))) => return Ok(Some(*delivery)),
                // An alarm at the broker, which concerns publishers.
                Ok(Some(Inbound::Event(_))) => {}
                Ok(Some(Inbound::Cancelled)) => return Err(self.end_cancelled()),
                Ok(None) => return Ok(None),
                Err(Lost) => return Err(self.end()),
            }
        }
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        &self.link.peer
    }

    /// Waits until a delivery has come, or the answer that [`consumers_since`](Deliveries::consumers_since) waits
    /// for, or one of `others` is ready, at most `until` then.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) {
        match &self.counter {
            None => self.link.wait(others, until),
            Some(counter) => self.link.wait(&[others, &[counter.answers.as_fd()]].concat(), until),
        };
    }

    fn channel(&self) -> &Channel {
        self.consuming.borrow_owner()
    }

    fn receiving(&self) -> String {
        format!("receive from {}", self.link.peer)
    }

    /// Why no more deliveries come.
    fn end(&mut self) -> Error {
        let closed = self.link.end();
        self.link.refusal(self.receiving()).unwrap_or(closed)
    }

    /// The same after the broker has cancelled the consumer.
    fn end_cancelled(&mut self) -> Error {
        let reason = self.why_cancelled(&self.receiving());
        self.link.end();
        reason
    }

    /// Why the broker has cancelled the consumer: mostly because the queue was deleted, but also
    /// where its node is down, or a message was not acknowledged for too long (RabbitMQ 4.3).
    fn why_cancelled(&self, operation: &str) -> Error {
        let deadline = Instant::now() + LOOK_TIMEOUT;
        let is_deleted = loop {
            match self.count_consumers(deadline) {
                // RabbitMQ 4 cancels the consumers of a quorum queue before the queue is gone.
                Ok(_) if Instant::now() + LOOK_AGAIN < deadline => thread::sleep(LOOK_AGAIN),
                Ok(_) => break false,
                Err(error) => break error.kind() == ErrorKind::NotFound,
            }
        };
        let reason = match is_deleted {
            true => "the queue was deleted",
            false => "the broker cancelled the consumer, and keeps the queue",
        };
        Error::unavailable(format!("{operation}: {reason}"))
    }

    /// Acknowledges this delivery, and all before it. If the connection is lost,
    /// [`try_next`](Deliveries::try_next) tells.
    pub fn acknowledge(&self, delivery: &Delivery) {
        self.link.send(&encoder::acknowledgement(CHANNEL, delivery.tag));
    }

    /// Waits until the broker has acted on all acknowledgements. Deliveries for which there is no room are dropped
    /// from now on.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn barrier(&self, deadline: Instant, operation: &str) -> Result<(), Error> {
        self.link.drop_excess();
        self.link.barrier(self.channel(), left(deadline), operation)?.context(operation)
    }

    /// How many deliveries have been received that [`try_next`](Deliveries::try_next) has not returned, for any thread.
    pub fn waiting(&self) -> Waiting {
        Waiting(self.link.observed())
    }

    /// Requests an answer, before which come all deliveries that the broker has sent by then.
    pub fn request_answer(&mut self) {
        // There are no consumers to come.
        self.link.request_answered(&qos(0), Answer::Qos(CHANNEL), self.receiving());
        self.link.flush();
    }

    /// Waits for the next delivery before the [requested answer](Deliveries::request_answer); `None` once that has come.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`.
    pub fn next_before_answer(&mut self, deadline: Instant) -> Result<Option<Delivery>, Error> {
        loop {
            let is_answered = self.link.is_answered(Answer::Qos(CHANNEL));
            let next = self.try_next()?;
            if is_answered || next.is_some() {
                return Ok(next);
            }
            if Instant::now() >= deadline {
                let receiving = self.receiving();
                return Err(Error::unavailable(format!("{receiving}: no answer in time")));
            }
            self.link.wait_for_answer(Answer::Qos(CHANNEL), Some(deadline));
        }
    }

    /// Asks the broker to send no more. Deliveries that are on their way can still be received, as far as there is
    /// room for them; the queue delivers the rest again.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn cancel(&self, deadline: Instant) -> Result<(), Error> {
        self.link.drop_excess();
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
    /// [waits](Deliveries::wait). An exclusive queue is not asked about.
    pub fn consumers_since(&mut self, since: Instant) -> Option<u32> {
        self.counter.as_mut()?.count_since(since, &self.queue)
    }

    /// Whether the broker owes [`consumers_since`](Deliveries::consumers_since) an answer, or can give
    /// none.
    pub fn is_counting(&self) -> bool {
        self.counter.as_ref().is_none_or(|counter| counter.channel.is_none())
    }

    /// Binds the queue to the exchange once more, without waiting: if the exchange was deleted, the broker
    /// says so only now, and if it was made anew, the binding is. The next receive tells of a failure.
    pub fn bind_again(&self, exchange: &str) {
        self.link.send(&encoder::method(CHANNEL, &bind(&self.queue, exchange)));
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
    sender: Letterbox<(Channel, Count)>,
    answers: Mailbox<(Channel, Count)>,
}

struct Count {
    asked: Instant,
    consumers: u32,
}

impl ConsumerCounter {
    fn new(channel: Channel) -> Result<ConsumerCounter, Error> {
        let (sender, answers) = Mailbox::open()?;
        Ok(ConsumerCounter { channel: Some(channel), last: None, sender, answers })
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
                sender.send((channel, Count { asked, consumers }));
            }
            Err(error) => log::debug!("count consumers: {error}"),
        };
        if let Err(error) = thread::Builder::new().spawn(ask) {
            log::debug!("start a thread: {error}");
        }
    }
}
