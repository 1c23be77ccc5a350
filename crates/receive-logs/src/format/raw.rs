//! `--format raw`: the bytes of each record.

use std::io::{self, Write};

use amqp::Properties;
use logs_process::escape;

use super::body::BodyFormat;
use super::prefix::PrefixFormat;

/// Writes the records of a message.
pub struct RawRecords<'a> {
    pub prefix: &'a PrefixFormat,
    pub properties: &'a Properties,
    pub body: &'a BodyFormat,
}

impl RawRecords<'_> {
    /// Writes a record without its end.
    pub fn write(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        if !self.prefix.is_empty() {
            self.prefix
                .write(out, self.properties, |out, sender| escape::write_visible(out, sender))?;
            out.write_all(b" ")?;
        }
        self.body.write(out, record)
    }
}
