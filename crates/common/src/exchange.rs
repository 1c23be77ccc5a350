//! The fanout exchange: not durable unless asked for, not auto-deleted, no arguments, as the
//! publish/subscribe example declares it. Anything else would be refused where that one runs.

use amiquip::{Channel, ExchangeDeclareOptions, ExchangeType};

use crate::cli::ExchangeArgs;
use crate::exit::{During, Failure};

impl ExchangeArgs {
    /// Declares the exchange, unless `--passive`, and waits for the broker's word.
    ///
    /// # Errors
    ///
    /// A refused declaration, which also closes the channel; a lost connection.
    pub fn declare(&self, channel: &Channel) -> Result<(), Failure> {
        if self.passive {
            return Ok(());
        }
        channel
            .exchange_declare(ExchangeType::Fanout, &self.name, self.options())
            .map(drop)
            .during(format!("declare exchange '{}'", self.name))
    }

    /// Declares the exchange, unless `--passive`, without waiting: a refusal closes the channel.
    ///
    /// # Errors
    ///
    /// A lost connection.
    pub fn declare_nowait(&self, channel: &Channel) -> amiquip::Result<()> {
        if self.passive {
            return Ok(());
        }
        channel.exchange_declare_nowait(ExchangeType::Fanout, &self.name, self.options()).map(drop)
    }

    fn options(&self) -> ExchangeDeclareOptions {
        ExchangeDeclareOptions { durable: self.durable, ..ExchangeDeclareOptions::default() }
    }
}
