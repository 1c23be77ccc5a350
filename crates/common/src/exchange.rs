//! The declaration of the exchange. An exchange that exists is used with its own durability.

use std::sync::Once;

use amqp::{Durability, Error, ErrorKind, Exchange, ExchangeKind};

use crate::cli::ExchangeArgs;

impl ExchangeArgs {
    /// The durability that the command line asks for.
    pub fn durability(&self) -> Durability {
        match self.durable {
            true => Durability::Durable,
            false => Durability::Transient,
        }
    }

    /// The exchange to declare with this durability.
    pub fn with_durability(&self, durability: Durability) -> Exchange {
        Exchange { name: self.name.clone(), kind: ExchangeKind::Fanout, durability }
    }

    /// Calls `open`, which declares the exchange with `durability`. If the exchange exists with the other durability, logs
    /// that and calls `open` again with the other.
    ///
    /// # Errors
    ///
    /// Those of `open`.
    pub fn open_as_found<T>(
        &self,
        durability: Durability,
        open: impl Fn(Durability) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.note_comma();
        match open(durability) {
            Err(refusal) if refusal.kind() == ErrorKind::OtherDurability => {
                self.note_other_durability();
                open(durability.other())
            }
            outcome => outcome,
        }
    }

    /// Warns once that a name with a comma is the name of one exchange.
    fn note_comma(&self) {
        static NOTE: Once = Once::new();
        if self.name.contains(',') && !self.passive {
            NOTE.call_once(|| {
                log::warn!(
                    "'{}' is the name of one exchange: run one program for each exchange",
                    self.name
                );
            });
        }
    }

    /// Warns once that the exchange has the other durability, with the consequences.
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
}
