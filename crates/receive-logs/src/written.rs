//! Tracks which records and messages are completely in the output.

/// Proof that messages are completely in the output, so that they may be acknowledged. Only
/// [`Output`](crate::output::Output) returns it.
#[must_use]
pub struct Written(Option<u64>);

impl Written {
    /// The delivery tag of the last of the messages; `None` if there is none.
    pub fn last_tag(&self) -> Option<u64> {
        self.0
    }
}

/// The unit that a failed write must leave complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A record. The rest of its message is lost with the exclusive queue in any case.
    Record,
    /// A message. The broker delivers an incomplete one again.
    Message,
}

/// A position between two records.
#[derive(Clone, Copy, Debug, Default)]
pub struct Boundary {
    /// The number of bytes before it.
    pub bytes: u64,
    /// The number of records before it.
    pub records: u64,
}

/// A message that may not be in the file yet.
struct Buffered {
    end: Boundary,
    tag: u64,
}

/// Tracks records and messages from the buffer into the file.
pub struct Boundaries {
    unit: Unit,
    /// The ends of the records that may not be in the file yet.
    record_ends: Vec<u64>,
    /// The messages that may not be in the file yet. With [`Unit::Record`], only the last of them.
    messages: Vec<Buffered>,
    /// The end of the last complete record in the file, and of the last complete message.
    pub last_record: u64,
    last_message: Boundary,
    /// The last message in the file that is not part of a [`Written`] yet.
    unclaimed: Option<u64>,
    /// The number of records in the file and in the buffer.
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

    /// The number of records in the file.
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

    /// Records that the file now has all bytes before this position.
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

    /// Discards the buffer. Returns the end of the last complete unit in the file.
    pub fn discard_buffer(&mut self) -> Boundary {
        self.records = self.flushed_records();
        self.record_ends.clear();
        self.messages.clear();
        match self.unit {
            Unit::Record => Boundary { bytes: self.last_record, records: self.records },
            Unit::Message => self.last_message,
        }
    }

    /// The messages that are in the file since the last [`Written`].
    pub fn claim(&mut self) -> Written {
        Written(self.unclaimed.take())
    }
}
