//! Output to files that are rotated, limited or incomplete, and the reports of readiness.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::AmqpProperties;
use logs_tests::{
    Peer, Proxy, TempFile, Tool, binary, emit_log, project, rabbitmqctl, receive_logs, unique, url,
    wait_until,
};
use rustix::process::Signal;

fn lines(count: usize) -> Vec<u8> {
    (1..=count).flat_map(|number| format!("line {number}\n").into_bytes()).collect()
}

/// Publishes lines, a few at a time.
fn emit_slowly(exchange: &str, lines: Vec<u8>) -> logs_tests::Running {
    let (reader, mut writer) = std::io::pipe().unwrap();
    thread::spawn(move || {
        for chunk in lines.chunks(5_000) {
            writer.write_all(chunk).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
    });
    emit_log().args(["-l", "-e", exchange]).stdin(reader).start()
}

fn written(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_default()
}

#[test]
fn a_file_is_appended_to() {
    let (exchange, file) = (unique("append"), TempFile::with("all.log", b"before\n"));
    let start = || receive_logs().args(["-r", "-e", &exchange, "-o"]).arg(file.path()).start();
    for text in ["one", "two"] {
        let receiver = start().ready();
        emit_log().args(["-e", &exchange, text]).run().success();
        wait_until("the line is written", || written(file.path()).ends_with(b"\n"));
        let ended = receiver.stop().success();
        assert_eq!(ended.stdout_text(), "");
    }
    assert_eq!(written(file.path()), b"before\none\ntwo\n");
}

#[test]
fn a_file_that_cannot_be_opened_is_an_error_at_once() {
    let receiver = receive_logs().args(["-o", "/nonexistent/all.log", "-u", "amqp://127.0.0.1:1"]);
    receiver.run().fails_with(74, &["open \"/nonexistent/all.log\"", "No such file"]);
}

#[test]
fn a_record_that_a_crash_cut_short_is_ended() {
    let (exchange, file) = (unique("cut"), TempFile::with("all.log", b"line 1\nlin"));
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-o"]).arg(file.path());
    let receiver = receiver.start().ready();
    emit_log().args(["-e", &exchange, "line 3"]).run().success();
    wait_until("the line is written", || written(file.path()).ends_with(b"line 3\n"));
    let ended = receiver.stop().success();
    assert_eq!(written(file.path()), b"line 1\nlin\nline 3\n");
    assert!(ended.stderr_text().contains(" [!] "), "{ended:?}");
}

#[test]
fn logrotate_splits_no_record_and_loses_none() {
    const LINES: usize = 100_000;
    let exchange = unique("rotate");
    let (file, ready) = (TempFile::new("all.log"), TempFile::new("pid"));
    let example = fs::read_to_string(project().join("examples/logrotate.conf")).unwrap();
    let example = example.replace("/var/log/rabbit/all.log", file.path().to_str().unwrap());
    let example = example.replace("/run/receive-logs/pid", ready.path().to_str().unwrap());
    let config = TempFile::with("logrotate.conf", example.as_bytes());
    fs::set_permissions(config.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .unwrap();
    let state = TempFile::new("state");
    let rotate = || {
        let path = std::env::var("PATH").unwrap() + ":/usr/sbin";
        let tool = Tool::new("logrotate").env("PATH", path).arg("-f").arg("-s").arg(state.path());
        let ended = tool.arg(config.path()).run().success();
        assert_eq!(ended.stderr_text(), "");
    };
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-o"]).arg(file.path());
    let receiver = receiver.arg("--ready-file").arg(ready.path()).start().ready();
    let input = lines(LINES);
    let emitter = emit_slowly(&exchange, input.clone());
    for _ in 0..8 {
        wait_until("a line is written", || !written(file.path()).is_empty());
        rotate();
        wait_until("the file is reopened", || file.path().exists());
    }
    emitter.wait().success();
    let all = || {
        let rotated =
            (1..=8).rev().map(|number| file.path().with_extension(format!("log.{number}")));
        let mut all = Vec::new();
        for path in rotated {
            let zipped = path.with_extension(format!("{}.gz", path.extension().unwrap().display()));
            if zipped.exists() {
                all.extend(Command::new("gzip").arg("-dc").arg(zipped).output().unwrap().stdout);
            }
            all.extend(written(&path));
        }
        all.extend(written(file.path()));
        all
    };
    wait_until("everything is written", || all().len() >= input.len());
    receiver.stop().success();
    assert!(all() == input, "the bytes differ");
}

#[test]
fn a_file_that_cannot_be_reopened_stays_in_use() {
    let (exchange, file) = (unique("stays"), TempFile::new("all.log"));
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-o"]).arg(file.path());
    let receiver = receiver.start().ready();
    let moved = file.path().with_extension("moved");
    fs::rename(file.path(), &moved).unwrap();
    fs::create_dir(file.path()).unwrap();
    receiver.signal(Signal::HUP);
    receiver.wait_for_stderr("continuing with the file opened before", 1);
    emit_log().args(["-e", &exchange, "still here"]).run().success();
    wait_until("the line is written", || written(&moved) == b"still here\n");
    receiver.stop().success();
}

#[test]
fn a_full_output_ends_with_whole_records() {
    const LINES: usize = 20_000;
    let (queue, file) = (unique("full"), TempFile::new("all.log"));
    let options = ["-r", "-e", &queue, "--queue", &queue, "-o"];
    receive_logs().args(options).arg(file.path()).start().ready().stop().success();
    let input = TempFile::with("input", &lines(LINES));
    let input = fs::File::open(input.path()).unwrap();
    emit_log().args(["-l", "-e", &queue]).stdin(input).run().success();

    let limited = Tool::new("bash").args(["-c", "ulimit -f 100; exec \"$0\" \"$@\""]);
    let limited = limited.arg(binary("receive-logs")).env("AMQP_URL", url()).arg("-q");
    let ended = limited.args(options).arg(file.path()).run();
    ended.fails_with(74, &["write to \"/", "all.log\": File too large"]);
    let first = written(file.path());
    assert!(first.ends_with(b"\n") && first.len() > 50_000 && first.len() <= 102_400);
    assert!(lines(LINES).starts_with(&first), "whole, and in order");

    let rest = receive_logs().args(options).arg(file.path()).start().ready();
    // The order depends on when the broker detects the end of the first receiver.
    let all = || String::from_utf8(written(file.path())).unwrap();
    let distinct = || all().lines().map(String::from).collect::<BTreeSet<_>>().len();
    wait_until("everything is written", || distinct() == LINES);
    rest.stop().success();
    assert!(all().lines().count() <= LINES + 2000);
    rabbitmqctl(["delete_queue", &queue]);
}

/// Writes a queue to a file of limited size, by `-o` or as stdout. The limit grows with each run.
fn assert_a_full_file_repeats_nothing(kind: &str, redirection: &str, output: &[&str]) {
    const LINES: usize = 30_000;
    let (queue, file) = (unique("full"), TempFile::new("all.log"));
    let options = ["-r", "-e", &queue, "--queue", &queue, "--queue-type", kind];
    receive_logs().args(options).start().ready().stop().success();
    let input = TempFile::with("input", &lines(LINES));
    let input = fs::File::open(input.path()).unwrap();
    emit_log().args(["-l", "--batch", "-e", &queue]).stdin(input).run().success();
    let mut before = 0;
    for kilobytes in [100, 200, 300, 1_000_000] {
        let script = format!("ulimit -f {kilobytes}; exec \"$0\" \"$@\" {redirection}");
        let limited = Tool::new("bash").args(["-c", &script]).arg(binary("receive-logs"));
        let limited = limited.env("AMQP_URL", url()).env("OUT", file.path());
        let limited = limited.args(options).args(["--idle-timeout", "2s"]).args(output);
        let is_enough = kilobytes == 1_000_000;
        limited.args(output.first().map(|_| file.path())).run().exits_with(match is_enough {
            true => 0,
            false => 74,
        });
        let text = String::from_utf8(written(file.path())).unwrap();
        assert!(text.ends_with('\n') && text.len() > before, "{kilobytes}: {}", text.len());
        before = text.len();
        let distinct: BTreeSet<_> = text.lines().collect();
        assert_eq!(text.lines().count(), distinct.len(), "{kind}, {kilobytes}: each once");
        assert_eq!(distinct.len() == LINES, is_enough);
    }
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn complete_messages_in_a_full_file_are_not_repeated() {
    assert_a_full_file_repeats_nothing("quorum", "", &["-o"]);
    assert_a_full_file_repeats_nothing("classic", ">>\"$OUT\"", &[]);
}

#[test]
fn an_incomplete_large_message_is_removed() {
    let (queue, file) = (unique("large"), TempFile::new("all.log"));
    let options = ["-r", "-e", &queue, "--queue", &queue, "--queue-type", "classic", "-o"];
    receive_logs().args(options).arg(file.path()).start().ready().stop().success();
    let peer = Peer::connect();
    let batch = |number| {
        let id = format!("emit-log/0000000000000001/{number}");
        AmqpProperties::default().with_type_("lines".into()).with_message_id(id)
    };
    peer.publish_with(&queue, b"first\nsecond", batch(1));
    peer.publish_with(&queue, &[b'x'; 100], AmqpProperties::default());
    let body = vec!["y".repeat(999); 300].join("\n");
    peer.publish_with(&queue, body.as_bytes(), batch(3));
    let limited = Tool::new("bash").args(["-c", "ulimit -f 200; exec \"$0\" \"$@\""]);
    let limited = limited.arg(binary("receive-logs")).env("AMQP_URL", url()).arg("-v");
    let ended = limited.args(options).arg(file.path()).run().exits_with(74);
    assert!(ended.stderr_text().contains("3 messages written"), "{ended:?}");
    let small = format!("first\nsecond\n{}\n", "x".repeat(100));
    assert_eq!(written(file.path()), small.as_bytes());
    let rest = receive_logs().args(options).arg(file.path()).args(["-n", "300"]);
    rest.run().success();
    assert_eq!(String::from_utf8(written(file.path())).unwrap(), format!("{small}{body}\n"));
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn a_file_rotated_before_the_first_connection_is_reopened() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = TempFile::new("all.log");
    let uri = format!("amqp://{}", listener.local_addr().unwrap());
    let receiver = receive_logs().args(["-r", "-u", &uri, "--retry", "forever", "-o"]);
    let receiver = receiver.arg(file.path()).start();
    wait_until("the file is open", || file.path().exists());
    let (waiting, _) = listener.accept().unwrap();
    fs::rename(file.path(), file.path().with_extension("1")).unwrap();
    drop(waiting);
    let _proxy = Proxy::start_on(listener, &url());
    receiver.ready();
    assert!(file.path().exists());
}

#[test]
fn a_non_blocking_pipe_does_not_lose_output() {
    let exchange = unique("nonblocking");
    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-n", "20000"]);
    let receiver = receiver.stdout(writer).start_redirected().ready();
    let input = TempFile::with("input", &lines(20_000));
    let input = fs::File::open(input.path()).unwrap();
    emit_log().args(["-l", "-e", &exchange]).stdin(input).run().success();
    logs_tests::wait_until_full(&reader);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    receiver.wait().success();
    assert!(all == lines(20_000));
}

#[test]
fn a_full_standard_output_is_an_error() {
    let (exchange, file) = (unique("limit"), TempFile::new("out"));
    let limited = Tool::new("bash").args(["-c", "ulimit -f 1; exec \"$0\" -e \"$1\""]);
    let limited = limited.arg(binary("receive-logs")).arg(&exchange).env("AMQP_URL", url());
    let limited = limited.stdout(file.create()).start_redirected().ready();
    emit_log().args(["-e", &exchange, &"x".repeat(2000)]).run().success();
    let ended = limited.wait().exits_with(74);
    assert!(ended.stderr_text().contains("write to stdout: File too large"), "{ended:?}");
}

#[test]
fn the_ready_file_exists_while_it_runs() {
    let ready = TempFile::with("pid", b"1234567\n");
    let exchange = unique("ready");
    let receiver = receive_logs().args(["-e", &exchange, "--ready-file"]).arg(ready.path());
    let receiver = receiver.start().ready();
    let pid = String::from_utf8(ready.read().unwrap()).unwrap();
    assert!(
        fs::read_to_string(format!("/proc/{}/cmdline", pid.trim_end()))
            .unwrap()
            .contains(&exchange)
    );
    receiver.stop().success();
    assert!(!ready.path().exists());

    fs::write(ready.path(), "1234567\n").unwrap();
    let unreachable = receive_logs().args(["-u", "amqp://127.0.0.1:1", "--ready-file"]);
    unreachable.arg(ready.path()).run().exits_with(69);
    assert!(!ready.path().exists(), "it was never ready");

    let owner = receive_logs().args(["-e", &exchange, "--ready-file"]).arg(ready.path());
    let owner = owner.start().ready();
    let unreachable = receive_logs().args(["-u", "amqp://127.0.0.1:1", "--ready-file"]);
    let unreachable = unreachable.arg(ready.path()).run().exits_with(69);
    assert!(unreachable.stderr_text().contains("belongs to process"), "{unreachable:?}");
    assert_eq!(ready.read().unwrap(), format!("{}\n", owner.id()).as_bytes());
    owner.stop().success();
    // As a crash of the system may leave it.
    fs::write(ready.path(), "").unwrap();
    let receiver = receive_logs().args(["-e", &exchange, "--ready-file"]).arg(ready.path());
    receiver.start().ready().stop().success();
    let impossible = receive_logs().args(["--ready-file", "/nonexistent/pid"]).run();
    impossible.exits_with(74);
    let file = TempFile::with("all.log", b"precious\n");
    let mistaken = receive_logs().arg("--ready-file").arg(file.path()).run();
    mistaken.fails_with(74, &["create ready file", "is not a ready file"]);
    assert_eq!(file.read().unwrap(), b"precious\n");
}

#[test]
fn a_second_signal_removes_the_ready_file() {
    let ready = TempFile::new("pid");
    let exchange = unique("twice");
    let (reader, writer) = std::io::pipe().unwrap();
    let receiver = receive_logs().args(["-r", "-e", &exchange, "--ready-file"]).arg(ready.path());
    let receiver = receiver.stdout(writer).start_redirected().ready();
    // More than a pipe holds, so that the receiver cannot end by itself.
    emit_log().args(["-e", &exchange, &"x".repeat(100_000)]).run().success();
    wait_until("the receiver writes", || rustix::io::ioctl_fionread(&reader).unwrap() > 0);
    receiver.signal(Signal::TERM);
    receiver.signal(Signal::TERM);
    assert_eq!(receiver.wait().signal(), Some(Signal::TERM.as_raw()));
    assert!(!ready.path().exists());
}

#[test]
fn systemd_is_notified_of_the_state() {
    let (file, socket) = (TempFile::new("all.log"), TempFile::new("notify"));
    let manager = UnixDatagram::bind(socket.path()).unwrap();
    manager.set_read_timeout(Some(logs_tests::PATIENCE)).unwrap();
    let expect_state = |expected: &str| {
        let mut buffer = [0; 1000];
        let length = manager.recv(&mut buffer).expect(expected);
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(text.lines().any(|line| line == expected), "{expected}: {text}");
        text
    };
    let receiver = receive_logs().args(["-e", &unique("systemd"), "-o"]).arg(file.path());
    let receiver = receiver.env("NOTIFY_SOCKET", socket.path()).start();
    expect_state("READY=1");
    receiver.signal(Signal::HUP);
    assert!(expect_state("RELOADING=1").contains("MONOTONIC_USEC="));
    expect_state("READY=1");
    receiver.stop().success();
    expect_state("STOPPING=1");
}

#[test]
fn sighup_ends_a_receiver_without_output_file() {
    let receiver = receive_logs().args(["-e", &unique("hangup")]).start().ready();
    let asked = Instant::now();
    receiver.signal(Signal::HUP);
    assert_eq!(receiver.wait().signal(), Some(Signal::HUP.as_raw()));
    assert!(asked.elapsed() < Duration::from_secs(1));
}
