//! What people type because other tools want it so.

use std::fs::File;

use logs_tests::{TempFile, emit_log, receive_logs, unique};
use serde_json::Value;

#[test]
fn a_tag_is_the_prefix_of_what_its_program_sends() {
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
    assert_eq!(tagged["headers"], serde_json::json!({"Host": host}));
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
