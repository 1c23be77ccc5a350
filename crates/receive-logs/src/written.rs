//! Which records and messages are in the output as a whole.

/// Proof that messages are in the output as a whole, so that they may be acknowledged. Only
/// [`Output`](crate::output::Output) returns values of this type.
#[must_use]
pub struct Written(Option<u64>);

impl Written {
    /// The delivery tag of the last of the messages; `None` if there are none.
    pub fn last_tag(&self) -> Option<u64> {
        self.0
    }
}

/// What a failed write must not tear apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A record: an exclusive queue loses the rest of the message anyway.
    Record,
    /// A message: it is delivered again as a whole.
    Message,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, Default)]
pub struct Boundary {
    /// Bytes before.
    pub bytes: u64,
    /// Records before.
    pub records: u64,
}

/// A message that may not be in the file yet.
struct Buffered {
    end: Boundary,
    tag: u64,
}

/// Follows records and messages from the buffer into the file.
pub struct Boundaries {
    unit: Unit,
    /// Where the records end that may not be in the file yet.
    record_ends: Vec<u64>,
    /// The messages that may not be in the file yet; with [`Unit::Record`] only the last of them.
    messages: Vec<Buffered>,
    /// The end of the last whole record, and of the last whole message, in the file.
    pub last_record: u64,
    last_message: Boundary,
    /// The last message in the file that is not part of a [`Written`] yet.
    unclaimed: Option<u64>,
    /// Records in the file and in the buffer.
    pub records: u64,
}

impl Boundaries {
    pub fn new(unit: Unit) -> Boundaries {
        Boundaries {
            unit,
            record_ends: Vec::new(),
            messages: Vec::new(),
            last_record: 0,
            last_message: Boundary::default(),
            unclaimed: None,
            records: 0,
        }
    }

    /// Records in the file.
    pub fn flushed_records(&self) -> u64 {
        self.records - self.record_ends.len() as u64
    }

    /// Adds a record that ends at this position.
    pub fn add_record(&mut self, end: u64) {
        self.records += 1;
        self.record_ends.push(end);
    }

    /// Adds a message whose last record ends at this position.
    pub fn add_message(&mut self, end: u64, tag: u64) {
        if self.unit == Unit::Record {
            self.messages.clear();
        }
        let end = Boundary { bytes: end, records: self.records };
        self.messages.push(Buffered { end, tag });
    }

    /// Takes the records and messages out of the buffer that end before this position of the file.
    pub fn flush(&mut self, position: u64) {
        let records = self.record_ends.partition_point(|end| *end <= position);
        if let Some(end) = self.record_ends.drain(..records).next_back() {
            self.last_record = end;
        }
        let messages = self.messages.partition_point(|message| message.end.bytes <= position);
        if let Some(Buffered { end, tag }) = self.messages.drain(..messages).next_back() {
            (self.last_message, self.unclaimed) = (end, Some(tag));
        }
    }

    /// Discards the buffer. Returns where the last whole unit in the file ends.
    pub fn discard_buffer(&mut self) -> Boundary {
        self.records = self.flushed_records();
        self.record_ends.clear();
        self.messages.clear();
        match self.unit {
            Unit::Record => Boundary { bytes: self.last_record, records: self.records },
            Unit::Message => self.last_message,
        }
    }

    /// The messages in the file since the last [`Written`].
    pub fn claim(&mut self) -> Written {
        Written(self.unclaimed.take())
    }
}
