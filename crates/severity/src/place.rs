//! The places where common formats have the severity.

use std::ops::Range;

use crate::Severity;
use crate::gap::{Gap, kind, skip_colors};

/// The keys whose value is a severity, in JSON and in `level=error`.
const KEYS: [&str; 6] = ["level", "lvl", "severity", "levelname", "loglevel", "log_level"];

/// The text before a word.
#[derive(Default)]
pub struct Place<'a> {
    /// The number of words.
    words: usize,
    /// The previous word; empty before the first word.
    previous: &'a [u8],
    /// The byte before the previous word.
    before_previous: Option<u8>,
    /// The bytes between the two words.
    gap: Gap,
    /// Whether a JSON object has begun.
    is_object: bool,
    /// Whether there was a time of day.
    has_time: bool,
    /// Whether there was a word that is not a number.
    has_text: bool,
    /// The number of numbers before the word that only white space separates from the word before them.
    columns: usize,
}

impl<'a> Place<'a> {
    /// Advances to a `word` after a gap, with `after` behind it.
    pub fn enter(&mut self, gap: Gap, word: &[u8], after: &[u8]) {
        self.gap = gap;
        if gap.has(kind::BRACE) {
            self.is_object |= self.is_first() || gap.has(kind::DOUBLE_QUOTE);
        }
        if !self.has_time && is_number(word) && is_number(self.previous) {
            self.has_time = self.ends_time(word, after);
        }
    }

    /// Advances to the end of the word.
    pub fn leave(&mut self, line: &'a [u8], word: Range<usize>) {
        self.before_previous = word.start.checked_sub(1).map(|before| line[before]);
        self.previous = &line[word];
        self.words += 1;
        let is_column = is_number(self.previous) && self.gap.is_all(kind::SPACE);
        self.columns = if is_column { self.columns + 1 } else { 0 };
        self.has_text |= !is_number(self.previous);
    }

    fn is_first(&self) -> bool {
        self.words == 0
    }

    /// Whether a number is the end of a time of day: `12:00`, `-12.00.00.123` (BGL) or `260131 120000` (HDFS).
    fn ends_time(&self, number: &[u8], after: &[u8]) -> bool {
        let is_pair = |digits: &[u8]| digits.len() == 2 && digits.iter().all(u8::is_ascii_digit);
        match self.gap {
            gap if gap.is(b':') => true,
            gap if gap.is(b'-') => {
                let is_part = |part: &[u8]| part[0] == b'.' && is_pair(&part[1..]);
                is_pair(self.previous)
                    && is_pair(number)
                    && after.get(6) == Some(&b'.')
                    && after[..6].chunks(3).all(is_part)
            }
            gap if gap.is_all(kind::SPACE) && !self.has_text => {
                is_date(self.previous) && is_time(number)
            }
            _ => false,
        }
    }

    /// The severity that a word means at this place, with `after` behind it, and how many bytes of the word mean it.
    pub fn severity(&self, word: &[u8], after: &[u8]) -> Option<(usize, Severity)> {
        // Most words of a text end here.
        if !self.is_first() && !self.has_time && !self.gap.has(kind::SEPARATOR | kind::BRACKET) {
            return None;
        }
        let severity = match word {
            [b'0'..=b'9', ..] if self.is_priority(after) => Severity::of_priority(word),
            [b'0'..=b'9', ..] if self.is_number_of_json(after) => Severity::of_number(word),
            [b'0'..=b'9', ..] => None,
            [letter] if self.is_of_logcat(after) => Severity::of_letter(*letter),
            [letter, digits @ ..] if is_of_klog(digits, after) => {
                return Severity::of_letter(*letter).map(|severity| (1, severity));
            }
            _ if self.is_of_word(word, after) && !self.is_part_of_path(after) => {
                Severity::of_word(word)
            }
            _ => None,
        };
        severity.map(|severity| (word.len(), severity))
    }

    /// syslog, the kernel and systemd: `<11>Jan 31 ...`, `<6>[ 0.000000] ...`, `<3>failed`
    fn is_priority(&self, after: &[u8]) -> bool {
        self.is_first()
            && self.gap.is(b'<')
            && after.strip_prefix(b">").is_some_and(|text| text.trim_ascii_start() == text)
    }

    /// pino: `{"level":30,"time":1769860800000, ...`, bunyan: `{"name":"app", ... ,"level":30,"msg": ...`. In other
    /// JSON, a level may be the level of a battery.
    fn is_number_of_json(&self, after: &[u8]) -> bool {
        self.is_object && self.previous == b"level" && self.is_value() && {
            let next_key = &after[Gap::read(after).1..];
            next_key.starts_with(b"msg") || self.words == 1 && next_key.starts_with(b"time")
        }
    }

    /// Whether the word is a value in JSON or logfmt.
    fn is_value(&self) -> bool {
        self.gap.has(kind::SEPARATOR)
            && self.gap.is_all(kind::SPACE | kind::SEPARATOR | kind::QUOTE | kind::DOUBLE_QUOTE)
    }

    /// Whether the previous word is a whole key for a severity. A part of a URL (`?level=error`) and an option
    /// (`--log-level=error`) are not.
    fn is_key_of_severity(&self) -> bool {
        let is_part = match self.before_previous {
            Some(b'?' | b'&' | b'/') => true,
            Some(b'-') => !self.is_object,
            _ => false,
        };
        !is_part && KEYS.iter().any(|key| key.as_bytes().eq_ignore_ascii_case(self.previous))
    }

    /// Android: `01-31 12:00:00.123  1234  1234 E Tag: text`, or `E/Tag( 1234): text`
    fn is_of_logcat(&self, after: &[u8]) -> bool {
        match after {
            _ if self.has_text => false,
            [b' ', rest @ ..] => {
                self.columns >= 2 && self.gap.is_all(kind::SPACE) && rest.contains(&b':')
            }
            [b'/', rest @ ..] => is_tag_with_process(rest),
            _ => false,
        }
    }

    /// Whether the word is a part of a path such as `std::panic::catch_unwind`.
    fn is_part_of_path(&self, after: &[u8]) -> bool {
        self.gap.is_all(kind::SEPARATOR) && self.gap.length == 2 || after.starts_with(b"::")
    }

    /// Whether a `word` at this place, with `after` behind it, is the severity if it is the name of one. The place is
    /// checked first, because that is faster than to compare names.
    fn is_of_word(&self, word: &[u8], after: &[u8]) -> bool {
        let gap = self.gap;
        let in_capitals = || word.iter().all(u8::is_ascii_uppercase);
        let after = || skip_colors(after);
        let is_bracketed = || skip_colors(after().trim_ascii_start()).starts_with(b"]");
        if self.is_first() {
            // Only a quote and a bracket may precede the first word: `"[WARN] disk is full"`.
            return gap.length <= 2 && gap.is_all(kind::DOUBLE_QUOTE | kind::BRACKET);
        }
        if self.is_value() && self.is_key_of_severity() {
            return true;
        }
        if self.is_object {
            return false;
        }
        match gap.last {
            b'[' => is_bracketed(),
            b':' if after().starts_with(b":") || is_bracketed() || in_capitals() => true,
            _ => self.has_time && (!self.has_text || in_capitals()),
        }
    }
}

/// Android: `ActivityManager( 1234): text`
fn is_tag_with_process(text: &[u8]) -> bool {
    let is_end = |byte: &u8| matches!(byte, b' ' | b'(');
    let tag = text.iter().position(is_end).unwrap_or(text.len());
    let process = text[tag..].trim_ascii_start().strip_prefix(b"(").unwrap_or_default();
    let digits = process.trim_ascii_start();
    let length = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    length > 0 && digits[length..].starts_with(b"):")
}

/// klog: `E0131 12:00:00.123456 1 main.go:10] text`, and glog, which has the year too
fn is_of_klog(date: &[u8], after: &[u8]) -> bool {
    matches!(date.len(), 4 | 8)
        && date.iter().all(u8::is_ascii_digit)
        && matches!(
            after,
            [b' ', b'0'..=b'2', b'0'..=b'9', b':', b'0'..=b'5', b'0'..=b'9', b':', ..]
        )
}

/// Whether a word is a number, or a part of a time such as `31T12` and `00Z`.
fn is_number(word: &[u8]) -> bool {
    word.first().is_some_and(u8::is_ascii_digit)
}

/// Whether a number is a date of HDFS: year, month and day in six digits.
fn is_date(number: &[u8]) -> bool {
    is_six_digits(number)
        && (&b"01"[..]..=b"12").contains(&&number[2..4])
        && (&b"01"[..]..=b"31").contains(&&number[4..])
}

/// Whether a number is a time of HDFS: hour, minute and second in six digits.
fn is_time(number: &[u8]) -> bool {
    is_six_digits(number)
        && number[..2] < b"24"[..]
        && number[2..4] < b"60"[..]
        && number[4..] < b"60"[..]
}

fn is_six_digits(number: &[u8]) -> bool {
    number.len() == 6 && number.iter().all(u8::is_ascii_digit)
}
