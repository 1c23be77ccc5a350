//! How records are written. Each format has a file.

mod json;
mod prefix;
mod raw;
mod severity;
mod text;

use std::io::{self, IsTerminal, Write};

use clap::ColorChoice;

use self::json::JsonRecords;
use self::prefix::{Prefix, time_of_arrival};
use self::raw::RawRecords;
use self::text::TextRecords;
use crate::cli::{Cli, Format};
use crate::message::Message;

/// How records are written.
#[derive(Clone, Copy, Debug)]
pub struct RecordFormat {
    format: Format,
    /// Begin text and raw records with the time of arrival, and with the sender.
    timestamp: bool,
    sender: bool,
    /// Colour the severity.
    color: bool,
    /// Escape control characters in raw records.
    escape: bool,
    /// The byte that ends a record.
    pub end: u8,
}

impl RecordFormat {
    /// Takes the format from the command line. For a terminal, colours are on by default, and control characters are escaped.
    pub fn new(cli: &Cli, output: &impl IsTerminal) -> RecordFormat {
        RecordFormat {
            format: cli.format(),
            timestamp: cli.timestamp,
            sender: cli.prefix,
            color: match cli.color {
                ColorChoice::Always => true,
                ColorChoice::Never => false,
                ColorChoice::Auto => wants_color(output),
            },
            escape: output.is_terminal(),
            end: if cli.null { b'\0' } else { b'\n' },
        }
    }

    /// A writer for the records of a message.
    pub fn records(self, message: &Message) -> Records<'_> {
        let RecordFormat { timestamp, sender, color, escape, .. } = self;
        let sender = sender.then_some(&message.delivery.properties);
        let prefix = Prefix::new(timestamp, sender);
        match self.format {
            Format::Text => Records::Text(TextRecords { prefix, color }),
            Format::Raw => Records::Raw(RawRecords { prefix, color, escape }),
            Format::Json => Records::Json(JsonRecords::new(message)),
        }
    }
}

/// Writes the records of one message.
pub enum Records<'a> {
    Text(TextRecords<'a>),
    Raw(RawRecords<'a>),
    Json(JsonRecords<'a>),
}

impl Records<'_> {
    /// Writes a `record` without its end. The `index` counts the records of the message from 0.
    ///
    /// # Errors
    ///
    /// The errors of `out`.
    pub fn write(&mut self, out: &mut impl Write, index: u64, record: &[u8]) -> io::Result<()> {
        match self {
            Records::Text(text) => text.write(out, record),
            Records::Raw(raw) => raw.write(out, record),
            Records::Json(json) => json.write(out, index, record, &time_of_arrival()),
        }
    }
}

/// Whether the environment asks for colours in this output, by the rules of the colours of `--help`.
fn wants_color(output: &impl IsTerminal) -> bool {
    let clicolor = anstyle_query::clicolor();
    let supports_color = anstyle_query::term_supports_color() || clicolor == Some(true);
    match () {
        () if anstyle_query::no_color() => false,
        () if anstyle_query::clicolor_force() => true,
        () => clicolor != Some(false) && output.is_terminal() && supports_color,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use amqp::{Delivery, Properties};
    use clap::Parser;

    use super::*;

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
        let mut delivery = Box::<Delivery>::default();
        delivery.properties = properties;
        let message = Message::new(delivery);
        let mut out = Vec::new();
        let format = RecordFormat::new(&cli, output);
        format.records(&message).write(&mut out, 0, record).unwrap();
        out.push(format.end);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_format_ends_its_records() {
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
    fn color_follows_the_option_and_the_format() {
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
    fn a_sender_cannot_imitate_a_message() {
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
