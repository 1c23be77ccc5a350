//! The reading of a stream over one connection.

use std::collections::VecDeque;
use std::fmt::Display;
use std::ops::Range;
use std::time::Duration;

use amqp::{Connection, Deliveries, Delivery, Error, StreamOffset, stream_offset};
use logs_process::time::{self, Precision};

use super::{CLOCK_SKEW, Position, Start};
use crate::alert;

/// Where a reader stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Never,
    /// After this offset; `None` in a stream that was empty.
    At(Option<u64>),
    /// All messages before the end were taken.
    Reached,
}

/// The reading of a stream over one connection: which deliveries to write, and up to where they are written.
pub struct Reader {
    stream: String,
    pub(super) from: StreamOffset,
    /// The last delivery taken.
    last: Option<Position>,
    /// Deliveries taken and not known to be written, by delivery tag, and where to go on after each.
    taken: VecDeque<(u64, Start)>,
    /// Where to begin, or to go on after messages were written.
    place: Start,
    /// Messages sent before this time are left out, in seconds since 1970, up to the offset of the newest
    /// message when reading began. Later messages are new, whatever their publisher takes for the time.
    pub(super) since: u64,
    pub(super) history: u64,
    /// Records to leave out before the first that is written.
    skip: u64,
    pub(super) end: End,
    /// Whether the last message written is still in the stream, and so are all after it.
    pub(super) is_unbroken: bool,
    /// Whether the stream is not the one that was read before, which was deleted.
    pub(super) is_new: bool,
}

impl Reader {
    pub(super) fn new(stream: &str, place: Start, end: End) -> Reader {
        let mut reader = Reader {
            stream: stream.into(),
            from: StreamOffset::First,
            last: None,
            taken: VecDeque::new(),
            place,
            since: 0,
            history: 0,
            skip: 0,
            end: if end == End::At(None) { End::Reached } else { end },
            is_unbroken: false,
            is_new: false,
        };
        match place {
            Start::Tail(_) | Start::First => {}
            // Read again, this stream is read from its first message, as the stream is empty now.
            Start::Next => (reader.from, reader.place) = (StreamOffset::Next, Start::First),
            Start::Since(time) => {
                reader.from = StreamOffset::Time(time.saturating_sub(CLOCK_SKEW));
            }
            Start::At { position, skip } => {
                reader.from = StreamOffset::At(position.offset);
                reader.skip = skip;
            }
            // The message at this position comes first, unless the limits have removed that message.
            Start::After { position, skip } => {
                reader.from = StreamOffset::At(position.offset);
                reader.skip = skip;
                reader.last = Some(position);
                if let End::At(end) = end
                    && end <= Some(position.offset)
                {
                    reader.end = End::Reached;
                }
            }
        }
        reader
    }

    /// Consumes the stream. The broker has `max_wait` to answer, by default the timeout of the connection.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, no answer in time.
    pub fn consume(
        &self,
        connection: Connection,
        max_wait: Option<Duration>,
    ) -> Result<Deliveries, Error> {
        connection.consume_stream(&self.stream, self.from, max_wait)
    }

    /// Whether the last message written is still in the stream, so that none after it is missing.
    pub fn is_unbroken(&self) -> bool {
        self.is_unbroken
    }

    /// Whether the stream is not the one that was read before, which was deleted.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Whether all messages before the end were taken.
    pub fn is_at_end(&self) -> bool {
        self.end == End::Reached
    }

    /// Where to go on over another connection.
    pub fn place(&self) -> Start {
        self.place
    }

    /// The next delivery before the end, if any is there. Messages that were removed are reported.
    ///
    /// # Errors
    ///
    /// Those of [`Deliveries::try_next`].
    pub fn try_next(&mut self, deliveries: &mut Deliveries) -> Result<Option<Delivery>, Error> {
        while self.end != End::Reached {
            let Some(delivery) = deliveries.try_next()? else {
                break;
            };
            let Some(position) = Position::of(&delivery, self.expected_offset()) else {
                // Nothing can be said of its place.
                return Ok(Some(delivery));
            };
            if self.is_wanted(position) {
                // Read again, messages that are too old are to be told from those that are not.
                if !self.is_too_old(&delivery) {
                    // Until a message is written, the first one is what the stream is recognised by.
                    if !matches!(self.place, Start::At { .. } | Start::After { .. }) {
                        self.place = Start::At { position, skip: self.skip };
                    }
                    let place = Start::After { position, skip: self.skip };
                    self.taken.push_back((delivery.tag, place));
                }
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// The lowest offset that the next delivery can have, where that is known.
    fn expected_offset(&self) -> Option<u64> {
        match (self.last, self.from) {
            (Some(last), _) => Some(last.offset + 1),
            (None, StreamOffset::At(offset)) => Some(offset),
            (None, _) => None,
        }
    }

    /// Notes a delivery, and returns whether it is to be taken: neither taken before nor after the end.
    fn is_wanted(&mut self, position: Position) -> bool {
        let end = match self.end {
            End::At(Some(end)) => end,
            _ => u64::MAX,
        };
        if position.offset >= end {
            self.end = End::Reached;
        }
        // The offset before which a message is missing, unless that is a segment's end.
        let expected = match (self.last, self.from) {
            (Some(last), _) if position.offset <= last.offset => return false,
            (Some(last), _) if position.offset <= end => last.offset + 2,
            (Some(last), _) => last.offset + 1,
            (None, StreamOffset::At(offset)) => offset,
            (None, StreamOffset::First) => end,
            (None, _) => u64::MAX,
        };
        if position.offset > expected {
            self.report_removed(position, end);
            // Removed since they were counted: rather too many records than too few.
            self.skip = 0;
        }
        self.last = Some(position);
        position.offset <= end
    }

    /// Reports the messages that were removed before the message at `next`, up to the `end`.
    fn report_removed(&self, next: Position, end: u64) {
        let first = self.expected_offset().unwrap_or(0);
        let last = end.min(next.offset - 1);
        alert(format!(
            "missed up to {} messages of stream '{}' (offsets {first} to {last}), sent between {} and \
             {}: its limits have removed them",
            last + 1 - first,
            self.stream,
            time(self.last.and_then(|last| last.sent)),
            time(next.sent)
        ));
    }

    /// Whether a message was sent before the time to begin with.
    pub fn is_too_old(&self, delivery: &Delivery) -> bool {
        delivery.properties.timestamp().is_some_and(|sent| sent < self.since)
            && stream_offset(delivery).is_some_and(|offset| offset <= self.history)
    }

    /// Which of the `records` of a delivery to write.
    pub fn select(&mut self, records: u64) -> Range<u64> {
        let skipped = self.skip.min(records);
        self.skip -= skipped;
        if let Some((_, Start::After { skip, .. })) = self.taken.back_mut() {
            *skip = self.skip;
        }
        skipped..records
    }

    /// Notes that the deliveries up to this tag are written.
    pub fn note_written(&mut self, delivery_tag: u64) {
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
