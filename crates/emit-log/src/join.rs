//! `--join`: which lines belong to one record, such as a message and its stack trace.

use std::sync::LazyLock;

use memchr::memchr_iter;
use regex::bytes::{Regex, RegexSet};

/// Which lines begin a record.
#[derive(Clone, Debug)]
pub enum Join {
    /// Lines that do not continue a message or a stack trace.
    Traces,
    /// Lines that match.
    At(Regex),
}

impl Join {
    /// The ends of the records in `text`, which begins with a record and has whole lines. The last record may go on, so
    /// it has no end here.
    pub fn ends(&self, text: &[u8]) -> Vec<usize> {
        let (mut ends, mut record, mut start) = (Vec::new(), Record::default(), 0);
        for newline in memchr_iter(b'\n', text) {
            let line = &text[start..newline];
            let is_start = start > 0
                && match self {
                    Join::Traces => !record.is_continued_by(line),
                    Join::At(pattern) => pattern.is_match(line),
                };
            if is_start {
                ends.push(start);
                record = Record::default();
            }
            record.add(line);
            start = newline + 1;
        }
        ends
    }
}

/// What the lines of a record say about its next line.
#[derive(Default)]
struct Record {
    /// Whether an unindented line continues the record.
    is_open: bool,
    /// Whether the last lines are the stack trace of a goroutine.
    is_goroutine: bool,
    /// Whether the record has a stack trace to which the next one does not belong.
    has_trace: bool,
}

impl Record {
    fn is_continued_by(&self, line: &[u8]) -> bool {
        line.first().is_some_and(|byte| b" \t".contains(byte))
            || self.is_open
            || CONTINUATION.is_match(line)
            || self.is_goroutine && GOROUTINE.is_match(line)
            || !self.has_trace && TRACE.is_match(line)
    }

    fn add(&mut self, line: &[u8]) {
        let is_blank = line.trim_ascii().is_empty();
        let is_indented = line.first().is_some_and(|byte| b" \t".contains(byte));
        self.is_open = OPENING.is_match(line) || self.is_open && (is_indented || is_blank);
        self.is_goroutine = line.starts_with(b"goroutine ") || self.is_goroutine && !is_blank;
        self.has_trace = FRAME.is_match(line) || self.has_trace && !CHAIN.is_match(line);
    }
}

/// Unindented lines that continue a record.
static CONTINUATION: LazyLock<RegexSet> = LazyLock::new(|| {
    patterns(&[
        // Blank lines, and ends of blocks in braces.
        r"^\s*$",
        r"^[\])}]+[,;]?\r?$",
        // Java.
        r"^(Caused by: |Suppressed: |\.\.\. \d+ (more|common frames omitted))",
        // Python.
        r"^(During handling of the above|The above exception was the direct cause)",
        r#"^File ".*", line \d+"#,
        // Go.
        r"^(goroutine \d+ |\[signal )",
        // Rust.
        r"^(stack backtrace:|note: run with `RUST_BACKTRACE|note: Some details are omitted)",
        // Node, below an uncaught error.
        r"^Node\.js v\d+",
    ])
});

/// Unindented lines that begin the stack trace of the message above them.
static TRACE: LazyLock<RegexSet> = LazyLock::new(|| {
    patterns(&[
        r"^([a-z][\w$]*\.)+[\w$]*(Exception|Error|Throwable)(: |\r?$)",
        r"^Traceback \(most recent call last\):",
    ])
});

/// Lines of a stack trace.
static FRAME: LazyLock<RegexSet> =
    LazyLock::new(|| patterns(&[r"^\s+at ", r#"^\s+File ".*", line \d+"#]));

/// Lines between two stack traces that belong together.
static CHAIN: LazyLock<RegexSet> = LazyLock::new(|| {
    patterns(&[r"^(During handling of the above|The above exception was the direct cause)"])
});

/// Lines below which the next unindented line continues the record: the last frame of Python is above the exception, the
/// head of a Rust panic above its message, and the mark in a source line above an error of Node.
static OPENING: LazyLock<RegexSet> = LazyLock::new(|| {
    patterns(&[r#"^\s+File ".*", line \d+"#, r"^thread '.*' .*panicked at .*:\r?$", r"^\s*\^+\r?$"])
});

/// Unindented lines in the stack trace of a goroutine.
static GOROUTINE: LazyLock<RegexSet> = LazyLock::new(|| {
    patterns(&[r"^(created by |exit status |\.\.\.additional frames|\S+\(.*\)\r?$)"])
});

fn patterns(patterns: &[&str]) -> RegexSet {
    RegexSet::new(patterns).expect("the patterns are valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of a text, by their ends. The last one is complete.
    fn records<'a>(text: &'a str, join: &Join) -> Vec<&'a str> {
        let mut starts = join.ends(text.as_bytes());
        starts.insert(0, 0);
        let ends = starts[1..].iter().copied().chain([text.len()]);
        starts.iter().zip(ends).map(|(start, end)| &text[*start..end]).collect()
    }

    /// Checks that the text of these records is cut into them.
    fn check(expected: &[&str]) {
        assert_eq!(records(&expected.concat(), &Join::Traces), expected);
    }

    const PLAIN: &str = "info: started\n";

    #[test]
    fn a_trace_of_java_is_one_record() {
        check(&[
            PLAIN,
            "2026-01-31 12:00:00 ERROR [main] App - failed\n\
             java.lang.IllegalStateException: outer\n\
             \tat com.example.App.run(App.java:14)\n\
             \tat com.example.App.main(App.java:7)\n\
             Caused by: java.io.IOException: inner\n\
             \tat com.example.Store.read(Store.java:22)\n\
             \t... 2 more\n",
            "java.lang.Error: alone\n\tat com.example.App.main(App.java:9)\n",
            "Exception in thread \"main\" java.lang.NullPointerException\n\
             \tat com.example.App.main(App.java:3)\n\
             \tSuppressed: java.io.IOException\n\
             \t\t... 1 more\n",
            PLAIN,
        ]);
    }

    #[test]
    fn a_trace_of_python_is_one_record() {
        check(&[
            PLAIN,
            "ERROR:root:failed\n\
             Traceback (most recent call last):\n\
             \x20 File \"/app/a.py\", line 3, in f\n\
             \x20   raise ValueError(\"a\")\n\
             ValueError: a\n\
             \n\
             During handling of the above exception, another exception occurred:\n\
             \n\
             Traceback (most recent call last):\n\
             \x20 File \"/app/a.py\", line 5, in <module>\n\
             \x20   f()\n\
             \x20   ~^^\n\
             KeyError: 'b'\n",
            "Traceback (most recent call last):\n\
             \x20 File \"/app/a.py\", line 9, in <module>\n\
             ZeroDivisionError: division by zero\n",
            "WARNING:root:after\n",
        ]);
    }

    #[test]
    fn a_trace_of_go_is_one_record() {
        check(&[
            "2026/01/31 12:00:00 listening\n",
            "panic: runtime error: invalid memory address or nil pointer dereference\n\
             [signal SIGSEGV: segmentation violation code=0x1 addr=0x0 pc=0x4567]\n\
             \n\
             goroutine 1 [running]:\n\
             main.(*Server).handle(0x0, {0xc000012345, 0x5})\n\
             \t/app/main.go:12 +0x1d\n\
             main.main()\n\
             \t/app/main.go:7 +0x2a\n\
             \n\
             goroutine 18 [select]:\n\
             net/http.(*persistConn).writeLoop(0xc0001)\n\
             \t/usr/lib/go/src/net/http/transport.go:2400 +0xf0\n\
             created by net/http.(*Transport).dialConn in goroutine 5\n\
             \t/usr/lib/go/src/net/http/transport.go:1799 +0x152f\n\
             exit status 2\n",
            "2026/01/31 12:00:01 listening\n",
        ]);
    }

    #[test]
    fn a_trace_of_rust_is_one_record() {
        check(&[
            "thread 'main' (41) panicked at src/main.rs:2:5:\n\
             index out of bounds: the len is 3 but the index is 99\n\
             stack backtrace:\n\
             \x20  0: core::panicking::panic_fmt\n\
             \x20            at /rustc/library/core/src/panicking.rs:80:14\n\
             note: Some details are omitted, run with `RUST_BACKTRACE=full` for a verbose backtrace.\n",
            "thread 'worker' panicked at src/lib.rs:9:1:\n\
             boom\n\
             note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n",
            PLAIN,
        ]);
    }

    #[test]
    fn a_trace_of_node_is_one_record() {
        check(&[
            "/app/server.js:3\n\
             \x20   throw new Error(\"boom\");\n\
             \x20   ^\n\
             \n\
             Error: boom\n\
             \x20   at handler (/app/server.js:3:11)\n\
             \x20   at Module._compile (node:internal/modules/cjs/loader:1554:14) {\n\
             \x20 code: 'E'\n\
             }\n\
             \n\
             Node.js v20.20.2\n",
            "Error: no file\n    at open (/app/x.js:1:1)\n",
            PLAIN,
        ]);
    }

    #[test]
    fn a_trace_of_csharp_is_one_record() {
        check(&[
            "fail: App[0]\n      request failed\n",
            "Unhandled exception. System.InvalidOperationException: outer\n\
             \x20---> System.IO.IOException: inner\n\
             \x20  at N.Store.Read() in /app/Store.cs:line 5\n\
             \x20  --- End of inner exception stack trace ---\n\
             \x20  at N.App.Main() in /app/App.cs:line 9\n",
            PLAIN,
        ]);
    }

    #[test]
    fn plain_lines_and_blocks() {
        check(&[
            "a\n",
            "b\r\n",
            "{\n  \"level\": \"error\"\n}\n",
            "c\n\n",
            "Error: disk is full\n",
            "Errors: 2\n",
            "goroutines: 3\n",
        ]);
        assert!(Join::Traces.ends(b"").is_empty());
        assert!(Join::Traces.ends(b"  indented\n\n").is_empty());
    }

    #[test]
    fn a_pattern_can_begin_a_record() {
        let join = Join::At(Regex::new(r"^\d{4}-").unwrap());
        let expected = ["no date\n", "2026-01-31 a\nb\n", "2026-02-01 c\n"];
        assert_eq!(records(&expected.concat(), &join), expected);
    }
}
