//! Messages and events of the broker.

use crate::Properties;

/// A message for the consumer.
#[derive(Clone, Debug, Default)]
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

/// A message that no queue has taken.
#[derive(Debug, Default)]
pub struct Return {
    /// The broker's reason.
    pub reply_text: String,
    /// The body.
    pub content: Vec<u8>,
    /// The properties, as they were published.
    pub properties: Properties,
}

/// An event of the broker. They come in the order in which they count: a message is returned before its
/// confirmation.
#[derive(Debug)]
pub enum Event {
    /// The message with this delivery tag is confirmed, or all up to it.
    Confirmed {
        /// Messages are counted from 1.
        tag: u64,
        /// Whether all earlier messages are meant as well.
        multiple: bool,
    },
    /// A queue has nacked the message with this delivery tag, or all up to it.
    Nacked {
        /// Messages are counted from 1.
        tag: u64,
        /// Whether all earlier messages are meant as well.
        multiple: bool,
    },
    /// No queue has taken this message.
    Returned(Box<Return>),
    /// The broker takes no messages for now, for this reason.
    Blocked(String),
    /// The broker takes messages again.
    Unblocked,
}

/// A message or event of the broker, in the order of arrival.
#[derive(Debug)]
pub(crate) enum Inbound {
    /// A message for the consumer.
    Delivery(Box<Delivery>),
    /// News for the publisher.
    Event(Event),
    /// The broker has cancelled the consumer.
    Cancelled,
}
