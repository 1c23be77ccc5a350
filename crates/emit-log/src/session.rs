//! Connections that publish.

use std::time::Instant;

use amqp::{Connection, Durability, Error, Publishing, Route, Start};
use logs_common::ExchangeArgs;
use logs_common::hints::hint;
use logs_common::password::Brokers;
use logs_process::Failure;

use crate::cli::Cli;

/// A connection that publishes, and the state of its broker.
pub struct Session {
    /// The connection.
    pub publishing: Publishing,
    /// Why the broker takes no messages at present, in its own words.
    pub blocked: Option<String>,
    /// When the broker last confirmed or refused a message, or had none to confirm.
    pub last_answer: Instant,
}

impl Session {
    /// A session on a connection that was just opened.
    pub fn new(publishing: Publishing) -> Session {
        Session { publishing, blocked: None, last_answer: Instant::now() }
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
        })
    }

    /// The operation, as in messages.
    pub fn publishing(&self) -> String {
        self.route(self.exchange.durability(), Start::LetIn).publishing()
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
            exchange: self.exchange.name.clone(),
            declare: (!self.exchange.passive).then_some(durability),
            start,
            mandatory: self.mandatory,
            confirms: self.confirms,
        }
    }
}
