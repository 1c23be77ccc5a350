//! Places in a stream, and the message by which a place is recognised.

use amqp::{Delivery, stream_offset};
use serde::{Deserialize, Serialize};

/// Where to begin, or to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// With the next message.
    Next,
    /// With the oldest message.
    First,
    /// With the first message sent at this time or later, in seconds since 1970.
    Since(u64),
    /// With the last records, this many.
    Tail(u64),
    /// With this message, but without the first records.
    At {
        /// The message.
        #[serde(rename = "position")]
        message: Fingerprint,
        /// How many records to leave out, of this message and the next ones.
        skip: u64,
    },
    /// After a message that is written already.
    After {
        /// The message.
        #[serde(rename = "position")]
        message: Fingerprint,
        /// How many records to leave out of the next messages.
        skip: u64,
    },
}

impl Place {
    /// The offset of the message that is written already.
    pub fn last_offset(self) -> Option<u64> {
        match self {
            Place::After { message, .. } => Some(message.offset),
            _ => None,
        }
    }
}

/// A message in a stream, by which to recognise the stream and to go on.
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
    /// The fingerprint of a message of a stream. A message whose headers were too large to be read is taken to be
    /// at the `expected` offset, at which reading can go on; `None` if that is unknown too.
    pub fn of(delivery: &Delivery, expected: Option<u64>) -> Option<Fingerprint> {
        let expected = stream_offset(delivery).or(expected)?;
        Some(Fingerprint::at(delivery, expected))
    }

    /// The same where an offset is expected.
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

/// Where a stream is. A place in any other stream is worthless.
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
