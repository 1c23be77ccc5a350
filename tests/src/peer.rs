//! Another AMQP client, on the node under test.

use crate::url;

/// Another AMQP client, for what the tools themselves do not send.
pub struct Peer {
    channel: amiquip::Channel,
    _connection: amiquip::Connection,
}

impl Peer {
    /// Connects to the broker under test.
    pub fn connect() -> Peer {
        let mut connection = amiquip::Connection::insecure_open(&url()).expect("connect");
        let channel = connection.open_channel(None).expect("open a channel");
        Peer { channel, _connection: connection }
    }

    /// The channel.
    pub fn channel(&self) -> &amiquip::Channel {
        &self.channel
    }

    /// Publishes to a fanout exchange.
    pub fn publish(&self, exchange: &str, body: &[u8]) {
        self.publish_with(exchange, body, amiquip::AmqpProperties::default());
    }

    /// Publishes to a fanout exchange, with properties.
    pub fn publish_with(&self, exchange: &str, body: &[u8], properties: amiquip::AmqpProperties) {
        let publish = amiquip::Publish::with_properties(body, "", properties);
        self.channel.basic_publish(exchange, publish).expect("publish");
    }
}
