//! The storage of unconfirmed messages.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use amqp::Error as AmqpError;
use amqp::retry::RetryFor;
use anyhow::Error;

use crate::message::Message;
use crate::window::Window;

/// Whether the broker accepts messages, from the worst state to the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BrokerState {
    /// There is no connection.
    Disconnected,
    /// Messages wait until receivers are back, or until a queue has room.
    Holding,
    /// The broker has an alarm and reads no messages.
    Blocked,
    /// Messages are sent.
    Ready,
}

/// The limits of the wait for the last confirms.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// How long the broker may confirm nothing.
    pub patience: RetryFor,
    /// How long the publisher waits for the last confirms after a signal.
    pub grace: Duration,
}

/// The lowest number of each run.
pub fn first_numbers<'m>(messages: impl Iterator<Item = &'m Message>) -> BTreeMap<u64, u64> {
    let mut first = BTreeMap::new();
    for Message { run, number, .. } in messages {
        let lowest = first.entry(*run).or_insert(*number);
        *lowest = (*lowest).min(*number);
    }
    first
}

/// Holds all unconfirmed messages, in the order in which they are sent.
pub trait Outbox: Send {
    /// The messages that are sent and not confirmed.
    fn window(&self) -> &Window;

    /// The same, to change it.
    fn window_mut(&mut self) -> &mut Window;

    /// Whether the publisher must wait for a first broker before it reads input.
    fn needs_broker(&self) -> bool {
        true
    }

    /// Adds a message of the input behind all others. Even with an error, the message is in the outbox.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn put(&mut self, message: Message) -> Result<(), Error>;

    /// Whether to read more of the input.
    fn accepts_input(&self, broker: BrokerState) -> bool;

    /// Moves the next message to be sent into the window, and returns it. `None` if no message can be sent now.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn next(&mut self, broker: BrokerState) -> Result<Option<Message>, Error>;

    /// Does the work that is due, such as writing messages to disk.
    ///
    /// # Errors
    ///
    /// When the storage is damaged, or when all messages are confirmed before one that the broker does not accept.
    fn work(&mut self, broker: BrokerState) -> Result<(), Error>;

    /// The lowest number of an unconfirmed record of each run that has one. `None` if messages were given up.
    fn first_unconfirmed(&self) -> Option<BTreeMap<u64, u64>> {
        Some(first_numbers(self.window().unconfirmed()))
    }

    /// The latest time of the next call of [`work`](Outbox::work).
    fn next_time(&self, _broker: BrokerState) -> Option<Instant> {
        None
    }

    /// Splits or drops messages to be sent again that are larger than `limit` bytes. `cause` is the broker's error for
    /// such a message.
    fn limit_bodies(&mut self, limit: usize, cause: &AmqpError);

    /// Whether all messages are confirmed.
    fn is_empty(&self) -> bool;

    /// When to [`sync`](Outbox::sync). `_are_elsewhere`: some records are not in the outbox yet.
    fn sync_time(&self, _are_elsewhere: bool) -> Option<Instant> {
        None
    }

    /// Writes all messages to the disk, so that a power cut does not lose them. This can take long.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn sync(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The limits of the wait for the last confirms; `None` if the outbox does not keep messages after the end.
    fn ending(&self) -> Option<Ending> {
        None
    }

    /// The error when a limit of [`ending`](Outbox::ending) has passed; `what` describes the state of the broker.
    fn timeout_error(&self, what: String) -> Error {
        AmqpError::unavailable(what).into()
    }

    /// Closes the outbox.
    ///
    /// # Errors
    ///
    /// When records are lost.
    fn close(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
