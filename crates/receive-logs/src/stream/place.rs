//! Places in a stream, and the message that identifies a place.

use amqp::{Delivery, stream_offset};
use serde::{Deserialize, Serialize};

/// Where to begin or to continue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// With the next message.
    Next,
    /// With the oldest message.
    First,
    /// With the first message sent at this time or later, in seconds since 1970.
    Since(u64),
    /// With the last records, of this number.
    Tail(u64),
    /// With this message, without its first records.
    At {
        /// The message.
        #[serde(rename = "position")]
        message: Fingerprint,
        /// The number of records to skip, in this message and the next ones.
        skip: u64,
    },
    /// After a message that is already written.
    After {
        /// The message.
        #[serde(rename = "position")]
        message: Fingerprint,
        /// The number of records to skip in the next messages.
        skip: u64,
    },
}

impl Place {
    /// The offset of the message that is already written.
    pub fn last_offset(self) -> Option<u64> {
        match self {
            Place::After { message, .. } => Some(message.offset),
            _ => None,
        }
    }
}

/// A message in a stream. It identifies the stream, and a place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The offset of the message.
    pub offset: u64,
    /// CRC-32 of body and `message_id`.
    checksum: u32,
    /// The property `timestamp`, in seconds since 1970.
    pub sent: Option<u64>,
}

impl Fingerprint {
    /// The fingerprint of a message of a stream. If its headers are too large to read, its offset is assumed to be
    /// the `expected` one, so that reading can continue there. `None` if that is unknown as well.
    pub fn of(delivery: &Delivery, expected: Option<u64>) -> Option<Fingerprint> {
        let expected = stream_offset(delivery).or(expected)?;
        Some(Fingerprint::at(delivery, expected))
    }

    /// The same with a known expected offset.
    pub fn at(delivery: &Delivery, expected: u64) -> Fingerprint {
        let properties = &delivery.properties;
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&delivery.body);
        checksum.update(properties.message_id().as_deref().unwrap_or_default().as_bytes());
        Fingerprint {
            offset: stream_offset(delivery).unwrap_or(expected),
            checksum: checksum.finalize(),
            sent: *properties.timestamp(),
        }
    }
}

/// The identity of a stream. A place is only valid in its own stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The name of the broker's cluster.
    pub cluster: String,
    /// The vhost.
    pub vhost: String,
    /// The exchange.
    pub exchange: String,
    /// The stream.
    pub stream: String,
}
