//! The severity of whole lines: samples of common formats, and lines without a severity.

mod formats;
mod places;
mod plain;

use std::ops::Range;

use logs_process::escape;
use logs_severity::{Severity, find};

/// The word that is the severity of a line. The same word must be found when receive-logs prints the line in quotes,
/// and when it escapes the line for a terminal.
fn severity(line: &str) -> Option<(&str, Severity)> {
    let found = at(line, find(line.as_bytes()));
    let (mut quoted, mut visible) = (Vec::new(), Vec::new());
    escape::write_quoted(&mut quoted, line.as_bytes()).unwrap();
    escape::write_visible(&mut visible, line.as_bytes()).unwrap();
    for printed in [quoted, visible] {
        let printed = String::from_utf8(printed).unwrap();
        assert_eq!(at(&printed, find(printed.as_bytes())), found, "{line}\n{printed}");
    }
    found
}

fn at(line: &str, found: Option<(Range<usize>, Severity)>) -> Option<(&str, Severity)> {
    found.map(|(word, severity)| (&line[word], severity))
}
