//! Connections that publish.

use std::mem;
use std::time::Instant;

use amqp::retry::Timings;
use amqp::{Connection, Durability, Error, ErrorKind, Publishing, Route, Start};
use logs_common::ExchangeArgs;
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
    /// Why the broker takes no messages at present, in its own words.
    pub blocked: Option<String>,
    /// When the broker last confirmed or refused a message, or had none to confirm.
    pub last_answer: Instant,
    /// What this connection and earlier ones have shown.
    pub health: Health,
    /// Whether the broker was asked to answer when it has taken all messages.
    pub is_asked: bool,
}

impl Session {
    /// A session on a connection that was just opened.
    pub fn new(publishing: Publishing, health: Health) -> Session {
        let last_answer = Instant::now();
        Session { publishing, blocked: None, last_answer, health, is_asked: false }
    }

    /// Asks the broker to answer when it has taken all messages.
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
    /// The options of the exchange.
    pub exchange: ExchangeArgs,
    mandatory: bool,
    /// Whether the broker is to confirm messages.
    pub confirms: bool,
    /// Whether there is one message: its errors do not name its number.
    pub is_single: bool,
    /// The pauses between attempts to connect.
    pub timings: Timings,
}

impl SessionConfig {
    /// The settings of the command line.
    ///
    /// # Errors
    ///
    /// When a URI or the password file is wrong.
    pub fn new(cli: &Cli) -> Result<SessionConfig, Failure> {
        Ok(SessionConfig {
            brokers: cli.connection.brokers()?,
            exchange: cli.exchange.clone(),
            mandatory: cli.mandatory,
            confirms: !cli.no_confirm,
            is_single: !cli.lines,
            timings: Timings::default(),
        })
    }

    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        self.route(self.exchange.durability(), Start::LoggedIn).publishing()
    }

    /// An error that concerns a record, and names it unless there is only one.
    pub fn at_record(&self, message: &Message, kind: ErrorKind, text: &str) -> Error {
        match self.is_single {
            true => Error::new(kind, text),
            false => Error::new(kind, format!("record {}: {text}", message.number)),
        }
    }

    /// Connects, and declares the exchange. An exchange of the other durability is used as it is: with
    /// [`Start::AtOnce`] that refusal, like others, comes later, in place of the first confirmation.
    ///
    /// # Errors
    ///
    /// When no broker lets us in, or the broker refuses the declaration for another reason.
    pub fn open(&self, durability: Durability, start: Start) -> Result<Publishing, Error> {
        self.exchange.open_as_found(durability, |durability| self.open_once(durability, start))
    }

    fn open_once(&self, durability: Durability, start: Start) -> Result<Publishing, Error> {
        let connection = Connection::open(&self.brokers.uris()?, "emit-log", hint)?;
        let publishing = connection.publish(self.route(durability, start))?;
        log::info!("publishing to exchange '{}'", self.exchange.name);
        Ok(publishing)
    }

    fn route(&self, durability: Durability, start: Start) -> Route {
        Route {
            exchange: self.exchange.with_durability(durability),
            declare: !self.exchange.passive,
            start,
            mandatory: self.mandatory,
            confirms: self.confirms,
        }
    }
}
