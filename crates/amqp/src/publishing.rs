//! Publishing to a fanout exchange: messages out, and events of the broker in.

use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, ConnectionBlockedNotification, ExchangeType};
use amiquip::{Publish, Return};
use crossbeam_channel::{Receiver, Select, never};

use crate::connection::{Durability, declaring, exchange_options};
use crate::error::Error;
use crate::link::Link;
use crate::transport::frame_filter::Close;

/// Class and method of the declaration of an exchange.
const EXCHANGE_DECLARE: [u8; 4] = [0, 40, 0, 10];

/// Bytes of a body from which on publishing may have to wait; smaller messages fit into amiquip's buffer.
const LARGE: usize = 1024 * 1024;

/// Where messages go, and which answers the broker is to give.
#[derive(Clone, Debug)]
pub struct Route {
    /// The fanout exchange.
    pub exchange: String,
    /// How to declare it; an exchange that is not declared must exist.
    pub declare: Option<Durability>,
    /// Whether messages that no queue takes come back.
    pub mandatory: bool,
    /// Whether the broker confirms messages.
    pub confirms: bool,
}

/// An event of the broker. They come in the order in which they count: a message is returned before its
/// confirmation.
#[derive(Debug)]
pub enum Event {
    /// The message with this delivery tag is confirmed, or all up to it.
    Confirmed {
        /// Messages are counted from 1.
        tag: u64,
        /// Whether all earlier messages are meant as well.
        multiple: bool,
    },
    /// A queue has refused the message with this delivery tag, or all up to it.
    Refused {
        /// Messages are counted from 1.
        tag: u64,
        /// Whether all earlier messages are meant as well.
        multiple: bool,
    },
    /// No queue has taken this message.
    Returned(Box<Return>),
    /// The broker takes no messages for now, for this reason.
    Blocked(String),
    /// The broker takes messages again.
    Unblocked,
}

/// The connection is lost, or the broker has closed the channel; [`Publishing::end`] tells why.
#[derive(Debug)]
pub struct Lost;

/// A connection that publishes. Dropped, it is cut at once.
pub struct Publishing {
    // Dropped first: a channel whose connection is gone does not wait for the broker.
    link: Link,
    channel: Channel,
    route: Route,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    /// A confirmation that waits until the messages that were returned before it are told.
    confirmed: Option<Confirm>,
}

impl Publishing {
    pub(crate) fn start(link: Link, channel: Channel, route: Route) -> Result<Publishing, Error> {
        let mut publishing = Publishing {
            link,
            channel,
            route,
            confirms: never(),
            returns: never(),
            confirmed: None,
        };
        match publishing.prepare() {
            Ok(()) => Ok(publishing),
            Err(_) => Err(publishing.end()),
        }
    }

    /// With confirmations the declaration goes out without waiting, and its refusal shows in place of
    /// the next confirmation. Without confirmations, messages would be lost with the refusal.
    fn prepare(&mut self) -> amiquip::Result<()> {
        let Publishing { link, channel, route, .. } = self;
        // Without confirmations, this channel alone shows that the broker has closed the AMQP channel.
        if route.mandatory || !route.confirms {
            self.returns = channel.listen_for_returns()?;
        }
        if let Some(durability) = route.declare {
            let options = exchange_options(durability);
            channel.exchange_declare_nowait(ExchangeType::Fanout, &route.exchange, options)?;
        }
        if route.confirms {
            self.confirms = channel.listen_for_publisher_confirms()?;
            channel.enable_publisher_confirms_nowait()
        } else {
            let answer = link.barrier(channel, link.timeout, self.route.publishing());
            answer.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
        }
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        &self.link.peer
    }

    /// How the exchange was declared, unless it was not.
    pub fn declared(&self) -> Option<Durability> {
        self.route.declare
    }

    /// Sends a message off. A large message may have to wait while the broker takes none; then the
    /// connection is cut when `timeout` has passed.
    ///
    /// # Errors
    ///
    /// When the connection is lost, as far as that is known already.
    pub fn publish(
        &self,
        body: &[u8],
        properties: AmqpProperties,
        timeout: Duration,
    ) -> Result<(), Lost> {
        let mut publish = Publish::with_properties(body, "", properties);
        publish.mandatory = self.route.mandatory;
        let publish = || self.channel.basic_publish(&self.route.exchange, publish);
        let published = match body.len() {
            ..LARGE => publish(),
            _ => {
                let published = self.link.call(timeout, self.route.publishing(), publish);
                published.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
            }
        };
        published.map_err(|_| Lost)
    }

    /// Makes `select` wait for the next event.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        select.recv(&self.confirms);
        select.recv(&self.returns);
        select.recv(&self.link.blocked);
    }

    /// The next event, if any is there.
    ///
    /// # Errors
    ///
    /// When the connection is lost, after all events before.
    pub fn try_event(&mut self) -> Result<Option<Event>, Lost> {
        let mut is_lost = false;
        if self.confirmed.is_none() {
            self.confirmed = take(&self.confirms, &mut is_lost);
        }
        if let Some(returned) = take(&self.returns, &mut is_lost) {
            return Ok(Some(Event::Returned(Box::new(returned))));
        }
        if let Some(confirm) = self.confirmed.take() {
            return Ok(Some(match confirm {
                Confirm::Ack(ack) => {
                    Event::Confirmed { tag: ack.delivery_tag, multiple: ack.multiple }
                }
                Confirm::Nack(nack) => {
                    Event::Refused { tag: nack.delivery_tag, multiple: nack.multiple }
                }
            }));
        }
        if is_lost {
            return Err(Lost);
        }
        self.link.backlog().all_taken();
        match take(&self.link.blocked, &mut is_lost) {
            Some(ConnectionBlockedNotification::Blocked(reason)) => {
                Ok(Some(Event::Blocked(reason)))
            }
            Some(ConnectionBlockedNotification::Unblocked) => Ok(Some(Event::Unblocked)),
            None if is_lost => Err(Lost),
            None => Ok(None),
        }
    }

    /// Waits until the broker has taken all messages that were published without confirmations.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within `timeout`.
    pub fn flush(&mut self, timeout: Duration) -> Result<(), Error> {
        let flushed = self.link.barrier(&self.channel, timeout, self.route.publishing())?;
        flushed.map_err(|_| self.end())
    }

    /// Ends a connection that is [`Lost`], and returns the reason.
    pub fn end(&mut self) -> Error {
        let Some(Close { code, text, request: Some(request) }) = self.link.closed() else {
            return self.link.end();
        };
        let refused = match *request {
            EXCHANGE_DECLARE => declaring(&self.route.exchange),
            _ => self.route.publishing(),
        };
        match code {
            // The exchange was deleted after the declaration, and will be declared again.
            404 if self.route.declare.is_some() => Error::unavailable(format!("{refused}: {text}")),
            _ => {
                let reply = Error::reply(refused, *code, text);
                self.link.explain(reply)
            }
        }
    }

    /// Closes the connection, within a second. An error is of no use by then: all is confirmed.
    pub fn close(mut self) {
        if let Err(error) = self.link.close() {
            log::debug!("{error}");
        }
    }
}

impl Route {
    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        format!("publish to exchange '{}'", self.exchange)
    }
}

/// The next of a channel, if any is there; notes whether the connection has ended it.
fn take<T>(channel: &Receiver<T>, is_lost: &mut bool) -> Option<T> {
    channel.try_recv().inspect_err(|error| *is_lost |= error.is_disconnected()).ok()
}
