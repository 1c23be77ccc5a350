//! What the broker delivers from a queue.

use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery, FieldTable};
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded};
use self_cell::self_cell;

use crate::error::{During, Error, ErrorKind};
use crate::link::{Link, left};

/// Bytes around the body of a delivery, roughly.
const FRAMES: usize = 100;

/// How long the broker may take to say whether a queue is still there after it has cancelled its
/// consumer.
const MAX_LOOK: Duration = Duration::from_millis(500);

self_cell!(
    /// A channel, and the consumer on it.
    struct Consuming {
        owner: Channel,
        #[covariant]
        dependent: Consumer,
    }
);

/// The deliveries of one queue. Dropped without [`close`](Deliveries::close), the connection is cut at
/// once. The fields are dropped in this order: a consumer whose connection is gone does not wait for the
/// broker.
pub struct Deliveries {
    link: Link,
    consuming: Consuming,
    queue: String,
    question: Question,
}

impl Deliveries {
    pub(crate) fn start(
        mut link: Link,
        channel: Channel,
        second: Option<Channel>,
        queue: &str,
        max_wait: Duration,
    ) -> Result<Deliveries, Error> {
        let operation = format!("consume queue '{queue}'");
        let consume = || {
            Consuming::try_new(channel, |channel| {
                channel.basic_consume(queue, ConsumerOptions::default()).during(&operation)
            })
        };
        let consuming = link.call_within(max_wait, &operation, consume)?;
        let consuming = consuming.map_err(|error| link.why(error))?;
        Ok(Deliveries { link, consuming, queue: queue.into(), question: Question::new(second) })
    }

    /// The next delivery, if there is one; none after the last one of a consumer that was
    /// [cancelled](Deliveries::cancel).
    ///
    /// # Errors
    ///
    /// Why no more come, after the last one; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Delivery>, Error> {
        match self.receiver().try_recv() {
            Ok(ConsumerMessage::Delivery(delivery)) => {
                self.link.backlog().take(delivery.body.len() + FRAMES);
                Ok(Some(delivery))
            }
            // What was acknowledged last is yet to be sent: the connection stays.
            Ok(ConsumerMessage::ClientCancelled) => Ok(None),
            Ok(end) => Err(self.end(Some(end))),
            Err(TryRecvError::Disconnected) => Err(self.end(None)),
            Err(TryRecvError::Empty) => Ok(None),
        }
    }

    /// Makes `select` wait for the next one, when there is none, or for the answer to a
    /// [question](Deliveries::ask_consumers).
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        self.link.backlog().all_taken();
        select.recv(self.receiver());
        select.recv(&self.question.answers);
    }

    fn receiver(&self) -> &Receiver<ConsumerMessage> {
        self.consuming.borrow_dependent().receiver()
    }

    fn channel(&self) -> &Channel {
        self.consuming.borrow_owner()
    }

    /// Why no more deliveries come, if `last` is what came after them.
    fn end(&mut self, last: Option<ConsumerMessage>) -> Error {
        let operation = format!("receive from {}", self.link.peer());
        let cancelled = matches!(last, Some(ConsumerMessage::ServerCancelled))
            .then(|| self.why_cancelled(&operation));
        let closed = self.link.end();
        match last {
            Some(ConsumerMessage::ServerClosedChannel(error))
            | Some(ConsumerMessage::ServerClosedConnection(error)) => {
                Error::from_amiquip(operation, error)
            }
            _ => cancelled.unwrap_or(closed),
        }
    }

    /// Why the broker has cancelled the consumer: mostly because the queue was deleted, but also
    /// where its node is down, or a message was not acknowledged for too long (RabbitMQ 4.3).
    fn why_cancelled(&self, operation: &str) -> Error {
        let reason = match self.count_consumers(Instant::now() + MAX_LOOK) {
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

    /// Waits until the broker has acted on all that was sent to it.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn barrier(&self, deadline: Instant, operation: &str) -> Result<(), Error> {
        self.link.barrier(self.channel(), left(deadline), operation)?.during(operation)
    }

    /// Asks the broker to send no more. What it has sent by then can still be received, unless there
    /// is no answer by the `deadline`, and the connection is cut.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer in time.
    pub fn cancel(&self, deadline: Instant) -> Result<(), Error> {
        let operation = "cancel the consumer";
        let cancel = || self.consuming.borrow_dependent().cancel();
        self.link.call_within(left(deadline), operation, cancel)?.during(operation)
    }

    /// How many consumers the queue has. A quorum queue counts one that is cancelled until it has
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
        self.link.call_within(left(deadline), &operation, count)?.during(operation)
    }

    /// Asks how many consumers the queue has without waiting for the answer, unless the broker is being
    /// asked already. It takes a [second channel](crate::Connection::open_second_channel).
    pub fn ask_consumers(&mut self) {
        self.question.ask(&self.queue);
    }

    /// The answer, if there is a new one: when the question was asked, and how many there are.
    pub fn consumers(&mut self) -> Option<(Instant, u32)> {
        self.question.answer()
    }

    /// Whether the broker owes an answer, or can give none.
    pub fn is_asking(&self) -> bool {
        self.question.channel.is_none()
    }

    /// Binds the queue to the exchange once more, without waiting: if somebody has deleted the exchange,
    /// the broker says so only now, or another one is there. If it fails, the next receive tells.
    pub fn bind_again(&self, exchange: &str) {
        let bound = self.channel().queue_bind_nowait(&self.queue, exchange, "", FieldTable::new());
        if let Err(error) = bound {
            log::debug!("bind: {error}");
        }
    }

    /// When something came from the broker, be it the end.
    pub fn last_received(&self) -> Instant {
        self.link.last_received()
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.link.limit
    }

    /// Closes the connection by the `deadline`, which deletes an exclusive queue, and returns what is not
    /// acknowledged to any other.
    pub fn close(mut self, deadline: Instant) {
        // The consumer ends after that: amiquip takes it for a failure of the connection if the consumer
        // is gone when the broker's answer to its cancellation comes.
        if let Err(error) = self.link.close_by(deadline) {
            log::debug!("{error}");
        }
    }
}

/// How many consumers a queue has, asked without waiting for the answer: on a channel of its own, in
/// a thread of its own.
struct Question {
    /// Unless the broker is being asked, or there is none.
    channel: Option<Channel>,
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
        Question { channel, sender, answers }
    }

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

    fn answer(&mut self) -> Option<(Instant, u32)> {
        let Answer { channel, asked, consumers } = self.answers.try_recv().ok()?;
        self.channel = Some(channel);
        Some((asked, consumers))
    }
}
