//! Lines without a severity: prose, and output of programs.
//!
//! - `prose.txt` has 1,000 lines of the documentation and of doc comments of this project, without code. More than a
//!   hundred of them mention a severity in a sentence.
//! - The output of programs is made of the parts below, in all combinations. Most parts contain the name of a severity.
//!
//! A line whose first word is the name of a severity does not belong here: the first word is the severity.

use crate::severity;

/// All lines with a part of `beginnings`, a part of `middles` and a part of `ends`.
fn combine(beginnings: &[&str], middles: &[&str], ends: &[&str]) -> Vec<String> {
    let mut lines = Vec::new();
    for beginning in beginnings {
        for middle in middles {
            lines.extend(ends.iter().map(|end| format!("{beginning}{middle}{end}")));
        }
    }
    lines
}

/// Names and paths, as in URLs, directories and class names.
const NAMES: [&str; 17] = [
    "index",
    "error",
    "error.log",
    "errors/404",
    "warning",
    "info.php",
    "debug/pprof",
    "alert.js",
    "critical.css",
    "trace.json",
    "notice-2026",
    "level-error",
    "severity",
    "no-panic",
    "fatal_error",
    "logs?level=error",
    "path/level=error",
];

fn access_logs() -> Vec<String> {
    let beginnings = [
        "10.0.0.1 - - [31/Jan/2026:12:00:00 +0000] \"GET /",
        "2001:db8::1 - alice [31/Jan/2026:23:59:59 +0100] \"POST /api/v1/",
        "web1:443 192.0.2.7 - - [31/Jan/2026:12:00:00 +0000] \"HEAD /static/",
        "127.0.0.1:50000 - \"GET /",
        "2026-01-31T12:00:00Z 192.0.2.7 \"PUT /",
    ];
    let ends = [
        " HTTP/1.1\" 200 512",
        " HTTP/2.0\" 404 0 \"https://example.com/error\" \"Mozilla/5.0 (X11; Linux x86_64)\"",
        " HTTP/1.1\" 500 17 \"-\" \"curl/8.5.0\" 0.003",
    ];
    combine(&beginnings, &NAMES, &ends)
}

fn directories() -> Vec<String> {
    let beginnings = [
        "-rw-r--r-- 1 root root     4096 Jan 31 12:00 ",
        "drwxr-xr-x 2 www-data adm  512 31. Jan 2025 ",
        "lrwxrwxrwx 1 app app 7 2026-01-31 12:00 latest -> ",
        "  1234 root  20   0   12M  4M S  0.0  0.1 0:00.01 /usr/bin/",
        "root      1234  0.0  0.1  12345  678 ?        Ss   12:00   0:00 /usr/sbin/",
        "/dev/sda1  20G  7.1G  12G  38% /srv/",
        "diff --git a/src/",
        "commit 1f2e3d4c5b6a Fix the name of ",
        "test tests::",
    ];
    combine(&beginnings, &NAMES, &["", ".gz", "~ ... ok"])
}

fn stack_traces() -> Vec<String> {
    let beginnings = [
        "\tat com.example.app.Error.",
        "\tat org.example.critical.",
        "Caused by: com.example.FatalError at ",
        "    at Object.<anonymous> (/srv/app/",
        "  File \"/usr/lib/python3/logging/",
        "  12: std::panic::catch_unwind at ./src/",
        "goroutine 1 [running]: main.",
        "#3  0x00007f12 in log_error (",
    ];
    combine(&beginnings, &NAMES, &["(Error.java:12)", "\", line 12, in warn", ":12:5"])
}

fn system_logs() -> Vec<String> {
    let beginnings = [
        "Jan 31 12:00:00 web1 app[123]: ",
        "2026-01-31T12:00:00.123456+01:00 web1 systemd[1]: ",
        "[   12.345678] usb 1-1: ",
        "2026-01-31 12:00:00,123 - my.app - ",
        "web-1  | ",
    ];
    let middles = [
        "there was no ",
        "request without an ",
        "retry after the last ",
        "read /var/log/",
        "0 of 5 ",
        "sent a ",
        "(",
        "exit status 1, not an ",
    ];
    let ends = [
        "error",
        "warning: nothing to do",
        "info message",
        "debug build",
        "panic in the streets",
        "critical section",
        "alert (5)",
        "notice period",
        "trace of dust",
        "fatal flaw, it seems",
    ];
    combine(&beginnings, &middles, &ends)
}

fn data() -> Vec<String> {
    let beginnings = [
        "{\"id\":7,\"name\":\"",
        "{\"time\":\"2026-01-31T12:00:00Z\",\"msg\":\"12:00:00 ERROR ",
        "7,web1,2026-01-31,12:00,",
        " 7 | web1 | 12:00:00 | ",
        "<item id=\"7\" name=\"",
        "SELECT * FROM logs WHERE name = '",
        "key: value, other=",
        "$ ./run --log-level=error --level=debug ",
    ];
    combine(
        &beginnings,
        &NAMES,
        &["\",\"level\":3}", "\",\"battery\":{\"level\":50}}", ", 5 errors", "'"],
    )
}

#[test]
fn lines_without_a_severity_have_none() {
    let prose = include_str!("prose.txt").lines().map(String::from).collect();
    let kinds: [Vec<String>; 6] =
        [prose, access_logs(), directories(), stack_traces(), system_logs(), data()];
    let found: Vec<_> = kinds.iter().flatten().filter(|line| severity(line).is_some()).collect();
    assert!(found.is_empty(), "{found:#?}");
    let distinct: std::collections::HashSet<_> = kinds.iter().flatten().collect();
    assert!(distinct.len() >= 2000, "{}", distinct.len());
}
