//! The severities, and the table of words, letters and numbers that formats use for them.

/// The severity of a log line. A greater severity is worse.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Details of the control flow.
    Trace,
    /// Details for developers.
    Debug,
    /// Normal operation.
    Info,
    /// Normal but significant.
    Notice,
    /// A condition that may become an error.
    Warning,
    /// A failed operation.
    Error,
    /// A failed program or system.
    Critical,
}

struct Row {
    severity: Severity,
    /// Letters of Android's logcat and of klog.
    letters: &'static [u8],
    /// The number in the JSON of bunyan and pino.
    number: &'static [u8],
    /// Severities of syslog: RFC 5424, section 6.2.1.
    syslog: &'static [u8],
    /// Words in lower case. The first word is the name.
    words: &'static [&'static str],
}

/// A row for each severity, in the order of [`Severity`]. The abbreviations are those of zerolog, Serilog, logrus and
/// .NET.
#[rustfmt::skip]
const TABLE: [Row; 7] = [
    Row { severity: Severity::Trace, letters: b"V", number: b"10", syslog: &[],
          words: &["trace", "verbose", "trc", "trce", "trac", "vrb"] },
    Row { severity: Severity::Debug, letters: b"D", number: b"20", syslog: &[7],
          words: &["debug", "dbg", "dbug", "debu"] },
    Row { severity: Severity::Info, letters: b"I", number: b"30", syslog: &[6],
          words: &["info", "inf"] },
    Row { severity: Severity::Notice, letters: b"", number: b"", syslog: &[5],
          words: &["notice"] },
    Row { severity: Severity::Warning, letters: b"W", number: b"40", syslog: &[4],
          words: &["warning", "warn", "wrn"] },
    Row { severity: Severity::Error, letters: b"E", number: b"50", syslog: &[3],
          words: &["error", "err", "severe", "erro"] },
    Row { severity: Severity::Critical, letters: b"FA", number: b"60", syslog: &[0, 1, 2],
          words: &["critical", "crit", "fatal", "panic", "alert", "emergency", "emerg", "ftl", "fata", "pnc", "pani"] },
];

impl Severity {
    /// All severities, from the least to the most severe.
    pub fn all() -> impl Iterator<Item = Severity> {
        TABLE.iter().map(|row| row.severity)
    }

    /// The name in lower case, as in a routing key.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].words[0]
    }

    /// The severity with this name. Every word of the table is a name, in upper or lower case.
    pub fn parse(name: &str) -> Option<Severity> {
        Severity::of_word(name.as_bytes())
    }

    pub(crate) fn of_word(word: &[u8]) -> Option<Severity> {
        let is_word = |name: &&str| name.as_bytes().eq_ignore_ascii_case(word);
        severity_where(|row| row.words.iter().any(is_word))
    }

    pub(crate) fn of_letter(letter: u8) -> Option<Severity> {
        severity_where(|row| row.letters.contains(&letter))
    }

    pub(crate) fn of_number(number: &[u8]) -> Option<Severity> {
        severity_where(|row| row.number == number)
    }

    /// The severity in a priority of syslog, which is 8 times the facility plus the severity. The facility is at most
    /// 23: RFC 5424, section 6.2.1.
    pub(crate) fn of_priority(priority: &[u8]) -> Option<Severity> {
        let priority: u8 = str::from_utf8(priority).ok()?.parse().ok()?;
        severity_where(|row| priority < 24 * 8 && row.syslog.contains(&(priority % 8)))
    }
}

fn severity_where(is_row: impl Fn(&Row) -> bool) -> Option<Severity> {
    TABLE.iter().find(|row| is_row(row)).map(|row| row.severity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Severity::{Critical, Debug, Error, Info, Trace, Warning};

    #[test]
    fn the_table_is_in_the_order_of_severities() {
        assert!(TABLE.iter().enumerate().all(|(index, row)| row.severity as usize == index));
        assert!(TABLE.is_sorted_by_key(|row| row.severity));
        let names = TABLE.map(|row| row.severity.name());
        assert_eq!(names, ["trace", "debug", "info", "notice", "warning", "error", "critical"]);
    }

    #[test]
    fn every_word_is_the_name_of_one_severity() {
        for Row { severity, words, .. } in &TABLE {
            for word in *words {
                assert_eq!(Severity::parse(word), Some(*severity), "{word}");
                assert_eq!(Severity::parse(&word.to_uppercase()), Some(*severity), "{word}");
            }
        }
        for name in ["", "errors", "warn ", "E", "3", "30"] {
            assert_eq!(Severity::parse(name), None, "{name}");
        }
    }

    #[test]
    fn letters_and_numbers_have_a_severity() {
        let letters = b"VDIWEFAX".map(Severity::of_letter);
        let expected = [Trace, Debug, Info, Warning, Error, Critical, Critical].map(Some);
        assert_eq!(letters[..7], expected);
        assert_eq!(letters[7], None);
        assert_eq!(Severity::of_number(b"30"), Some(Info));
        assert_eq!(Severity::of_number(b"35"), None);
        for (priority, severity) in [
            ("0", Some(Critical)),
            ("11", Some(Error)),
            ("30", Some(Info)),
            ("191", Some(Debug)),
            ("192", None),
            ("999", None),
        ] {
            assert_eq!(Severity::of_priority(priority.as_bytes()), severity, "{priority}");
        }
    }
}
