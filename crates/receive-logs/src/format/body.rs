//! The body of text and raw records. A terminal gets a view for people: colours, highlights, and no control characters.

use std::io::{self, Write};

use logs_process::escape::{Escape, Quotes, Target};
use regex::bytes::Regex;

use super::highlight::{Piece, pieces};

/// Reverse video: it is visible in any colour, and its end resets no colour.
const MATCH: (&[u8], &[u8]) = (b"\x1b[7m", b"\x1b[27m");

/// How bodies are written.
#[derive(Clone, Debug)]
pub struct BodyFormat {
    /// Which quotes and characters to escape. `None` leaves all bytes as they are.
    pub escape: Option<(Quotes, Target)>,
    /// Colour the severity and highlight the matches of these patterns.
    pub highlights: Option<Vec<Regex>>,
}

impl BodyFormat {
    pub fn write(&self, out: &mut impl Write, record: &[u8]) -> io::Result<()> {
        let mut escape = self.escape.map(|(quotes, target)| Escape::new(quotes, target));
        let record = match self.escape {
            Some((_, Target::Terminal(_))) => without_line_end(record),
            _ => record,
        };
        match &self.highlights {
            Some(patterns) => {
                for Piece { text, style, is_match } in pieces(record, patterns) {
                    let (start, end) = if is_match { MATCH } else { (&b""[..], &b""[..]) };
                    write!(out, "{style}")?;
                    out.write_all(start)?;
                    write_piece(out, &mut escape, text)?;
                    out.write_all(end)?;
                    write!(out, "{style:#}")?;
                }
            }
            None => write_piece(out, &mut escape, record)?,
        }
        escape.map_or(Ok(()), |mut escape| escape.end(out))
    }
}

/// A record without the line end that its sender has left in it.
fn without_line_end(record: &[u8]) -> &[u8] {
    let record = record.strip_suffix(b"\n").unwrap_or(record);
    record.strip_suffix(b"\r").unwrap_or(record)
}

fn write_piece(out: &mut impl Write, escape: &mut Option<Escape>, piece: &[u8]) -> io::Result<()> {
    match escape {
        Some(escape) => escape.write(out, piece),
        None => out.write_all(piece),
    }
}
