//! The queue of a subscription: exclusive, durable, or a stream.

use std::time::{Duration, Instant};

use amqp::{Durability, QueueState};

use crate::cli::QueueType;
use crate::stream::cursor::Cursor;
use crate::stream::place::Place;

/// How long a queue counts as shared after the broker has counted other consumers. One of them may be
/// that of our own lost connection, which the broker keeps for three heartbeats at most.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// A queue bound to the exchange.
pub struct BoundQueue {
    /// The name of the queue.
    pub name: String,
    /// What kind of queue it is.
    pub source: Source,
    /// Whether the exchange outlives the broker, and with it the binding of a queue that does.
    pub durability: Durability,
    /// The exchange.
    pub exchange: String,
    /// Whether to bind the queue to the exchange again from time to time.
    pub rebinds: bool,
}

/// Where the messages are from.
pub enum Source {
    /// A queue that is deleted with its connection.
    Exclusive,
    /// A queue that stays.
    Durable(DurableQueue),
    /// A stream, from which nothing is taken out.
    Stream(Box<Cursor>),
}

/// A queue that stays when its receivers end.
pub struct DurableQueue {
    /// Its type, if it is declared here.
    pub kind: QueueType,
    /// How many messages waited in the queue.
    pub queued: u32,
    /// Whether the queue had to be created again because it was deleted.
    pub is_new: bool,
    /// Until when others are taken to consume the queue.
    shared_until: Option<Instant>,
}

impl DurableQueue {
    /// A queue that existed or was created, in this state.
    pub fn new(kind: QueueType, state: &QueueState) -> DurableQueue {
        let mut queue =
            DurableQueue { kind, queued: state.messages, is_new: false, shared_until: None };
        if state.consumers > 0 {
            queue.record_other_consumers();
        }
        queue
    }

    /// The broker has counted other consumers.
    pub fn record_other_consumers(&mut self) {
        self.shared_until = Some(Instant::now() + SHARED_FOR);
    }

    /// Whether others are known to consume the queue, now or within `SHARED_FOR`.
    pub fn is_shared(&self) -> bool {
        self.shared_until.is_some_and(|until| Instant::now() < until)
    }
}

impl BoundQueue {
    /// The queue, if it stays, with the messages that are not acknowledged.
    pub fn durable(&self) -> Option<&DurableQueue> {
        match &self.source {
            Source::Durable(queue) => Some(queue),
            _ => None,
        }
    }

    /// How far a stream is read.
    pub fn cursor(&self) -> Option<&Cursor> {
        match &self.source {
            Source::Stream(cursor) => Some(cursor),
            _ => None,
        }
    }

    /// How far a stream is read.
    pub fn cursor_mut(&mut self) -> Option<&mut Cursor> {
        match &mut self.source {
            Source::Stream(cursor) => Some(cursor),
            _ => None,
        }
    }

    /// Where to go on in a stream.
    pub fn place(&self) -> Option<Place> {
        self.cursor().map(Cursor::place)
    }

    /// Whether the exchange, and with it the binding of the queue, survives a restart of the broker.
    pub fn is_bound_for_good(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// Whether messages may have been sent while no queue was bound, if this queue follows a lost subscription.
    pub fn may_have_missed(&self) -> bool {
        match &self.source {
            Source::Exclusive => true,
            Source::Durable(queue) => queue.is_new || !self.is_bound_for_good(),
            Source::Stream(cursor) => cursor.is_new() || !self.is_bound_for_good(),
        }
    }
}
