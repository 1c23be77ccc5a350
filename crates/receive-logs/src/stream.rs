//! Reading a stream: where to begin, where to end, and how to go on after an interruption.
//!
//! Every message of a stream has an offset. Offsets ascend, but not every offset is a message: the end of
//! a segment takes one, too. The broker tells neither how long a stream is nor whether this is still the
//! same stream, so [`StreamConfig::find`] looks for the newest message first, and goes on after a message
//! only if that message is still in its place.

mod reader;

use std::sync::{Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use amqp::{
    Connection, Deliveries, Delivery, Error, ErrorKind, Queue, QueueState, StreamOffset, Value,
    stream_offset,
};
use bytesize::ByteSize;
use logs_common::hints;
use logs_process::exit::{Failure, Status};
use serde::{Deserialize, Serialize};

use crate::cli::{Cli, Keep};
use crate::resume::{Origin, ResumeFile};
use crate::sequence::{Observation, SequenceTracker};

use reader::End;
pub use reader::Reader;

/// The limits of a stream without `--keep`.
const KEEP: [Keep; 2] =
    [Keep::Age(Duration::from_secs(24 * 60 * 60)), Keep::Size(ByteSize::gib(1))];

/// The size of a segment in bytes, where `--keep` limits the age alone, and at most. The broker removes
/// whole segments, and by default begins another only after 500 MB.
const SEGMENT: u64 = 50_000_000;
const MAX_SEGMENT: u64 = 500_000_000;

/// For so many seconds that the clock of a publisher is ahead of the broker's, `--since` stays exact.
const CLOCK_SKEW: u64 = 5;

/// How long the replica on this node may lag behind the replica that was read before, and how long to
/// wait before looking again.
const CATCH_UP: Duration = Duration::from_millis(if cfg!(test) { 600 } else { 5000 });
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long to wait for the first message of a stream that seems to be empty. The broker knows the number
/// of messages seconds late.
const EMPTY_AFTER: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 2000 });

/// How many messages `--tail` looks at first, to learn how many records a message has.
const SAMPLE: u64 = 1000;

/// Messages that the broker sends ahead of their acknowledgement.
const PREFETCH: u16 = 2000;

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// With the next message.
    Next,
    /// With the oldest message.
    First,
    /// With the first message sent at this time or later, in seconds since 1970.
    Since(u64),
    /// With the last so many records.
    Tail(u64),
    /// With this message, but without the first records.
    At {
        /// The message.
        position: Position,
        /// How many records to leave out, of this message and the next ones.
        skip: u64,
    },
    /// After a message that is written already.
    After {
        /// The message.
        position: Position,
        /// How many records to leave out of the next messages.
        skip: u64,
    },
}

impl Start {
    /// The offset of the message that is written already.
    pub fn last_offset(self) -> Option<u64> {
        match self {
            Start::After { position, .. } => Some(position.offset),
            _ => None,
        }
    }
}

/// How to go on where the stream is not the stream that was read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherStream {
    /// Read the new stream from its beginning.
    ReadAll,
    /// Fail.
    Refuse,
}

/// A message in a stream, by which to recognise the stream and to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    offset: u64,
    /// CRC-32 of body and `message_id`.
    checksum: u32,
    /// The property `timestamp`, in seconds since 1970.
    sent: Option<u64>,
}

impl Position {
    /// The position of a message of a stream. A message whose headers were too large to be read is taken to be at the
    /// `expected` offset, at which reading can go on; `None` where that is not known either.
    fn of(delivery: &Delivery, expected: Option<u64>) -> Option<Position> {
        let expected = stream_offset(delivery).or(expected)?;
        Some(Position::at(delivery, expected))
    }

    /// The same where an offset is expected.
    fn at(delivery: &Delivery, expected: u64) -> Position {
        let properties = &delivery.properties;
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&delivery.body);
        checksum.update(properties.message_id().as_deref().unwrap_or_default().as_bytes());
        Position {
            offset: stream_offset(delivery).unwrap_or(expected),
            checksum: checksum.finalize(),
            sent: *properties.timestamp(),
        }
    }
}

/// Which stream to read, and how.
pub struct StreamConfig {
    /// The name of the stream.
    pub name: String,
    /// Where to begin, unless messages are written already.
    pub start: Start,
    keep: Vec<Keep>,
    follow: bool,
    /// Where the stream is; the name of the cluster once that is known.
    origin: Origin,
    cluster: OnceLock<String>,
    /// The offset of the newest message when reading began; `None` if there was no message.
    end: OnceLock<Option<u64>>,
}

impl StreamConfig {
    /// Takes the options of the command line, and the position in the file of `--resume`; `None` without
    /// `--stream`.
    ///
    /// # Errors
    ///
    /// When the position is that of another vhost, exchange or stream.
    pub fn new(
        cli: &Cli,
        vhost: &str,
        resume: Option<&ResumeFile>,
    ) -> Result<Option<StreamConfig>, Failure> {
        let options = &cli.stream;
        let Some(name) = options.name.clone() else {
            return Ok(None);
        };
        let mut origin = Origin {
            vhost: vhost.into(),
            exchange: cli.exchange.name.clone(),
            stream: name.clone(),
            cluster: String::new(),
        };
        if let Some(noted) = resume.and_then(ResumeFile::origin) {
            origin.cluster.clone_from(&noted.cluster);
            if origin != *noted {
                return Err(Failure::new(Status::Config, foreign_position(noted)));
            }
        }
        let place = resume.and_then(ResumeFile::place);
        Ok(Some(StreamConfig {
            name,
            origin,
            cluster: OnceLock::new(),
            start: match (place, options.since, options.tail) {
                (Some(place), ..) => place,
                (None, Some(time), _) => Start::Since(time),
                (None, None, Some(records)) => Start::Tail(records),
                (None, None, None) if options.from_start => Start::First,
                (None, None, None) => Start::Next,
            },
            keep: match options.keep.is_empty() {
                true => KEEP.to_vec(),
                false => options.keep.clone(),
            },
            follow: !options.no_follow,
            end: OnceLock::new(),
        }))
    }

    /// Where the stream is, once a broker has been reached.
    pub fn origin(&self) -> Origin {
        let cluster = self.cluster.get().cloned().unwrap_or_default();
        Origin { cluster, ..self.origin.clone() }
    }

    /// The declaration of the stream.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::stream(&self.name);
        let mut segment = SEGMENT;
        for limit in &self.keep {
            queue = match limit {
                Keep::Age(age) => {
                    let seconds = format!("{}s", age.as_secs());
                    queue.argument("x-max-age", Value::LongString(seconds))
                }
                Keep::Size(size) => {
                    segment = (size.as_u64() / 10).clamp(1, MAX_SEGMENT);
                    queue.argument("x-max-length-bytes", integer(size.as_u64()))
                }
            };
        }
        queue.argument("x-stream-max-segment-size-bytes", integer(segment))
    }

    /// Checks that the broker has streams, and remembers its name.
    ///
    /// # Errors
    ///
    /// When the broker is RabbitMQ before 3.9, which would make a queue of another type, or refuse in other
    /// words.
    pub fn check_broker(&self, connection: &Connection) -> Result<(), Error> {
        let cluster = connection.server_property("cluster_name").unwrap_or_default();
        self.cluster.get_or_init(|| cluster);
        let version = connection.server_property("version").unwrap_or_default();
        let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(major), Some(minor)) if (major, minor) < (3, 9) => Err(Error::new(
                ErrorKind::Configuration,
                format!(
                    "declare stream '{}': streams need RabbitMQ 3.9 or later, and this is {version}",
                    self.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Checks that an existing queue is a stream: no other queue can be consumed from an offset.
    ///
    /// # Errors
    ///
    /// When the queue is no stream, has no replica on this node, or the connection fails.
    pub fn check_type(&self, connection: &Connection) -> Result<(), Error> {
        self.consume(connection, 1, StreamOffset::Next).map(drop)
    }

    /// Whether the position was noted at a broker of another name. Nodes of one cluster may have different
    /// names, so a message that is recognised counts for more.
    fn has_moved(&self) -> bool {
        let noted = &self.origin.cluster;
        !noted.is_empty() && self.cluster.get().is_some_and(|cluster| cluster != noted)
    }

    /// Notes, at the first call only, that the stream exists with other limits than those of `--keep`.
    pub fn note_other_limits(&self) {
        static NOTE: Once = Once::new();
        let name = &self.name;
        NOTE.call_once(|| {
            log::info!("stream '{name}' exists with other limits, and is used as it is (--keep)");
        });
    }

    /// Finds the place to begin at, and the end of the stream.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, no answer in time, and with [`OtherStream::Refuse`] another stream
    /// than that of the position.
    pub fn find(
        &self,
        connection: &Connection,
        state: &QueueState,
        start: Start,
        other: OtherStream,
    ) -> Result<Reader, Error> {
        if self.follow && start == Start::First {
            return Ok(Reader::new(&self.name, start, End::Never));
        }
        let newest = match self.find_newest(connection, EMPTY_AFTER)? {
            None if state.messages > 0 => self.find_newest(connection, CATCH_UP)?,
            newest => newest,
        };
        let Some(newest) = self.catch_up(connection, newest, self.known_end(start))? else {
            return self.read_other(other);
        };
        let last = *self.end.get_or_init(|| newest.map(|newest| newest.offset));
        let end = match self.follow {
            true => End::Never,
            false => End::At(last),
        };
        let mut is_unbroken = false;
        let place = match (start, newest) {
            (Start::After { position, .. } | Start::At { position, .. }, _) => {
                let first = self.first_from(connection, position.offset)?;
                is_unbroken = first == position;
                // Where the message was removed, the name of the cluster has to do.
                let is_same = is_unbroken || first.offset > position.offset && !self.has_moved();
                if !is_same {
                    return self.read_other(other);
                }
                start
            }
            (Start::Next, Some(position)) => Start::After { position, skip: 0 },
            (Start::Tail(records), Some(newest)) => {
                let tail = self.find_tail(connection, records, newest.offset)?;
                Start::At { position: tail.first, skip: tail.records.saturating_sub(records) }
            }
            (Start::Tail(_), None) => Start::First,
            (Start::Next, None) | (Start::First | Start::Since(_), _) => start,
        };
        let mut reader = Reader::new(&self.name, place, end);
        reader.is_unbroken = is_unbroken;
        if let (Start::Since(time), Some(last)) = (self.start, last) {
            (reader.since, reader.history) = (time, last);
        }
        if let (Start::Since(time), End::At(_), Some(newest)) = (place, end, newest)
            && !self.has_any(connection, reader.from, newest.sent >= Some(time))?
        {
            reader.end = End::Reached;
        }
        Ok(reader)
    }

    /// The offset that the stream has reached before, where that is known.
    fn known_end(&self, start: Start) -> Option<u64> {
        let end = self.end.get().copied().flatten().filter(|_| !self.follow);
        match start {
            Start::After { position, .. } | Start::At { position, .. } => {
                end.max(Some(position.offset))
            }
            _ => end,
        }
    }

    /// Waits until the stream reaches an offset that it has had before, which takes a lagging replica a
    /// moment. Returns the newest message then, and `None` for a stream that was made anew.
    fn catch_up(
        &self,
        connection: &Connection,
        mut newest: Option<Position>,
        known_end: Option<u64>,
    ) -> Result<Option<Option<Position>>, Error> {
        let give_up = Instant::now() + CATCH_UP;
        while newest.map(|newest| newest.offset) < known_end {
            if Instant::now() >= give_up {
                return Ok(None);
            }
            thread::sleep(LOOK_AGAIN);
            newest = self.find_newest(connection, EMPTY_AFTER)?;
        }
        Ok(Some(newest))
    }

    /// Whether the broker sends any message from there on. A stream that `should` have a message gets more
    /// time.
    fn has_any(
        &self,
        connection: &Connection,
        from: StreamOffset,
        should: bool,
    ) -> Result<bool, Error> {
        let mut deliveries = self.consume(connection, 1, from)?;
        let max_wait = if should { CATCH_UP } else { EMPTY_AFTER };
        Ok(wait_for_next(&mut deliveries, Instant::now() + max_wait)?.is_some())
    }

    /// The newest message, as far as this node of a cluster has the stream; `None` if no message comes within
    /// `max_wait`.
    fn find_newest(
        &self,
        connection: &Connection,
        max_wait: Duration,
    ) -> Result<Option<Position>, Error> {
        // The broker sends all of the last chunk at once, as the prefetch count allows.
        let mut last = self.consume(connection, u16::MAX, StreamOffset::LastChunk)?;
        let deadline = Instant::now() + last.timeout();
        let Some(first) = wait_for_next(&mut last, Instant::now() + max_wait)? else {
            return Ok(None);
        };
        let mut newest = Position::of(&first, None);
        last.request_answer();
        while let Some(delivery) = last.next_before_answer(deadline)? {
            let expected = newest.map(|newest| newest.offset + 1);
            newest = Position::of(&delivery, expected);
        }
        Ok(newest)
    }

    /// The first message from an `offset` on, which the stream has reached.
    fn first_from(&self, connection: &Connection, offset: u64) -> Result<Position, Error> {
        let mut deliveries = self.consume(connection, 1, StreamOffset::At(offset))?;
        let deadline = Instant::now() + deliveries.timeout();
        let first = next_by(&mut deliveries, deadline, &self.name)?;
        Ok(Position::at(&first, offset))
    }

    /// Consumes the stream over another connection to the same broker, which is cut when dropped: deliveries
    /// may come after the answer to a cancellation, among those of the next consumer.
    fn consume(
        &self,
        connection: &Connection,
        prefetch: u16,
        from: StreamOffset,
    ) -> Result<Deliveries, Error> {
        let mut connection = connection.open_another()?;
        connection.set_prefetch(prefetch);
        connection.consume_stream(&self.name, from, None)
    }

    /// Reads a stream that is not the stream of the position, where that is right.
    fn read_other(&self, other: OtherStream) -> Result<Reader, Error> {
        let name = &self.name;
        let text = match other {
            OtherStream::ReadAll if self.follow => {
                let mut reader = Reader::new(name, Start::First, End::Never);
                reader.is_new = true;
                return Ok(reader);
            }
            OtherStream::ReadAll => format!(
                "read stream '{name}': the stream was made anew before all was read (--no-follow)"
            ),
            OtherStream::Refuse if self.has_moved() => foreign_position(&self.origin),
            OtherStream::Refuse => format!(
                "read stream '{name}': the position is that of another stream of this name (remove the \
                 file of --resume to begin anew, or use another)"
            ),
        };
        Err(Error::new(ErrorKind::Configuration, text))
    }

    /// The smallest part up to the offset `end` that is known to hold so many `records`, or all there is.
    fn find_tail(&self, connection: &Connection, records: u64, end: u64) -> Result<Part, Error> {
        let mut window = records.min(SAMPLE);
        loop {
            let part = self.count_from(connection, end.saturating_sub(window), end)?;
            if part.records >= records || !part.is_cut {
                return Ok(part);
            }
            // As many messages as the records seen so far let expect, and a tenth more.
            let per_message = (part.records / window).max(1);
            let expected = records / per_message;
            window = expected.saturating_add(expected / 10).max(window.saturating_mul(2));
        }
    }

    /// Counts the records from the offset `start` to the offset `end`, at which there is a message.
    fn count_from(&self, connection: &Connection, start: u64, end: u64) -> Result<Part, Error> {
        let mut deliveries = self.consume(connection, PREFETCH, StreamOffset::At(start))?;
        let timeout = deliveries.timeout();
        let mut runs = SequenceTracker::new();
        let mut delivery = next_by(&mut deliveries, Instant::now() + timeout, &self.name)?;
        let first = Position::at(&delivery, start);
        // The offset before the first message may be the end of a segment.
        let is_cut = start > 0 && first.offset <= start + 1;
        let mut part = Part { first, records: 0, is_cut };
        let mut offset = first.offset;
        for taken in 1.. {
            part.records += new_records(&mut runs, &delivery);
            if offset >= end {
                break;
            }
            if taken % u64::from(PREFETCH / 2) == 0 {
                deliveries.acknowledge(&delivery);
            }
            delivery = next_by(&mut deliveries, Instant::now() + timeout, &self.name)?;
            offset = stream_offset(&delivery).unwrap_or(offset + 1);
        }
        Ok(part)
    }
}

/// A part at the end of a stream.
struct Part {
    /// The first message.
    first: Position,
    records: u64,
    /// Whether there may be messages before the part.
    is_cut: bool,
}

/// Waits for the next delivery of a stream that has more messages.
fn next_by(
    deliveries: &mut Deliveries,
    deadline: Instant,
    stream: &str,
) -> Result<Delivery, Error> {
    wait_for_next(deliveries, deadline)?.ok_or_else(|| {
        Error::unavailable(format!("read stream '{stream}': the broker sends nothing"))
    })
}

/// Waits for the next delivery until the `deadline`.
fn wait_for_next(
    deliveries: &mut Deliveries,
    deadline: Instant,
) -> Result<Option<Delivery>, Error> {
    loop {
        let next = deliveries.try_next()?;
        if next.is_some() || Instant::now() >= deadline {
            return Ok(next);
        }
        // If nothing has come by then, the loop ends.
        deliveries.wait(&[], Some(deadline));
    }
}

/// The options that are the remedy for an error of an operation on a stream.
pub fn hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotAStream => {
            " (a queue of this name exists, and is no stream: use another --stream, or --queue)"
        }
        ErrorKind::NoReplica => {
            " (--uri or AMQP_URL takes several nodes of a cluster: name one with a replica)"
        }
        _ => hints::hint(kind),
    }
}

/// How many records of a message are not repeated.
fn new_records(runs: &mut SequenceTracker, delivery: &Delivery) -> u64 {
    match runs.observe_delivery(delivery) {
        (_, Observation::Duplicate) => 0,
        (records, _) => records,
    }
}

fn foreign_position(origin: &Origin) -> String {
    let Origin { cluster, vhost, exchange, stream } = origin;
    format!(
        "resume: the position is that of stream '{stream}' bound to exchange '{exchange}', vhost '{vhost}' \
         of '{cluster}' (use another file with --resume)"
    )
}

fn integer(number: u64) -> Value {
    Value::LongLongInt(i64::try_from(number).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
