//! A connection that publishes, and its settings.

use std::mem;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use amqp::retry::Timings;
use amqp::{Connection, Error, ErrorKind, Exchange, Publishing, Route, Start, Woken};
use logs_common::ExchangeConfig;
use logs_common::exchange::open_as_found;
use logs_common::hints::hint;
use logs_common::password::Brokers;
use logs_process::Failure;

use crate::cli::Cli;
use crate::health::Health;
use crate::message::Message;

/// A connection that publishes, and the state of its broker.
pub struct Session {
    /// The connection.
    pub publishing: Publishing,
    /// The broker's reason for an alarm. While it is set, the broker reads no messages.
    pub blocked: Option<String>,
    /// The last time at which the broker confirmed or nacked a message, or at which no message was unconfirmed.
    pub last_answer: Instant,
    /// When bytes of messages were last left to be sent.
    pub sent_at: Instant,
    /// The state of the broker, from this connection and earlier ones.
    pub health: Health,
    /// Whether [`ask`](Session::ask) was called.
    pub is_asked: bool,
}

impl Session {
    /// A session on a new connection.
    pub fn new(publishing: Publishing, health: Health) -> Session {
        let now = Instant::now();
        Session {
            publishing,
            blocked: None,
            last_answer: now,
            sent_at: now,
            health,
            is_asked: false,
        }
    }

    /// Waits as [`Publishing::wait`] does.
    pub fn wait(&mut self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        let was_sending = self.publishing.is_sending();
        let woken = self.publishing.wait(others, until);
        if was_sending {
            self.sent_at = Instant::now();
        }
        woken
    }

    /// Asks the broker to answer when it has read all messages. This is for publishing without confirms.
    pub fn ask(&mut self) {
        if !mem::replace(&mut self.is_asked, true) {
            self.last_answer = Instant::now();
            self.publishing.ask();
        }
    }
}

/// Where to publish, and how.
pub struct SessionConfig {
    brokers: Brokers,
    /// The exchange.
    pub exchange: ExchangeConfig,
    mandatory: bool,
    /// Whether unroutable messages are sent again until they are routed.
    pub resends_unroutable: bool,
    /// Whether the broker confirms messages.
    pub confirms: bool,
    /// Whether there is only one message, so that errors do not need its number.
    pub is_single: bool,
    /// The pauses between attempts to connect.
    pub timings: Timings,
}

impl SessionConfig {
    /// Reads the settings from the command line.
    ///
    /// # Errors
    ///
    /// When a URI or the password file is wrong.
    pub fn new(cli: &Cli) -> Result<SessionConfig, Failure> {
        let exchange = cli.exchange();
        exchange.warn_about_comma();
        Ok(SessionConfig {
            brokers: cli.connection.brokers()?,
            exchange,
            mandatory: cli.mandatory || cli.notes_unroutable(),
            resends_unroutable: cli.mandatory && !cli.follow.is_empty(),
            confirms: !cli.no_confirm,
            is_single: !cli.has_records(),
            timings: Timings::default(),
        })
    }

    /// The operation, as errors name it.
    pub fn publishing(&self) -> String {
        self.route(self.exchange.declaration(), Start::LoggedIn).publishing()
    }

    /// An error about a message. It has the number of the first record, which counts the records of the routing key,
    /// unless there is only one message.
    pub fn at_record(&self, message: &Message, kind: ErrorKind, text: &str) -> Error {
        match self.is_single {
            true => Error::new(kind, text),
            false if message.key.is_empty() => {
                Error::new(kind, format!("record {}: {text}", message.number))
            }
            false => {
                let Message { number, key, .. } = message;
                Error::new(kind, format!("record {number} with routing key '{key}': {text}"))
            }
        }
    }

    /// Connects, and declares the exchange. An exchange of the other durability is used as it is. With
    /// [`Start::AtOnce`], this returns before the broker answers, so the caller gets an error of the declaration later.
    ///
    /// # Errors
    ///
    /// When no login succeeds, or the broker refuses the declaration for another reason.
    pub fn open(&self, exchange: Exchange, start: Start) -> Result<Publishing, Error> {
        open_as_found(vec![exchange], |exchanges| self.open_once(exchanges[0].clone(), start))
    }

    fn open_once(&self, exchange: Exchange, start: Start) -> Result<Publishing, Error> {
        let connection = Connection::open(&self.brokers.uris()?, "emit-log", hint)?;
        let publishing = connection.publish(self.route(exchange, start))?;
        log::info!("publishing to exchange '{}'", self.exchange.name);
        Ok(publishing)
    }

    fn route(&self, exchange: Exchange, start: Start) -> Route {
        Route {
            exchange,
            declare: self.exchange.is_declared(),
            start,
            mandatory: self.mandatory,
            confirms: self.confirms,
        }
    }
}
