//! The status line of SIGUSR1 and `--status-interval`: in every state, at any time, and without losing log lines.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use logs_tests::{
    Broker, CHANNEL_OPEN, PATIENCE, Running, ScriptedBroker, TempFile, Tool, emit_log,
    receive_logs, unique, wait_until, wait_until_full,
};
use rustix::process::Signal;

/// An address without a listener.
const NO_BROKER: &str = "amqp://127.0.0.1:1";

/// Sends SIGUSR1, and returns the status line from the name `broker` on.
fn ask(running: &Running) -> String {
    let before = lines(&running.stderr_so_far()).len();
    running.signal(Signal::USR1);
    running.wait_for_stderr(": running since ", before + 1);
    let mut line = None;
    wait_until("the line is complete", || {
        line = lines(&running.stderr_so_far()).into_iter().nth(before);
        line.is_some()
    });
    line.unwrap()
}

/// Sends SIGUSR1 until the status contains a text.
fn ask_until(running: &Running, text: &str) -> String {
    let mut status = String::new();
    wait_until(&format!("the status contains {text:?}"), || {
        status = ask(running);
        status.contains(text)
    });
    status
}

/// The complete status lines, each from the name `broker` on.
fn lines(stderr: &str) -> Vec<String> {
    let whole = stderr.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(status_of).collect()
}

/// The part of a status line after the tool and its start time; `None` for any other line.
fn status_of(line: &str) -> Option<String> {
    let (tool, rest) = line.split_once(": running since ")?;
    let (since, rest) = rest.split_once(" (")?;
    let (_elapsed, rest) = rest.split_once("), ")?;
    humantime::parse_rfc3339(since).unwrap();
    assert!(tool == "emit-log" || tool == "receive-logs", "{line}");
    assert!(rest.starts_with("broker ") && rest.contains(", reconnections "), "{line}");
    Some(rest.to_string())
}

fn handles_sigusr1(running: &Running) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    let bit = 1 << (Signal::USR1.as_raw() - 1);
    u64::from_str_radix(caught.trim(), 16).unwrap() & bit != 0
}

#[test]
fn the_status_shows_the_wait_for_the_first_broker() {
    for tool in [emit_log().arg("words"), emit_log().arg("-l"), receive_logs()] {
        let mut running = tool.args(["-u", NO_BROKER, "--retry", "forever"]).start();
        running.wait_for_stderr("trying again", 1);
        for _ in 0..3 {
            let status = ask(&running);
            assert!(status.starts_with("broker none for "), "{status}");
            assert!(status.contains(" (trying until there is one), "), "{status}");
            assert!(status.ends_with(", reconnections 0"), "{status}");
        }
        assert!(running.is_running());
    }
    let emitter = emit_log().args(["-u", NO_BROKER, "--retry", "1h", "words"]).start();
    emitter.wait_for_stderr("trying again", 1);
    let status = ask(&emitter);
    assert!(status.contains(" (trying for 59m "), "{status}");
    assert!(status.ends_with("), sent 0, confirmed 0, in doubt 0, reconnections 0"), "{status}");
}

#[test]
fn a_request_at_the_start_is_answered_later() {
    let exchange = unique("early");
    let (input, writer) = std::io::pipe().unwrap();
    let ask_early = |tool: Tool| {
        let fifo = TempFile::new("fifo");
        Tool::new("mkfifo").arg(fifo.path()).run().success();
        let running = tool.args(["-e", &exchange, "--password-file"]).arg(fifo.path()).start();
        wait_until("it handles the signal", || handles_sigusr1(&running));
        running.signal(Signal::USR1);
        File::options().write(true).open(fifo.path()).unwrap().write_all(b"guest\n").unwrap();
        running.wait_for_stderr(", reconnections 0\n", 1);
        running
    };
    let emitter = ask_early(emit_log().arg("-l").stdin(input));
    ask_early(receive_logs()).ready().stop().success();
    drop(writer);
    emitter.wait().success();
}

#[test]
fn a_request_during_the_login_does_not_end_it() {
    let broker = ScriptedBroker::start();
    broker.withhold(CHANNEL_OPEN);
    let emitter = emit_log().args(["-u", &broker.url(), "-l", "--retry", "forever"]).start();
    broker.wait_for_requests(CHANNEL_OPEN, 1);
    for _ in 0..3 {
        let status = ask(&emitter);
        assert!(status.starts_with("broker none for "), "{status}");
    }
    assert_eq!(lines(&emitter.stderr_so_far()).len(), emitter.stderr_so_far().lines().count());
    assert_eq!(broker.count_requests(CHANNEL_OPEN), 1);
}

#[test]
fn the_status_shows_alarms_and_outages() {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-u", broker.url(), "-r"]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
    writer.write_all(b"one\n").unwrap();
    receiver.wait_for_stdout(b"one\n");
    let counts = "sent 1, confirmed 1, in doubt 0, reconnections 0";
    let status = ask_until(&emitter, "confirmed 1");
    let (_, place) = broker.url().split_once('@').unwrap();
    let address = format!("broker {}", place.split_once('/').unwrap().0);
    assert_eq!(status, format!("{address}, {counts}"));
    let status = ask(&receiver);
    assert_eq!(status, format!("{address}, written 1, missed 0, reconnections 0"));

    broker.ctl(["set_vm_memory_high_watermark", "0.0000001"]);
    writer.write_all(b"two\n").unwrap();
    let blocked = ask_until(&emitter, " (blocked: low on memory), ");
    assert!(blocked.contains(", sent 2, confirmed 1, in doubt 1, "), "{blocked}");
    let words = emit_log().args(["-q", "-u", broker.url(), "-e", "x", "words"]).start();
    wait_until("it handles the signal", || handles_sigusr1(&words));
    let blocked = ask_until(&words, " (blocked: low on memory), ");
    assert!(blocked.ends_with(", sent 1, confirmed 0, in doubt 1, reconnections 0"), "{blocked}");
    broker.ctl(["set_vm_memory_high_watermark", "0.6"]);
    receiver.wait_for_stdout(b"one\ntwo\n");
    words.wait().success();

    broker.kill();
    let none = ask_until(&emitter, "broker none for ");
    assert!(none.contains(" (trying for ") && none.contains(" more), sent 2, "), "{none}");
    let none = ask_until(&receiver, "broker none for ");
    assert!(none.ends_with(" (trying until there is one), written 2, missed 0, reconnections 0"));
    broker.restart();
    let again = format!("{address}, written 2, missed 0, reconnections 1");
    assert_eq!(ask_until(&receiver, "reconnections 1"), again);
    writer.write_all(b"three\n").unwrap();
    receiver.wait_for_stdout(b"one\ntwo\nthree\n");
    let again = ask_until(&emitter, "confirmed 3");
    assert_eq!(again, format!("{address}, sent 3, confirmed 3, in doubt 0, reconnections 1"));
    drop(writer);
    emitter.wait().success();
}

#[test]
fn a_receiver_whose_output_blocks_answers_at_once() {
    let exchange = unique("blocks");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let receiver = receive_logs().args(["-e", &exchange, "-r"]).stdout(writer);
    let receiver = receiver.start_redirected().ready();
    let input = TempFile::with("input", &b"line\n".repeat(100_000));
    let emitter = emit_log().args(["-e", &exchange, "-l"]);
    emitter.stdin(File::open(input.path()).unwrap()).run().success();
    let held = wait_until_full(&reader);
    let status = ask(&receiver);
    let written: u64 = value(&status, "written").parse().unwrap();
    assert!(written > 0 && 5 * written <= held, "{status}: {held} bytes");
    thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    ask_until(&receiver, ", written 100000, ");
    receiver.stop().success();
}

fn value<'a>(status: &'a str, name: &str) -> &'a str {
    let values = status.split(", ").find_map(|part| part.strip_prefix(name)?.strip_prefix(' '));
    values.unwrap_or_else(|| panic!("{name} in {status}"))
}

#[test]
fn many_requests_under_load_lose_no_line() {
    const LINES: u64 = 30_000;
    let exchange = unique("storm");
    let receiver = receive_logs().args(["-e", &exchange, "-r", "-n", &LINES.to_string()]);
    let receiver = receiver.start().ready();
    let text: String = (1..=LINES).map(|number| format!("line {number}\n")).collect();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-e", &exchange, "-l"]).stdin(reader).start();
    wait_until("it handles the signal", || handles_sigusr1(&emitter));
    let is_over = AtomicBool::new(false);
    let requests = thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut requests = 0;
            while !is_over.load(Ordering::Relaxed) {
                emitter.signal(Signal::USR1);
                receiver.signal(Signal::USR1);
                requests += 1;
                // Without a pause, the program would only handle signals.
                thread::sleep(Duration::from_micros(200));
            }
            requests
        });
        // This lasts until all lines except the last few thousand are sent to the broker.
        let written = writer.write_all(text.as_bytes());
        is_over.store(true, Ordering::Relaxed);
        written.unwrap();
        storm.join().unwrap()
    });
    drop(writer);
    let emitter = emitter.wait().success();
    let receiver = receiver.wait().success();
    assert!(receiver.stdout_text() == text, "{} bytes", receiver.stdout.len());
    for ended in [emitter, receiver] {
        let stderr = ended.stderr_text();
        let (whole, all) = (lines(&stderr).len(), stderr.lines().count());
        assert!(requests > 100 && whole > 10, "{whole} lines for {requests} requests");
        // The only other line is the banner of the receiver, so no connection was lost.
        assert!(all - whole <= 1, "{stderr}");
    }
}

#[test]
fn the_status_interval_works_with_quiet() {
    let exchange = unique("interval");
    let options = ["-q", "-e", &exchange, "--status-interval", "50ms"];
    let receiver = receive_logs().args(options).start();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().arg("-l").args(options).stdin(reader).start();
    wait_until("the receiver is ready", || receiver.stderr_so_far().contains("), broker "));
    writer.write_all(b"line\n").unwrap();
    emitter.wait_for_stderr("sent 1, confirmed 1, in doubt 0, reconnections 0\n", 3);
    let waiting = emit_log().args(["-u", NO_BROKER, "--retry", "forever", "words"]);
    let waiting = waiting.args(["-q", "--status-interval", "50ms"]).start();
    waiting.wait_for_stderr(" (trying until there is one), sent 0, ", 3);
    drop(writer);
    emitter.wait().success();
    let receiver = receiver.stop().success();
    assert!(lines(&receiver.stderr_text()).len() >= 3, "{receiver:?}");
}

/// Each write to a datagram socket is a datagram.
#[test]
fn the_status_line_is_one_write() {
    let (test, program) = UnixDatagram::pair().unwrap();
    test.set_read_timeout(Some(PATIENCE)).unwrap();
    let emitter = emit_log().args(["-q", "-u", NO_BROKER, "--retry", "forever", "words"]);
    let emitter = emitter.stderr(OwnedFd::from(program)).start();
    wait_until("it handles the signal", || handles_sigusr1(&emitter));
    emitter.signal(Signal::USR1);
    let mut buffer = [0; 10_000];
    let length = test.recv(&mut buffer).unwrap();
    let line = String::from_utf8_lossy(&buffer[..length]);
    assert!(line.ends_with(" reconnections 0\n") && status_of(line.trim_end()).is_some(), "{line}");
}

/// The value of a metric in a file.
fn metric(file: &TempFile, name: &str) -> Option<f64> {
    let text = String::from_utf8(file.read().ok()?).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("{name=\""))?;
    line.split_once("\"} ")?.1.parse().ok()
}

#[test]
fn metrics_files_have_the_counts_of_the_status() {
    let exchange = unique("metrics");
    let (sent, written) = (TempFile::new("sent.prom"), TempFile::new("written.prom"));
    let tool = |tool: Tool, file: &TempFile| {
        tool.args(["-e", &exchange, "--metrics-file"]).arg(file.path())
    };
    let receiver = tool(receive_logs().args(["-r", "--exclude", "two"]), &written).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = tool(emit_log().arg("-l").stdin(reader), &sent).start();
    writer.write_all(b"one\ntwo\nthree\n").unwrap();
    wait_until("the files are written while the tools run", || {
        metric(&sent, "emit_log_records_confirmed_total") == Some(3.0)
            && metric(&written, "receive_logs_records_written_total") == Some(2.0)
    });
    assert_eq!(metric(&sent, "emit_log_connected"), Some(1.0));
    assert_eq!(metric(&written, "receive_logs_connected"), Some(1.0));
    assert_eq!(metric(&written, "receive_logs_records_filtered_total"), Some(1.0));
    let before = metric(&written, "receive_logs_last_delivery_timestamp_seconds").unwrap();
    let begun = metric(&written, "receive_logs_start_timestamp_seconds").unwrap();
    assert!(begun > 1.7e9 && before >= begun, "{begun} {before}");

    writer.write_all(b"four\n").unwrap();
    drop(writer);
    emitter.wait().success();
    receiver.wait_for_stdout(b"one\nthree\nfour\n");
    receiver.stop().success();
    assert_eq!(metric(&sent, "emit_log_records_confirmed_total"), Some(4.0));
    assert_eq!(metric(&sent, "emit_log_connected"), Some(0.0));
    assert_eq!(metric(&written, "receive_logs_records_written_total"), Some(3.0));
    assert_eq!(metric(&written, "receive_logs_connected"), Some(0.0));
    for (file, prefix) in [(sent, "emit_log_"), (written, "receive_logs_")] {
        let text = String::from_utf8(file.read().unwrap()).unwrap();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = line.strip_prefix(prefix).unwrap().split(' ').next().unwrap();
            let page = include_str!("../../docs/monitoring.md");
            assert!(page.contains(&format!("`{name}`")), "docs/monitoring.md has no {name}");
        }
    }
}

#[test]
fn a_metrics_file_that_cannot_be_written_ends_the_tool_at_once() {
    for tool in [emit_log().arg("words"), receive_logs()] {
        let ended = tool.args(["-u", NO_BROKER, "--metrics-file", "/nonexistent/a.prom"]).run();
        ended.fails_with(74, &["write metrics file \"/nonexistent/a.prom\": No such file"]);
    }
}
