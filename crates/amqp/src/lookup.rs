//! Reading a part of a stream, before the connection consumes a queue.
//!
//! A lookup uses the second channel. No delivery of the lookup arrives after the broker has confirmed the end of that
//! channel.

use std::time::{Duration, Instant};

use crate::connection::{Connection, Lost, SECOND};
use crate::consuming::stream_arguments;
use crate::declare::{Queue, StreamOffset};
use crate::error::{Error, ErrorKind};
use crate::message::{Delivery, Inbound};
use crate::method;
use crate::requests::Ticket;

/// The messages of a stream from an offset on. Dropping it closes its channel and waits for the answer.
pub struct Lookup<'a> {
    connection: &'a mut Connection,
    /// The operation, as in messages.
    operation: String,
    /// The answer before which all deliveries arrive that the broker has sent.
    requested: Option<Ticket>,
}

impl Connection {
    /// Whether a queue or stream of this name exists.
    ///
    /// # Errors
    ///
    /// Another refusal, a lost connection, and no answer within the connection timeout.
    pub fn queue_exists(&mut self, name: &str) -> Result<bool, Error> {
        self.open_second()?;
        let (queue, timeout) = (Queue::existing(name), self.timeout());
        match self.call_on(SECOND, &method::declare_queue(&queue), queue.declaring(), timeout) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a stream from an offset on. The broker sends `prefetch` messages ahead of their acknowledgement.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within the connection timeout.
    pub fn look_up(
        &mut self,
        stream: &str,
        prefetch: u16,
        from: StreamOffset,
    ) -> Result<Lookup<'_>, Error> {
        self.open_second()?;
        self.request(SECOND, &method::qos(prefetch), "set the prefetch count".into());
        let (operation, timeout) = (format!("consume queue '{stream}'"), self.timeout());
        let lookup = Lookup {
            connection: self,
            operation: format!("read stream '{stream}'"),
            requested: None,
        };
        let consume = method::consume(stream, &stream_arguments(from));
        lookup.connection.call_on(SECOND, &consume, operation, timeout)?;
        Ok(lookup)
    }
}

impl Lookup<'_> {
    /// Waits for the next delivery, at most until `until`.
    ///
    /// # Errors
    ///
    /// The end of the consumer, of the channel or of the connection.
    pub fn next(&mut self, until: Instant) -> Result<Option<Box<Delivery>>, Error> {
        loop {
            match self.connection.try_next() {
                Ok(Some(Inbound::Delivery(delivery))) => return Ok(Some(delivery)),
                // An alarm at the broker, which concerns publishers.
                Ok(Some(Inbound::Event(_))) => {}
                Ok(Some(Inbound::Cancelled)) => {
                    let operation = &self.operation;
                    let text = format!("{operation}: the broker cancelled the consumer");
                    return Err(Error::unavailable(text));
                }
                Ok(None) => {
                    if let Some(refusal) = self.connection.refusal_on_second(&self.operation) {
                        return Err(refusal);
                    }
                    let is_answered =
                        self.requested.is_some_and(|t| !self.connection.is_pending(t));
                    if is_answered || Instant::now() >= until {
                        return Ok(None);
                    }
                    self.connection.wait_for_lookup(self.requested, until);
                }
                Err(Lost) => return Err(self.connection.end_during(&self.operation)),
            }
        }
    }

    /// Waits for the next of the deliveries that the broker has sent before this was first called; `None` after the
    /// last.
    ///
    /// # Errors
    ///
    /// As for [`next`](Lookup::next), and no answer by the `deadline`.
    pub fn next_sent(&mut self, deadline: Instant) -> Result<Option<Box<Delivery>>, Error> {
        let requested = *self.requested.get_or_insert_with(|| {
            // The prefetch count is for later consumers of this channel, of which there are none.
            self.connection.request(SECOND, &method::qos(0), self.operation.clone())
        });
        let next = self.next(deadline)?;
        if next.is_none() && self.connection.is_pending(requested) {
            return Err(Error::unavailable(format!("{}: no answer in time", self.operation)));
        }
        Ok(next)
    }

    /// Acknowledges the delivery with this tag, and all before it.
    pub fn acknowledge(&mut self, tag: u64) {
        self.connection.send(&method::acknowledgement(SECOND, tag));
    }

    /// How long the broker may take to answer.
    pub fn timeout(&self) -> Duration {
        self.connection.timeout()
    }
}

impl Drop for Lookup<'_> {
    fn drop(&mut self) {
        self.connection.close_second();
    }
}
