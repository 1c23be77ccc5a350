//! The fanout exchange: not durable unless asked for, not auto-deleted, no arguments, as the
//! publish/subscribe example declares it. Anything else would be refused where that one runs.

use amiquip::{Channel, ExchangeDeclareOptions, ExchangeType};

use crate::cli::ExchangeArgs;
use crate::exit::{During, Failure};

/// Class and method of the declaration.
pub const EXCHANGE_DECLARE: [u8; 4] = [0, 40, 0, 10];

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
            .during(self.declaring())
    }

    /// Declares the exchange, unless `--passive`, without waiting: a refusal closes the channel,
    /// with [`EXCHANGE_DECLARE`] as the request.
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

    /// The operation, as in messages.
    pub fn declaring(&self) -> String {
        format!("declare exchange '{}'", self.name)
    }

    fn options(&self) -> ExchangeDeclareOptions {
        ExchangeDeclareOptions { durable: self.durable, ..ExchangeDeclareOptions::default() }
    }
}
