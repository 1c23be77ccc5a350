//! `--format text`: ` [x] "info: hi"`, one line for each record.

use std::io::{self, Write};

use logs_process::escape;

use super::prefix::Prefix;
use super::severity;

/// Writes the records of a message.
pub struct TextRecords<'a> {
    pub prefix: Prefix<'a>,
    /// Colour the severity.
    pub color: bool,
}

impl TextRecords<'_> {
    /// Writes a record without its end. The prefix has neither a line break nor a quote, so that no sender can
    /// imitate a message.
    pub fn write(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        self.prefix.write(out, |out, sender| escape::write_unquoted(out, sender))?;
        out.write_all(b" [x] ")?;
        match self.color {
            true => severity::color(out, |out| escape::write_quoted(out, record)),
            false => escape::write_quoted(out, record),
        }
    }
}
