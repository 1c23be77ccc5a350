//! The declaration of the exchange. An exchange that exists is used with its own durability.

use std::collections::BTreeSet;
use std::sync::Mutex;

use amqp::{Durability, Error, ErrorKind, Exchange, ExchangeKind};

use crate::cli::ExchangeArgs;

/// An exchange and its options.
#[derive(Clone, Debug)]
pub struct ExchangeConfig {
    /// The name of the exchange.
    pub name: String,
    args: ExchangeArgs,
}

impl ExchangeArgs {
    /// The options, for an exchange of this name.
    pub fn of(&self, name: &str) -> ExchangeConfig {
        ExchangeConfig { name: name.into(), args: self.clone() }
    }
}

impl ExchangeConfig {
    /// The exchange to declare, with the durability that the command line asks for. The broker's own exchanges are
    /// durable.
    pub fn declaration(&self) -> Exchange {
        let durability = match self.args.durable || self.is_reserved() {
            true => Durability::Durable,
            false => Durability::Transient,
        };
        Exchange { name: self.name.clone(), kind: self.kind(), durability }
    }

    /// The type of the exchange. The broker's own exchanges have known types.
    pub fn kind(&self) -> ExchangeKind {
        match self.name.as_str() {
            "amq.fanout" => ExchangeKind::Fanout,
            "amq.direct" => ExchangeKind::Direct,
            name if name == "amq.topic" || name.starts_with("amq.rabbitmq.") => ExchangeKind::Topic,
            _ => self.args.kind,
        }
    }

    /// Whether to declare the exchange.
    pub fn is_declared(&self) -> bool {
        !self.args.passive && !self.is_reserved()
    }

    /// Warns that a name with a comma is the name of one exchange.
    pub fn warn_about_comma(&self) {
        let name = &self.name;
        if name.contains(',') && !self.args.passive {
            log::warn!("'{name}' is the name of one exchange: run one program for each exchange");
        }
    }

    /// Whether the name has the prefix that is reserved for the broker.
    fn is_reserved(&self) -> bool {
        self.name.starts_with("amq.")
    }
}

/// Calls `open`, which declares the exchanges. If the broker refuses the durability of an exchange, calls `open` again
/// with the other one.
///
/// # Errors
///
/// Those of `open`.
pub fn open_as_found<T>(
    mut exchanges: Vec<Exchange>,
    open: impl Fn(&[Exchange]) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut changed = vec![false; exchanges.len()];
    loop {
        let refusal = match open(&exchanges) {
            Err(refusal) => refusal,
            opened => return opened,
        };
        let refused = exchanges.iter().position(|exchange| refusal.refuses(exchange));
        let Some(refused) = refused.filter(|index| !changed[*index]) else {
            return Err(refusal);
        };
        let Some(other) = with_other_durability(&exchanges[refused], &refusal) else {
            return Err(refusal);
        };
        exchanges[refused] = other;
        changed[refused] = true;
    }
}

/// The exchange with the other durability, if this is why the broker has refused to declare it. Logs a warning with the
/// consequences, once about each exchange.
pub fn with_other_durability(declared: &Exchange, refusal: &Error) -> Option<Exchange> {
    let Exchange { name, durability, .. } = declared;
    let warning = match (refusal.kind(), durability) {
        (ErrorKind::OtherDurability, Durability::Durable) => format!(
            "exchange '{name}' exists and is not durable: it is used as it is, and a restart of \
             the broker deletes it with the bindings of its queues"
        ),
        (ErrorKind::OtherDurability, Durability::Transient) => format!(
            "exchange '{name}' exists and is durable: it is used as it is (with --durable, \
             emit-log sends messages that durable queues keep across a restart of the broker)"
        ),
        (ErrorKind::Deprecated, Durability::Transient) => format!(
            "the broker no longer permits exchanges that are not durable: exchange '{name}' is declared \
             durable (--durable avoids this note)"
        ),
        _ => return None,
    };
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if WARNED.lock().is_ok_and(|mut warned| warned.insert(name.clone())) {
        log::warn!("{warning}");
    }
    Some(Exchange { durability: durability.other(), ..declared.clone() })
}
