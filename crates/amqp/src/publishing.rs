//! Publishing to an exchange: messages out, and events of the broker in.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::Properties;
use crate::connection::{CHANNEL, Connection, Lost};
use crate::declare::{Exchange, NO_KEY};
use crate::error::Error;
use crate::message::{Event, Inbound};
use crate::method::{self, Close};
use crate::poll::{Woken, wait_for};
use crate::requests::Ticket;
use crate::shared::Shared;

/// The reply code where an operator, or the end of the broker, closes a connection.
const CONNECTION_FORCED: u16 = 320;

/// Bytes of frames that are sent at a time.
const SENT_AT_ONCE: usize = 64 * 1024;

/// Where messages go, and which answers the broker is to give.
#[derive(Clone, Debug)]
pub struct Route {
    /// The exchange.
    pub exchange: Exchange,
    /// Whether to declare it; otherwise it must exist.
    pub declare: bool,
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
    /// Once the broker has accepted the login.
    LoggedIn,
    /// At once, so that messages need no round trip of their own. With confirmations only: a refused login is
    /// the end of the first wait.
    AtOnce,
}

/// A connection that publishes. Dropped, it is cut at once.
pub struct Publishing {
    connection: Shared,
    route: Route,
    /// Host and port, as in messages.
    peer: String,
    publish: Publish,
    /// Frames that are not handed over yet.
    frames: Vec<u8>,
    max_payload: usize,
    round_trip: Duration,
    /// The question whether the broker has taken all messages.
    question: Option<Ticket>,
}

impl Connection {
    /// Makes the connection ready for publishing.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within the connection timeout. With
    /// [`Start::AtOnce`](crate::Start::AtOnce) these end the first wait.
    pub fn publish(self, route: Route) -> Result<Publishing, Error> {
        Publishing::start(self, route)
    }
}

impl Publishing {
    fn start(mut connection: Connection, route: Route) -> Result<Publishing, Error> {
        if route.declare {
            connection.declare_exchange(&route.exchange);
        }
        if route.confirms {
            let operation = "ask for confirmations".into();
            connection.request(CHANNEL, &method::confirm_select(), operation);
        }
        let mut publishing = Publishing {
            peer: connection.peer().into(),
            publish: Publish::new(&route, NO_KEY),
            frames: Vec::new(),
            max_payload: connection.max_payload(),
            round_trip: connection.round_trip(),
            question: None,
            connection: Shared::new(connection),
            route,
        };
        publishing.prepare()?;
        Ok(publishing)
    }

    fn prepare(&mut self) -> Result<(), Error> {
        let mut connection = self.connection.lock();
        let timeout = connection.timeout();
        match (self.route.confirms, self.route.start) {
            (true, Start::AtOnce) => return Ok(()),
            (true, Start::LoggedIn) => {
                return connection.wait_for_login(Instant::now() + timeout);
            }
            (false, _) => {}
        }
        // Messages would be lost with a refused declaration.
        let outcome = connection.barrier(self.route.publishing(), timeout);
        let is_closed = connection.closed().is_some();
        drop(connection);
        outcome.map_err(|error| if is_closed { self.end() } else { error })
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// How the exchange was declared, unless it was not.
    pub fn declared(&self) -> Option<&Exchange> {
        self.route.declare.then_some(&self.route.exchange)
    }

    /// Publishes a message; the next [`flush`](Publishing::flush) sends it.
    pub fn publish(&mut self, routing_key: &str, body: &[u8], properties: &Properties) {
        if routing_key != self.publish.routing_key {
            self.publish = Publish::new(&self.route, routing_key);
        }
        self.frames.extend_from_slice(&self.publish.frame);
        method::push_content(&mut self.frames, CHANNEL, properties, body, self.max_payload);
        if self.frames.len() >= SENT_AT_ONCE {
            self.flush();
        }
    }

    /// Sends what is published, as far as the socket takes it; the rest goes out during a
    /// [wait](Publishing::wait).
    pub fn flush(&mut self) {
        if !self.frames.is_empty() {
            self.connection.lock().send(&self.frames);
            self.frames.clear();
        }
    }

    /// Whether the socket takes so little that no more should be published for now.
    pub fn is_congested(&self) -> bool {
        self.connection.lock().is_congested()
    }

    /// Whether bytes of messages are left to be sent.
    pub fn is_sending(&self) -> bool {
        !self.frames.is_empty() || self.connection.lock().is_sending()
    }

    /// The time to the broker and back, as measured during the login.
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Whether the broker has accepted the login.
    pub fn is_login_complete(&self) -> bool {
        self.connection.lock().is_login_complete()
    }

    /// Whether the broker has refused a request, and acts on no later one. If an operator closes the connection, the
    /// broker may have acted on requests that it has not answered.
    pub fn is_refused(&self) -> bool {
        let connection = self.connection.lock();
        connection.closed().is_some_and(|Close { code, request, .. }| {
            // RabbitMQ does not name the request if the limit on channels is reached.
            request.is_some() || !connection.is_login_complete() && *code != CONNECTION_FORCED
        })
    }

    /// Waits until an event or the answer to [`ask`](Publishing::ask) has arrived, all that was left to be sent is sent,
    /// or one of `others` is ready, at most until `until`.
    pub fn wait(&mut self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        let mut connection = self.connection.lock();
        // With the rest from before: the wait ends when all of that is sent.
        connection.send_later(&self.frames);
        self.frames.clear();
        match self.question.filter(|question| connection.is_pending(*question)) {
            Some(question) => connection.wait_or_answer(question, others, until),
            None => connection.wait(others, until),
        }
    }

    /// Waits until one of `others` is ready, at most until `until`. Events of the broker wake nobody: the next
    /// [wait](Publishing::wait) reads them. Does nothing if something is left to be sent or `until` has passed.
    pub fn wait_for_others(&self, others: &[BorrowedFd<'_>], until: Instant) -> Woken {
        match self.is_sending() || until <= Instant::now() {
            true => Woken::default(),
            false => wait_for(others, Some(until)),
        }
    }

    /// The next event, if any is there.
    ///
    /// # Errors
    ///
    /// When the connection is lost, after all events before.
    pub fn try_event(&mut self) -> Result<Option<Event>, Lost> {
        let mut connection = self.connection.lock();
        loop {
            match connection.try_next()? {
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
        let mut connection = self.connection.lock();
        // This prefetch count is for later consumers, of which there are none.
        let question = connection.request(CHANNEL, &method::qos(0), self.route.publishing());
        connection.flush();
        self.question = Some(question);
    }

    /// Whether the broker has answered.
    pub fn has_answered(&self) -> bool {
        self.question.is_some_and(|question| !self.connection.lock().is_pending(question))
    }

    /// Ends a connection that is [`Lost`], and returns the reason.
    pub fn end(&mut self) -> Error {
        let mut connection = self.connection.lock();
        match connection.closed() {
            // The exchange was deleted after the declaration, and will be declared again.
            Some(Close { code: 404, text, request: Some(_) }) if self.route.declare => {
                Error::unavailable(format!("{}: {text}", self.route.publishing()))
            }
            Some(Close { request: Some(_), .. }) => {
                let refusal = connection.refusal(&self.route.publishing());
                refusal.unwrap_or_else(|| connection.end())
            }
            _ => connection.end(),
        }
    }

    /// Closes the connection, within a second. An error would be of no use: all is confirmed.
    pub fn close(mut self) {
        self.flush();
        self.connection.lock().close();
    }
}

/// The method `basic.publish`, the same for all messages with a routing key.
struct Publish {
    routing_key: String,
    frame: Vec<u8>,
}

impl Publish {
    fn new(route: &Route, routing_key: &str) -> Publish {
        let publish = method::publish(&route.exchange.name, routing_key, route.mandatory);
        Publish { routing_key: routing_key.into(), frame: publish.frame(CHANNEL) }
    }
}

impl Route {
    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        format!("publish to exchange '{}'", self.exchange.name)
    }
}
