//! What it takes to open a connection that publishes.

use amqp::{Connection, Durability, Error, Publishing, Route, Uri};
use logs_common::{ExchangeArgs, Failure};

use crate::cli::Cli;

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
        self.route(self.exchange.durability()).publishing()
    }

    /// Connects. An exchange of the other durability will do; with confirmations it is refused later, in
    /// place of the first one.
    ///
    /// # Errors
    ///
    /// When no broker lets us in, or it refuses the declaration.
    pub fn open(&self, durability: Durability) -> Result<Publishing, Error> {
        self.exchange.open_as_found(durability, |durability| self.open_once(durability))
    }

    fn open_once(&self, durability: Durability) -> Result<Publishing, Error> {
        let connection = Connection::open(&self.uris, "emit-log")?;
        let publishing = connection.publish(self.route(durability))?;
        log::info!("publishing to exchange '{}'", self.exchange.name);
        Ok(publishing)
    }

    fn route(&self, durability: Durability) -> Route {
        Route {
            exchange: self.exchange.name.clone(),
            declare: (!self.exchange.passive).then_some(durability),
            mandatory: self.mandatory,
            confirms: self.confirms,
        }
    }
}
