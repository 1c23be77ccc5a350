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
        Exchange { name: self.name.clone(), kind: self.kind(), durability }
    }

    /// The type of the exchange. The broker's own exchanges have known types.
    pub fn kind(&self) -> ExchangeKind {
        match self.name.as_str() {
            "amq.fanout" => ExchangeKind::Fanout,
            "amq.direct" => ExchangeKind::Direct,
            name if name == "amq.topic" || name.starts_with("amq.rabbitmq.") => ExchangeKind::Topic,
            _ => self.kind,
        }
    }

    /// Whether to declare the exchange. The prefix `amq.` is reserved for the broker.
    pub fn is_declared(&self) -> bool {
        !self.passive && !self.name.starts_with("amq.")
    }

    /// Calls `open`, which declares the exchange with `durability`. If the exchange exists with the other durability,
    /// logs a warning and calls `open` again with the other durability.
    ///
    /// # Errors
    ///
    /// Those of `open`.
    pub fn open_as_found<T>(
        &self,
        durability: Durability,
        open: impl Fn(Durability) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.warn_about_comma();
        match open(durability) {
            Err(refusal) if refusal.kind() == ErrorKind::OtherDurability => {
                self.warn_about_durability();
                open(durability.other())
            }
            outcome => outcome,
        }
    }

    /// Warns once that a name with a comma is the name of one exchange.
    fn warn_about_comma(&self) {
        static WARNING: Once = Once::new();
        if self.name.contains(',') && !self.passive {
            WARNING.call_once(|| {
                log::warn!(
                    "'{}' is the name of one exchange: run one program for each exchange",
                    self.name
                );
            });
        }
    }

    /// Warns once that the exchange has the other durability, with the consequences.
    pub fn warn_about_durability(&self) {
        static WARNING: Once = Once::new();
        let name = &self.name;
        WARNING.call_once(|| match self.durability() {
            Durability::Durable => log::warn!(
                "exchange '{name}' exists and is not durable: it is used as it is, and a restart of \
                 the broker deletes it with the bindings of its queues"
            ),
            Durability::Transient => log::warn!(
                "exchange '{name}' exists and is durable: it is used as it is (with --durable, \
                 emit-log sends messages that durable queues keep across a restart of the broker)"
            ),
        });
    }
}
