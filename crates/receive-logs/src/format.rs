//! How records are written. Each format has a file.

mod body;
mod clock;
mod highlight;
mod json;
mod prefix;
mod raw;
mod text;

use std::io::{self, IsTerminal, Write};

use clap::ColorChoice;
use logs_process::escape::{Colors, Quotes, Target};
use logs_process::exit::Failure;

use self::body::BodyFormat;
use self::clock::{Clock, time_of_arrival};
use self::json::JsonRecords;
use self::prefix::PrefixFormat;
use self::raw::RawRecords;
use self::text::TextRecords;
use crate::cli::{Cli, Format};
use crate::message::Message;

/// How records are written.
#[derive(Clone, Debug)]
pub struct RecordFormat {
    format: Format,
    /// The start of text and raw records.
    prefix: PrefixFormat,
    /// The body of text and raw records.
    body: BodyFormat,
    /// The byte that ends a record.
    pub end: u8,
}

impl RecordFormat {
    /// Takes the format from the command line. For a terminal, colours are on by default, and control characters are escaped.
    ///
    /// # Errors
    ///
    /// When the local time zone is unknown.
    pub fn new(cli: &Cli, output: &impl IsTerminal) -> Result<RecordFormat, Failure> {
        let has_color = match cli.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => wants_color(output),
        };
        let target = match (has_color, output.is_terminal()) {
            (true, _) => Target::Terminal(Colors::Shown),
            (false, true) => Target::Terminal(Colors::Removed),
            (false, false) => Target::Pipe,
        };
        let escape = match cli.format() {
            Format::Raw if output.is_terminal() => Some((Quotes::Plain, target)),
            Format::Raw => None,
            Format::Text | Format::Json => Some((Quotes::Escaped, target)),
        };
        Ok(RecordFormat {
            format: cli.format(),
            prefix: PrefixFormat { clock: Clock::new(cli)?, has_sender: cli.prefix },
            body: BodyFormat { escape, highlights: has_color.then(|| cli.filter.grep.clone()) },
            end: if cli.null { b'\0' } else { b'\n' },
        })
    }

    /// A writer for the records of a message.
    pub fn records<'a>(&'a self, message: &'a Message) -> Records<'a> {
        let RecordFormat { prefix, body, .. } = self;
        let properties = &message.delivery.properties;
        match self.format {
            Format::Text => Records::Text(TextRecords { prefix, properties, body }),
            Format::Raw => Records::Raw(RawRecords { prefix, properties, body }),
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

    use amqp::{Delivery, Properties, Table, Value};
    use clap::Parser;
    use logs_common::wire::TIMESTAMP_IN_MS;

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
        let format = RecordFormat::new(&cli, output).unwrap();
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
    fn a_terminal_gets_a_view_for_people() {
        let record = b"\x1b[31mERROR\x1b[0m\ta\x1b]0;t\x07\x1b[2J\r";
        let shown = "\x1b[31mERROR\x1b[0m\ta\\u{1b}]0;t\\u{7}\\u{1b}[2J\x1b[0m";
        let always = ["--color", "always"];
        assert_eq!(written(&always, &terminal(), record), format!(" [x] \"{shown}\"\n"));
        let raw = [&always[..], &["-r"]].concat();
        assert_eq!(written(&raw, &terminal(), record), format!("{shown}\n"));
        let removed = "ERROR\ta\\u{1b}]0;t\\u{7}\\u{1b}[2J";
        let never = written(&["--color", "never"], &terminal(), record);
        assert_eq!(never, format!(" [x] \"{removed}\"\n"));
        let piped = r"\u{1b}[31mERROR\u{1b}[0m\ta\u{1b}]0;t\u{7}\u{1b}[2J\r";
        assert_eq!(written(&[], &file(), record), format!(" [x] \"{piped}\"\n"));
        let raw = written(&["-r"], &file(), record);
        assert_eq!(raw.as_bytes(), [&record[..], b"\n"].concat());
    }

    #[test]
    fn matches_are_highlighted_where_colours_are_on() {
        let options = ["--grep", "time.?out", "--color"];
        let of =
            |color, record: &[u8]| written(&[&options[..], &[color]].concat(), &file(), record);
        let shown = " [x] \"\x1b[31merror\x1b[0m: a \x1b[7mtimeout\x1b[27m\"\n";
        assert_eq!(of("always", b"error: a timeout"), shown);
        assert_eq!(of("never", b"error: a timeout"), " [x] \"error: a timeout\"\n");
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
    fn a_timestamp_can_be_that_of_sending() {
        let sent = |properties: Properties| {
            written_from(properties, &["--timestamp=sent", "-r"], &file(), b"a")
        };
        let millis = Table::from([(TIMESTAMP_IN_MS.into(), Value::LongLongInt(1_700_000_000_123))]);
        let seconds = Properties::default().with_timestamp(1_700_000_001);
        assert_eq!(sent(seconds.clone().with_headers(millis)), "2023-11-14T22:13:20.123Z a\n");
        assert_eq!(sent(seconds), "2023-11-14T22:13:21Z a\n");
        assert_eq!(sent(Properties::default()), "- a\n");
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
