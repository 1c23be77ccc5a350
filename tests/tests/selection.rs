//! `--grep`, `--exclude`, `--level` and `--from`.

use logs_tests::{TempFile, emit_log, rabbitmqctl, receive_logs, unique, wait_until};

const LINES: &str =
    "info: started\nerror: timeout\nGET /health\n[ERROR] refused\nwarning: slow\ndebug: timeout\n";

/// What a receiver with these options writes of [`LINES`].
fn written(emit: &[&str], options: &[&str]) -> String {
    let exchange = unique("selection");
    let receiver = receive_logs().args(["-e", &exchange, "--raw"]).args(options).start().ready();
    let all = receive_logs().args(["-e", &exchange, "--raw", "-n", "7"]).start().ready();
    let input = TempFile::with("lines", LINES.as_bytes());
    let lines = emit_log().args(["-e", &exchange, "--lines"]).args(emit);
    lines.stdin(std::fs::File::open(input.path()).unwrap()).run().success();
    emit_log().args(["-e", &exchange, "critical: end"]).run().success();
    all.wait().success();
    receiver.stop().success().stdout_text()
}

#[test]
fn records_are_selected_alone_and_in_batches() {
    for emit in [&[][..], &["--batch", "--linger", "20ms"]] {
        for (options, expected) in [
            (
                &["--grep", "timeout|refused"][..],
                "error: timeout\n[ERROR] refused\ndebug: timeout\n",
            ),
            (&["--grep", "timeout", "--exclude", "^debug"], "error: timeout\n"),
            (
                &["--exclude", "timeout", "--exclude", "(?i)get"],
                "info: started\n[ERROR] refused\nwarning: slow\ncritical: end\n",
            ),
            (&["--level", "error"], "error: timeout\n[ERROR] refused\ncritical: end\n"),
            (&["--level", "warn", "--grep", "slow|end"], "warning: slow\ncritical: end\n"),
        ] {
            assert_eq!(written(emit, options), expected, "{emit:?} {options:?}");
        }
    }
    assert_eq!(
        written(&["--tag", "web"], &["--from", "web", "--level", "error"]),
        "error: timeout\n[ERROR] refused\n"
    );
    assert_eq!(written(&["--tag", "web"], &["--from", "db"]), "");
}

#[test]
fn limits_count_written_records() {
    let exchange = unique("selection-limits");
    let options = ["-e", &exchange, "--raw", "--grep", "yes", "-n", "2"];
    let receiver = receive_logs().args(options).start().ready();
    for word in ["no", "yes 1", "no", "no", "yes 2"] {
        emit_log().args(["-e", &exchange, word]).run().success();
    }
    assert_eq!(receiver.wait().success().stdout_text(), "yes 1\nyes 2\n");

    // Records that are not selected do not count as activity.
    let options = ["-e", &exchange, "--raw", "--grep", "yes", "--idle-timeout", "2s", "-v"];
    let receiver = receive_logs().args(options).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-e", &exchange, "--lines"]).stdin(reader).start();
    let feeder = std::thread::spawn(move || {
        use std::io::Write;
        while writer.write_all(b"no\n").is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
    assert_eq!(receiver.wait().success().stdout_text(), "");
    emitter.stop();
    feeder.join().unwrap();
}

#[test]
fn records_that_are_not_selected_are_acknowledged_and_counted() {
    let (exchange, queue) = (unique("selection-queue"), unique("selection-q"));
    let options =
        ["-e", &exchange, "--queue", &queue, "--grep", "yes", "--status-interval", "100ms"];
    let receiver = receive_logs().args(options).start().ready();
    for word in ["no", "yes", "no"] {
        emit_log().args(["-e", &exchange, word]).run().success();
    }
    receiver.wait_for_stdout(b" [x] \"yes\"\n");
    receiver.wait_for_stderr("written 1, filtered 2,", 1);
    receiver.stop().success();
    wait_until("the queue is empty", || {
        let queues = rabbitmqctl(["list_queues", "name", "messages"]);
        queues.contains(&format!("{queue}\t0"))
    });
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn a_wrong_expression_shows_its_place() {
    for (option, value, part) in
        [("--grep", "a(b", "unclosed group"), ("--level", "loud", "warning")]
    {
        let stderr = receive_logs().args([option, value]).run().exits_with(2).stderr_text();
        assert!([option, value, part].iter().all(|part| stderr.contains(part)), "{stderr}");
    }
}
