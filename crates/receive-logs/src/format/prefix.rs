//! The start of text and raw records: a time and the sender.

use std::io::{self, Write};

use amqp::Properties;

use super::clock::Clock;
use crate::message::{file, host};

/// The maximum number of characters of a sender's name.
const SENDER: usize = 64;

/// What records begin with.
#[derive(Clone, Debug)]
pub struct PrefixFormat {
    /// `None` if records begin with no time.
    pub clock: Option<Clock>,
    /// Whether records begin with the sender.
    pub has_sender: bool,
}

impl PrefixFormat {
    pub fn is_empty(&self) -> bool {
        self.clock.is_none() && !self.has_sender
    }

    /// Writes the prefix of a message. `escape` writes the sender, because a sender can choose any name.
    pub fn write<W: Write>(
        &self,
        out: &mut W,
        properties: &Properties,
        escape: impl FnOnce(&mut W, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some(clock) = &self.clock {
            out.write_all(clock.time(properties).as_bytes())?;
        }
        if self.has_sender {
            out.write_all(if self.clock.is_some() { b" " } else { b"" })?;
            let sender = match file(properties) {
                Some(file) => &format!("{}:{file}", sender(properties)),
                None => sender(properties),
            };
            let end = sender.char_indices().nth(SENDER).map_or(sender.len(), |(end, _)| end);
            escape(out, &sender.as_bytes()[..end])?;
            out.write_all(if end < sender.len() { b"..." } else { b"" })?;
        }
        Ok(())
    }
}

/// The program that sent the message, else its machine, else `-`.
fn sender(properties: &Properties) -> &str {
    let app_id = properties.app_id().as_deref();
    let given = |name: &&str| !name.is_empty();
    app_id.filter(given).or_else(|| host(properties).filter(given)).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use amqp::{Table, Value};
    use logs_common::wire::HOST;

    use super::*;

    fn from_host(host: &str) -> Properties {
        let host = Value::LongString(host.into());
        Properties::default().with_headers(Table::from([(HOST.into(), host)]))
    }

    #[test]
    fn the_sender_is_the_program_else_the_machine() {
        for (properties, name) in [
            (from_host("web1").with_app_id("backup".into()), "backup"),
            (from_host("web1").with_app_id("".into()), "web1"),
            (from_host("web1"), "web1"),
            (from_host(""), "-"),
            (Properties::default(), "-"),
        ] {
            assert_eq!(sender(&properties), name);
        }
    }
}
