//! The severity of whole lines: samples of common formats, and lines without a severity.

mod formats;
mod places;
mod plain;

use logs_severity::{Severity, find};

/// The word that is the severity of a line.
fn severity(line: &str) -> Option<(&str, Severity)> {
    find(line.as_bytes()).map(|(word, severity)| (&line[word], severity))
}
