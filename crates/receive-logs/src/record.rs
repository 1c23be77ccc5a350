//! Messages to bytes.

use std::io::IsTerminal;
use std::time::SystemTime;

use amqp::Delivery;
use clap::ColorChoice;
use logs_common::escape;

use crate::cli::{Cli, Format};
use crate::json::JsonRecord;
use crate::severity;

/// How records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    shape: Shape,
    /// Begin with the time of arrival.
    timestamp: bool,
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

impl Record {
    /// Takes the format from the command line, with regard to a terminal.
    pub fn new(cli: &Cli, output: &impl IsTerminal) -> Record {
        let shape = match cli.format() {
            Format::Text => Shape::Text,
            Format::Raw if output.is_terminal() => Shape::Visible,
            Format::Raw => Shape::Raw,
            Format::Json => Shape::Json,
        };
        let color = match cli.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                let wanted = !anstyle_query::no_color() && anstyle_query::term_supports_color();
                output.is_terminal() && wanted
            }
        };
        let end = if cli.null { b'\0' } else { b'\n' };
        Record { shape, timestamp: cli.timestamp, color, end }
    }

    /// Appends a `record` of a message, the `index`th from 0.
    pub fn push(self, out: &mut Vec<u8>, delivery: &Delivery, record: &[u8], index: u64) {
        if self.timestamp && self.shape != Shape::Json {
            out.extend_from_slice(now().as_bytes());
            if self.shape != Shape::Text {
                out.push(b' ');
            }
        }
        if self.shape == Shape::Text {
            out.extend_from_slice(b" [x] ");
        }
        let start = out.len();
        match self.shape {
            Shape::Text => escape::push_quoted(out, record),
            Shape::Raw => out.extend_from_slice(record),
            Shape::Visible => escape::push_visible(out, record),
            Shape::Json => {
                let object = JsonRecord::new(delivery, record, index, now());
                serde_json::to_writer(&mut *out, &object).expect("memory takes any write");
            }
        }
        if self.color && self.shape != Shape::Json {
            severity::color(out, start);
        }
        out.push(self.end);
    }
}

/// UTC, with milliseconds.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
