//! Options and arguments that users know from other tools.

use std::fs::File;

use logs_tests::{TempFile, Tool, binary, emit_log, receive_logs, unique, url};
use serde_json::Value;

#[test]
fn a_tag_is_the_prefix_of_its_messages() {
    let exchange = unique("tag");
    let receiver = |options: &[&str]| {
        receive_logs().args(["-e", &exchange, "-n", "3"]).args(options).start().ready()
    };
    let (text, raw) = (receiver(&["--prefix"]), receiver(&["--prefix", "-r"]));
    let (json, plain) = (receiver(&["--prefix", "-f", "json"]), receiver(&[]));
    let emit = |options: &[&str]| emit_log().args(["-e", &exchange]).args(options).run().success();
    emit(&["--tag", "backup", "info: done"]);
    emit(&["-H", "Host: web1", "hi"]);
    emit(&["anonymous"]);
    assert_eq!(
        text.wait().success().stdout_text(),
        "backup [x] \"info: done\"\nweb1 [x] \"hi\"\n- [x] \"anonymous\"\n"
    );
    let raw = raw.wait().success().stdout_text();
    assert_eq!(raw, "backup info: done\nweb1 hi\n- anonymous\n");
    let plain = plain.wait().success().stdout_text();
    assert_eq!(plain, " [x] \"info: done\"\n [x] \"hi\"\n [x] \"anonymous\"\n");
    let json = json.wait().success().stdout_text();
    let tagged: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let millis = &tagged["headers"]["timestamp_in_ms"];
    assert_eq!(tagged["headers"], serde_json::json!({"Host": host, "timestamp_in_ms": millis}));
    let seconds = tagged["properties"]["timestamp"].as_u64().unwrap();
    assert_eq!(millis.as_u64().unwrap() / 1000, seconds);
    assert_eq!(tagged["properties"]["app_id"], "backup");
    assert_eq!(tagged["body"], "info: done");
}

#[test]
fn each_record_of_a_batch_has_the_prefix() {
    let exchange = unique("batch");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "2", "--prefix"]).start().ready();
    let input = TempFile::with("input", b"a\nb\n");
    let emitter = emit_log().args(["-e", &exchange, "-l", "--batch", "--tag", "app"]);
    emitter.stdin(File::open(input.path()).unwrap()).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), "app [x] \"a\"\napp [x] \"b\"\n");
}

#[test]
fn an_output_named_like_a_format_is_written_with_a_note() {
    let directory = tempfile::tempdir().unwrap();
    let exchange = unique("format");
    let binary = binary("receive-logs");
    let command =
        format!("cd {:?} && exec {binary:?} -e {exchange} -n 1 -o json", directory.path());
    let receiver = Tool::new("sh").args(["-c", &command]).env("AMQP_URL", url()).start().ready();
    emit_log().args(["-e", &exchange, "hi"]).run().success();
    let stderr = receiver.wait().success().stderr_text();
    assert!(
        stderr.starts_with("receive-logs: -o names the file to write to, \"json\""),
        "{stderr}"
    );
    let written = std::fs::read_to_string(directory.path().join("json")).unwrap();
    assert_eq!(written, " [x] \"hi\"\n");
}

#[test]
fn a_dash_names_standard_output() {
    let exchange = unique("dash");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1", "-o", "-"]).start().ready();
    emit_log().args(["-e", &exchange, "hi"]).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"hi\"\n");
}

#[test]
fn a_list_of_exchanges_is_the_name_of_one() {
    let exchange = unique("a,b");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).start().ready();
    let sent = emit_log().args(["-e", &exchange, "hi"]).run().success();
    let note =
        format!("'{exchange}' is the name of one exchange: run one program for each exchange\n");
    assert_eq!(sent.stderr_text(), format!("emit-log: {note}"));
    let received = receiver.wait().success();
    assert!(received.stderr_text().contains(&format!("receive-logs: {note}")), "{received:?}");
    assert_eq!(received.stdout_text(), " [x] \"hi\"\n");
    let passive = emit_log().args(["-e", &exchange, "--passive", "hi"]).run().success();
    assert_eq!(passive.stderr_text(), "");
}

#[test]
fn options_of_other_tools_lead_to_a_tip() {
    for (args, tip) in [
        (&["--json"][..], "tip: --format json"),
        (&["-j"], "tip: --format json"),
        (&["--follow"], "tip: receive-logs waits for new messages"),
        (&["-F"], "tip: receive-logs waits for new messages"),
        (&["app.log"], "tip: --grep REGEX and --level LEVEL select records"),
        (&["--no-color"], "tip: colours are off with --color never"),
        (&["--routing-key", "error"], "tip: --bind PATTERN selects the routing keys"),
        (&["--severity", "error"], "tip: --grep REGEX and --level LEVEL select records"),
        (&["--since", "10m"], "tip: only a stream keeps"),
        (&["--tail", "5"], "tip: only a stream keeps"),
        (&["--lines", "5"], "tip: --count N"),
        (&["--host", "h"], "tip: --uri has all of these: --uri amqp://user:password@host"),
    ] {
        let ended = receive_logs().args(args).run().exits_with(2);
        let stderr = ended.stderr_text();
        assert!(stderr.contains(tip) && stderr.matches("tip:").count() == 1, "{ended:?}");
        assert!(!stderr.contains("Usage: receive-logs --no-follow"), "{ended:?}");
    }
    for (args, tip) in [
        (&["-f", "file"][..], "tip: --follow FILE publishes each line of a file as it grows"),
        (&["--file=file"], "tip: --follow FILE publishes each line of a file"),
        (&["--tail", "file"], "tip: --follow FILE publishes each line of a file"),
        (&["--stdin"], "tip: --lines publishes each line of standard input"),
        (&["--severity", "error", "hi"], "tip: write the severity into the message"),
        (&["--json", "{}"], "tip: any text is a message"),
        (&["--spool", "spool", "hi"], "tip: --lines reads the messages from standard input"),
        (&["-p", "5672", "hi"], "tip: --uri has all of these"),
    ] {
        let ended = emit_log().args(args).run().exits_with(2);
        let stderr = ended.stderr_text();
        assert!(stderr.contains(tip) && stderr.matches("tip:").count() == 1, "{ended:?}");
    }
    for host in ["broker", "broker:5672", "127.0.0.1:5672"] {
        emit_log().args(["-u", host, "hi"]).run().fails_with(2, &["--uri: ", "amqp://host"]);
        receive_logs().args(["-u", host]).run().fails_with(2, &["--uri: ", "amqp://host"]);
    }
}

#[test]
fn output_options_are_next_to_each_other() {
    let help = receive_logs().arg("-h").run().success().stdout_text();
    let place =
        |option: &str| help.find(&format!("{option} ")).unwrap_or_else(|| panic!("{option}"));
    let options =
        ["--format", "--timestamp", "--prefix", "--output", "--color", "--quiet", "--verbose"];
    assert!(options.is_sorted_by_key(|option| place(option)), "{help}");
    assert!(place("--verbose") < place("--count"), "{help}");
}
