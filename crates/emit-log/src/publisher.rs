//! Publishing: nothing is forgotten before the broker has confirmed it.

use std::collections::VecDeque;
use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, ConfirmPayload, ConnectionBlockedNotification};
use amiquip::{Error as AmqpError, Publish, Return};
use anyhow::Error;
use crossbeam_channel::{Receiver, after, never, select};
use logs_common::exit::{Failure, Status, status_of};
use logs_common::retry::{Backoff, Patience};
use logs_common::uri::Uri;
use logs_common::{Connection, ExchangeArgs};

use crate::cli::Cli;

/// How long to try to get back to a lost broker, and to wait for one that confirms nothing,
/// unless `--retry` says otherwise.
const PATIENCE: Patience = Patience::For(Duration::from_secs(60));

/// Publishes messages in order, connects again when the connection is lost, and sends what is
/// unconfirmed once more.
pub struct Publisher<'a> {
    cli: &'a Cli,
    uris: Vec<Uri>,
    properties: AmqpProperties,
    session: Session<'a>,
    /// What the broker has not confirmed, in the order sent: the first has the delivery tag
    /// `first_tag`, and the tags are consecutive. `None` is confirmed, but an earlier one is not.
    unconfirmed: VecDeque<Option<Vec<u8>>>,
    first_tag: u64,
    confirmed: u64,
    unheard: u64,
    /// Runs from the first failure to the next confirmation.
    backoff: Option<Backoff>,
}

/// What the broker said in the end.
pub struct Summary {
    /// Messages that no receiver's queue took; counted with `--mandatory` only.
    pub unheard: u64,
}

impl<'a> Publisher<'a> {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry`, or none lets us in.
    pub fn connect(cli: &'a Cli) -> Result<Publisher<'a>, Error> {
        let uris = cli.connection.uris()?;
        let mut backoff = Backoff::new(cli.connection.retry.unwrap_or(Patience::NONE));
        let session = loop {
            match Session::open(cli, &uris) {
                Ok(session) => break session,
                Err(failure) => backoff.pause(failure.into())?,
            }
        };
        Ok(Publisher {
            cli,
            uris,
            properties: cli.properties(),
            session,
            unconfirmed: VecDeque::new(),
            first_tag: 1,
            confirmed: 0,
            unheard: 0,
            backoff: None,
        })
    }

    /// Publishes a message, and keeps it until it is confirmed.
    ///
    /// # Errors
    ///
    /// When the broker refuses it, or is lost and does not come back in time.
    pub fn publish(&mut self, body: Vec<u8>) -> Result<(), Error> {
        let sent = self.session.publish(&body, &self.properties);
        if self.cli.no_confirm {
            return sent.map_err(|error| self.session.cause(error).into());
        }
        self.unconfirmed.push_back(Some(body));
        match sent {
            Ok(()) => Ok(()),
            Err(error) => {
                let cause = self.session.cause(error);
                self.recover(cause)
            }
        }
    }

    /// Waits until all is confirmed, and closes the connection.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn finish(mut self) -> Result<Summary, Error> {
        if self.cli.no_confirm {
            self.session.flush()?;
        }
        while !self.unconfirmed.is_empty() {
            self.wait()?;
        }
        self.unheard += self.session.returns.try_iter().count() as u64;
        if let Err(failure) = self.session.connection.close() {
            log::debug!("{failure}");
        }
        Ok(Summary {
            unheard: self.unheard,
        })
    }

    /// Waits for the next word from the broker, and acts on it.
    fn wait(&mut self) -> Result<(), Error> {
        let limit = match self.patience() {
            Patience::For(duration) => after(duration),
            Patience::Forever => never(),
        };
        let session = &mut self.session;
        select! {
            recv(session.confirms) -> confirm => match confirm {
                Ok(Confirm::Ack(ack)) => self.settle(ack),
                Ok(Confirm::Nack(_)) => {
                    let reason = format!("{}: refused by a queue", session.publishing());
                    return self.recover(Failure::unavailable(reason));
                }
                Err(_) => {
                    let cause = session.end();
                    return self.recover(cause);
                }
            },
            recv(session.blocked) -> notice => match notice {
                Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                    log::warn!("blocked by the broker: {reason}");
                }
                Ok(ConnectionBlockedNotification::Unblocked) => {
                    log::warn!("unblocked by the broker");
                }
                Err(_) => session.blocked = never(),
            },
            recv(limit) -> _ => {
                let peer = session.connection.peer();
                let reason = format!("{}: {peer} confirms nothing", session.publishing());
                return Err(self.doubt(Failure::unavailable(reason).into()));
            }
        }
        Ok(())
    }

    /// How long to go on without a confirmation.
    fn patience(&self) -> Patience {
        self.cli.connection.retry.unwrap_or(PATIENCE)
    }

    /// Strikes off what the broker has confirmed.
    fn settle(&mut self, ack: ConfirmPayload) {
        let through = (ack.delivery_tag + 1).saturating_sub(self.first_tag) as usize;
        let skipped = if ack.multiple {
            0
        } else {
            through.saturating_sub(1)
        };
        let settled = self.unconfirmed.iter_mut().take(through).skip(skipped);
        settled.for_each(|message| *message = None);
        while let Some(None) = self.unconfirmed.front() {
            self.unconfirmed.pop_front();
            self.first_tag += 1;
            self.confirmed += 1;
        }
        self.backoff = None;
    }

    /// Opens another session after the end of one, and sends what is unconfirmed again.
    fn recover(&mut self, cause: Failure) -> Result<(), Error> {
        let patience = self.patience();
        let mut error = Error::from(cause);
        self.unheard += self.session.returns.try_iter().count() as u64;
        self.unconfirmed.retain(Option::is_some);
        loop {
            let backoff = self.backoff.get_or_insert_with(|| Backoff::new(patience));
            backoff.pause(error).map_err(|error| self.doubt(error))?;
            match self.resend() {
                Ok(session) => {
                    self.session = session;
                    self.first_tag = 1;
                    return Ok(());
                }
                Err(failure) => error = failure.into(),
            }
        }
    }

    /// Adds to `error` what became of the messages, unless it tells that itself.
    fn doubt(&self, error: Error) -> Error {
        if status_of(&error) != Status::Unavailable {
            return error;
        }
        let doubt = self.unconfirmed.iter().flatten().count();
        error.context(format!("{} confirmed, {doubt} in doubt", self.confirmed))
    }

    fn resend(&self) -> Result<Session<'a>, Failure> {
        let mut session = Session::open(self.cli, &self.uris)?;
        for body in self.unconfirmed.iter().flatten() {
            let sent = session.publish(body, &self.properties);
            sent.map_err(|error| session.cause(error))?;
        }
        Ok(session)
    }
}

/// One connection, ready for publishing. The fields are dropped in this order: a channel whose
/// connection is gone does not wait for the broker.
struct Session<'a> {
    exchange: &'a ExchangeArgs,
    mandatory: bool,
    connection: Connection,
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    blocked: Receiver<ConnectionBlockedNotification>,
}

impl<'a> Session<'a> {
    /// Connects; the declaration goes out without waiting, and its refusal shows at the next
    /// confirmation.
    fn open(cli: &'a Cli, uris: &[Uri]) -> Result<Session<'a>, Failure> {
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
        session
            .prepare(!cli.no_confirm)
            .map_err(|_| session.end())?;
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

    fn publish(&self, body: &[u8], properties: &AmqpProperties) -> amiquip::Result<()> {
        let mut publish = Publish::with_properties(body, "", properties.clone());
        publish.mandatory = self.mandatory;
        self.channel.basic_publish(&self.exchange.name, publish)
    }

    /// Waits until the broker has taken all that was published without confirmations, by a
    /// request whose answer comes after it.
    fn flush(&mut self) -> Result<(), Failure> {
        let request = || self.channel.qos(0, 0, false);
        let flushed = self.connection.ask(self.publishing(), request)?;
        flushed.map_err(|error| self.cause(error))
    }

    /// Why the session ended, when no call has said so.
    fn end(&mut self) -> Failure {
        // Any call tells whether the broker has closed the channel, and why; but only once.
        match self.channel.enable_publisher_confirms_nowait() {
            Err(error) => self.cause(error),
            Ok(()) => self.connection.end(),
        }
    }

    /// What is behind an `error` of a call.
    fn cause(&mut self, error: AmqpError) -> Failure {
        match error {
            AmqpError::ServerClosedChannel { .. } => self.refusal(error),
            _ => self.connection.end(),
        }
    }

    /// Which of the requests that went out without waiting for one another was refused with
    /// `error`: the declaration, if it is refused again.
    fn refusal(&mut self, error: AmqpError) -> Failure {
        let declared = self.connection.open_channel().and_then(|channel| {
            let request = || self.exchange.declare(&channel);
            self.connection.ask("declare the exchange", request)?
        });
        match declared {
            Ok(()) => Failure::amqp(self.publishing(), error),
            Err(failure) => failure,
        }
    }

    fn publishing(&self) -> String {
        format!("publish to exchange '{}'", self.exchange.name)
    }
}
