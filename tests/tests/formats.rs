//! The formats of receive-logs: text, raw and json.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::{SystemTime, UNIX_EPOCH};

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use logs_tests::{
    Peer, TempFile, Tool, binary, emit_log, receive_logs, terminal, unique, url, wait_until,
};
use serde_json::Value;

/// Quotes, a backslash, a newline, ESC, NUL, a bidirectional override, and a byte that is not UTF-8.
const NASTY: &[u8] = b"say \"hi\" \\ \n [x] \"fake\"\x1b[31m\0 \xe2\x80\xae \xff end";

/// Starts a receiver of one message and publishes the message. Returns the output.
fn written(options: &[&str], body: &[u8], properties: AmqpProperties) -> Vec<u8> {
    let exchange = unique("formats");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).args(options);
    let receiver = receiver.start().ready();
    Peer::connect().publish_with(&exchange, body, properties);
    receiver.wait().success().stdout
}

fn plain(options: &[&str], body: &[u8]) -> Vec<u8> {
    written(options, body, AmqpProperties::default())
}

#[test]
fn text_is_one_line_for_any_message() {
    let line = r#" [x] "say \"hi\" \\ \n [x] \"fake\"\u{1b}[31m\0 \u{202e} \xff end""#;
    assert_eq!(String::from_utf8(plain(&[], NASTY)).unwrap(), format!("{line}\n"));
}

#[test]
fn raw_is_the_exact_bytes_when_redirected() {
    assert_eq!(plain(&["--raw"], NASTY), [NASTY, b"\n"].concat());
    assert_eq!(plain(&["--format", "raw", "-0"], NASTY), [NASTY, b"\0"].concat());
}

#[test]
fn only_a_message_of_emit_log_is_split() {
    for message_type in ["lines", "records"] {
        let properties = AmqpProperties::default().with_type_(message_type.into());
        let body = b"a\0b\nc";
        let numbered = properties.clone().with_message_id("7".into());
        for properties in [properties, numbered] {
            assert_eq!(written(&["--raw", "-0"], body, properties), [&body[..], b"\0"].concat());
        }
    }
}

/// The lines on a terminal for one message.
fn shown(environment: &str, options: &str, body: &[u8]) -> Vec<String> {
    let exchange = unique("terminal");
    let screen = TempFile::new("screen");
    let errors = TempFile::new("errors");
    let (binary, errors_path) = (binary("receive-logs"), errors.path());
    let command =
        format!("exec env {environment} {binary:?} {options} -n 1 -e {exchange} 2>{errors_path:?}");
    let terminal = terminal(&command, screen.path()).env("AMQP_URL", url()).start();
    wait_until("the receiver is waiting", || {
        errors.read().is_ok_and(|text| text == logs_tests::BANNER.as_bytes())
    });
    Peer::connect().publish(&exchange, body);
    terminal.wait().success();
    let shown = String::from_utf8(screen.read().unwrap()).unwrap();
    shown.lines().map(Into::into).collect()
}

#[test]
fn control_characters_are_escaped_on_a_terminal() {
    let start = r#"say "hi" \ \n [x] "fake""#;
    let end = r"\0 \u{202e} \xff end";
    for (options, line) in [
        ("--raw", format!("{start}\x1b[31m{end}\x1b[0m")),
        ("--raw --color never", format!("{start}{end}")),
        ("--color never", r#" [x] "say \"hi\" \\ \n [x] \"fake\"\0 \u{202e} \xff end""#.into()),
    ] {
        let shown = shown("TERM=xterm", options, NASTY);
        assert!(shown.contains(&line), "{options}: {shown:?}");
    }
    let shown = shown("TERM=xterm", "--format json", "\u{9b}31m\x7f\u{202e}".as_bytes());
    let escaped = r#""body":"\u009b31m\u007f\u202e""#;
    assert!(shown.iter().any(|shown| shown.contains(escaped)), "{shown:?}");
}

#[test]
fn a_terminal_shows_program_output_as_it_was() {
    let grep = "export TERM=xterm; printf '\\tan error\\r\\n' | grep --color=always error";
    let output = Tool::new("sh").args(["-c", grep]).run().success().stdout;
    let output = output.strip_suffix(b"\n").unwrap();
    let text = str::from_utf8(output).unwrap();
    assert!(text.contains("\x1b[01;31m") && text.ends_with('\r'), "{text:?}");
    // grep also erases the rest of the line, which could hide other text.
    let escaped = text.trim_end_matches('\r').replace("\x1b[K", "\\u{1b}[K");
    let shown_raw = shown("TERM=xterm", "--raw", output);
    assert!(shown_raw.contains(&format!("{escaped}\x1b[0m")), "{shown_raw:?}");
    let shown_text = shown(
        "TERM=xterm NO_COLOR=1",
        "",
        "\t\u{645}\u{6cc}\u{200c}\u{62e} 👩\u{200d}💻\u{3000}日".as_bytes(),
    );
    let line = " [x] \"\t\u{645}\u{6cc}\u{200c}\u{62e} 👩\u{200d}💻\u{3000}日\"";
    assert!(shown_text.iter().any(|shown| shown == line), "{shown_text:?}");
}

#[test]
fn matches_are_highlighted_on_a_terminal() {
    for (options, line) in [
        ("--raw --grep time.?out", "\x1b[31merror\x1b[0m: \x1b[7mtimeout\x1b[27m"),
        ("--raw --grep time.?out --color never", "error: timeout"),
    ] {
        let shown = shown("TERM=xterm", options, b"error: timeout");
        assert!(shown.iter().any(|shown| shown == line), "{options}: {shown:?}");
    }
}

#[test]
fn the_severity_is_coloured_on_a_terminal() {
    let (plain_line, colored) = (" [x] \"error: no\"", " [x] \"\u{1b}[31merror\u{1b}[0m: no\"");
    for (environment, options, line) in [
        ("TERM=xterm", "", colored),
        ("TERM=xterm", "--color never", plain_line),
        ("TERM=xterm NO_COLOR=1", "", plain_line),
        ("TERM=xterm NO_COLOR=1", "--color always", colored),
        ("TERM=dumb", "", plain_line),
        ("TERM=xterm", "--raw", &colored[6..colored.len() - 1]),
    ] {
        let shown = shown(environment, options, b"error: no");
        assert!(shown.iter().any(|shown| shown == line), "{environment} {options}: {shown:?}");
    }
    assert_eq!(plain(&[], b"error: no"), format!("{plain_line}\n").into_bytes());
    let always = plain(&["--color", "always"], b"error: no");
    assert_eq!(always, format!("{colored}\n").into_bytes());
    let json = plain(&["--color", "always", "-f", "json"], b"error: no");
    assert!(!json.contains(&b'\x1b'));
}

#[test]
fn json_has_all_properties_of_a_message() {
    let mut headers = FieldTable::new();
    headers.insert("Host".into(), AmqpValue::LongString("web1".into()));
    headers.insert("Attempts".into(), AmqpValue::LongInt(-3));
    headers.insert(
        "Tags".into(),
        AmqpValue::FieldArray(vec![AmqpValue::Boolean(true), AmqpValue::Void]),
    );
    let properties = AmqpProperties::default()
        .with_content_type("text/plain".into())
        .with_app_id("billing".into())
        .with_timestamp(1_700_000_000)
        .with_headers(headers);
    let object = written(&["-f", "json"], "disk \"91 %\"\n".as_bytes(), properties);
    let object: Value = serde_json::from_slice(&object).unwrap();
    assert_eq!(object["body"], "disk \"91 %\"\n");
    assert_eq!(object["routing_key"], "");
    assert_eq!(object["redelivered"], false);
    assert!(object["exchange"].as_str().unwrap().starts_with("formats-"));
    assert!(object["received_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(object["properties"]["content_type"], "text/plain");
    assert_eq!(object["properties"]["app_id"], "billing");
    assert_eq!(object["properties"]["timestamp"], 1_700_000_000);
    assert_eq!(
        object["headers"],
        serde_json::json!({"Host": "web1", "Attempts": -3, "Tags": [true, null]})
    );
}

#[test]
fn json_has_base64_for_bytes_that_are_not_utf8() {
    let object = plain(&["-f", "json"], NASTY);
    assert_eq!(object.iter().filter(|byte| **byte == b'\n').count(), 1);
    let object: Value = serde_json::from_slice(&object).unwrap();
    assert_eq!(object["body_base64"], STANDARD.encode(NASTY));
    assert_eq!(object.get("body"), None);
}

#[test]
fn records_can_begin_with_the_time() {
    for (option, end) in [("text", " [x] \"hi\"\n"), ("raw", " hi\n")] {
        let line = String::from_utf8(plain(&["-t", "-f", option], b"hi")).unwrap();
        let (time, rest) = line.split_at("2026-01-01T00:00:00.000Z".len());
        assert_eq!(rest, end);
        assert!(time.starts_with("20") && time.ends_with('Z'), "{line}");
    }
}

#[test]
fn records_can_begin_with_the_time_of_sending() {
    let sent_at = |emit: &[&str], options: &[&str]| {
        let exchange = unique("sent");
        let receiver = receive_logs().args(["-e", &exchange, "-n", "1", "-r"]).args(options);
        let receiver = receiver.env("TZ", "Asia/Kolkata").start().ready();
        emit_log().args(["-e", &exchange]).args(emit).arg("hi").run().success();
        receiver.wait().success().stdout_text()
    };
    let before = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let line = sent_at(&["--tag", "web"], &["-t=sent"]);
    let after = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let time = line.strip_suffix(" hi\n").expect("a time");
    assert!(*before <= *time && *time <= *after, "{before} {time} {after}");
    let line = sent_at(&[], &["--timestamp=sent"]);
    let time = line.strip_suffix("Z hi\n").expect("a time in seconds");
    assert_eq!(time.len(), "2026-01-31T09:30:00".len());
    for (emit, options, length) in [
        (&[][..], &["-t", "--local-time"][..], "2026-01-31T09:30:00.000".len()),
        (&["--tag", "web"], &["-t=sent", "--local-time"], "2026-01-31T09:30:00.000".len()),
        (&[], &["-t=sent", "--local-time"], "2026-01-31T09:30:00".len()),
    ] {
        let line = sent_at(emit, options);
        let time = line.strip_suffix("+05:30 hi\n").unwrap_or_else(|| panic!("{line}"));
        assert_eq!(time.len(), length, "{line}");
    }
    assert_eq!(plain(&["--timestamp=sent", "-r"], b"hi"), b"- hi\n");
    let unknown = receive_logs().args(["-t", "--local-time"]).env("TZ", "No/Where");
    unknown.run().fails_with(78, &["--local-time: ", "TZ", "Europe/Berlin"]);
}

#[test]
fn empty_and_large_messages_arrive_unchanged() {
    assert_eq!(plain(&["--raw"], b""), b"\n");
    assert_eq!(plain(&[], b""), b" [x] \"\"\n");
    let mut large: Vec<u8> = (0..10_000_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let received = plain(&["--raw"], &large);
    large.push(b'\n');
    assert!(received == large, "{} of {} bytes", received.len(), large.len());
}

#[test]
fn a_large_message_is_not_formatted_in_memory() {
    let body = vec![0xff; 16_000_000];
    for (format, length) in [("text", 64_000_000), ("json", 21_000_000)] {
        let (exchange, file) = (unique("large"), TempFile::new("log"));
        let receiver = receive_logs().args(["-e", &exchange, "-f", format, "-o"]);
        let receiver = receiver.arg(file.path()).start().ready();
        Peer::connect().publish(&exchange, &body);
        let is_written = || file.path().metadata().is_ok_and(|file| file.len() > length);
        wait_until("the message is written", is_written);
        let peak = receiver.peak_memory();
        receiver.stop().success();
        assert!(peak < 52_000_000, "{format}: {peak} bytes");
    }
}

#[test]
fn words_are_bytes() {
    let exchange = unique("bytes");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1", "-r"]).start().ready();
    let word = OsString::from_vec(b"caf\xe9".to_vec());
    let sent = emit_log().args(["-e", &exchange]).arg(word).run().success();
    assert_eq!(sent.stdout_text(), " [x] Sent \"caf\\xe9\"\n");
    assert_eq!(receiver.wait().success().stdout, b"caf\xe9\n");
}

#[test]
fn headers_and_properties_are_sent() {
    let exchange = unique("properties");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1", "-f", "json"]).start().ready();
    let options =
        ["-H", "Host: web1", "-H", "Path:/a:b", "--content-type", "text/x", "--app-id", "a"];
    emit_log().args(["-e", &exchange]).args(options).arg("hi").run().success();
    let object: Value = serde_json::from_slice(&receiver.wait().success().stdout).unwrap();
    assert_eq!(object["headers"], serde_json::json!({"Host": "web1", "Path": "/a:b"}));
    let mut properties = object["properties"].clone();
    let timestamp = properties.as_object_mut().unwrap().remove("timestamp").unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!((now - 10..=now).contains(&timestamp.as_u64().unwrap()), "{timestamp} of {now}");
    let id = properties.as_object_mut().unwrap().remove("message_id").unwrap();
    let id = id.as_str().and_then(|id| id.strip_prefix("emit-log/")).unwrap();
    assert_eq!(id.split_once('/').map(|(_run, number)| number), Some("1"));
    assert_eq!(properties, serde_json::json!({"content_type": "text/x", "app_id": "a"}));
}
