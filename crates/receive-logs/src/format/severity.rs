//! Colours the severity of a message.

use std::io::{self, Write};
use std::ops::Range;

use anstyle::{AnsiColor, Style};

/// The number of bytes at the start of a message in which a severity is searched.
const SEARCHED: usize = 512;

/// The keys whose value is a severity, in JSON and in `level=error`.
const KEYS: [&str; 6] = ["level", "lvl", "severity", "levelname", "loglevel", "log_level"];

const LEVELS: [(&[&str], Style); 7] = [
    (
        &["emerg", "emergency", "panic", "alert", "fatal", "crit", "critical"],
        AnsiColor::Red.on_default().bold(),
    ),
    (&["error", "err", "severe"], AnsiColor::Red.on_default()),
    (&["warning", "warn"], AnsiColor::Yellow.on_default()),
    (&["notice"], AnsiColor::Cyan.on_default()),
    (&["info"], AnsiColor::Green.on_default()),
    (&["debug"], AnsiColor::Blue.on_default()),
    (&["trace", "verbose"], Style::new().dimmed()),
];

/// The number of bytes that determine the severity: [`SEARCHED`], a word that begins there, and the bytes after the
/// word.
const BEGINNING: usize = SEARCHED + 64;

/// Writes a message to `out` by `write`. Colours the word that is its severity, if there is one.
///
/// # Errors
///
/// The errors of `out`.
pub fn color<W: Write>(
    out: &mut W,
    write: impl FnOnce(&mut Colored<'_, W>) -> io::Result<()>,
) -> io::Result<()> {
    let mut colored = Colored { out, beginning: Some(Vec::with_capacity(BEGINNING)) };
    write(&mut colored)?;
    colored.finish()
}

/// A writer that colours the severity.
pub struct Colored<'a, W> {
    out: &'a mut W,
    /// The start of the message, until it is long enough to search.
    beginning: Option<Vec<u8>>,
}

impl<W: Write> Colored<'_, W> {
    fn finish(&mut self) -> io::Result<()> {
        let Some(beginning) = self.beginning.take() else {
            return Ok(());
        };
        let Some((word, style)) = find(&beginning) else {
            return self.out.write_all(&beginning);
        };
        self.out.write_all(&beginning[..word.start])?;
        write!(self.out, "{style}")?;
        self.out.write_all(&beginning[word.clone()])?;
        write!(self.out, "{style:#}")?;
        self.out.write_all(&beginning[word.end..])
    }
}

impl<W: Write> Write for Colored<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(beginning) = &mut self.beginning else {
            return self.out.write(bytes);
        };
        let taken = bytes.len().min(BEGINNING - beginning.len());
        beginning.extend_from_slice(&bytes[..taken]);
        if beginning.len() == BEGINNING {
            self.finish()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Finds the severity. It is the first word, or a later word at a place where common formats have the severity. An
/// "error" elsewhere is ordinary text.
fn find(message: &[u8]) -> Option<(Range<usize>, Style)> {
    let mut place = Place::default();
    let mut position = 0;
    loop {
        let gap_start = position;
        while position < SEARCHED && !is_letter(*message.get(position)?) {
            // The letter of an escape such as `\t` or `\"` is not part of a word.
            position += if message[position] == b'\\' { 2 } else { 1 };
        }
        place.gap = message.get(gap_start..position)?;
        let rest = message.get(position..).filter(|_| position < SEARCHED)?;
        let length = rest.iter().position(|byte| !is_letter(*byte)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(length);
        place.is_object |= gap_start == 0 && place.gap.contains(&b'{');
        place.has_time |= place.gap == b":" && is_number(place.previous) && is_number(word);
        if place.is_of_severity(word, after)
            && let Some(style) = style_of(word)
        {
            return Some((position..position + length, style));
        }
        place.has_text |= !is_number(word);
        place.previous = word;
        position += length;
    }
}

/// The text before a word.
#[derive(Default)]
struct Place<'a> {
    /// The previous word; empty before the first word.
    previous: &'a [u8],
    /// The bytes between the two words.
    gap: &'a [u8],
    /// Whether a JSON object has begun.
    is_object: bool,
    /// Whether there was a time of day.
    has_time: bool,
    /// Whether there was a word that is not a number.
    has_text: bool,
}

impl Place<'_> {
    /// Whether a `word` at this place, with `after` behind it, is the severity if it is the name of one. The place is
    /// checked first, because that is faster than to compare names.
    fn is_of_severity(&self, word: &[u8], after: &[u8]) -> bool {
        let is_all = |bytes: &[u8]| self.gap.iter().all(|byte| bytes.contains(byte));
        let gap = self.gap.trim_ascii_end();
        let in_capitals = || word.iter().all(u8::is_ascii_uppercase);
        let is_bracketed = || after.trim_ascii_start().starts_with(b"]");
        if self.previous.is_empty() {
            // Only the quote of the text format and a bracket may precede the first word: `"[WARN] disk is full"`.
            return self.gap.len() <= 2 && is_all(b"\"[");
        }
        if (gap.contains(&b':') || gap.contains(&b'='))
            && is_all(b" :='\"\\")
            && is_one_of(&KEYS, self.previous)
        {
            return true;
        }
        if self.is_object {
            return false;
        }
        match gap.last() {
            Some(b'[') => is_bracketed(),
            Some(b':') if after.starts_with(b":") || is_bracketed() || in_capitals() => true,
            _ => self.has_time && (!self.has_text || in_capitals()),
        }
    }
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || !byte.is_ascii() || byte == b'_'
}

/// Whether a word is a number, or a part of a time such as `31T12` and `00Z`.
fn is_number(word: &[u8]) -> bool {
    word.first().is_some_and(u8::is_ascii_digit)
}

fn is_one_of(names: &[&str], word: &[u8]) -> bool {
    names.iter().any(|name| name.as_bytes().eq_ignore_ascii_case(word))
}

fn style_of(word: &[u8]) -> Option<Style> {
    LEVELS.iter().find(|(names, _)| is_one_of(names, word)).map(|(_, style)| *style)
}

#[cfg(test)]
mod tests {
    use logs_process::escape;

    use super::*;

    fn colored(message: &str) -> String {
        let mut out = b"> ".to_vec();
        color(&mut out, |out| out.write_all(message.as_bytes())).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// The coloured word of a message, which must be the same in the quotes of the text format.
    fn severity(message: &str) -> Option<&str> {
        let word = find(message.as_bytes()).map(|(word, _)| &message[word]);
        let mut quoted = Vec::new();
        escape::write_quoted(&mut quoted, message.as_bytes()).unwrap();
        let in_quotes = find(&quoted).map(|(word, _)| str::from_utf8(&quoted[word]).unwrap());
        assert_eq!(word, in_quotes, "{message}");
        word
    }

    #[test]
    fn a_severity_as_the_first_word_is_coloured() {
        assert_eq!(colored("error: no"), "> \x1b[31merror\x1b[0m: no");
        assert_eq!(colored("\"[WARN] hm\""), "> \"[\x1b[33mWARN\x1b[0m] hm\"");
        assert_eq!(colored("Info"), "> \x1b[32mInfo\x1b[0m");
        assert_eq!(colored("\"crit\""), "> \"\x1b[1m\x1b[31mcrit\x1b[0m\"");
    }

    #[test]
    fn only_the_beginning_of_a_message_is_searched() {
        let (start, rest) = (" ".repeat(SEARCHED - 5), "x".repeat(100_000));
        let message = format!("[1]{start}[error] {rest}");
        let expected = format!("> [1]{start}[\u{1b}[31merror\u{1b}[0m] {rest}");
        assert!(colored(&message) == expected);
        let late = format!("[1] {start}[error] {rest}");
        assert!(colored(&late) == format!("> {late}"));
    }

    #[test]
    fn other_words_are_not_coloured() {
        for message in ["", "\"\"", "no error", "errors: 2", "infoä", "warn_once", "[[[info", "7"]
        {
            assert_eq!(colored(message), format!("> {message}"));
        }
    }

    #[test]
    fn severities_of_common_formats_are_found() {
        for (level, message) in [
            // log4j, logback, Spring Boot, Kafka, Elasticsearch
            ("INFO", "2026-01-31 12:00:00,123 INFO  [main] com.example.App - no error"),
            ("ERROR", "12:00:00.123 [http-nio-8080-exec-1] ERROR c.example.App - boom"),
            ("WARN", "2026-01-31T12:00:00.123+01:00  WARN 12345 --- [      main] c.e.App : hm"),
            ("ERROR", "[2026-01-31 12:00:00,123] ERROR [KafkaApi-1] Failed (kafka.server)"),
            ("INFO", "[2026-01-31T12:00:00,123][INFO ][o.e.n.Node ] [node-1] started"),
            // Python: basicConfig, asctime - name - levelname, gunicorn, celery
            ("WARNING", "WARNING:root:an error"),
            ("ERROR", "2026-01-31 12:00:00,123 - my.app - ERROR - boom"),
            ("INFO", "[2026-01-31 12:00:00 +0000] [1234] [INFO] Listening at: http://0.0.0.0:80"),
            ("WARNING", "[2026-01-31 12:00:00,123: WARNING/MainProcess] hm"),
            // syslog and daemons
            ("error", "Jan 31 12:00:00 web1 sshd[123]: error: kex_exchange_identification: closed"),
            ("WARNING", "Jan 31 12:00:00 web1 kernel: WARNING: CPU: 0 PID: 1"),
            ("Info", "dovecot: imap-login: Info: Aborted login"),
            ("error", "2026/01/31 12:00:00 [error] 123#123: *1 open() failed"),
            (
                "error",
                "[Sat Jan 31 12:00:00.123456 2026] [core:error] [pid 1] AH00126: Invalid URI",
            ),
            ("ERROR", "2026-01-31 12:00:00.123 UTC [123] ERROR:  relation \"x\" does not exist"),
            ("Warning", "2026-01-31T12:00:00.123456Z 0 [Warning] [MY-010068] [Server] CA"),
            ("info", "2026-01-31 12:00:00.123456+00:00 [info] <0.222.0> Server startup complete"),
            ("error", "main.c:10:5: error: expected ';' before '}' token"),
            // Rust, Go, Ruby, the console of zap
            ("WARN", "[2026-01-31T12:00:00Z WARN  my_app] hm"),
            ("INFO", "2026-01-31T12:00:00.123456Z  INFO my_app: error count 0"),
            ("INFO", "2026/01/31 12:00:00 INFO hello count=3"),
            ("ERROR", "E, [2026-01-31T12:00:00.123456 #1234] ERROR -- : boom"),
            ("error", "2026-01-31T12:00:00.000Z\terror\tmain.go:10\tboom"),
            ("ERROR", "2026-01-31T12:00:00.000Z\tERROR\tmain.go:10\tboom"),
            // logfmt
            ("warn", "time=2026-01-31T12:00:00Z level=warn msg=\"no error\""),
            ("info", "time=\"2026-01-31T12:00:00Z\" level=info msg=\"an ERROR\""),
            ("error", "ts=1769860800.1 caller=main.go:1 lvl=error err=\"exit 1\""),
            // JSON
            ("error", r#"{"time":"2026-01-31T12:00:00Z","level":"error","msg":"x"}"#),
            ("WARNING", r#"{"asctime": "12:00:00", "levelname": "WARNING", "message": "ERROR"}"#),
            ("info", r#"{"msg":"error: none","log.level":"info"}"#),
            ("CRITICAL", r#"{"severity": "CRITICAL", "message": "boom"}"#),
        ] {
            assert_eq!(severity(message), Some(level), "{message}");
        }
    }

    #[test]
    fn a_word_in_the_text_is_not_a_severity() {
        let late = format!("{}12:00:00 ERROR", " ".repeat(SEARCHED));
        for message in [
            "there was no error: all is well",
            "404 error page",
            "2 critical vulnerabilities",
            "3 of 5 ERROR",
            "5 5 ERROR",
            "failed [error 5]",
            "12:00:00 GET /error 200",
            "12:00:00 there was no error",
            "an ERROR",
            "status: info requested",
            r#"{"error":"none","msg":"12:00:00 ERROR: x","level":30}"#,
            r#"{"level":30,"warning":true}"#,
            "level of debug",
            "level debug",
            "a\\",
            "\\",
            &late,
        ] {
            assert_eq!(severity(message), None, "{message}");
        }
    }
}
