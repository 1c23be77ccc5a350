//! The parts of a record that stand out: its severity, and the matches of `--grep`.

use std::ops::Range;

use anstyle::{AnsiColor, Style};
use logs_process::escape::length_of_color;
use logs_severity::{Severity, find};
use memchr::memchr_iter;
use regex::bytes::Regex;

/// The number of bytes at the start of a record in which matches are highlighted.
const HIGHLIGHTED: usize = 64 * 1024;

/// A part of a record with one look.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub text: &'a [u8],
    /// The style of the severity; plain outside of it.
    pub style: Style,
    /// Whether the text is part of a match.
    pub is_match: bool,
}

/// Cuts a record into pieces. The severity of a record with colours of its own has no style, and no piece cuts such a
/// colour.
pub fn pieces<'a>(record: &'a [u8], patterns: &[Regex]) -> Vec<Piece<'a>> {
    let searched = &record[..record.len().min(HIGHLIGHTED)];
    let color_at = |start| Some(start..start + length_of_color(&searched[start..])?);
    let colors: Vec<_> = memchr_iter(b'\x1b', searched).filter_map(color_at).collect();
    let severity = find(record).filter(|_| colors.is_empty());
    let matches = |pattern: &Regex| -> Vec<_> {
        pattern.find_iter(searched).map(|found| found.range()).collect()
    };
    let matches: Vec<_> = patterns.iter().map(matches).collect();

    let word = severity.iter().map(|(word, _)| word);
    let ranges = word.chain(matches.iter().flatten()).chain(&colors);
    let mut cuts: Vec<usize> = ranges.flat_map(|range| [range.start, range.end]).collect();
    cuts.extend([0, record.len()]);
    cuts.sort_unstable();
    cuts.retain(|cut| range_at(&colors, *cut).is_none_or(|color| color.start == *cut));
    cuts.dedup();
    let piece = |cut: &[usize]| {
        let severity = severity.as_ref().filter(|(word, _)| word.contains(&cut[0]));
        Piece {
            text: &record[cut[0]..cut[1]],
            style: severity.map_or(Style::new(), |(_, severity)| style(*severity)),
            is_match: matches.iter().any(|ranges| range_at(ranges, cut[0]).is_some()),
        }
    };
    cuts.windows(2).map(piece).collect()
}

/// The range that contains a position. The ranges are in order and do not overlap.
fn range_at(ranges: &[Range<usize>], position: usize) -> Option<&Range<usize>> {
    let next = ranges.partition_point(|range| range.end <= position);
    ranges.get(next).filter(|range| range.contains(&position))
}

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

#[cfg(test)]
mod tests {
    use logs_severity::SEARCHED;

    use super::*;

    /// The pieces of a record: a severity in `<>`, a match in `[]`.
    fn marked(record: &str, patterns: &[&str]) -> String {
        let patterns: Vec<_> = patterns.iter().map(|text| Regex::new(text).unwrap()).collect();
        let mut out = String::new();
        for Piece { text, style, is_match } in pieces(record.as_bytes(), &patterns) {
            let text = str::from_utf8(text).unwrap();
            let text = if is_match { format!("[{text}]") } else { text.into() };
            out += &if style.is_plain() { text } else { format!("<{text}>") };
        }
        out
    }

    #[test]
    fn the_severity_has_a_style() {
        for (record, expected) in [
            ("error: no", "<error>: no"),
            ("[WARN] hm", "[<WARN>] hm"),
            ("Info", "<Info>"),
            ("no error", "no error"),
            ("", ""),
        ] {
            assert_eq!(marked(record, &[]), expected);
        }
        let style = |record: &str| pieces(record.as_bytes(), &[])[0].style;
        assert_eq!(style("error: no"), AnsiColor::Red.on_default());
        assert_eq!(style("crit"), AnsiColor::Red.on_default().bold());
    }

    #[test]
    fn only_the_beginning_of_a_record_is_searched_for_a_severity() {
        let (start, rest) = (" ".repeat(SEARCHED - 5), "x".repeat(100_000));
        let record = format!("[1]{start}[error] {rest}");
        assert!(marked(&record, &[]) == format!("[1]{start}[<error>] {rest}"));
        let late = format!("[1] {start}[error] {rest}");
        assert!(marked(&late, &[]) == late);
    }

    #[test]
    fn matches_of_all_patterns_are_highlighted() {
        for (record, patterns, expected) in [
            ("a timeout, refused", &["time.?out", "refused"][..], "a [timeout], [refused]"),
            ("abcd", &["ab", "bc"], "[a][b][c]d"),
            ("error: error", &["error"], "<[error]>: [error]"),
            ("error: no", &["err"], "<[err]><or>: no"),
            ("aaa", &["^a", "x*"], "[a]aa"),
        ] {
            assert_eq!(marked(record, patterns), expected);
        }
        let record = "a".repeat(HIGHLIGHTED + 1);
        assert!(marked(&record, &["a+"]) == format!("[{}]a", "a".repeat(HIGHLIGHTED)));
    }

    #[test]
    fn a_color_of_the_record_is_whole_and_replaces_ours() {
        let record = "\x1b[31merror\x1b[0m: no";
        assert_eq!(marked(record, &[]), record);
        assert_eq!(marked(record, &["r: n"]), record);
        assert_eq!(marked(record, &["r.*n"]), "\x1b[31me[rror][\x1b[0m][: n]o");
        assert_eq!(marked(record, &["31|0"]), record);
        assert_eq!(marked(record, &["1me|m:"]), "\x1b[31m[e]rror\x1b[0m[:] no");
    }
}
