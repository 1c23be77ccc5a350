//! `--format json`: a record with all properties of its message.

use std::io::{self, Write};

use amqp::{Delivery, Properties, Table, Value as Field};
use base64::Engine;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use logs_common::wire::MessageId;
use logs_process::escape;
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Map, Value};

use crate::message::Message;

/// Properties and headers of at most this number of bytes are repeated for each record of a batch.
const REPEATED: usize = 1024;

/// The JSON object of a record.
#[derive(Serialize)]
struct JsonRecord<'a> {
    received_at: &'a str,
    exchange: &'a str,
    routing_key: &'a str,
    redelivered: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<Base64<'a>>,
    properties: &'a Map<String, Value>,
    headers: &'a Map<String, Value>,
}

/// Bytes that are encoded while they are written.
struct Base64<'a>(&'a [u8]);

impl Serialize for Base64<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &STANDARD))
    }
}

/// Writes the records of a message.
pub struct JsonRecords<'a> {
    delivery: &'a Delivery,
    /// The id of the first record.
    id: Option<MessageId>,
    properties: Map<String, Value>,
    headers: Map<String, Value>,
    /// Whether properties and headers are too large to be repeated for each record.
    is_large: bool,
}

impl<'a> JsonRecords<'a> {
    /// Converts the properties and headers, which the records share.
    pub fn new(message: &'a Message) -> JsonRecords<'a> {
        let Message { delivery, layout, .. } = message;
        let properties = json_properties(&delivery.properties);
        let headers = delivery.properties.headers().as_ref().map_or_else(Map::new, json_table);
        let is_large = layout.records > 1 && {
            let mut text = Vec::new();
            write_json(&mut text, &(&properties, &headers)).is_err() || text.len() > REPEATED
        };
        JsonRecords { delivery, id: layout.id, properties, headers, is_large }
    }

    /// Writes a `record` without its end. The `index` counts the records of the message from 0.
    pub fn write(
        &mut self,
        out: &mut impl Write,
        index: u64,
        record: &[u8],
        received_at: &str,
    ) -> io::Result<()> {
        if let Some(id) = self.id {
            let id = MessageId { number: id.number + index, ..id };
            self.properties.insert("message_id".into(), String::from(id).into());
        }
        let body = str::from_utf8(record).ok();
        let object = JsonRecord {
            received_at,
            exchange: &self.delivery.exchange,
            routing_key: &self.delivery.routing_key,
            redelivered: self.delivery.redelivered,
            body,
            body_base64: body.is_none().then_some(Base64(record)),
            properties: &self.properties,
            headers: &self.headers,
        };
        write_json(out, &object)?;
        if self.is_large {
            self.properties.retain(|name, _| name == "message_id");
            self.headers.clear();
        }
        Ok(())
    }
}

fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut serializer = Serializer::with_formatter(out, VisibleFormatter);
    value.serialize(&mut serializer).map_err(io::Error::from)
}

/// Escapes invisible characters, as the text format does, so that no message can control a terminal.
struct VisibleFormatter;

impl Formatter for VisibleFormatter {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Most text is ASCII. Any formatter escapes the control characters of ASCII except DEL.
        if fragment.is_ascii() && !fragment.contains('\x7f') {
            return writer.write_all(fragment.as_bytes());
        }
        let mut start = 0;
        for (position, character) in fragment.char_indices() {
            if !escape::is_visible(character) {
                writer.write_all(&fragment.as_bytes()[start..position])?;
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
                start = position + character.len_utf8();
            }
        }
        writer.write_all(&fragment.as_bytes()[start..])
    }
}

/// The properties that are set, by their AMQP names.
fn json_properties(properties: &Properties) -> Map<String, Value> {
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

fn json_table(table: &Table) -> Map<String, Value> {
    table.iter().map(|(name, value)| (name.clone(), json_value(value))).collect()
}

fn json_value(value: &Field) -> Value {
    match value {
        Field::Boolean(value) => Value::from(*value),
        Field::ShortShortInt(value) => Value::from(*value),
        Field::ShortShortUInt(value) => Value::from(*value),
        Field::ShortInt(value) => Value::from(*value),
        Field::ShortUInt(value) => Value::from(*value),
        Field::LongInt(value) => Value::from(*value),
        Field::LongUInt(value) => Value::from(*value),
        Field::LongLongInt(value) => Value::from(*value),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::DecimalValue(value) => {
            Value::from(f64::from(value.value) / 10f64.powi(i32::from(value.scale)))
        }
        Field::LongString(value) => Value::from(value.as_str()),
        Field::FieldArray(values) => values.iter().map(json_value).collect(),
        Field::Timestamp(value) => Value::from(*value),
        Field::FieldTable(table) => Value::from(json_table(table)),
        Field::ByteArray(bytes) => Value::from(STANDARD.encode(bytes)),
        Field::Void => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A message to the exchange `logs`.
    fn message(properties: Properties, body: &[u8]) -> Message {
        let mut delivery = Box::<Delivery>::default();
        (delivery.exchange, delivery.properties) = ("logs".into(), properties);
        delivery.body = body.into();
        Message::new(delivery)
    }

    fn object(message: &Message, record: &[u8], index: u64) -> Value {
        let mut out = Vec::new();
        JsonRecords::new(message).write(&mut out, index, record, "now").unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn a_plain_message_has_all_fields() {
        let mut message = message(Properties::default(), b"hi");
        message.delivery.redelivered = true;
        let expected = json!({
            "received_at": "now", "exchange": "logs", "routing_key": "", "redelivered": true,
            "body": "hi", "properties": {}, "headers": {},
        });
        assert_eq!(object(&message, b"hi", 0), expected);
    }

    #[test]
    fn invisible_characters_are_escaped() {
        let text = "\x7f\u{80}\u{9b}31m\u{9d}\u{61c}\u{200b}\u{200d}\u{200e}\u{202e}\u{2028}\u{2066}\u{feff}\u{e0001}";
        let headers = Table::from([(text.into(), Field::LongString(text.into()))]);
        let properties = Properties::default().with_headers(headers).with_app_id(text.into());
        let message = message(properties, text.as_bytes());
        let mut out = Vec::new();
        JsonRecords::new(&message).write(&mut out, 0, text.as_bytes(), "now").unwrap();
        assert!(out.iter().all(|byte| matches!(byte, b' '..=b'~')), "{}", out.escape_ascii());
        let object: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(object["body"], text);
        assert_eq!(object["headers"][text], text);
        assert_eq!(object["properties"]["app_id"], text);
    }

    #[test]
    fn visible_text_is_unchanged() {
        for text in ["it's 5 °C", "日本語", "cafe\u{301}", "\u{1f600}", "a\u{ad}b"] {
            let mut out = Vec::new();
            write_json(&mut out, &text).unwrap();
            let escaped = text.replace('\u{ad}', "\\u00ad");
            assert_eq!(String::from_utf8(out).unwrap(), format!("\"{escaped}\""));
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_in_base64() {
        let object = object(&message(Properties::default(), b""), b"\xffab", 0);
        assert_eq!((&object["body"], &object["body_base64"]), (&Value::Null, &json!("/2Fi")));
    }

    #[test]
    fn each_record_of_a_batch_has_its_own_number() {
        let id = |message_id: &str, index| {
            let properties = Properties::default().with_message_id(message_id.into());
            object(&message(properties, b""), b"", index)["properties"]["message_id"].clone()
        };
        assert_eq!(id("emit-log/0000000000000abc/7", 2), "emit-log/0000000000000abc/9");
        assert_eq!(id("another program's", 2), "another program's");
    }

    #[test]
    fn large_headers_are_only_in_the_first_record_of_a_batch() {
        let objects = |header: usize| {
            let id = "emit-log/0000000000000001/7".to_string();
            let headers = Table::from([("Host".into(), Field::LongString("x".repeat(header)))]);
            let properties = Properties::default().with_type_("lines".into());
            let properties = properties.with_message_id(id).with_headers(headers);
            let message = message(properties, b"a\nb");
            let mut records = JsonRecords::new(&message);
            [0, 1].map(|index| {
                let mut out = Vec::new();
                records.write(&mut out, index, b"", "now").unwrap();
                serde_json::from_slice::<Value>(&out).unwrap()
            })
        };
        let [first, second] = objects(2000);
        assert_eq!(first["headers"]["Host"], "x".repeat(2000));
        assert_eq!(first["properties"]["type"], "lines");
        assert_eq!(second["headers"], json!({}));
        assert_eq!(second["properties"], json!({"message_id": "emit-log/0000000000000001/8"}));
        let [first, second] = objects(100);
        assert_eq!(first["headers"], second["headers"]);
        assert_eq!(second["properties"]["type"], "lines");
    }

    #[test]
    fn properties_have_their_amqp_names() {
        let properties = Properties::default()
            .with_content_type("text/plain".into())
            .with_content_encoding("gzip".into())
            .with_delivery_mode(2)
            .with_priority(3)
            .with_correlation_id("c".into())
            .with_reply_to("r".into())
            .with_expiration("60000".into())
            .with_message_id("m".into())
            .with_timestamp(4)
            .with_type_("t".into())
            .with_user_id("u".into())
            .with_app_id("a".into())
            .with_cluster_id("k".into());
        let expected = json!({
            "content_type": "text/plain", "content_encoding": "gzip", "delivery_mode": 2,
            "priority": 3, "correlation_id": "c", "reply_to": "r", "expiration": "60000",
            "message_id": "m", "timestamp": 4, "type": "t", "user_id": "u", "app_id": "a",
            "cluster_id": "k",
        });
        assert_eq!(object(&message(properties, b""), b"", 0)["properties"], expected);
    }

    #[test]
    fn headers_keep_their_types() {
        let inner = Table::from([("deep".into(), Field::Void)]);
        let headers = Table::from([
            ("bool".into(), Field::Boolean(true)),
            ("i8".into(), Field::ShortShortInt(-1)),
            ("u8".into(), Field::ShortShortUInt(1)),
            ("i16".into(), Field::ShortInt(-2)),
            ("u16".into(), Field::ShortUInt(2)),
            ("i32".into(), Field::LongInt(-3)),
            ("u32".into(), Field::LongUInt(3)),
            ("i64".into(), Field::LongLongInt(-4)),
            ("f32".into(), Field::Float(0.5)),
            ("f64".into(), Field::Double(0.25)),
            ("text".into(), Field::LongString("hi".into())),
            ("list".into(), Field::FieldArray(vec![Field::LongInt(1), Field::Void])),
            ("time".into(), Field::Timestamp(5)),
            ("table".into(), Field::FieldTable(inner)),
            ("bytes".into(), Field::ByteArray(b"\xff".to_vec())),
        ]);
        let message = message(Properties::default().with_headers(headers), b"");
        let expected = json!({
            "bool": true, "i8": -1, "u8": 1, "i16": -2, "u16": 2, "i32": -3, "u32": 3, "i64": -4,
            "f32": 0.5, "f64": 0.25, "text": "hi", "list": [1, null], "time": 5,
            "table": {"deep": null}, "bytes": "/w==",
        });
        assert_eq!(object(&message, b"", 0)["headers"], expected);
    }
}
