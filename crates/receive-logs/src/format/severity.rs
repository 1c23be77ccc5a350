//! Colours the severity of a message.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use logs_severity::{BEGINNING, Severity, find};

fn style(severity: Severity) -> Style {
    match severity {
        Severity::Trace => Style::new().dimmed(),
        Severity::Debug => AnsiColor::Blue.on_default(),
        Severity::Info => AnsiColor::Green.on_default(),
        Severity::Notice => AnsiColor::Cyan.on_default(),
        Severity::Warning => AnsiColor::Yellow.on_default(),
        Severity::Error => AnsiColor::Red.on_default(),
        Severity::Critical => AnsiColor::Red.on_default().bold(),
    }
}

/// Writes a message to `out` by `write`. Colours the word that is its severity, if there is one.
///
/// # Errors
///
/// The errors of `out`.
pub fn color<W: Write>(
    out: &mut W,
    write: impl FnOnce(&mut Colored<'_, W>) -> io::Result<()>,
) -> io::Result<()> {
    let mut colored = Colored { out, beginning: Some(Vec::with_capacity(BEGINNING)) };
    write(&mut colored)?;
    colored.finish()
}

/// A writer that colours the severity.
pub struct Colored<'a, W> {
    out: &'a mut W,
    /// The start of the message, until it is long enough to search.
    beginning: Option<Vec<u8>>,
}

impl<W: Write> Colored<'_, W> {
    fn finish(&mut self) -> io::Result<()> {
        let Some(beginning) = self.beginning.take() else {
            return Ok(());
        };
        let Some((word, severity)) = find(&beginning) else {
            return self.out.write_all(&beginning);
        };
        let style = style(severity);
        self.out.write_all(&beginning[..word.start])?;
        write!(self.out, "{style}")?;
        self.out.write_all(&beginning[word.clone()])?;
        write!(self.out, "{style:#}")?;
        self.out.write_all(&beginning[word.end..])
    }
}

impl<W: Write> Write for Colored<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(beginning) = &mut self.beginning else {
            return self.out.write(bytes);
        };
        let taken = bytes.len().min(BEGINNING - beginning.len());
        beginning.extend_from_slice(&bytes[..taken]);
        if beginning.len() == BEGINNING {
            self.finish()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use logs_severity::SEARCHED;

    use super::*;

    fn colored(message: &str) -> String {
        let mut out = b"> ".to_vec();
        color(&mut out, |out| out.write_all(message.as_bytes())).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_severity_as_the_first_word_is_coloured() {
        assert_eq!(colored("error: no"), "> \x1b[31merror\x1b[0m: no");
        assert_eq!(colored("\"[WARN] hm\""), "> \"[\x1b[33mWARN\x1b[0m] hm\"");
        assert_eq!(colored("Info"), "> \x1b[32mInfo\x1b[0m");
        assert_eq!(colored("\"crit\""), "> \"\x1b[1m\x1b[31mcrit\x1b[0m\"");
    }

    #[test]
    fn only_the_beginning_of_a_message_is_searched() {
        let (start, rest) = (" ".repeat(SEARCHED - 5), "x".repeat(100_000));
        let message = format!("[1]{start}[error] {rest}");
        let expected = format!("> [1]{start}[\u{1b}[31merror\u{1b}[0m] {rest}");
        assert!(colored(&message) == expected);
        let late = format!("[1] {start}[error] {rest}");
        assert!(colored(&late) == format!("> {late}"));
    }

    #[test]
    fn other_words_are_not_coloured() {
        for message in ["", "\"\"", "no error", "infoä", "7"] {
            assert_eq!(colored(message), format!("> {message}"));
        }
    }
}
