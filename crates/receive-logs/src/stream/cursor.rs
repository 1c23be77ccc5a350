//! Reads a stream over one connection.

use std::collections::VecDeque;
use std::fmt::Display;
use std::time::Duration;

use amqp::{Connection, Deliveries, Delivery, Error, StreamOffset, stream_offset};
use logs_process::time::{self, Precision};

use super::place::{Fingerprint, Origin, Place};
use crate::environment::Alert;
use crate::message::Message;

/// `--since` is exact if the clock of a publisher is at most this number of seconds ahead of the broker's clock.
const CLOCK_SKEW: u64 = 5;

/// Where a cursor stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Never,
    /// After this offset; `None` if the stream was empty.
    At(Option<u64>),
    /// All messages before the end were returned.
    Reached,
}

/// Whether the stream is the one that was read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Continuity {
    /// No message was read before, or the last written one was removed.
    Unknown,
    /// The last written message is still in the stream, and so are all messages after it.
    Unbroken,
    /// The stream that was read before was deleted.
    NewStream,
}

/// The reading of a stream over one connection: which deliveries to write, and up to which they are written.
pub struct Cursor {
    /// The stream.
    pub origin: Origin,
    pub(super) from: StreamOffset,
    /// The last returned delivery.
    last: Option<Fingerprint>,
    /// The returned deliveries that may not be written yet: their delivery tags, and the place to continue after
    /// each.
    taken: VecDeque<(u64, Place)>,
    /// Where to begin or, after messages are written, to continue.
    place: Place,
    /// Messages up to the offset `history` are skipped if they were sent before this time, in seconds since 1970.
    /// `history` is the newest offset when reading began. Later messages are new, even if the clock of their
    /// publisher is wrong.
    pub(super) since: u64,
    pub(super) history: u64,
    /// The number of records to skip before the first one to write.
    skip: u64,
    pub(super) end: End,
    pub(super) continuity: Continuity,
    alert: Alert,
}

impl Cursor {
    pub(super) fn new(origin: Origin, place: Place, end: End, alert: Alert) -> Cursor {
        let (from, skip, last) = match place {
            Place::Tail(_) | Place::First => (StreamOffset::First, 0, None),
            Place::Next => (StreamOffset::Next, 0, None),
            Place::Since(time) => (StreamOffset::Time(time.saturating_sub(CLOCK_SKEW)), 0, None),
            Place::At { message, skip } => (StreamOffset::At(message.offset), skip, None),
            // The broker delivers this message first, unless the limits have removed it.
            Place::After { message, skip } => {
                (StreamOffset::At(message.offset), skip, Some(message))
            }
        };
        Cursor {
            origin,
            from,
            last,
            taken: VecDeque::new(),
            place: match place {
                // The stream is empty, so reading continues with its first message.
                Place::Next => Place::First,
                _ => place,
            },
            since: 0,
            history: 0,
            skip,
            end: match end {
                End::At(end) if end <= last.map(|last| last.offset) => End::Reached,
                _ => end,
            },
            continuity: Continuity::Unknown,
            alert,
        }
    }

    /// Consumes the stream. The broker has `max_wait` to answer, by default the timeout of the connection.
    ///
    /// # Errors
    ///
    /// When the broker refuses, does not answer in time, or is lost.
    pub fn consume(
        &self,
        connection: Connection,
        max_wait: Option<Duration>,
    ) -> Result<Deliveries, Error> {
        connection.consume_stream(&self.origin.stream, self.from, max_wait)
    }

    /// Whether the last written message is still in the stream, so that no message after it is missing.
    pub fn is_unbroken(&self) -> bool {
        self.continuity == Continuity::Unbroken
    }

    /// Whether the stream that was read before was deleted, and this is another one.
    pub fn is_new(&self) -> bool {
        self.continuity == Continuity::NewStream
    }

    /// Whether all messages before the end were returned.
    pub fn is_at_end(&self) -> bool {
        self.end == End::Reached
    }

    /// Where another consumer continues over the same connection; `None` while messages are not written.
    pub fn offset_to_continue(&self) -> Option<StreamOffset> {
        let from = match (self.last, self.from) {
            (Some(last), _) => StreamOffset::At(last.offset + 1),
            // The stream was empty.
            (None, StreamOffset::Next) => StreamOffset::First,
            (None, from) => from,
        };
        self.taken.is_empty().then_some(from)
    }

    /// Where to continue over another connection.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The next delivery before the end, if it has arrived. Reports messages that were removed from the stream.
    ///
    /// # Errors
    ///
    /// The errors of [`Deliveries::try_next`].
    pub fn try_next(
        &mut self,
        deliveries: &mut Deliveries,
    ) -> Result<Option<Box<Delivery>>, Error> {
        while self.end != End::Reached {
            let Some(delivery) = deliveries.try_next()? else {
                break;
            };
            let Some(message) = Fingerprint::of(&delivery, self.expected_offset()) else {
                // Its offset is unknown, so it cannot be compared with the end.
                return Ok(Some(delivery));
            };
            if self.is_wanted(message) {
                // A message that is too old is not recorded, because it must be recognised again when it is read
                // again.
                if !self.is_too_old(&delivery) {
                    // Until a message is written, the first one identifies the stream.
                    if !matches!(self.place, Place::At { .. } | Place::After { .. }) {
                        self.place = Place::At { message, skip: self.skip };
                    }
                    let place = Place::After { message, skip: self.skip };
                    self.taken.push_back((delivery.tag, place));
                }
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// The lowest possible offset of the next delivery; `None` if it is unknown.
    fn expected_offset(&self) -> Option<u64> {
        match (self.last, self.from) {
            (Some(last), _) => Some(last.offset + 1),
            (None, StreamOffset::At(offset)) => Some(offset),
            (None, _) => None,
        }
    }

    /// Records a message. Returns whether it is new and not after the end.
    fn is_wanted(&mut self, message: Fingerprint) -> bool {
        let end = match self.end {
            End::At(Some(end)) => end,
            _ => u64::MAX,
        };
        if message.offset >= end {
            self.end = End::Reached;
        }
        // If the offset is higher than this, messages are missing. One offset may be the end of a segment.
        let expected = match (self.last, self.from) {
            (Some(last), _) if message.offset <= last.offset => return false,
            (Some(last), _) if message.offset <= end => last.offset + 2,
            (Some(last), _) => last.offset + 1,
            (None, StreamOffset::At(offset)) => offset,
            (None, StreamOffset::First) => end,
            (None, _) => u64::MAX,
        };
        if message.offset > expected {
            self.report_removed(message, end);
            // Some of the counted records were removed. Too many records are better than too few.
            self.skip = 0;
        }
        self.last = Some(message);
        message.offset <= end
    }

    /// Reports the messages before `next`, up to the `end`, that were removed from the stream.
    fn report_removed(&self, next: Fingerprint, end: u64) {
        let first = self.expected_offset().unwrap_or(0);
        let last = end.min(next.offset - 1);
        (self.alert)(format!(
            "missed up to {} messages of stream '{}' (offsets {first} to {last}), sent between {} and \
             {}: its limits have removed them",
            last + 1 - first,
            self.origin.stream,
            time(self.last.and_then(|last| last.sent)),
            time(next.sent)
        ));
    }

    /// Whether a message was sent before the time of `--since`.
    pub fn is_too_old(&self, delivery: &Delivery) -> bool {
        delivery.properties.timestamp().is_some_and(|sent| sent < self.since)
            && stream_offset(delivery).is_some_and(|offset| offset <= self.history)
    }

    /// Skips the records of a message that `--tail` excludes.
    pub fn select(&mut self, message: &mut Message) {
        self.skip -= message.skip(self.skip);
        if let Some((_, Place::After { skip, .. })) = self.taken.back_mut() {
            *skip = self.skip;
        }
    }

    /// Records that the deliveries up to this tag are written.
    pub fn record_written(&mut self, delivery_tag: u64) {
        let written = self.taken.partition_point(|(tag, _)| *tag <= delivery_tag);
        if let Some((_, place)) = self.taken.drain(..written).next_back() {
            self.place = place;
        }
    }
}

/// A time in seconds since 1970, in RFC 3339.
pub(super) fn time(seconds: Option<u64>) -> impl Display {
    match seconds {
        Some(seconds) => time::format(i128::from(seconds) * 1000, Precision::Seconds),
        None => "an unknown time".into(),
    }
}
