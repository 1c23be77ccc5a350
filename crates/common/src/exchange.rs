//! The fanout exchange: not durable unless asked for or found so, not auto-deleted, no arguments, as the
//! publish/subscribe example declares it. Anything else would be refused where that one runs.

use std::sync::Once;

use amiquip::{Channel, ExchangeDeclareOptions, ExchangeType};

use crate::cli::ExchangeArgs;
use crate::exit::{During, Failure};

/// Class and method of the declaration.
pub const EXCHANGE_DECLARE: [u8; 4] = [0, 40, 0, 10];

/// Whether an exchange survives a restart of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It does, with the bindings of durable queues.
    Durable,
    /// It goes, and all bindings with it.
    Transient,
}

impl Durability {
    /// The one that this is not.
    pub fn other(self) -> Durability {
        match self {
            Durability::Durable => Durability::Transient,
            Durability::Transient => Durability::Durable,
        }
    }
}

impl ExchangeArgs {
    /// What the command line asks for.
    pub fn durability(&self) -> Durability {
        match self.durable {
            true => Durability::Durable,
            false => Durability::Transient,
        }
    }

    /// Declares the exchange, unless `--passive`, and waits for the broker's word.
    ///
    /// # Errors
    ///
    /// A refused declaration, which also closes the channel; a lost connection. An exchange that
    /// [only differs in durability](Failure::is_other_durability) will do, declared as it is.
    pub fn declare(&self, channel: &Channel, durability: Durability) -> Result<(), Failure> {
        if self.passive {
            return Ok(());
        }
        channel
            .exchange_declare(ExchangeType::Fanout, &self.name, options(durability))
            .map(drop)
            .during(self.declaring())
    }

    /// Declares the exchange, unless `--passive`, without waiting: a refusal closes the channel,
    /// with [`EXCHANGE_DECLARE`] as the request.
    ///
    /// # Errors
    ///
    /// A lost connection.
    pub fn declare_nowait(&self, channel: &Channel, durability: Durability) -> amiquip::Result<()> {
        if self.passive {
            return Ok(());
        }
        let options = options(durability);
        channel.exchange_declare_nowait(ExchangeType::Fanout, &self.name, options).map(drop)
    }

    /// Tells, once, that the exchange has not the durability asked for, and what that means.
    pub fn note_other_durability(&self) {
        static NOTE: Once = Once::new();
        let name = &self.name;
        NOTE.call_once(|| match self.durability() {
            Durability::Durable => log::warn!(
                "exchange '{name}' exists and is not durable: it is used as it is, and a restart of \
                 the broker takes it away with the bindings of its queues"
            ),
            Durability::Transient => log::warn!(
                "exchange '{name}' exists and is durable: it is used as it is (with --durable, \
                 emit-log sends what durable queues keep through a restart of the broker)"
            ),
        });
    }

    /// The operation, as in messages.
    pub fn declaring(&self) -> String {
        format!("declare exchange '{}'", self.name)
    }
}

fn options(durability: Durability) -> ExchangeDeclareOptions {
    let durable = durability == Durability::Durable;
    ExchangeDeclareOptions { durable, ..ExchangeDeclareOptions::default() }
}
