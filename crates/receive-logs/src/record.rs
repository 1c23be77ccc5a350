//! Messages to bytes.

use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use amqp::{Delivery, Properties, Value};
use clap::ColorChoice;
use logs_common::wire::{HOST, Layout};
use logs_process::escape;
use logs_process::time::{self, Precision};

use crate::cli::{Cli, Format};
use crate::json::JsonMessage;
use crate::severity::Colored;

/// Characters of a sender's name that are shown.
const SENDER: usize = 64;

/// How records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordFormat {
    shape: Shape,
    /// Begin with the time of arrival.
    timestamp: bool,
    /// Name the sender before the record.
    prefix: bool,
    /// Colour the severity.
    color: bool,
    /// The byte that ends a record.
    pub end: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// ` [x] "info: hi"`
    Text,
    /// The bytes as they are.
    Raw,
    /// Raw, for people: control characters are escaped.
    Visible,
    /// A JSON object.
    Json,
}

impl RecordFormat {
    /// Takes the format from the command line, with regard to a terminal.
    pub fn new(cli: &Cli, output: &impl IsTerminal) -> RecordFormat {
        let shape = match cli.format() {
            Format::Text => Shape::Text,
            Format::Raw if output.is_terminal() => Shape::Visible,
            Format::Raw => Shape::Raw,
            Format::Json => Shape::Json,
        };
        let color = match cli.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => wants_color(output),
        };
        let end = if cli.null { b'\0' } else { b'\n' };
        RecordFormat { shape, timestamp: cli.timestamp, prefix: cli.prefix, color, end }
    }

    /// For the records of a message.
    pub fn message<'a>(self, delivery: &'a Delivery, layout: &Layout) -> MessageFormat<'a> {
        MessageFormat {
            format: self,
            sender: self.prefix.then(|| sender(&delivery.properties)),
            json: (self.shape == Shape::Json).then(|| JsonMessage::new(delivery, layout)),
        }
    }
}

/// How the records of a message are written.
pub struct MessageFormat<'a> {
    format: RecordFormat,
    sender: Option<&'a str>,
    json: Option<JsonMessage<'a>>,
}

impl MessageFormat<'_> {
    /// Writes a `record` of the message, the `index`th from 0.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write(&mut self, out: &mut impl Write, record: &[u8], index: u64) -> io::Result<()> {
        if let Some(json) = &mut self.json {
            json.write(out, record, index, &now())?;
        } else {
            self.write_start(out)?;
            if self.format.color {
                let mut colored = Colored::new(out);
                self.write_body(&mut colored, record)?;
                colored.finish()?;
            } else {
                self.write_body(out, record)?;
            }
        }
        out.write_all(&[self.format.end])
    }

    fn write_body(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        match self.format.shape {
            Shape::Text => escape::write_quoted(out, record),
            Shape::Visible => escape::write_visible(out, record),
            Shape::Raw | Shape::Json => out.write_all(record),
        }
    }

    /// Writes the part before the text of a record. The sender cannot pass for a message: it has no line
    /// break, and in the text format no quote.
    fn write_start(&self, out: &mut impl Write) -> io::Result<()> {
        let RecordFormat { shape, timestamp, .. } = self.format;
        if timestamp {
            out.write_all(now().as_bytes())?;
        }
        if let Some(sender) = self.sender {
            out.write_all(if timestamp { b" " } else { b"" })?;
            let end = sender.char_indices().nth(SENDER).map_or(sender.len(), |(end, _)| end);
            let (shown, rest) = sender.split_at(end);
            match shape {
                Shape::Text => escape::write_unquoted(out, shown.as_bytes())?,
                _ => escape::write_visible(out, shown.as_bytes())?,
            }
            out.write_all(if rest.is_empty() { b"" } else { b"..." })?;
        }
        match shape {
            Shape::Text => out.write_all(b" [x] "),
            _ if timestamp || self.sender.is_some() => out.write_all(b" "),
            _ => Ok(()),
        }
    }
}

/// The program that has sent a message, or else the machine, or `-` where the message names neither.
fn sender(properties: &Properties) -> &str {
    let app_id = properties.app_id().as_deref();
    let host = || match properties.headers().as_ref()?.get(HOST) {
        Some(Value::LongString(host)) => Some(host.as_str()),
        _ => None,
    };
    let given = |name: &&str| !name.is_empty();
    app_id.filter(given).or_else(|| host().filter(given)).unwrap_or("-")
}

/// Whether the environment wants colours in this output, by the rules that the colours of `--help` follow.
fn wants_color(output: &impl IsTerminal) -> bool {
    let clicolor = anstyle_query::clicolor();
    let supports_color = anstyle_query::term_supports_color() || clicolor == Some(true);
    match () {
        () if anstyle_query::no_color() => false,
        () if anstyle_query::clicolor_force() => true,
        () => clicolor != Some(false) && output.is_terminal() && supports_color,
    }
}

/// UTC, with milliseconds.
fn now() -> String {
    time::format(time::millis(SystemTime::now()), Precision::Millis)
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use amqp::Table;
    use clap::Parser;
    use logs_tests::Message;

    use super::*;
    use crate::testing::deliveries;

    fn file() -> File {
        File::open("/dev/null").unwrap()
    }

    fn terminal() -> File {
        OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap()
    }

    fn written(options: &[&str], output: &File, record: &[u8]) -> String {
        written_from(Properties::default(), options, output, record)
    }

    fn written_from(
        properties: Properties,
        options: &[&str],
        output: &File,
        record: &[u8],
    ) -> String {
        let cli = Cli::parse_from([&["receive-logs"], options].concat());
        let [mut delivery] = deliveries(&[Message::new("")]).try_into().unwrap();
        delivery.properties = properties;
        let mut out = Vec::new();
        let layout = Layout::of(&delivery.properties, record);
        let mut message = RecordFormat::new(&cli, output).message(&delivery, &layout);
        message.write(&mut out, record, 0).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_format_has_its_own_form_and_end() {
        let record = b"a\t\"b\"";
        assert_eq!(written(&[], &file(), record), " [x] \"a\\t\\\"b\\\"\"\n");
        assert_eq!(written(&["-r"], &file(), record), "a\t\"b\"\n");
        assert_eq!(written(&["-r", "-0"], &file(), record), "a\t\"b\"\0");
        let json = written(&["-f", "json", "-t"], &file(), record);
        assert!(json.starts_with("{\"received_at\":\"2"), "{json}");
        assert!(json.ends_with("}\n"), "{json}");
    }

    #[test]
    fn raw_is_escaped_on_a_terminal_only() {
        assert_eq!(written(&["-r"], &terminal(), b"a\x1bb"), "a\\u{1b}b\n");
        assert_eq!(written(&["-r"], &file(), b"a\x1bb"), "a\x1bb\n");
    }

    #[test]
    fn a_severity_is_coloured_where_that_is_asked_for() {
        let red = " [x] \"\u{1b}[31merror\u{1b}[0m: no\"\n";
        assert_eq!(written(&["--color", "always"], &file(), b"error: no"), red);
        assert_eq!(
            written(&["--color", "never"], &terminal(), b"error: no"),
            " [x] \"error: no\"\n"
        );
        assert_eq!(written(&[], &file(), b"error: no"), " [x] \"error: no\"\n");
        let json = written(&["-f", "json", "--color", "always"], &file(), b"error");
        assert!(!json.contains('\u{1b}'), "{json}");
    }

    #[test]
    fn a_timestamp_comes_first_in_text_and_raw() {
        for (format, rest) in [("text", " [x] \"a\"\n"), ("raw", " a\n")] {
            let written = written(&["-t", "-f", format], &file(), b"a");
            let (time, after) = written.split_at("2026-01-02T03:04:05.678Z".len());
            humantime::parse_rfc3339(time).unwrap();
            assert_eq!(after, rest);
        }
    }

    fn from_host(host: &str) -> Properties {
        let host = Value::LongString(host.into());
        Properties::default().with_headers(Table::from([(HOST.into(), host)]))
    }

    #[test]
    fn the_sender_is_the_program_or_else_the_machine() {
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

    #[test]
    fn a_prefix_names_the_sender_in_text_and_raw() {
        let from = |app_id: &str, options: &[&str], output: &File| {
            let properties = Properties::default().with_app_id(app_id.into());
            written_from(properties, &[&["--prefix"], options].concat(), output, b"info: hi")
        };
        assert_eq!(from("backup", &[], &file()), "backup [x] \"info: hi\"\n");
        assert_eq!(from("backup", &["-r"], &file()), "backup info: hi\n");
        let timed = from("backup", &["-t"], &file());
        assert!(timed.ends_with("Z backup [x] \"info: hi\"\n"), "{timed}");
        let timed = from("backup", &["-t", "-r"], &file());
        assert!(timed.ends_with("Z backup info: hi\n"), "{timed}");
        let colored = from("error", &["--color", "always"], &file());
        assert_eq!(colored, "error [x] \"\u{1b}[32minfo\u{1b}[0m: hi\"\n");
        assert!(from("backup", &["-f", "json"], &file()).starts_with("{\"received_at\""));
    }

    #[test]
    fn a_long_sender_is_cut_off() {
        let from = |length| {
            let sender = "ü".repeat(length);
            let properties = Properties::default().with_app_id(sender);
            written_from(properties, &["--prefix", "-r"], &file(), b"hi")
        };
        assert_eq!(from(64), format!("{} hi\n", "ü".repeat(64)));
        assert_eq!(from(65), format!("{}... hi\n", "ü".repeat(64)));
    }

    #[test]
    fn a_sender_cannot_pass_for_a_message() {
        let from = |options: &[&str], output: &File| {
            let sender = "a\n [x] \"fake\"\x1b[31m".to_string();
            written_from(Properties::default().with_app_id(sender), options, output, b"hi")
        };
        let text = r#"a\n [x] \"fake\"\u{1b}[31m [x] "hi""#;
        assert_eq!(from(&["--prefix"], &file()), format!("{text}\n"));
        let raw = r#"a\n [x] "fake"\u{1b}[31m hi"#;
        assert_eq!(from(&["--prefix", "-r"], &terminal()), format!("{raw}\n"));
        assert_eq!(from(&["--prefix", "-r"], &file()), format!("{raw}\n"));
    }
}
