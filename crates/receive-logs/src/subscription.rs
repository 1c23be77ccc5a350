//! The deliveries of a queue, and their acknowledgements.

use std::os::fd::BorrowedFd;
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Deliveries, Delivery, Error, NO_KEY, Waiting};

use crate::cli::QueueType;
use crate::queue::{BoundQueue, DurableQueue, Source};
use crate::written::Written;

/// Messages that the broker sends ahead of their acknowledgement. They bound the memory; a larger
/// number is not faster.
pub const PREFETCH: u16 = 2000;

/// How long a received message may stay unacknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// How long the queue may be without its binding unnoticed.
const BIND_AFTER: Duration = Duration::from_secs(10);

/// How long a quorum queue may take to apply the last acknowledgement, where the deadline of
/// stopping allows. Milliseconds are usual; a receiver that joins meanwhile hides the end.
const SETTLING: Duration = Duration::from_secs(1);

/// When deliveries are acknowledged, which makes the broker send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credit {
    /// Repeatedly, so that there are always deliveries on their way.
    Renewed,
    /// At the end, as `--count` asks for no more messages than these; before, if repeats use them up.
    Once(u16),
}

impl Credit {
    /// How many unacknowledged deliveries there can be.
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
    /// Others too, now or recently.
    Shared,
    /// The broker has not answered yet.
    Unknown,
}

/// A running subscription. Dropped without [`close`](Subscription::close), its connection is cut at once.
pub struct Subscription {
    deliveries: Deliveries,
    /// What is consumed.
    pub queue: BoundQueue,
    credit: Credit,
    /// The tag of the last message that is written and not acknowledged.
    last_written: Option<u64>,
    /// Deliveries received since the last acknowledgement, and when the next one is due.
    unacknowledged: u16,
    acknowledge_at: Option<Instant>,
    is_cancelled: bool,
    bind_at: Instant,
    /// When the broker had confirmed the consumer.
    pub begun_at: Instant,
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
            begun_at: Instant::now(),
        }
    }

    /// The next delivery, if there is one.
    ///
    /// # Errors
    ///
    /// After the last delivery, why there are no more; by then the connection is closed.
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

    /// The next delivery that has reached this machine, if there is one.
    ///
    /// # Errors
    ///
    /// As for [`try_next`](Subscription::try_next).
    pub fn next_here(&mut self) -> Result<Option<Box<Delivery>>, Error> {
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

    /// Waits until a delivery has arrived, or an answer about consumers, or one of `others` is ready, at most `until`
    /// then.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) {
        self.deliveries.wait(others, until);
    }

    /// Who consumes the queue, if the broker has counted after that `time`. Otherwise the broker is
    /// asked; the answer ends a [wait](Subscription::wait).
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

    /// Whether an answer of the broker is pending, or impossible.
    pub fn is_asking(&self) -> bool {
        self.queue.durable().is_some() && self.deliveries.is_counting()
    }

    /// Whether others consume the queue, asking the broker by the `deadline`. Without an answer they
    /// count as absent: a gap reported in vain is better than one that is not reported.
    pub fn has_other_consumers(&self, deadline: Instant) -> bool {
        let own = u32::from(!self.is_cancelled);
        let are_there =
            || self.deliveries.count_consumers(deadline).is_ok_and(|consumers| consumers > own);
        self.queue.durable().is_some_and(|queue| queue.is_shared() || are_there())
    }

    /// Acknowledges messages, together with later ones: when half of the prefetch count is received, after a second,
    /// or [at once](Subscription::send_acknowledgement).
    ///
    /// Only `Output` returns a `Written`, after the bytes have left the process:
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

    /// Whether enough messages were received to write and acknowledge them now, before the broker has no more
    /// credit to send.
    pub fn wants_acknowledgement(&self) -> bool {
        self.unacknowledged >= self.credit.acknowledged_after()
    }

    /// Acknowledges, and binds the queue again, if it is time.
    pub fn run_timers(&mut self) {
        let now = Instant::now();
        if self.acknowledge_at.is_some_and(|time| time <= now) {
            self.send_acknowledgement();
        }
        if self.bind_at <= now {
            self.bind_again();
        }
    }

    /// When to [run the timers](Subscription::run_timers) at the latest.
    pub fn next_timer(&self) -> Instant {
        self.acknowledge_at.map_or(self.bind_at, |time| time.min(self.bind_at))
    }

    /// Binds the queue to the exchange once more: that the exchange was deleted, and perhaps declared
    /// again without the binding, shows in no other way. A failure ends the deliveries.
    fn bind_again(&mut self) {
        self.bind_at = Instant::now() + BIND_AFTER;
        if self.queue.rebinds {
            self.deliveries.bind_again(&self.queue.exchange, NO_KEY);
        }
    }

    /// Sends the acknowledgement of all messages that are written. If that fails, the deliveries end.
    pub fn send_acknowledgement(&mut self) {
        (self.unacknowledged, self.acknowledge_at) = (0, None);
        if let Some(tag) = self.last_written.take() {
            self.deliveries.acknowledge(tag);
        }
    }

    /// When the broker last sent anything, including the end of the connection.
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

    /// Sends the acknowledgement of all messages that are written, and waits until the broker has acted on it,
    /// so that none of them is delivered again after the end of the connection.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts the connection.
    pub fn acknowledge_all(&mut self, deadline: Instant) -> Result<(), Error> {
        let Some(&DurableQueue { kind, .. }) = self.queue.durable() else {
            // The queue is deleted with the connection; a stream keeps its messages.
            return Ok(());
        };
        if matches!(self.credit, Credit::Once(_)) {
            // To a consumer, the broker would answer the acknowledgement with more messages.
            self.cancel(deadline)?;
        }
        if self.is_cancelled && self.last_written.is_some() && kind == QueueType::Quorum {
            return self.acknowledge_to_quorum(deadline);
        }
        self.send_acknowledgement();
        self.deliveries.barrier(deadline, "acknowledge written messages")
    }

    /// Acknowledges the rest of a cancelled consumer, and waits until its quorum queue forgets the
    /// consumer. An answer of the channel proves too little: RabbitMQ (3.10 to 4.3) puts acknowledgements
    /// off while the queue has more than 32 commands of the channel to apply, such as the returns of
    /// cancelled deliveries, and drops those put off when the connection closes.
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

    /// Closes the connection by the `deadline`. That deletes an exclusive queue, and returns to any
    /// other the messages that are not acknowledged.
    pub fn close(self, deadline: Instant) {
        self.deliveries.close(deadline);
    }
}

#[cfg(test)]
mod tests {
    use amqp::ErrorKind;
    use clap::Parser;
    use logs_tests::{
        CONSUME, EXCHANGE_DECLARE, QUEUE_BIND, QUEUE_DECLARE, QueueCounts, ScriptedBroker,
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

    #[test]
    fn a_stream_is_bound_before_its_end_is_found() {
        let broker = ScriptedBroker::start();
        broker.withhold(CONSUME);
        let cli = Cli::parse_from(["receive-logs", "--uri", &broker.url(), "--stream", "s"]);
        let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
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
            let config = SubscriptionConfig::new(&cli, None, &Environment::default()).unwrap();
            let subscribe = || config.prepare()?.consume(None);
            assert_eq!(subscribe().err().unwrap().kind(), ErrorKind::NotAStream);
            assert_eq!(broker.count_requests(QUEUE_BIND), 0, "{start:?}");
        }
    }
}
