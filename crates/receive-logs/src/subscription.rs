//! The deliveries of a queue and their acknowledgements.

use std::os::fd::BorrowedFd;
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Deliveries, Delivery, Error, Waiting};

use crate::cli::QueueType;
use crate::queue::{BoundQueue, DurableQueue, Source};
use crate::stream::cursor::Cursor;
use crate::written::Written;

/// The number of messages that the broker sends ahead of their acknowledgement. It limits the memory; a larger number
/// is not faster.
pub const PREFETCH: u16 = 2000;

/// How long a received message may stay unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// How long the loss of the binding may remain unnoticed.
const BIND_AFTER: Duration = Duration::from_secs(10);

/// How long a stream is silent until it is consumed again. The broker does not report a consumer that it no longer
/// serves.
const CONSUME_AFTER: Duration = Duration::from_secs(30);

/// How long a quorum queue may take to apply the last acknowledgement, if the deadline of the stop allows it. It
/// usually takes milliseconds. If another receiver joins meanwhile, the number of consumers does not fall, and this
/// time passes in full.
const SETTLING: Duration = Duration::from_secs(1);

/// When deliveries are acknowledged. An acknowledgement makes the broker send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credit {
    /// Repeatedly, so that the broker always has credit to send.
    Renewed,
    /// At the end, because `--count` needs only this number of messages. Earlier if duplicates use up the credit.
    Once(u16),
}

impl Credit {
    /// The maximum number of unacknowledged deliveries.
    pub fn prefetch(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH,
            Credit::Once(count) => count,
        }
    }

    /// The number of deliveries to acknowledge together.
    fn acknowledged_after(self) -> u16 {
        match self {
            Credit::Renewed => PREFETCH / 2,
            // Reached before --count only if there are duplicates. An earlier acknowledgement would make the broker
            // send messages beyond --count.
            Credit::Once(count) => count,
        }
    }
}

/// The consumers of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Only this receiver, at the time when the broker counted.
    Alone,
    /// Other receivers as well, now or recently.
    Shared,
    /// The broker has not answered yet.
    Unknown,
}

/// A running subscription. Dropping it without [`close`](Subscription::close) cuts its connection at once.
pub struct Subscription {
    deliveries: Deliveries,
    /// The queue that is consumed.
    pub queue: BoundQueue,
    credit: Credit,
    /// The tag of the last message that is written but not acknowledged.
    last_written: Option<u64>,
    /// Deliveries received since the last acknowledgement, and when the next one is due.
    unacknowledged: u16,
    acknowledge_at: Option<Instant>,
    is_cancelled: bool,
    bind_at: Instant,
    consume_at: Instant,
    /// When the broker confirmed the consumer.
    pub started_at: Instant,
}

impl Subscription {
    pub(crate) fn new(deliveries: Deliveries, queue: BoundQueue, credit: Credit) -> Subscription {
        Subscription {
            deliveries,
            queue,
            credit,
            last_written: None,
            unacknowledged: 0,
            acknowledge_at: None,
            is_cancelled: false,
            bind_at: Instant::now() + BIND_AFTER,
            consume_at: Instant::now() + CONSUME_AFTER,
            started_at: Instant::now(),
        }
    }

    /// The next delivery; `None` if none has arrived.
    ///
    /// # Errors
    ///
    /// After the last delivery, the reason of the end. The connection is closed then.
    pub fn try_next(&mut self) -> Result<Option<Box<Delivery>>, Error> {
        let next = match self.queue.cursor_mut() {
            Some(cursor) => cursor.try_next(&mut self.deliveries)?,
            None => self.deliveries.try_next()?,
        };
        if next.is_some() {
            self.unacknowledged += 1;
            self.acknowledge_at.get_or_insert_with(|| Instant::now() + ACK_AFTER);
        }
        Ok(next)
    }

    /// The next delivery that has arrived at this machine, without waiting; `None` if there is none.
    ///
    /// # Errors
    ///
    /// As for [`try_next`](Subscription::try_next).
    pub fn next_arrived(&mut self) -> Result<Option<Box<Delivery>>, Error> {
        let next = self.try_next()?;
        if next.is_some() {
            return Ok(next);
        }
        self.wait(&[], Some(Instant::now()));
        self.try_next()
    }

    /// The number of deliveries that are received and not returned yet, readable from any thread.
    pub fn waiting(&self) -> Waiting {
        self.deliveries.waiting()
    }

    /// Host and port of the broker, for messages.
    pub fn peer(&self) -> &str {
        self.deliveries.peer()
    }

    /// Waits until a delivery or an answer about consumers arrives, one of `others` is ready, or the time is `until`.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) {
        self.deliveries.wait(others, until);
    }

    /// Who consumes the queue, if the broker has counted after `time`. Otherwise this asks the broker, whose answer
    /// ends a [wait](Subscription::wait).
    pub fn sharing(&mut self, time: Instant) -> Sharing {
        let Source::Durable(queue) = &mut self.queue.source else {
            return Sharing::Alone;
        };
        if queue.is_shared() {
            return Sharing::Shared;
        }
        match self.deliveries.consumers_since(time) {
            None => Sharing::Unknown,
            Some(..=1) => Sharing::Alone,
            Some(_) => {
                let name = &self.queue.name;
                log::info!("queue '{name}' has other receivers: gaps are not reported");
                queue.record_other_consumers();
                Sharing::Shared
            }
        }
    }

    /// Whether an answer about consumers is pending, or can no longer arrive.
    pub fn is_asking(&self) -> bool {
        self.queue.durable().is_some() && self.deliveries.is_counting()
    }

    /// Asks the broker, until the `deadline`, whether the queue has other consumers. Without an answer it has none,
    /// because a gap that is reported in vain is better than one that is not reported.
    pub fn has_other_consumers(&self, deadline: Instant) -> bool {
        let own = u32::from(!self.is_cancelled);
        let are_there =
            || self.deliveries.count_consumers(deadline).is_ok_and(|consumers| consumers > own);
        self.queue.durable().is_some_and(|queue| queue.is_shared() || are_there())
    }

    /// Marks messages for acknowledgement. They are acknowledged together with later ones: after half of the prefetch
    /// count, after a second, or by [`send_acknowledgement`](Subscription::send_acknowledgement).
    ///
    /// Only `Output` returns a `Written`, when the bytes have left the process:
    ///
    /// ```
    /// # use receive_logs::{message::Message, output::Output, subscription::Subscription};
    /// fn copy(message: Message, output: &mut Output, subscription: &mut Subscription) {
    ///     output.write(&message).unwrap();
    ///     subscription.acknowledge(output.flush().unwrap());
    /// }
    /// ```
    ///
    /// A message that was only received cannot be acknowledged:
    ///
    /// ```compile_fail,E0308
    /// # use receive_logs::{message::Message, output::Output, subscription::Subscription};
    /// fn copy(message: Message, output: &mut Output, subscription: &mut Subscription) {
    ///     output.write(&message).unwrap();
    ///     subscription.acknowledge(message);
    /// }
    /// ```
    pub fn acknowledge(&mut self, written: Written) {
        if let Some(tag) = written.last_tag() {
            if let Some(cursor) = self.queue.cursor_mut() {
                cursor.record_written(tag);
            }
            self.last_written = Some(tag);
        }
    }

    /// Whether to write and acknowledge now, before the broker runs out of credit.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= self.credit.acknowledged_after()
    }

    /// Acknowledges messages, binds the queue and consumes a stream again if it is time.
    pub fn run_timers(&mut self) {
        let now = Instant::now();
        if self.acknowledge_at.is_some_and(|time| time <= now) {
            self.send_acknowledgement();
        }
        if self.bind_at <= now {
            self.bind_again();
        }
        if self.consume_at <= now {
            self.consume_again();
        }
    }

    /// When to call [`run_timers`](Subscription::run_timers) at the latest.
    pub fn next_timer(&self) -> Instant {
        let timer = self.bind_at.min(self.consume_at);
        self.acknowledge_at.map_or(timer, |time| time.min(timer))
    }

    /// Binds the queue to the exchange again. The broker does not report that an exchange is deleted, and a new
    /// exchange of that name does not have the binding. An error ends the deliveries.
    fn bind_again(&mut self) {
        self.bind_at = Instant::now() + BIND_AFTER;
        if self.queue.rebinds {
            self.queue.bindings.bind_again(&self.deliveries);
        }
    }

    /// Consumes a silent stream where its reading stopped. An error ends the deliveries.
    fn consume_again(&mut self) {
        self.consume_at = Instant::now() + CONSUME_AFTER;
        let Some(from) = self.queue.cursor().and_then(Cursor::offset_to_continue) else {
            return;
        };
        match self.deliveries.restart_stream(self.credit.prefetch(), from) {
            Ok(()) => log::debug!("silent stream '{}' is consumed again", self.queue.name),
            Err(failure) => log::debug!("{failure}"),
        }
    }

    /// Acknowledges all written messages. An error ends the deliveries.
    pub fn send_acknowledgement(&mut self) {
        (self.unacknowledged, self.acknowledge_at) = (0, None);
        self.consume_at = Instant::now() + CONSUME_AFTER;
        if let Some(tag) = self.last_written.take() {
            self.deliveries.acknowledge(tag);
        }
    }

    /// When the broker last sent anything, including the end of the connection.
    pub fn last_received(&self) -> Instant {
        self.deliveries.last_received()
    }

    /// Cancels the consumer. Deliveries that the broker has sent by then can still be received. Without an answer by
    /// the `deadline`, the connection is cut.
    ///
    /// # Errors
    ///
    /// A lost connection, or no answer in time.
    pub fn cancel(&mut self, deadline: Instant) -> Result<(), Error> {
        self.is_cancelled = true;
        self.deliveries.cancel(deadline)
    }

    /// Acknowledges all written messages, and waits until the broker has processed the acknowledgement. Otherwise it
    /// could deliver them again after the end of the connection.
    ///
    /// # Errors
    ///
    /// A lost connection, or no answer by the `deadline`, which cuts the connection.
    pub fn acknowledge_all(&mut self, deadline: Instant) -> Result<(), Error> {
        let Some(&DurableQueue { kind, .. }) = self.queue.durable() else {
            // The queue is deleted with the connection; a stream keeps its messages.
            return Ok(());
        };
        if matches!(self.credit, Credit::Once(_)) {
            // If the consumer were not cancelled, the broker would answer the acknowledgement with more messages.
            self.cancel(deadline)?;
        }
        if self.is_cancelled && self.last_written.is_some() && kind == QueueType::Quorum {
            return self.acknowledge_to_quorum(deadline);
        }
        self.send_acknowledgement();
        self.deliveries.barrier(deadline, "acknowledge written messages")
    }

    /// Acknowledges the remaining messages of a cancelled consumer, and waits until the quorum queue has removed the
    /// consumer. An answer on the channel is not sufficient: RabbitMQ (3.10 to 4.3) delays acknowledgements while the
    /// queue has more than 32 commands of the channel to apply, such as the returns of cancelled deliveries. When the
    /// connection closes, it drops the delayed ones.
    fn acknowledge_to_quorum(&mut self, deadline: Instant) -> Result<(), Error> {
        let consumers = self.deliveries.count_consumers(deadline)?;
        self.send_acknowledgement();
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

    /// Closes the connection by the `deadline`. The broker then deletes an exclusive queue. In any other queue, it
    /// makes unacknowledged messages available again.
    pub fn close(self, deadline: Instant) {
        self.deliveries.close(deadline);
    }
}

#[cfg(test)]
mod tests {
    use amqp::{ErrorKind, stream_offset};
    use clap::Parser;
    use logs_tests::{
        CONSUME, EXCHANGE_DECLARE, Message, QUEUE_BIND, QUEUE_DECLARE, QueueCounts, ScriptedBroker,
        StreamMessage, wait_until,
    };

    use super::*;
    use crate::cli::Cli;
    use crate::environment::Environment;
    use crate::prepare::SubscriptionConfig;

    #[test]
    fn a_passive_receiver_of_a_stream_never_binds() {
        for (passive, bindings) in [(&["--passive"][..], 0), (&[], 2)] {
            let broker = ScriptedBroker::start();
            broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
            let arguments = ["receive-logs", "--uri", &broker.url(), "--stream", "s"];
            let cli = Cli::parse_from([&arguments, passive].concat());
            let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
            let mut subscription = config.prepare().unwrap().consume(None).unwrap();
            subscription.bind_at = Instant::now();
            subscription.run_timers();
            let deadline = Instant::now() + subscription.timeout();
            subscription.deliveries.barrier(deadline, "test").unwrap();
            assert_eq!(broker.count_requests(QUEUE_BIND), bindings);
            assert_eq!(broker.count_requests(EXCHANGE_DECLARE), bindings.min(1));
        }
    }

    /// A subscription to the stream of a scripted broker.
    fn stream_of(broker: &ScriptedBroker) -> Subscription {
        let cli = Cli::parse_from(["receive-logs", "--uri", &broker.url(), "--stream", "s"]);
        let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
        config.prepare().unwrap().consume(None).unwrap()
    }

    /// Waits for the next message of a stream, and returns its offset.
    fn next_written(subscription: &mut Subscription) -> u64 {
        let mut next = None;
        wait_until("a message arrives", || {
            next = subscription.next_arrived().unwrap();
            next.is_some()
        });
        let next = next.unwrap();
        subscription.queue.cursor_mut().unwrap().record_written(next.tag);
        stream_offset(&next).unwrap()
    }

    #[test]
    fn a_silent_stream_is_consumed_where_it_stopped() {
        let messages = |count| {
            let message = |offset| StreamMessage { offset, arrived: 0, message: Message::new("") };
            (0..count).map(message)
        };
        for (before, read) in [(0, 0), (3, 0), (3, 2)] {
            let broker = ScriptedBroker::start();
            broker.set_stream(messages(before));
            let mut subscription = stream_of(&broker);
            broker.set_stream(messages(before + read));
            for offset in before..before + read {
                assert_eq!(next_written(&mut subscription), offset);
            }
            let deadline = Instant::now() + subscription.timeout();
            let settle = || subscription.deliveries.barrier(deadline, "test").unwrap();
            settle();
            broker.forget_consumers();
            broker.set_stream(messages(before + read + 2));
            settle();
            assert!(subscription.next_arrived().unwrap().is_none());

            subscription.consume_at = Instant::now();
            subscription.run_timers();
            assert_eq!(next_written(&mut subscription), before + read);
            assert_eq!(next_written(&mut subscription), before + read + 1);
        }
    }

    #[test]
    fn a_stream_is_bound_before_its_end_is_found() {
        let broker = ScriptedBroker::start();
        broker.set_stream([]);
        broker.withhold(CONSUME);
        let cli = Cli::parse_from(["receive-logs", "--uri", &broker.url(), "--stream", "s"]);
        let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
        thread::spawn(move || config.prepare().map(drop));
        broker.wait_for_requests(CONSUME, 1);
        broker.wait_for_requests(QUEUE_BIND, 1);
    }

    #[test]
    fn a_queue_that_is_not_a_stream_is_never_bound() {
        for start in [&[][..], &["--from-start"]] {
            let broker = ScriptedBroker::start();
            broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
            let other = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 's'";
            broker.refuse(QUEUE_DECLARE, 406, other);
            let no_stream = "PRECONDITION_FAILED - invalid arg 'x-stream-offset' for queue 's'";
            broker.refuse(CONSUME, 406, no_stream);
            let arguments = ["receive-logs", "--uri", &broker.url(), "--stream", "s"];
            let cli = Cli::parse_from([&arguments, start].concat());
            let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
            let subscribe = || config.prepare()?.consume(None);
            assert_eq!(subscribe().err().unwrap().kind(), ErrorKind::NotAStream);
            assert_eq!(broker.count_requests(QUEUE_BIND), 0, "{start:?}");
        }
    }
}
