//! One connection, ready for publishing.

use std::sync::Arc;
use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, ConnectionBlockedNotification};
use amiquip::{Publish, Return};
use crossbeam_channel::{Receiver, never};
use logs_common::exchange::{Durability, EXCHANGE_DECLARE};
use logs_common::exit::Failure;
use logs_common::guard::Close;
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};

use crate::cli::Cli;

/// Bytes of a body from which on publishing may have to wait: what amiquip buffers is larger.
const LARGE: usize = 1024 * 1024;

/// Where to publish, and how.
pub struct SessionConfig {
    uris: Vec<Uri>,
    /// The exchange, as the command line has it.
    pub exchange: ExchangeArgs,
    mandatory: bool,
    /// Whether the broker is to confirm messages.
    pub confirms: bool,
}

impl SessionConfig {
    /// What the command line asks for.
    ///
    /// # Errors
    ///
    /// When no brokers can be made of it.
    pub fn new(cli: &Cli) -> Result<SessionConfig, Failure> {
        Ok(SessionConfig {
            uris: cli.connection.uris()?,
            exchange: cli.exchange.clone(),
            mandatory: cli.mandatory,
            confirms: !cli.no_confirm,
        })
    }

    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        format!("publish to exchange '{}'", self.exchange.name)
    }
}

/// The fields are dropped in this order: a channel whose connection is gone does not wait for the
/// broker.
pub struct Session {
    config: Arc<SessionConfig>,
    /// The connection.
    pub connection: Connection,
    channel: Channel,
    /// What the broker has confirmed; ends with the session.
    pub confirms: Receiver<Confirm>,
    /// What no queue has taken, each before its confirmation.
    pub returns: Receiver<Return>,
    /// Whether the broker takes messages.
    pub blocked: Receiver<ConnectionBlockedNotification>,
}

impl Session {
    /// Connects. With confirmations the declaration goes out without waiting, and its refusal shows in
    /// place of the next confirmation. Without, nothing would tell what was sent until then.
    ///
    /// # Errors
    ///
    /// When no broker lets us in, or it refuses the declaration.
    pub fn open(config: &Arc<SessionConfig>, durability: Durability) -> Result<Session, Failure> {
        match Session::open_once(config, durability) {
            Err(refusal) if refusal.is_other_durability() => {
                config.exchange.note_other_durability();
                Session::open_once(config, durability.other())
            }
            outcome => outcome,
        }
    }

    fn open_once(config: &Arc<SessionConfig>, durability: Durability) -> Result<Session, Failure> {
        let (connection, channel) = Connection::open(&config.uris, "emit-log")?;
        let mut session = Session {
            config: Arc::clone(config),
            connection,
            channel,
            confirms: never(),
            returns: never(),
            blocked: never(),
        };
        session.prepare(durability).map_err(|_| session.end())?;
        log::info!("publishing to exchange '{}'", config.exchange.name);
        Ok(session)
    }

    fn prepare(&mut self, durability: Durability) -> amiquip::Result<()> {
        let Session { config, channel, .. } = self;
        self.blocked = self.connection.listen_for_blocked()?;
        if config.mandatory {
            self.returns = channel.listen_for_returns()?;
        }
        config.exchange.declare_nowait(channel, durability)?;
        if config.confirms {
            self.confirms = channel.listen_for_publisher_confirms()?;
            channel.enable_publisher_confirms_nowait()
        } else {
            let sync = self.connection.sync(channel, self.connection.limit, "open a channel");
            sync.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
        }
    }

    /// Sends a message off. A large one may have to wait for a broker that takes nothing; then
    /// the connection is cut when `limit` has passed.
    pub fn publish(
        &self,
        body: &[u8],
        properties: AmqpProperties,
        limit: Duration,
    ) -> amiquip::Result<()> {
        let mut publish = Publish::with_properties(body, "", properties);
        publish.mandatory = self.config.mandatory;
        let publish = || self.channel.basic_publish(&self.config.exchange.name, publish);
        if body.len() < LARGE {
            return publish();
        }
        let published = self.connection.ask_within(limit, self.config.publishing(), publish);
        published.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
    }

    /// Waits until the broker has taken all that was published without confirmations, no longer
    /// than `limit`.
    ///
    /// # Errors
    ///
    /// Why the broker has not taken it.
    pub fn flush(&mut self, limit: Duration) -> Result<(), Failure> {
        let flushed = self.connection.sync(&self.channel, limit, self.config.publishing())?;
        flushed.map_err(|_| self.end())
    }

    /// Ends a session in which something failed, and returns the reason.
    pub fn end(&mut self) -> Failure {
        let Some(Close { code, text, request: Some(request) }) = self.connection.closed() else {
            return self.connection.end();
        };
        let exchange = &self.config.exchange;
        let refused = match *request {
            EXCHANGE_DECLARE => exchange.declaring(),
            _ => self.config.publishing(),
        };
        match code {
            // An exchange that somebody has deleted is declared again.
            404 if !exchange.passive => Failure::unavailable(format!("{refused}: {text}")),
            _ => Failure::reply(refused, *code, text),
        }
    }
}
