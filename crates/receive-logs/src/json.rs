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
