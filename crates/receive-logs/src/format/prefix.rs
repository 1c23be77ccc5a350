//! The start of text and raw records: the time of arrival and the sender.

use std::io::{self, Write};
use std::time::SystemTime;

use amqp::Properties;
use logs_process::time::{self, Precision};

use crate::message::host;

/// The maximum number of characters of a sender's name.
const SENDER: usize = 64;

/// The prefix of the records of a message.
pub struct Prefix<'a> {
    timestamp: bool,
    sender: Option<&'a str>,
}

impl<'a> Prefix<'a> {
    /// With `properties`, the prefix contains the sender that they name.
    pub fn new(timestamp: bool, properties: Option<&'a Properties>) -> Prefix<'a> {
        Prefix { timestamp, sender: properties.map(sender) }
    }

    pub fn is_empty(&self) -> bool {
        !self.timestamp && self.sender.is_none()
    }

    /// Writes the prefix. `escape` writes the sender, because a sender can choose any name.
    pub fn write<W: Write>(
        &self,
        out: &mut W,
        escape: impl FnOnce(&mut W, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.timestamp {
            out.write_all(time_of_arrival().as_bytes())?;
        }
        if let Some(sender) = self.sender {
            out.write_all(if self.timestamp { b" " } else { b"" })?;
            let end = sender.char_indices().nth(SENDER).map_or(sender.len(), |(end, _)| end);
            escape(out, &sender.as_bytes()[..end])?;
            out.write_all(if end < sender.len() { b"..." } else { b"" })?;
        }
        Ok(())
    }
}

/// Now, in UTC with milliseconds.
pub fn time_of_arrival() -> String {
    time::format(time::millis(SystemTime::now()), Precision::Millis)
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
