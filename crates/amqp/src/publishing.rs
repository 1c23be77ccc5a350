//! Publishing to a fanout exchange: messages out, and events of the broker in.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use amiquip::Channel;
use amq_protocol::protocol::{AMQPClass, basic, confirm};

use crate::Properties;
use crate::connection::{Durability, declare_fanout, declaring, qos};
use crate::error::Error;
use crate::link::{Link, Lost};
use crate::transport::decoder::Inbound;
use crate::transport::encoder::{self, Answer};
use crate::transport::frame_filter::{CHANNEL, Close};
use crate::transport::wire::Woken;

/// The reply code where an operator, or the end of the broker, closes a connection.
const CONNECTION_FORCED: u16 = 320;

/// The answer which shows that the broker has taken all that came before the request.
const TAKEN: Answer = Answer::Qos(CHANNEL);

/// Bytes of frames that are sent at a time.
const SENT_AT_ONCE: usize = 64 * 1024;

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
    /// When to begin.
    pub start: Start,
}

/// When publishing begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Once the broker has let us in.
    LetIn,
    /// At once, so that messages need no round trip of their own. With confirmations only: a broker that does not
    /// let us in tells in place of the first confirmation.
    AtOnce,
}

/// A message that no queue has taken.
#[derive(Debug)]
pub struct Return {
    /// The broker's reason.
    pub reply_text: String,
    /// The body.
    pub content: Vec<u8>,
    /// The properties, as they were published.
    pub properties: Properties,
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

/// A connection that publishes. Dropped, it is cut at once.
pub struct Publishing {
    // Dropped first: a channel whose connection is gone does not wait for the broker.
    link: Link,
    channel: Channel,
    route: Route,
    /// The frame of `basic.publish`, the same for all messages.
    publish: Vec<u8>,
    /// Frames that are not handed over yet.
    frames: Vec<u8>,
    max_payload: usize,
}

impl Publishing {
    pub(crate) fn start(link: Link, channel: Channel, route: Route) -> Result<Publishing, Error> {
        let publish = encoder::method(
            CHANNEL,
            &AMQPClass::Basic(basic::AMQPMethod::Publish(basic::Publish {
                ticket: 0,
                exchange: route.exchange.clone(),
                routing_key: String::new(),
                mandatory: route.mandatory,
                immediate: false,
            })),
        );
        let max_payload = link.max_payload();
        let mut publishing =
            Publishing { link, channel, route, publish, frames: Vec::new(), max_payload };
        publishing.prepare()?;
        publishing.link.take_over();
        Ok(publishing)
    }

    fn prepare(&mut self) -> Result<(), Error> {
        let Publishing { link, route, .. } = self;
        if let Some(durability) = route.declare {
            link.request(&declare_fanout(&route.exchange, durability), declaring(&route.exchange));
        }
        if route.confirms {
            let select = confirm::AMQPMethod::Select(confirm::Select { nowait: true });
            link.request(&AMQPClass::Confirm(select), "ask for confirmations");
        }
        match (route.confirms, route.start) {
            (true, Start::AtOnce) => Ok(()),
            (true, Start::LetIn) => {
                link.flush();
                link.wait_to_be_let_in(Instant::now() + link.timeout)
            }
            // Messages would be lost with a refused declaration.
            (false, _) => self.barrier(),
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

    /// Publishes a message, which goes out with the next [`flush`](Publishing::flush).
    pub fn publish(&mut self, body: &[u8], properties: &Properties) {
        self.frames.extend_from_slice(&self.publish);
        encoder::push_content(&mut self.frames, CHANNEL, properties, body, self.max_payload);
        if self.frames.len() >= SENT_AT_ONCE {
            self.flush();
        }
    }

    /// Sends what is published, as far as the socket takes it; the rest goes out while somebody
    /// [waits](Publishing::wait).
    pub fn flush(&mut self) {
        if !self.frames.is_empty() {
            self.link.send(&self.frames);
            self.frames.clear();
        }
    }

    /// Whether the socket takes so little that no more should be published for now.
    pub fn is_congested(&self) -> bool {
        self.link.is_congested()
    }

    /// The time to the broker and back, as the login has shown it.
    pub fn round_trip(&self) -> Duration {
        self.link.round_trip()
    }

    /// Whether the broker has let us in.
    pub fn is_let_in(&self) -> bool {
        self.link.is_let_in()
    }

    /// Whether the broker has refused a request, and acts on no later one. Where an operator closes the connection, the
    /// broker may have acted on requests that it has not answered.
    pub fn is_refused(&self) -> bool {
        self.link.closed().is_some_and(|Close { code, request, .. }| {
            // RabbitMQ does not name the request where the limit on channels is reached.
            request.is_some() || !self.is_let_in() && *code != CONNECTION_FORCED
        })
    }

    /// Waits until an event has come, all that was left to be sent is sent, or one of `others` is ready, at most `until`
    /// then.
    pub fn wait(&mut self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        // With what was left before: the wait ends when all of that is sent.
        self.link.send_later(&self.frames);
        self.frames.clear();
        self.link.wait(others, until)
    }

    /// The next event, if any is there.
    ///
    /// # Errors
    ///
    /// When the connection is lost, after all events before.
    pub fn try_event(&mut self) -> Result<Option<Event>, Lost> {
        loop {
            match self.link.try_next()? {
                Some(Inbound::Event(event)) => return Ok(Some(event)),
                // Nobody consumes here.
                Some(Inbound::Delivery(_) | Inbound::Cancelled) => {}
                None => return Ok(None),
            }
        }
    }

    /// Asks the broker to answer when it has taken all that is published.
    pub fn ask(&mut self) {
        self.flush();
        // This prefetch count is for consumers to come, of which there are none.
        self.link.request_answered(&qos(0), TAKEN, self.route.publishing());
        self.link.flush();
    }

    /// Waits until the broker has answered to [`ask`](Publishing::ask), or an event has come, at most `until` then.
    pub fn wait_for_answer(&self, until: Option<Instant>) {
        self.link.wait_for_answer(TAKEN, until);
    }

    /// Whether the broker has answered.
    pub fn has_answered(&self) -> bool {
        self.link.is_answered(TAKEN)
    }

    /// Waits until the broker has acted on all requests.
    fn barrier(&mut self) -> Result<(), Error> {
        let timeout = self.link.timeout;
        let answered = self.link.barrier(&self.channel, timeout, self.route.publishing())?;
        answered.map_err(|_| self.end())
    }

    /// Ends a connection that is [`Lost`], and returns the reason.
    pub fn end(&mut self) -> Error {
        match self.link.closed() {
            // The exchange was deleted after the declaration, and will be declared again.
            Some(Close { code: 404, text, request: Some(_) }) if self.route.declare.is_some() => {
                Error::unavailable(format!("{}: {text}", self.route.publishing()))
            }
            Some(Close { request: Some(_), .. }) => {
                let refusal = self.link.refusal(self.route.publishing());
                refusal.unwrap_or_else(|| self.link.end())
            }
            _ => self.link.end(),
        }
    }

    /// Closes the connection, within a second. An error is of no use by then: all is confirmed.
    pub fn close(mut self) {
        self.flush();
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
