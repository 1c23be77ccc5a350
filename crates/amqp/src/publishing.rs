//! Publishing to a fanout exchange, and what the broker says of it.

use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, ConnectionBlockedNotification, ExchangeType};
use amiquip::{Publish, Return};
use crossbeam_channel::{Receiver, Select, TryRecvError, never};

use crate::connection::{Durability, declaring, exchange_options};
use crate::error::Error;
use crate::link::Link;
use crate::transport::frame_filter::Close;

/// Class and method of the declaration of an exchange.
const EXCHANGE_DECLARE: [u8; 4] = [0, 40, 0, 10];

/// Bytes of a body from which on publishing may have to wait: what amiquip buffers is larger.
const LARGE: usize = 1024 * 1024;

/// Where messages go, and what the broker is to say of them.
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

/// What the broker says, in the order in which it counts: a message that comes back does so before its
/// confirmation.
#[derive(Debug)]
pub enum Event {
    /// The message with this delivery tag is confirmed, or all up to it.
    Confirmed {
        /// Messages are counted from 1.
        tag: u64,
        /// All up to it.
        multiple: bool,
    },
    /// A queue has refused the message with this delivery tag, or all up to it.
    Refused {
        /// Messages are counted from 1.
        tag: u64,
        /// All up to it.
        multiple: bool,
    },
    /// No queue has taken this message.
    Returned(Box<Return>),
    /// The broker takes no messages for now, for this reason.
    Blocked(String),
    /// It takes messages again.
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
    blocked: Receiver<ConnectionBlockedNotification>,
    /// A confirmation that waits until the messages that came back before it are told.
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
            blocked: never(),
            confirmed: None,
        };
        match publishing.prepare() {
            Ok(()) => Ok(publishing),
            Err(_) => Err(publishing.end()),
        }
    }

    /// With confirmations the declaration goes out without waiting, and its refusal shows in place of
    /// the next confirmation. Without, nothing would tell what was sent until then.
    fn prepare(&mut self) -> amiquip::Result<()> {
        let Publishing { link, channel, route, .. } = self;
        self.blocked = link.listen_for_blocked()?;
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
            let answer = link.barrier(channel, link.limit, self.route.publishing());
            answer.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
        }
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        self.link.peer()
    }

    /// How the exchange was declared, unless it was not.
    pub fn declared(&self) -> Option<Durability> {
        self.route.declare
    }

    /// Sends a message off. A large one may have to wait for a broker that takes nothing; then
    /// the connection is cut when `max_wait` has passed.
    ///
    /// # Errors
    ///
    /// When the connection is lost, as far as that is known already.
    pub fn publish(
        &self,
        body: &[u8],
        properties: AmqpProperties,
        max_wait: Duration,
    ) -> Result<(), Lost> {
        let mut publish = Publish::with_properties(body, "", properties);
        publish.mandatory = self.route.mandatory;
        let publish = || self.channel.basic_publish(&self.route.exchange, publish);
        let published = match body.len() {
            ..LARGE => publish(),
            _ => {
                let published = self.link.call_within(max_wait, self.route.publishing(), publish);
                published.unwrap_or(Err(amiquip::Error::ConnectionTimeout))
            }
        };
        published.map_err(|_| Lost)
    }

    /// Makes `select` wait for the next event.
    pub fn select<'s>(&'s self, select: &mut Select<'s>) {
        select.recv(&self.confirms);
        select.recv(&self.returns);
        select.recv(&self.blocked);
    }

    /// The next of what the broker has said, if there is anything.
    ///
    /// # Errors
    ///
    /// When the connection is lost, after all that came before.
    pub fn try_event(&mut self) -> Result<Option<Event>, Lost> {
        let mut is_lost = false;
        if self.confirmed.is_none() {
            self.confirmed = match self.confirms.try_recv() {
                Ok(confirm) => Some(confirm),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => {
                    is_lost = true;
                    None
                }
            };
        }
        match self.returns.try_recv() {
            Ok(returned) => return Ok(Some(Event::Returned(Box::new(returned)))),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => is_lost = true,
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
        match self.blocked.try_recv() {
            Ok(ConnectionBlockedNotification::Blocked(reason)) => Ok(Some(Event::Blocked(reason))),
            Ok(ConnectionBlockedNotification::Unblocked) => Ok(Some(Event::Unblocked)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Lost),
        }
    }

    /// Waits until the broker has taken all that was published without confirmations, no longer
    /// than `max_wait`.
    ///
    /// # Errors
    ///
    /// Why the broker has not taken it.
    pub fn flush(&mut self, max_wait: Duration) -> Result<(), Error> {
        let flushed = self.link.barrier(&self.channel, max_wait, self.route.publishing())?;
        flushed.map_err(|_| self.end())
    }

    /// Ends a connection on which something failed, and returns the reason.
    pub fn end(&mut self) -> Error {
        let Some(Close { code, text, request: Some(request) }) = self.link.closed() else {
            return self.link.end();
        };
        let refused = match *request {
            EXCHANGE_DECLARE => declaring(&self.route.exchange),
            _ => self.route.publishing(),
        };
        match code {
            // An exchange that somebody has deleted is declared again.
            404 if self.route.declare.is_some() => Error::unavailable(format!("{refused}: {text}")),
            _ => Error::reply(refused, *code, text),
        }
    }

    /// Closes the connection, within a second. All that matters has been confirmed by then.
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
