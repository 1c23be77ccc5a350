//! One connection, ready for publishing.

use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, ConnectionBlockedNotification};
use amiquip::{Publish, Return};
use crossbeam_channel::{Receiver, never};
use logs_common::exchange::EXCHANGE_DECLARE;
use logs_common::exit::Failure;
use logs_common::guard::Close;
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};

use crate::cli::Cli;

/// Bytes of a body from which on publishing may have to wait: what amiquip buffers is larger.
const LARGE: usize = 1024 * 1024;

/// The fields are dropped in this order: a channel whose connection is gone does not wait for the
/// broker.
pub struct Session<'a> {
    exchange: &'a ExchangeArgs,
    mandatory: bool,
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

impl<'a> Session<'a> {
    /// Connects; the declaration goes out without waiting, and its refusal shows at the next
    /// confirmation.
    pub fn open(cli: &'a Cli, uris: &[Uri]) -> Result<Session<'a>, Failure> {
        let (connection, channel) = Connection::open(uris, "emit-log")?;
        let mut session = Session {
            exchange: &cli.exchange,
            mandatory: cli.mandatory,
            connection,
            channel,
            confirms: never(),
            returns: never(),
            blocked: never(),
        };
        session.prepare(!cli.no_confirm).map_err(|_| session.end())?;
        Ok(session)
    }

    fn prepare(&mut self, confirm: bool) -> amiquip::Result<()> {
        self.blocked = self.connection.listen_for_blocked()?;
        if self.mandatory {
            self.returns = self.channel.listen_for_returns()?;
        }
        self.exchange.declare_nowait(&self.channel)?;
        if confirm {
            self.confirms = self.channel.listen_for_publisher_confirms()?;
            self.channel.enable_publisher_confirms_nowait()?;
        }
        Ok(())
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
        publish.mandatory = self.mandatory;
        let publish = || self.channel.basic_publish(&self.exchange.name, publish);
        if body.len() < LARGE {
            return publish();
        }
        let published = self.connection.ask_within(limit, self.publishing(), publish);
        published.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
    }

    /// Waits until the broker has taken all that was published without confirmations, no longer
    /// than `limit`.
    pub fn flush(&mut self, limit: Duration) -> Result<(), Failure> {
        let flushed = self.connection.sync(&self.channel, limit, self.publishing())?;
        flushed.map_err(|_| self.end())
    }

    /// Ends a session in which something failed, and returns the reason.
    pub fn end(&mut self) -> Failure {
        let Some(Close { code, text, request: Some(request) }) = self.connection.closed() else {
            return self.connection.end();
        };
        let refused = match *request {
            EXCHANGE_DECLARE => self.exchange.declaring(),
            _ => self.publishing(),
        };
        match code {
            // An exchange that somebody has deleted is declared again.
            404 if !self.exchange.passive => Failure::unavailable(format!("{refused}: {text}")),
            _ => Failure::reply(refused, *code, text),
        }
    }

    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        format!("publish to exchange '{}'", self.exchange.name)
    }
}
