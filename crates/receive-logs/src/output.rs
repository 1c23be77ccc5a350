//! Messages to bytes, and bytes to where they go.

use std::io::{self, Write};
use std::time::SystemTime;

use amiquip::{AmqpProperties, AmqpValue, Delivery, FieldTable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use logs_common::packing::Packing;
use logs_common::text;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::{Cli, Format};

/// Bytes gathered before they are written while more messages are waiting.
const BUFFER: usize = 64 * 1024;

/// What one message becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// ` [x] "info: hi"`
    Text {
        /// Begin with the time of arrival.
        timestamp: bool,
    },
    /// The bytes as they are, and `end`.
    Raw {
        /// Begin with the time of arrival.
        timestamp: bool,
        /// What ends a record.
        end: u8,
    },
    /// Raw, for people: control characters are escaped.
    Visible {
        /// Begin with the time of arrival.
        timestamp: bool,
    },
    /// One JSON object a line.
    Json,
}

impl Record {
    /// What the command line asks for, on an output that is a terminal or is not.
    pub fn new(cli: &Cli, is_terminal: bool) -> Record {
        let timestamp = cli.timestamp;
        match cli.format() {
            Format::Text => Record::Text { timestamp },
            Format::Raw if is_terminal => Record::Visible { timestamp },
            Format::Raw => Record::Raw { timestamp, end: if cli.null { b'\0' } else { b'\n' } },
            Format::Json => Record::Json,
        }
    }

    /// Appends one `record` of a message that arrived at `now`.
    fn push(
        self,
        out: &mut Vec<u8>,
        delivery: &Delivery,
        record: &[u8],
        now: impl Fn() -> SystemTime,
    ) {
        let push_time = |out: &mut Vec<u8>| {
            out.extend_from_slice(rfc3339(now()).as_bytes());
        };
        match self {
            Record::Text { timestamp } => {
                if timestamp {
                    push_time(out);
                }
                out.extend_from_slice(b" [x] ");
                text::push_quoted(out, record);
                out.push(b'\n');
            }
            Record::Raw { timestamp, end } => {
                if timestamp {
                    push_time(out);
                    out.push(b' ');
                }
                out.extend_from_slice(record);
                out.push(end);
            }
            Record::Visible { timestamp } => {
                if timestamp {
                    push_time(out);
                    out.push(b' ');
                }
                text::push_visible(out, record);
                out.push(b'\n');
            }
            Record::Json => {
                let object = JsonRecord::new(delivery, record, rfc3339(now()));
                serde_json::to_writer(&mut *out, &object).expect("memory takes any write");
                out.push(b'\n');
            }
        }
    }
}

/// UTC, with milliseconds.
fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// Writes whole records, so that whatever reads along never sees half of one that stays so.
pub struct Output<W> {
    record: Record,
    buffer: Vec<u8>,
    sink: W,
}

impl<W: Write> Output<W> {
    /// Writes to `sink`, which should not have a buffer of its own.
    pub fn new(record: Record, sink: W) -> Output<W> {
        Output { record, buffer: Vec::with_capacity(BUFFER), sink }
    }

    /// Writes the records of a message, at most `limit` of them, and returns how many that were.
    /// They may stay in the buffer until the next [`flush`](Output::flush).
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn write(&mut self, delivery: &Delivery, limit: u64) -> io::Result<u64> {
        let packing = Packing::of(delivery.properties.type_().as_deref());
        let mut written = 0;
        for record in packing.records(&delivery.body) {
            if written == limit {
                break;
            }
            self.record.push(&mut self.buffer, delivery, record, SystemTime::now);
            written += 1;
            if self.buffer.len() >= BUFFER {
                self.flush()?;
            }
        }
        Ok(written)
    }

    /// Writes what is in the buffer.
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn flush(&mut self) -> io::Result<()> {
        let written = self.sink.write_all(&self.buffer);
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER);
        written
    }
}

/// The fields of `--format json`.
#[derive(Serialize)]
struct JsonRecord<'a> {
    received_at: String,
    exchange: &'a str,
    routing_key: &'a str,
    redelivered: bool,
    #[serde(flatten)]
    body: Body<'a>,
    properties: Map<String, Value>,
    headers: Map<String, Value>,
}

#[derive(Serialize)]
enum Body<'a> {
    #[serde(rename = "body")]
    Utf8(&'a str),
    #[serde(rename = "body_base64")]
    Base64(String),
}

impl<'a> JsonRecord<'a> {
    fn new(delivery: &'a Delivery, record: &'a [u8], received_at: String) -> JsonRecord<'a> {
        JsonRecord {
            received_at,
            exchange: &delivery.exchange,
            routing_key: &delivery.routing_key,
            redelivered: delivery.redelivered,
            body: match str::from_utf8(record) {
                Ok(text) => Body::Utf8(text),
                Err(_) => Body::Base64(STANDARD.encode(record)),
            },
            properties: json_properties(&delivery.properties),
            headers: delivery.properties.headers().as_ref().map_or_else(Map::new, json_table),
        }
    }
}

/// The properties that are set, by their AMQP names.
fn json_properties(properties: &AmqpProperties) -> Map<String, Value> {
    let text = |property: &Option<String>| property.clone().map(Value::from);
    let fields = [
        ("content_type", text(properties.content_type())),
        ("content_encoding", text(properties.content_encoding())),
        ("delivery_mode", properties.delivery_mode().map(Value::from)),
        ("priority", properties.priority().map(Value::from)),
        ("correlation_id", text(properties.correlation_id())),
        ("reply_to", text(properties.reply_to())),
        ("expiration", text(properties.expiration())),
        ("message_id", text(properties.message_id())),
        ("timestamp", properties.timestamp().map(Value::from)),
        ("type", text(properties.type_())),
        ("user_id", text(properties.user_id())),
        ("app_id", text(properties.app_id())),
        ("cluster_id", text(properties.cluster_id())),
    ];
    let set = fields.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
    set.collect()
}

fn json_table(table: &FieldTable) -> Map<String, Value> {
    table.iter().map(|(name, value)| (name.clone(), json_value(value))).collect()
}

fn json_value(value: &AmqpValue) -> Value {
    match value {
        AmqpValue::Boolean(value) => Value::from(*value),
        AmqpValue::ShortShortInt(value) => Value::from(*value),
        AmqpValue::ShortShortUInt(value) => Value::from(*value),
        AmqpValue::ShortInt(value) => Value::from(*value),
        AmqpValue::ShortUInt(value) => Value::from(*value),
        AmqpValue::LongInt(value) => Value::from(*value),
        AmqpValue::LongUInt(value) => Value::from(*value),
        AmqpValue::LongLongInt(value) => Value::from(*value),
        AmqpValue::Float(value) => Value::from(*value),
        AmqpValue::Double(value) => Value::from(*value),
        AmqpValue::DecimalValue(value) => {
            Value::from(f64::from(value.value) / 10f64.powi(i32::from(value.scale)))
        }
        AmqpValue::LongString(value) => Value::from(value.as_str()),
        AmqpValue::FieldArray(values) => values.iter().map(json_value).collect(),
        AmqpValue::Timestamp(value) => Value::from(*value),
        AmqpValue::FieldTable(table) => Value::from(json_table(table)),
        AmqpValue::ByteArray(bytes) => Value::from(STANDARD.encode(bytes)),
        AmqpValue::Void => Value::Null,
    }
}
