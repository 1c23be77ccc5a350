//! `--format json`: all that the broker says of a message.

use amqp::{Delivery, Properties, Table, Value as Field};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use logs_common::wire::MessageId;
use serde::Serialize;
use serde_json::{Map, Value};

/// A record, as the object to write.
#[derive(Serialize)]
pub struct JsonRecord<'a> {
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
    /// A `record` of a message, the `index`th from 0, that arrived at the time given.
    pub fn new(
        delivery: &'a Delivery,
        record: &'a [u8],
        index: u64,
        received_at: String,
    ) -> JsonRecord<'a> {
        let mut properties = json_properties(&delivery.properties);
        if let Some(id) = id_of_record(&delivery.properties, index) {
            properties.insert("message_id".into(), String::from(id).into());
        }
        JsonRecord {
            received_at,
            exchange: &delivery.exchange,
            routing_key: &delivery.routing_key,
            redelivered: delivery.redelivered,
            body: match str::from_utf8(record) {
                Ok(text) => Body::Utf8(text),
                Err(_) => Body::Base64(STANDARD.encode(record)),
            },
            properties,
            headers: delivery.properties.headers().as_ref().map_or_else(Map::new, json_table),
        }
    }
}

/// The message id of the `index`th record: the id of a message numbers its first record only.
fn id_of_record(properties: &Properties, index: u64) -> Option<MessageId> {
    let id = MessageId::parse(properties.message_id().as_deref()?)?;
    Some(MessageId { number: id.number.checked_add(index)?, ..id })
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
    use logs_tests::Message;
    use serde_json::json;

    use super::*;
    use crate::testing::deliveries;

    fn delivery(message: Message) -> Delivery {
        deliveries(&[message]).pop().expect("a delivery")
    }

    fn object(delivery: &Delivery, record: &[u8], index: u64) -> Value {
        let record = JsonRecord::new(delivery, record, index, "now".into());
        serde_json::to_value(record).unwrap()
    }

    #[test]
    fn a_plain_message_has_all_fields() {
        let delivery = delivery(Message { redelivered: true, ..Message::new("hi") });
        let expected = json!({
            "received_at": "now", "exchange": "logs", "routing_key": "", "redelivered": true,
            "body": "hi", "properties": {}, "headers": {},
        });
        assert_eq!(object(&delivery, b"hi", 0), expected);
    }

    #[test]
    fn bytes_that_are_not_utf8_are_in_base64() {
        let object = object(&delivery(Message::new("")), b"\xffab", 0);
        assert_eq!((&object["body"], &object["body_base64"]), (&Value::Null, &json!("/2Fi")));
    }

    #[test]
    fn each_record_of_a_batch_has_its_own_number() {
        let id = |message_id: &str, index| {
            let message_id = Some(message_id.to_string());
            let delivery = delivery(Message { message_id, ..Message::new("") });
            object(&delivery, b"", index)["properties"]["message_id"].clone()
        };
        assert_eq!(id("emit-log/0000000000000abc/7", 2), "emit-log/0000000000000abc/9");
        assert_eq!(id("another program's", 2), "another program's");
    }

    #[test]
    fn properties_have_their_amqp_names() {
        let mut delivery = delivery(Message::new(""));
        delivery.properties = Properties::default()
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
        assert_eq!(object(&delivery, b"", 0)["properties"], expected);
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
        let mut delivery = delivery(Message::new(""));
        delivery.properties = Properties::default().with_headers(headers);
        let expected = json!({
            "bool": true, "i8": -1, "u8": 1, "i16": -2, "u16": 2, "i32": -3, "u32": 3, "i64": -4,
            "f32": 0.5, "f64": 0.25, "text": "hi", "list": [1, null], "time": 5,
            "table": {"deep": null}, "bytes": "/w==",
        });
        assert_eq!(object(&delivery, b"", 0)["headers"], expected);
    }
}
