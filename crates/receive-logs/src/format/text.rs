//! `--format text`: ` [x] "info: hi"`, one line for each record.

use std::io::{self, Write};

use amqp::Properties;
use logs_process::escape;

use super::body::BodyFormat;
use super::prefix::PrefixFormat;

/// Writes the records of a message.
pub struct TextRecords<'a> {
    pub prefix: &'a PrefixFormat,
    pub properties: &'a Properties,
    pub body: &'a BodyFormat,
}

impl TextRecords<'_> {
    /// Writes a record without its end. The prefix has neither a line break nor a quote, so that no sender can
    /// imitate a message.
    pub fn write(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        self.prefix
            .write(out, self.properties, |out, sender| escape::write_unquoted(out, sender))?;
        out.write_all(b" [x] \"")?;
        self.body.write(out, record)?;
        out.write_all(b"\"")
    }
}
