//! Another AMQP client, on the node under test or on another node.

use amiquip::AmqpValue;

use crate::url;

/// Another AMQP client, for requests that the tools do not make.
pub struct Peer {
    channel: amiquip::Channel,
    connection: amiquip::Connection,
}

impl Peer {
    /// Connects to the node under test.
    pub fn connect() -> Peer {
        Peer::connect_to(&url())
    }

    /// Connects to the broker at `url`.
    pub fn connect_to(url: &str) -> Peer {
        let mut connection = amiquip::Connection::insecure_open(url).expect("connect");
        let channel = connection.open_channel(None).expect("open a channel");
        Peer { channel, connection }
    }

    /// The broker's version: 4 and 3 for RabbitMQ 4.3.6.
    pub fn broker_version(&self) -> (u32, u32) {
        let version = self.connection.server_properties().get("version");
        let Some(AmqpValue::LongString(version)) = version else { panic!("{version:?}") };
        let mut numbers = version.split('.').map(|number| number.parse().expect("a number"));
        (numbers.next().expect("a major version"), numbers.next().expect("a minor version"))
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
