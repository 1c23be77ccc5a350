//! A word that names a severity is ordinary text at most places.

use logs_severity::{BEGINNING, SEARCHED, Severity, find};

use crate::severity;

#[track_caller]
fn check_none(lines: &[&str]) {
    for line in lines {
        assert_eq!(severity(line), None, "{line}");
    }
}

#[test]
fn other_words_are_not_a_severity() {
    check_none(&["", "\"\"", "no error", "errors: 2", "infoä", "warn_once", "[[[info", "7"]);
    check_none(&["a\\", "\\", "\x1b[31m", "\x1b", "| ", "web-1  | ", "\"web-1  |"]);
}

#[test]
fn a_word_in_the_text_is_not_a_severity() {
    check_none(&[
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
        "a \x1b[31merror\x1b[0m in colour",
        "see the table | error | warning",
        "| error | warning |",
        "web-1  |  error after two spaces",
        "column|error",
        "error::tests ... ok",
        "12:00:00 at log::Level::ERROR",
    ]);
}

#[test]
fn other_keys_are_not_the_key_of_a_severity() {
    check_none(&[
        r#"{"error":"none","msg":"12:00:00 ERROR: x","level":30}"#,
        r#"{"level":30,"warning":true}"#,
        "12:00:00 request {\"msg\":\"ERROR\"}",
        "level of debug",
        "level debug",
        "status=ERROR",
        "{a: ERROR: not quoted}",
        "10.0.0.1 - - \"GET /logs?level=error&n=5 HTTP/1.1\" 200 5",
        "10.0.0.1 - - \"GET /logs?n=5&level=error HTTP/1.1\" 200 5",
        "app[5]: started with --log-level=error --level=debug",
    ]);
}

#[test]
fn other_numbers_are_not_a_severity() {
    check_none(&[
        "<11> apples",
        "<192>Jan 31 12:00:00 web1 app: not a priority",
        "<0.222.0> started",
        "of <11>Jan 31",
        "12:00:00<11>Jan 31",
        r#"{"level":31,"time":1}"#,
        r#"{"size":30,"msg":"x"}"#,
        r#"{"sensor":"tank","level":30,"time":1}"#,
        r#"{"level":30.5,"time":1}"#,
        r#"{"level":3,"msg":"verbosity of a Go program"}"#,
        "level=30 msg=x",
        "123456 203615 ERROR is not in June",
        "081109 246015 error",
        "081109 203615",
        "lib-10.20.30.40 has no ERROR",
        "5-10.20.30.40 WARN",
        "31-12.00.99 WARN",
        "31-12.00000.5 WARN",
    ]);
}

#[test]
fn other_letters_are_not_a_severity() {
    check_none(&[
        "E0131 is a number of a message",
        "E0131",
        "X0131 12:00:00.123456 1 main.go:1] x",
        "E013 12:00:00.123456 1 main.go:1] x",
        "12:00:00.123 1234 E ActivityManager: one number only",
        "1234 1234 E ActivityManager: no time",
        "01-31 12:00:00.123  1234  1234 E without a tag",
        "01-31 12:00:00.123  1234  1234 X Tag: other letter",
        "01-31 12:00:00.123 adb 1234  1234 E Tag: text before the numbers",
        "01-31 12:00:00.123  1234  1234/E Tag: not a column",
        "E/Tag: no process",
        "E/Tag(x): no process",
        "E/Tag(): no process",
        "E/Tag(5) no colon",
        "A/B testing (2): done",
        "E",
    ]);
}

#[test]
fn only_the_beginning_of_a_line_is_searched() {
    let rest = "x".repeat(100_000);
    for (spaces, expected) in
        [(SEARCHED - 5, Some((SEARCHED - 1..SEARCHED + 4, Severity::Error))), (SEARCHED - 4, None)]
    {
        let line = format!("[1]{}[error] {rest}", " ".repeat(spaces));
        assert_eq!(find(line.as_bytes()), expected);
        assert_eq!(find(&line.as_bytes()[..BEGINNING]), expected);
    }
    assert_eq!(severity(&format!("12:00:00 {}ERROR", "x ".repeat(SEARCHED))), None);
}
