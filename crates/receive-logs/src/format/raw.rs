//! `--format raw`: the bytes of each record, escaped on a terminal only.

use std::io::{self, Write};

use logs_process::escape;

use super::prefix::Prefix;
use super::severity;

/// Writes the records of a message.
pub struct RawRecords<'a> {
    pub prefix: Prefix<'a>,
    /// Escape control characters.
    pub escape: bool,
    /// Colour the severity.
    pub color: bool,
}

impl RawRecords<'_> {
    /// Writes a record without its end.
    pub fn write(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        if !self.prefix.is_empty() {
            self.prefix.write(out, |out, sender| escape::write_visible(out, sender))?;
            out.write_all(b" ")?;
        }
        match self.color {
            true => severity::color(out, |out| self.write_body(out, record)),
            false => self.write_body(out, record),
        }
    }

    fn write_body(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        match self.escape {
            true => escape::write_visible(out, record),
            false => out.write_all(record),
        }
    }
}
