//! The properties by which the two tools describe a message.
//!
//! The property `message_id` has the number of the first record, so that a receiver recognises gaps and duplicates.
//!
//! The property `type` of such a message names the byte that joins its records: newline for `lines`, NUL
//! for `records`. Any other message is a single record.
//!
//! The property `app_id` and the header [`HOST`] name the sending program and its machine. The header
//! [`FILE`] is the path of a followed file, and [`TIMESTAMP_IN_MS`] the exact time of sending.

use std::fmt::Write;
use std::iter;

use amqp::Properties;
use memchr::memchr_iter;

/// The header with the name of the sending machine.
pub const HOST: &str = "Host";

/// The header with the path of the file that has the records.
pub const FILE: &str = "File";

/// The header with the time of sending, a long integer of milliseconds since 1970. The interceptor of RabbitMQ that
/// adds timestamps uses the same name: <https://www.rabbitmq.com/docs/message-interceptors>
pub const TIMESTAMP_IN_MS: &str = "timestamp_in_ms";

/// Limit for the body of a batch, in bytes. A larger record is a message of its own.
pub const MAX_BATCH: usize = 64 * 1024;

/// The largest number of records in a batch: that of a body with only separators.
const MAX_RECORDS: u64 = MAX_BATCH as u64 + 1;

/// The records of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How the records are joined.
    pub packing: Packing,
    /// How many records there are.
    pub records: u64,
    /// The id of the first record, if the message is from `emit-log`.
    pub id: Option<MessageId>,
}

impl Layout {
    /// Finds the records of a message. Only a message with an id of emit-log can be a batch. A message of more than
    /// 65,537 records is not from emit-log, so it counts as a single record without an id.
    pub fn of(properties: &Properties, body: &[u8]) -> Layout {
        let single = Layout { packing: Packing::Single, records: 1, id: None };
        let id = properties.message_id().as_deref().and_then(MessageId::parse);
        let packing = match id {
            Some(_) => Packing::of(properties.type_().as_deref()),
            None => return single,
        };
        match packing.count(body) {
            records @ ..=MAX_RECORDS => Layout { packing, records, id },
            _ => single,
        }
    }
}

/// How records are packed into a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// The message is the record.
    Single,
    /// Records joined by newlines.
    Lines,
    /// Records joined by NUL.
    Nul,
}

impl Packing {
    /// For records that end in `separator`.
    pub fn separated_by(separator: u8) -> Packing {
        match separator {
            b'\0' => Packing::Nul,
            _ => Packing::Lines,
        }
    }

    /// The packing that the property `type` names.
    fn of(message_type: Option<&str>) -> Packing {
        match message_type {
            Some("lines") => Packing::Lines,
            Some("records") => Packing::Nul,
            _ => Packing::Single,
        }
    }

    /// The property `type` of a message with this packing.
    pub fn message_type(self) -> Option<&'static str> {
        match self {
            Packing::Single => None,
            Packing::Lines => Some("lines"),
            Packing::Nul => Some("records"),
        }
    }

    /// The records in the body of a message, at least one.
    pub fn records(self, body: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.separators(body).chain(iter::once(body.len())).map(move |end| {
            let record = &body[start..end];
            start = end + 1;
            record
        })
    }

    /// How many records there are.
    pub fn count(self, body: &[u8]) -> u64 {
        self.separators(body).count() as u64 + 1
    }

    /// The byte between two records.
    pub fn separator(self) -> Option<u8> {
        match self {
            Packing::Single => None,
            Packing::Lines => Some(b'\n'),
            Packing::Nul => Some(b'\0'),
        }
    }

    /// The positions of the separators in `body`.
    fn separators(self, body: &[u8]) -> impl Iterator<Item = usize> {
        self.separator().map(|separator| memchr_iter(separator, body)).into_iter().flatten()
    }
}

/// `emit-log/RUN/NUMBER`: RUN has 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId {
    /// The run, a random number.
    pub run: u64,
    /// The number of the first record in the message, counted from 1 within the run.
    pub number: u64,
}

impl MessageId {
    /// Parses the property `message_id`. Returns `None` for an id of another program.
    pub fn parse(text: &str) -> Option<MessageId> {
        let (run, number) = text.strip_prefix("emit-log/")?.split_at_checked(16)?;
        let run = run.bytes().try_fold(0, |run, byte| Some(run << 4 | hex_digit(byte)?))?;
        let number = number.strip_prefix('/').filter(|number| !number.starts_with('+'))?;
        // Counting from a larger number could overflow, and no run reaches it.
        let number = number.parse().ok().filter(|number| (1..=i64::MAX as u64).contains(number))?;
        Some(MessageId { run, number })
    }
}

/// The value of a lower-case hexadecimal digit.
fn hex_digit(digit: u8) -> Option<u64> {
    match digit {
        b'0'..=b'9' => Some((digit - b'0').into()),
        b'a'..=b'f' => Some((digit - b'a' + 10).into()),
        _ => None,
    }
}

impl From<MessageId> for String {
    fn from(id: MessageId) -> String {
        const LONGEST: usize = "emit-log/0123456789abcdef/9223372036854775807".len();
        let mut text = String::with_capacity(LONGEST);
        // Writing to a string never fails.
        let _ = write!(text, "emit-log/{:016x}/{}", id.run, id.number);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(message_type: Option<&str>, body: &'static [u8]) -> Vec<&'static [u8]> {
        let packing = Packing::of(message_type);
        let records: Vec<_> = packing.records(body).collect();
        assert_eq!(packing.count(body), records.len() as u64);
        records
    }

    #[test]
    fn the_type_of_a_message_names_its_separator() {
        assert_eq!(records(None, b"a\nb\0"), [b"a\nb\0"]);
        assert_eq!(records(Some("greeting"), b"a\nb"), [b"a\nb"]);
        assert_eq!(records(Some("lines"), b"a\n\nb\0c\n"), [&b"a"[..], b"", b"b\0c", b""]);
        assert_eq!(records(Some("records"), b"a\nb\0c"), [&b"a\nb"[..], b"c"]);
        assert_eq!(records(Some("lines"), b""), [b""]);
        assert_eq!(records(None, b""), [b""]);
    }

    fn layout(message_type: &str, id: &str, body: &[u8]) -> Layout {
        let properties =
            Properties::default().with_type_(message_type.into()).with_message_id(id.into());
        Layout::of(&properties, body)
    }

    #[test]
    fn only_a_message_with_an_emit_log_id_is_a_batch() {
        let id = MessageId { run: 1, number: 7 };
        let batch = Layout { packing: Packing::Nul, records: 2, id: Some(id) };
        assert_eq!(layout("records", &String::from(id), b"a\nb\0c"), batch);
        let single = Layout { packing: Packing::Single, records: 1, id: None };
        assert_eq!(layout("records", "7", b"a\nb\0c"), single);
        let properties = Properties::default().with_type_("lines".into());
        assert_eq!(Layout::of(&properties, b"a\nb"), single);
        let numbered = Layout { id: Some(id), ..single };
        assert_eq!(layout("", &String::from(id), b"a\nb"), numbered);
    }

    #[test]
    fn a_batch_larger_than_those_of_emit_log_is_one_record() {
        let id = MessageId { run: 1, number: 7 };
        let of = |separators| layout("lines", &String::from(id), &vec![b'\n'; separators]);
        assert_eq!((of(MAX_BATCH).records, of(MAX_BATCH).id), (MAX_RECORDS, Some(id)));
        let single = Layout { packing: Packing::Single, records: 1, id: None };
        assert_eq!(of(MAX_BATCH + 1), single);
    }

    #[test]
    fn each_packing_has_its_type() {
        for packing in [Packing::Single, Packing::Lines, Packing::Nul] {
            assert_eq!(Packing::of(packing.message_type()), packing);
        }
    }

    #[test]
    fn an_id_is_parsed_as_it_was_written() {
        for id in [
            MessageId { run: 0, number: 1 },
            MessageId { run: 0xfedc_ba98_7654_3210, number: i64::MAX as u64 },
        ] {
            assert_eq!(MessageId::parse(&String::from(id)), Some(id));
        }
    }

    #[test]
    fn other_texts_are_not_ids() {
        for text in [
            "",
            "7",
            "emit-log/1/2",
            "emit-log/0123456789abcdef/",
            "emit-log/0123456789abcdef/+2",
            "emit-log/0123456789abcdef/0",
            "emit-log/0123456789ABCDEF/2",
            "emit-log/+123456789abcdef/2",
            "emit-log/0123456789abcdef/9223372036854775808",
            "emit-log/0123456789abcdef/18446744073709551616",
            "emit-log/0123456789abcdef/1/2",
            "Emit-log/0123456789abcdef/1",
        ] {
            assert_eq!(MessageId::parse(text), None, "{text}");
        }
    }
}
