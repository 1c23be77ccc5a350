//! Finds a place in a stream, and its end.
//!
//! Every message of a stream has an offset. Offsets ascend, but the end of a segment has an offset too. The broker
//! reports neither the length of a stream nor whether it was deleted and created again. So [`StreamConfig::find`]
//! first looks for the newest message, and continues after a message only if that message still has its offset.

use std::thread;
use std::time::{Duration, Instant};

use amqp::{Connection, Delivery, Error, ErrorKind, Lookup, Queue, StreamOffset, stream_offset};

use super::config::{StreamConfig, foreign_position};
use super::cursor::{Continuity, Cursor, End};
use super::place::{Fingerprint, Place};
use crate::message::Message;
use crate::sequence::SequenceTracker;
use crate::sequence::run::Observation;

/// The pause before the next look at a replica that lags.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The number of messages that `--tail` reads first to estimate the records per message.
const SAMPLE: u64 = 1000;

/// The number of messages that the broker sends ahead of their acknowledgement.
const PREFETCH: u16 = 2000;

impl StreamConfig {
    /// Checks that an existing queue is a stream. Only a stream can be consumed from an offset.
    ///
    /// # Errors
    ///
    /// When the queue is not a stream, has no replica on this node, or the connection fails.
    pub fn check_type(&self, connection: &mut Connection) -> Result<(), Error> {
        self.look_up(connection, 1, StreamOffset::Next).map(drop)
    }

    /// Finds the place to begin at, and the end of the stream. A stream that `is_new` has no messages. After a lost subscription, reading continues at the
    /// place that it `reached`. A stream that was deleted and created again meanwhile is read from its beginning.
    ///
    /// # Errors
    ///
    /// When the broker refuses, does not answer in time, or is lost. At the start also when the position belongs to
    /// another stream.
    pub fn find(
        &self,
        connection: &mut Connection,
        is_new: bool,
        reached: Option<Place>,
    ) -> Result<Cursor, Error> {
        let start = reached.unwrap_or(self.start);
        if self.follow && start == Place::First {
            return Ok(Cursor::new(self.origin(), start, End::Never, self.alert));
        }
        let known_end = self.known_end(start);
        let newest = match is_new {
            true => None,
            false => self.find_newest_up_to(connection, known_end)?,
        };
        if newest.map(|newest| newest.offset) < known_end {
            return self.read_other(reached);
        }
        let last = *self.end.get_or_init(|| newest.map(|newest| newest.offset));
        let end = match self.follow {
            true => End::Never,
            false => End::At(last),
        };
        let mut continuity = Continuity::Unknown;
        let place = match (start, newest) {
            (Place::After { message, .. } | Place::At { message, .. }, _) => {
                let first = self.first_from(connection, message.offset)?;
                if first == message {
                    continuity = Continuity::Unbroken;
                } else if first.offset <= message.offset || self.has_moved() {
                    // The message was removed, so it does not identify the stream. The name of the cluster decides.
                    return self.read_other(reached);
                }
                start
            }
            (Place::Next, Some(message)) => Place::After { message, skip: 0 },
            (Place::Tail(records), Some(newest)) => {
                let tail = self.find_tail(connection, records, newest.offset)?;
                Place::At { message: tail.first, skip: tail.records.saturating_sub(records) }
            }
            (Place::Tail(_), None) => Place::First,
            (Place::Next, None) | (Place::First | Place::Since(_), _) => start,
        };
        let mut cursor = Cursor::new(self.origin(), place, end, self.alert);
        cursor.continuity = continuity;
        if let (Place::Since(time), Some(last)) = (self.start, last) {
            (cursor.since, cursor.history) = (time, last);
        }
        if let (Place::Since(time), End::At(_), Some(newest)) = (place, end, newest)
            && !self.has_any(connection, cursor.from)?
        {
            if newest.sent >= Some(time) {
                return Err(self.sends_nothing());
            }
            cursor.end = End::Reached;
        }
        Ok(cursor)
    }

    /// The newest message of an existing stream, with enough time for a busy broker and a replica that lags.
    fn find_newest_up_to(
        &self,
        connection: &mut Connection,
        known_end: Option<u64>,
    ) -> Result<Option<Fingerprint>, Error> {
        let mut newest = self.find_newest(connection, self.timings.empty_after)?;
        if newest.is_none() && self.has_messages(connection)? {
            let found = self.find_newest(connection, self.timings.catch_up)?;
            newest = Some(found.ok_or_else(|| self.sends_nothing())?);
        }
        self.catch_up(connection, newest, known_end)
    }

    /// Whether the broker counts any messages in the stream.
    fn has_messages(&self, connection: &mut Connection) -> Result<bool, Error> {
        Ok(connection.declare_queue(&Queue::existing(&self.name))?.messages > 0)
    }

    /// The error if the stream has messages, and the broker does not send them in time.
    fn sends_nothing(&self) -> Error {
        Error::unavailable(format!("read stream '{}': the broker sends nothing", self.name))
    }

    /// The offset that the stream has reached before; `None` if it is unknown.
    fn known_end(&self, start: Place) -> Option<u64> {
        let end = self.end.get().copied().flatten().filter(|_| !self.follow);
        match start {
            Place::After { message, .. } | Place::At { message, .. } => {
                end.max(Some(message.offset))
            }
            _ => end,
        }
    }

    /// Waits until the stream reaches an offset that it had before, because a replica may lag. Returns the newest
    /// message. If the stream was deleted and created again, that message is before the offset.
    fn catch_up(
        &self,
        connection: &mut Connection,
        mut newest: Option<Fingerprint>,
        known_end: Option<u64>,
    ) -> Result<Option<Fingerprint>, Error> {
        let give_up = Instant::now() + self.timings.catch_up;
        while newest.map(|newest| newest.offset) < known_end && Instant::now() < give_up {
            thread::sleep(LOOK_AGAIN);
            newest = self.find_newest(connection, self.timings.empty_after)?;
        }
        Ok(newest)
    }

    /// Whether the broker sends any message at or after `from`.
    fn has_any(&self, connection: &mut Connection, from: StreamOffset) -> Result<bool, Error> {
        let mut lookup = self.look_up(connection, 1, from)?;
        Ok(lookup.next(Instant::now() + self.timings.empty_after)?.is_some())
    }

    /// The newest message in the replica of this node; `None` if no message arrives within `max_wait`.
    fn find_newest(
        &self,
        connection: &mut Connection,
        max_wait: Duration,
    ) -> Result<Option<Fingerprint>, Error> {
        // The broker sends the whole last chunk at once, if the prefetch count allows it.
        let mut last = self.look_up(connection, u16::MAX, StreamOffset::LastChunk)?;
        let deadline = Instant::now() + last.timeout();
        let Some(first) = last.next(Instant::now() + max_wait)? else {
            return Ok(None);
        };
        let mut newest = Fingerprint::of(&first, None);
        while let Some(delivery) = last.next_sent(deadline)? {
            let expected = newest.map(|newest| newest.offset + 1);
            newest = Fingerprint::of(&delivery, expected);
        }
        Ok(newest)
    }

    /// The first message at or after an `offset` that the stream has reached.
    fn first_from(&self, connection: &mut Connection, offset: u64) -> Result<Fingerprint, Error> {
        let mut lookup = self.look_up(connection, 1, StreamOffset::At(offset))?;
        let first = self.next_of(&mut lookup)?;
        Ok(Fingerprint::at(&first, offset))
    }

    /// Reads the stream from an offset on.
    fn look_up<'a>(
        &self,
        connection: &'a mut Connection,
        prefetch: u16,
        from: StreamOffset,
    ) -> Result<Lookup<'a>, Error> {
        connection.look_up(&self.name, prefetch, from)
    }

    /// Waits for the next delivery of a stream that has more messages.
    fn next_of(&self, lookup: &mut Lookup<'_>) -> Result<Box<Delivery>, Error> {
        let deadline = Instant::now() + lookup.timeout();
        lookup.next(deadline)?.ok_or_else(|| self.sends_nothing())
    }

    /// Reads another stream than before from its beginning, or returns an error if that is not allowed.
    fn read_other(&self, reached: Option<Place>) -> Result<Cursor, Error> {
        let name = &self.name;
        let text = match reached {
            Some(_) if self.follow => {
                let mut cursor = Cursor::new(self.origin(), Place::First, End::Never, self.alert);
                cursor.continuity = Continuity::NewStream;
                return Ok(cursor);
            }
            Some(_) => format!(
                "read stream '{name}': the stream was deleted and created again before its end was read \
                 (--no-follow)"
            ),
            None if self.has_moved() => foreign_position(&self.origin),
            None => format!(
                "read stream '{name}': the position belongs to another stream of this name (remove the \
                 file of --resume to start over, or use another)"
            ),
        };
        Err(Error::new(ErrorKind::Configuration, text))
    }

    /// The smallest part before the offset `end` that has at least this number of `records`. If the stream has fewer,
    /// all of it.
    fn find_tail(
        &self,
        connection: &mut Connection,
        records: u64,
        end: u64,
    ) -> Result<Part, Error> {
        let mut window = records.min(SAMPLE);
        loop {
            let part = self.count_from(connection, end.saturating_sub(window), end)?;
            if part.records >= records || !part.is_cut {
                return Ok(part);
            }
            // The number of messages that is expected to have these records, and a tenth more.
            let per_message = (part.records / window).max(1);
            let expected = records / per_message;
            window = expected.saturating_add(expected / 10).max(window.saturating_mul(2));
        }
    }

    /// Counts the records from the offset `start` to the offset `end`, which is a message.
    fn count_from(&self, connection: &mut Connection, start: u64, end: u64) -> Result<Part, Error> {
        let mut lookup = self.look_up(connection, PREFETCH, StreamOffset::At(start))?;
        let mut runs = SequenceTracker::new();
        let mut delivery = self.next_of(&mut lookup)?;
        let first = Fingerprint::at(&delivery, start);
        // The offset before the first message may be the end of a segment.
        let is_cut = start > 0 && first.offset <= start + 1;
        let mut part = Part { first, records: 0, is_cut };
        let mut offset = first.offset;
        for taken in 1.. {
            let (tag, message) = (delivery.tag, Message::new(delivery));
            if runs.observe_message(&message) != Observation::Duplicate {
                part.records += message.layout.records;
            }
            if offset >= end {
                break;
            }
            if taken % u64::from(PREFETCH / 2) == 0 {
                lookup.acknowledge(tag);
            }
            delivery = self.next_of(&mut lookup)?;
            offset = stream_offset(&delivery).unwrap_or(offset + 1);
        }
        Ok(part)
    }
}

/// A part at the end of a stream.
struct Part {
    /// The first message.
    first: Fingerprint,
    records: u64,
    /// Whether there may be messages before the part.
    is_cut: bool,
}
