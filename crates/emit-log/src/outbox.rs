//! Where messages are until the broker has confirmed them.

use std::time::{Duration, Instant};

use amqp::Error as AmqpError;
use amqp::retry::RetryFor;
use anyhow::Error;

use crate::message::Message;
use crate::window::Window;

/// Whether the broker takes messages, from the worst to the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broker {
    /// There is no connection.
    Away,
    /// Messages wait for receivers to come back, or for a queue to get room.
    Holding,
    /// An alarm is on: the broker takes no messages at present.
    Blocked,
    /// Messages go out.
    Ready,
}

/// How the wait for the last confirmations ends.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// How long the broker may confirm nothing.
    pub patience: RetryFor,
    /// How long the broker may take for the rest after a signal.
    pub grace: Duration,
}

/// Holds all messages that are not confirmed, in the order in which they are sent.
pub trait Outbox: Send {
    /// The messages that were sent.
    fn window(&self) -> &Window;

    /// The messages that were sent.
    fn window_mut(&mut self) -> &mut Window;

    /// Whether nothing can be done before there is a first broker.
    fn needs_broker(&self) -> bool {
        true
    }

    /// Takes a message of the input, to be sent after all others. Even with an error, the message is in the outbox.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn put(&mut self, message: Message) -> Result<(), Error>;

    /// Whether to read more of the input.
    fn takes_input(&self, broker: Broker) -> bool;

    /// The next message to be sent, which is in the window from now on; `None` for not now.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn next(&mut self, broker: Broker) -> Result<Option<Message>, Error>;

    /// Does what is due.
    ///
    /// # Errors
    ///
    /// When the storage is damaged, or all is confirmed before a message that the broker cannot take.
    fn work(&mut self, broker: Broker) -> Result<(), Error>;

    /// When to [`work`](Outbox::work) again at the latest.
    fn next_time(&self, _broker: Broker) -> Option<Instant> {
        None
    }

    /// Lets no message be sent again that is larger than `limit` bytes, as the broker has refused one because of
    /// `cause`. Batches are split.
    fn limit_bodies(&mut self, limit: usize, cause: &AmqpError);

    /// Whether all messages are confirmed.
    fn is_empty(&self) -> bool;

    /// When to [`sync`](Outbox::sync). First all records are to be in the outbox; `_are_elsewhere`: some are not yet.
    fn sync_time(&self, _are_elsewhere: bool) -> Option<Instant> {
        None
    }

    /// Makes sure that all messages outlive the system. That can take long.
    ///
    /// # Errors
    ///
    /// When the storage is damaged.
    fn sync(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// How the wait for the last confirmations ends; `None` if messages that are given up are lost.
    fn ending(&self) -> Option<Ending> {
        None
    }

    /// The error when the time of [`ending`](Outbox::ending) is up, with `what` the broker has done.
    fn given_up(&self, what: String) -> Error {
        AmqpError::unavailable(what).into()
    }

    /// Ends the use of the outbox.
    ///
    /// # Errors
    ///
    /// When records are lost.
    fn close(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
