//! Consuming a queue.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Table;
use crate::connection::{CHANNEL, Connection, Lost, SECOND};
use crate::declare::{Queue, STREAM_OFFSET, StreamOffset};
use crate::error::{Error, ErrorKind};
use crate::message::{Delivery, Inbound};
use crate::method::{self, Answer};
use crate::requests::Ticket;
use crate::shared::Shared;

/// How long the broker may take to answer whether a queue still exists after it has cancelled the consumer.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// The time between two looks for a queue that still exists.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Counts received deliveries.
#[derive(Clone, Debug)]
pub struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    /// How many deliveries have been received and not been handed to the program.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// The deliveries of a queue. Dropped without [`close`](Deliveries::close), the connection is cut at once.
pub struct Deliveries {
    connection: Shared,
    queue: String,
    consumer_tag: String,
    /// Host and port, as in messages.
    peer: String,
    timeout: Duration,
    counter: ConsumerCounter,
}

/// Counts the consumers of a queue without waiting for the answer.
#[derive(Default)]
struct ConsumerCounter {
    /// The question on its way, and when it was sent.
    asked: Option<(Ticket, Instant)>,
    /// The last count, and when the broker was asked.
    last: Option<(u32, Instant)>,
}

impl Connection {
    /// Consumes a queue. From the return on, every message of the queue is delivered.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within `timeout`, by default that of the connection.
    pub fn consume(self, queue: &str, timeout: Option<Duration>) -> Result<Deliveries, Error> {
        Deliveries::start(self, queue, &Table::new(), timeout)
    }

    /// Consumes a stream from an offset on. A stream sends messages ahead only up to the
    /// [prefetch](Connection::set_prefetch), which has to be set; acknowledged messages stay in the stream.
    ///
    /// # Errors
    ///
    /// As for [`consume`](Connection::consume).
    pub fn consume_stream(
        self,
        stream: &str,
        from: StreamOffset,
        timeout: Option<Duration>,
    ) -> Result<Deliveries, Error> {
        Deliveries::start(self, stream, &stream_arguments(from), timeout)
    }

    /// Returns the consumer tag.
    fn start_consumer(
        &mut self,
        queue: &str,
        arguments: &Table,
        timeout: Duration,
    ) -> Result<String, Error> {
        let operation = format!("consume queue '{queue}'");
        match self.call(&method::consume(queue, arguments), operation, timeout)? {
            Answer::Consuming(consumer_tag) => Ok(consumer_tag),
            _ => Err(self.end()),
        }
    }
}

/// The arguments of a consumer of a stream.
pub(crate) fn stream_arguments(from: StreamOffset) -> Table {
    Table::from([(STREAM_OFFSET.into(), from.into())])
}

impl Deliveries {
    fn start(
        mut connection: Connection,
        queue: &str,
        arguments: &Table,
        timeout: Option<Duration>,
    ) -> Result<Deliveries, Error> {
        let timeout = timeout.unwrap_or(connection.timeout());
        Ok(Deliveries {
            queue: queue.into(),
            consumer_tag: connection.start_consumer(queue, arguments, timeout)?,
            peer: connection.peer().into(),
            timeout: connection.timeout(),
            counter: ConsumerCounter::default(),
            connection: Shared::new(connection),
        })
    }

    /// The next delivery, if any is there; none after the last of a consumer that was
    /// [cancelled](Deliveries::cancel).
    ///
    /// # Errors
    ///
    /// Why no more arrive, after the last delivery; by then the connection is closed.
    pub fn try_next(&mut self) -> Result<Option<Box<Delivery>>, Error> {
        loop {
            let next = self.connection.lock().try_next();
            match next {
                Ok(Some(Inbound::Delivery(delivery))) => return Ok(Some(delivery)),
                // An alarm of the broker concerns publishers only.
                Ok(Some(Inbound::Event(_))) => {}
                Ok(Some(Inbound::Cancelled)) => return Err(self.end_cancelled()),
                Ok(None) => return Ok(None),
                Err(Lost) => return Err(self.end()),
            }
        }
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Waits until a delivery has arrived, or the answer for [`consumers_since`](Deliveries::consumers_since), or one
    /// of `others` is ready, at most until `until`.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) {
        let mut connection = self.connection.lock();
        match self.counter.asked {
            None => connection.wait(others, until),
            Some((ticket, _)) => connection.wait_or_answer(ticket, others, until),
        };
    }

    /// Consumes the stream again from an offset on, on a new channel. Deliveries that
    /// [`try_next`](Deliveries::try_next) has not returned are dropped, and the tags begin with 1 again.
    ///
    /// A channel forgets which member of the stream it reads when the node is cut off from the others. It stays
    /// silent once that member has restarted (RabbitMQ 3.10 to 4.3).
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within the timeout of the connection.
    pub fn restart_stream(&mut self, prefetch: u16, from: StreamOffset) -> Result<(), Error> {
        let mut connection = self.connection.lock();
        connection.replace_channel()?;
        connection.set_prefetch(prefetch);
        let arguments = stream_arguments(from);
        self.consumer_tag = connection.start_consumer(&self.queue, &arguments, self.timeout)?;
        Ok(())
    }

    fn receiving(&self) -> String {
        format!("receive from {}", self.peer)
    }

    /// Why no more deliveries arrive.
    fn end(&mut self) -> Error {
        self.connection.lock().end_during(&self.receiving())
    }

    /// The same after the broker has cancelled the consumer.
    fn end_cancelled(&mut self) -> Error {
        let reason = self.why_cancelled(&self.receiving());
        self.connection.lock().end();
        reason
    }

    /// Why the broker has cancelled the consumer: mostly because the queue was deleted, but also
    /// because its node is down, or a message was not acknowledged for too long (RabbitMQ 4.3).
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

    /// Acknowledges the delivery with this tag, and all before it. If the connection is lost,
    /// [`try_next`](Deliveries::try_next) returns the error.
    pub fn acknowledge(&self, tag: u64) {
        self.connection.lock().send(&method::acknowledgement(CHANNEL, tag));
    }

    /// Waits until the broker has acted on all acknowledgements. Deliveries for which there is no room are dropped
    /// from now on.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn barrier(&self, deadline: Instant, operation: &str) -> Result<(), Error> {
        let mut connection = self.connection.lock();
        connection.drop_excess();
        connection.barrier(operation.into(), left(deadline))
    }

    /// How many deliveries have been received that [`try_next`](Deliveries::try_next) has not returned, for any thread.
    pub fn waiting(&self) -> Waiting {
        Waiting(self.connection.lock().waiting())
    }

    /// Cancels the consumer. Deliveries that are already sent can still be received, up to the limit of memory; the queue
    /// delivers the others again.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer by the `deadline`, which cuts it.
    pub fn cancel(&self, deadline: Instant) -> Result<(), Error> {
        let mut connection = self.connection.lock();
        connection.drop_excess();
        let cancel = method::cancel(&self.consumer_tag);
        connection.call(&cancel, "cancel the consumer".into(), left(deadline)).map(drop)
    }

    /// How many consumers the queue has. A quorum queue counts a cancelled consumer until the queue has
    /// acted on the last of its acknowledgements.
    ///
    /// # Errors
    ///
    /// A queue that is gone, a lost connection, and no answer by the `deadline`.
    pub fn count_consumers(&self, deadline: Instant) -> Result<u32, Error> {
        let operation = format!("count the consumers of queue '{}'", self.queue);
        let mut connection = self.connection.lock();
        let queue = Queue::existing(&self.queue);
        let state = connection.declare_within(&queue, operation, left(deadline))?;
        Ok(state.consumers)
    }

    /// How many consumers the queue had at `since` or later. If this is not known, a request is sent without waiting,
    /// and its answer ends a [wait](Deliveries::wait). No request is sent for an exclusive queue.
    pub fn consumers_since(&mut self, since: Instant) -> Option<u32> {
        let mut connection = self.connection.lock();
        let ConsumerCounter { asked, last } = &mut self.counter;
        if let Some((ticket, at)) = *asked
            && let Some(answer) = connection.take_answer(ticket)
        {
            *asked = None;
            match answer {
                Answer::Declared(state) => *last = Some((state.consumers, at)),
                other => log::debug!("count the consumers of queue '{}': {other:?}", self.queue),
            }
        }
        let count = last.filter(|(_, asked)| *asked >= since).map(|(consumers, _)| consumers);
        if count.is_none() && asked.is_none() && connection.has_second() {
            let declare = method::declare_queue(&Queue::existing(&self.queue));
            let ticket = connection.request(SECOND, &declare, "count the consumers".into());
            connection.flush();
            *asked = Some((ticket, Instant::now()));
        }
        count
    }

    /// Whether [`consumers_since`](Deliveries::consumers_since) waits for an answer, or will never get one.
    pub fn is_counting(&self) -> bool {
        let connection = self.connection.lock();
        match self.counter.asked {
            Some((ticket, _)) => connection.is_pending(ticket) || !connection.has_second(),
            None => !connection.has_second(),
        }
    }

    /// Binds the queue to the exchange once more, without waiting: if the exchange was deleted, the broker
    /// refuses only now, and if it was declared again, the binding is restored. A failure is the error of the next
    /// receive.
    pub fn bind_again(&self, exchange: &str, routing_key: &str) {
        let bind = method::bind(&self.queue, exchange, routing_key).frame(CHANNEL);
        self.connection.lock().send(&bind);
    }

    /// When the broker last sent anything; the end of the connection counts too.
    pub fn last_received(&self) -> Instant {
        self.connection.lock().last_received()
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Closes the connection by the `deadline`. The broker deletes an exclusive queue; to any other queue it
    /// returns the messages that are not acknowledged.
    pub fn close(self, deadline: Instant) {
        self.connection.lock().close_by(deadline);
    }
}

/// The time left until a deadline that may have passed.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
